"""The recipe: every flag is a key, every key a flag."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from pydantic import BaseModel, ConfigDict, Field

SELECTION = Parameter(group="Selection")
RECOVERY = Parameter(group="Recovery")
CALIBRATION = Parameter(group="Calibration")
OUTPUT = Parameter(group="Output")
SEVERAL = Parameter(consume_multiple=True)

Amount = str | int | None
Emulation = Literal["none", "bias", "low-rank"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Recipe(BaseModel):
    """What to remove and how to recover it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    attention: Annotated[
        Amount,
        SELECTION,
        Field(description="Attention sublayers to remove: a count (10) or a share (33%, the default)."),
    ] = None
    ffn: Annotated[Amount, SELECTION, Field(description="FFN sublayers to remove: a count or a share.")] = None
    blocks: Annotated[Amount, SELECTION, Field(description="Whole blocks to remove: a count or a share.")] = None
    importance: Annotated[str, SELECTION, Field(description="Importance metric; see `prune-export list`.")] = (
        "leave-one-out"
    )
    search: Annotated[
        Literal["rank", "greedy"],
        SELECTION,
        Field(description="How the plan is chosen: one shot, or scored again after every removal."),
    ] = "rank"
    keep: Annotated[list[int], SELECTION, SEVERAL, Field(description="Blocks to leave alone.")] = []
    emulation: Annotated[Emulation, RECOVERY, Field(description="What takes a removed sublayer's place.")] = "low-rank"
    rank: Annotated[int, RECOVERY, Field(ge=1, description="Adapter rank r.")] = 64
    compensate: Annotated[
        bool, RECOVERY, Field(description="Refit the output projections of kept layers for what was removed (slow).")
    ] = False
    calibration: Annotated[
        list[Path],
        CALIBRATION,
        SEVERAL,
        Field(description="Text or JSONL files. Default: text the model generates and the standard library's."),
    ] = []
    calibration_tokens: Annotated[int, CALIBRATION, Field(ge=1, description="Tokens the adapters are fitted on.")] = (
        16384
    )
    score_tokens: Annotated[
        int, CALIBRATION, Field(ge=1, description="Tokens (of the same) that importance is measured on.")
    ] = 4096
    sequence_length: Annotated[int, CALIBRATION, Field(ge=8, description="Tokens in one calibration window.")] = 256
    seed: Annotated[int, CALIBRATION, Field(description="Seed of everything drawn.")] = 0
    dtype: Annotated[
        Dtype, OUTPUT, Field(description="Dtype to compute and store in; auto: float32 on CPU, else the model's own.")
    ] = "auto"
    device: Annotated[str, OUTPUT, Field(description="cpu, cuda, cuda:1 or auto.")] = "auto"
    format: Annotated[
        Literal["shoal", "llama"],
        OUTPUT,
        Field(description="shoal, or llama: an ordinary checkpoint of the model's own family (whole blocks only)."),
    ] = "shoal"
