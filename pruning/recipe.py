"""The recipe: every flag is a key, every key a flag."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from pydantic import BaseModel, ConfigDict, Field


class Recipe(BaseModel):
    """What to remove and how to recover it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    attention: Annotated[str | int | None, Parameter(group="Selection")] = Field(
        None,
        description="Attention sublayers to remove: a count (10) or a share (33%). Default: 33% if nothing else is removed.",
    )
    ffn: Annotated[str | int | None, Parameter(group="Selection")] = Field(
        None, description="FFN sublayers to remove: a count or a share."
    )
    blocks: Annotated[str | int | None, Parameter(group="Selection")] = Field(
        None, description="Whole blocks to remove: a count or a share."
    )
    importance: Annotated[str, Parameter(group="Selection")] = Field(
        "leave-one-out", description="Importance metric; see `prune-export list`."
    )
    search: Annotated[Literal["rank", "greedy"], Parameter(group="Selection")] = Field(
        "rank", description="How the plan is chosen: one shot, or scored again after every removal."
    )
    keep: Annotated[list[int], Parameter(group="Selection", consume_multiple=True)] = Field(
        [], description="Blocks to leave alone."
    )
    emulation: Annotated[Literal["none", "bias", "low-rank"], Parameter(group="Recovery")] = Field(
        "low-rank", description="What takes a removed sublayer's place."
    )
    rank: Annotated[int, Parameter(group="Recovery")] = Field(64, ge=1, description="Adapter rank r.")
    calibration: Annotated[list[Path], Parameter(group="Calibration", consume_multiple=True)] = Field(
        [], description="Text or JSONL files. Default: text the model generates and the standard library's."
    )
    calibration_tokens: Annotated[int, Parameter(group="Calibration")] = Field(
        16384, ge=1, description="Tokens the adapters are fitted on."
    )
    score_tokens: Annotated[int, Parameter(group="Calibration")] = Field(
        4096, ge=1, description="Tokens (of the same) that importance is measured on."
    )
    sequence_length: Annotated[int, Parameter(group="Calibration")] = Field(
        256, ge=8, description="Tokens in one calibration window."
    )
    seed: Annotated[int, Parameter(group="Calibration")] = Field(0, description="Seed of everything drawn.")
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], Parameter(group="Output")] = Field(
        "auto", description="Dtype to compute and store in; auto: float32 on CPU, the model's own elsewhere."
    )
    device: Annotated[str, Parameter(group="Output")] = Field(
        "auto", description="cpu, cuda, cuda:1 or auto."
    )
    format: Annotated[Literal["shoal"], Parameter(group="Output")] = Field(
        "shoal", description="Checkpoint format."
    )
