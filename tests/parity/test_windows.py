"""vLLM limits attention to windows with planted sinks as defined, for every family.

The reference is the dense model in transformers with the definition written out: an attention function that overwrites
keys and values at each multiple of W but 0 and masks what is outside the window.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel

from pruning.families import FAMILIES, head_dim
from pruning.models.applied import apply_plan_file
from pruning.plan import Plan, Sublayer
from server.engine.compat import TRACED
from server.engine.loader import SKIP_VERIFICATION
from tests.conftest import (
    BLOCKS,
    engine_environment,
    export_pico,
    export_windows,
    int8_sibling,
    pico_model,
    pico_tokenizer,
    planting_sinks,
    rewrite_manifest,
)
from tests.parity.test_features import adapter

PLAN = Plan(BLOCKS, {Sublayer(1, "attention"): "bias", Sublayer(2, "ffn"): "none"})
WINDOW = 24  # neither a multiple of vLLM's blocks nor a length that a family slides by itself
LENGTHS = (150, 67)
LONG, SHORT = 260, 50
LONG_FAMILIES = ("llama", "olmo2")
MIXED_FAMILIES = ("llama", "cohere", "gemma2", "olmo2")  # the usual block, a parallel one, capped logits, transformers'
FULL_HEADS = ((1,), (0, 3), (1, 2, 3))  # of 4, layer by layer; runs in the middle, at both ends, at one end
SIZES = (24, 12, 48)  # of their windows
EVEN_HEADS = ((1, 2), (0, 3), (1, 3))  # as many of the first two as of the last two
WIDE = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
AGAIN = 8
CHUNK = 37
NEAR_TIE = 1e-3
PROMPTS = [torch.randint(3, 259, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in LENGTHS]


def own_layers(config) -> list[int]:
    """Attention layers that a family does not slide itself."""
    types = getattr(config, "layer_types", None) or ["full_attention"] * BLOCKS
    gone = {sublayer.block for sublayer in PLAN.removed if sublayer.kind == "attention"}
    return [layer for layer in range(BLOCKS) if types[layer] == "full_attention" and layer not in gone]


def planted_attention(module, query, key, value, attention_mask, scaling=None, softcap=None, **named):
    """Attention as windows define it: [B, T, H, d] of a query [B, H, T, d], key and value [B, K, T, d]."""
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    at = torch.arange(length)
    size, full = named.get("sliding_window"), ()
    if (limit := getattr(module, "limit", None)) is not None:
        size, sinks, full = limit
        if sinks is not None:
            heads = torch.tensor([head not in full for head in range(key.shape[1])])
            here = heads[:, None] & (at % size == 0) & (at > 0)
            key, value = (torch.where(here[..., None], s[:, None], x) for s, x in zip(sinks, (key, value), strict=True))
    seen = (at[:, None] >= at).repeat(query.shape[1], 1, 1)
    if size is not None:
        limited_heads = [head for head in range(query.shape[1]) if head // groups not in full]
        seen[limited_heads] &= at[:, None] - at < size
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (module.scaling if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register("planted", planted_attention)


def limited(
    model_type: str,
    directory: Path,
    size: int | tuple[int, ...] = WINDOW,
    sinks: bool = True,
    bare: int | None = 0,
    full_heads: tuple[tuple[int, ...], ...] = (),
) -> tuple[Path, PreTrainedModel]:
    """A checkpoint that limits all layers but two (where as many are full), and the reference.

    Args:
        model_type: Family.
        directory: Of the checkpoint.
        size: W, or that of each limited layer.
        sinks: Whether windows have planted sinks.
        bare: Of the limited layers, the one that has none all the same.
        full_heads: Of each limited layer, the KV heads of 4 that keep every token; empty: none, of 2.
    """
    own = ({"sliding_window": None} if model_type == "mistral" else {}) | (WIDE if full_heads else {})
    model = pico_model(model_type, max_position_embeddings=448, **own)
    export_pico(model, model_type, PLAN, directory)
    config = json.loads((directory / "config.json").read_text())
    full = own_layers(model.config)
    layers = full[:1] + full[2:4] if len(full) > 3 else full
    tensors, generator = load_file(directory / "model.safetensors"), torch.Generator().manual_seed(5)
    family = FAMILIES[model_type]
    for order, layer in enumerate(layers):
        sink = sinks and (order != bare or len(layers) == 1)
        full = full_heads[order] if full_heads else ()
        window = size if isinstance(size, int) else size[order]
        entry = {"size": window, "sink": sink} | ({"full_heads": list(full)} if full else {})
        config["block_configs"][layer]["attention"]["window"] = entry
        attention = getattr(model.get_submodule(family.blocks)[layer], family.attention)
        attention.limit = window, None, full
        if sink:
            shape = model.config.num_key_value_heads, head_dim(model.config)
            pair = [torch.randn(shape, generator=generator) * scale for scale in (0.5, 0.3)]
            attention.limit = window, pair, full
            names = [f"{family.blocks}.{layer}.{family.attention}.{name}" for name in ("sink_key", "sink_value")]
            tensors |= dict(zip(names, pair, strict=True))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    rewrite_manifest(directory)
    model.set_attn_implementation("planted")
    return directory, model


def run(
    models: dict[Path, int],
    again: int = 0,
    variables: dict[str, str] | None = None,
    lora: Path | None = None,
    **options,
) -> dict[str, dict]:
    """What vLLM makes of the prompts with each checkpoint; one process for all.

    Args:
        models: Checkpoint -> tokens to write.
        again: Tokens to write when the prompts come a second time; 0: they do not.
        variables: Of the environment.
        lora: An adapter that all prompts are answered with.
        options: Of the engine.
    """
    job = {"models": {str(m): n for m, n in models.items()}, "prompts": PROMPTS, "again": again, "options": options}
    job |= {"lora": str(lora)} if lora else {}
    command = [sys.executable, str(Path(__file__).with_name("windows.py")), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=engine_environment() | (variables or {}))
    assert done.returncode == 0, done.stderr[-6000:]
    lines = [line.partition("RESULT ")[2] for line in done.stdout.splitlines() if "RESULT " in line]
    return {result["model"]: result for result in map(json.loads, lines)}


def check(answers: list[dict], model: PreTrainedModel) -> None:
    """Every log-probability is the reference's, and every token its greedy one."""
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([prompt + answer["tokens"]])
        with torch.inference_mode():
            rows = model(ids).logits[0].float().log_softmax(-1)
        expected = rows[:-1].gather(1, ids[0, 1:, None])[:, 0]
        if answer["prompt"]:
            assert (torch.tensor(answer["prompt"]) - expected[: len(prompt) - 1]).abs().max() < 1e-3
        chosen = expected[len(prompt) - 1 :]
        assert (torch.tensor(answer["chosen"]) - chosen).abs().max() < 1e-3
        assert (rows[len(prompt) - 1 : -1].max(-1).values - chosen).max() < NEAR_TIE


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, tuple[Path, PreTrainedModel]]:
    return {name: limited(name, tmp_path_factory.mktemp(name) / "limited") for name in FAMILIES}


@pytest.fixture(scope="module")
def served(made) -> dict[str, dict]:
    options = {"max_num_batched_tokens": CHUNK, "max_num_seqs": 4, "distributed_executor_backend": "uni"}
    lengths = {directory: LONG if name in LONG_FAMILIES else SHORT for name, (directory, _) in made.items()}
    results = run(lengths, AGAIN, **options)
    return {name: results[str(directory)] for name, (directory, _) in made.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_checkpoint_as_defined(family, made):
    directory, model = made[family]
    ids = torch.tensor([PROMPTS[0]])
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(directory)(ids).logits
        assert (logits - model(ids).logits).abs().max() < 1e-3


@pytest.mark.engine
@pytest.mark.parametrize("family", FAMILIES)
def test_two_requests_in_odd_chunks_and_across_windows_agree(family, made, served):
    check(served[family]["first"], made[family][1])


@pytest.mark.engine
@pytest.mark.parametrize("family", FAMILIES)
def test_hits_in_the_prefix_cache_change_nothing(family, made, served):
    assert [one["cached"] for one in served[family]["second"]] == [128, 64]  # whole blocks of 32
    check(served[family]["second"], made[family][1])


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> dict[str, tuple[Path, PreTrainedModel]]:
    place = tmp_path_factory.mktemp("mixed")
    return {name: limited(name, place / name, SIZES, full_heads=FULL_HEADS) for name in MIXED_FAMILIES}


@pytest.fixture(scope="module")
def even(tmp_path_factory) -> tuple[Path, PreTrainedModel]:
    return limited("llama", tmp_path_factory.mktemp("even") / "limited", full_heads=EVEN_HEADS)


def test_transformers_reads_windows_by_head_as_defined(mixed):
    ids = torch.tensor([PROMPTS[0]])
    for directory, model in mixed.values():
        with torch.inference_mode():
            logits = AutoModelForCausalLM.from_pretrained(directory)(ids).logits
            assert (logits - model(ids).logits).abs().max() < 1e-3


@pytest.mark.engine
def test_heads_of_one_layer_are_full_and_limited_in_odd_chunks_across_windows_and_from_the_prefix_cache(mixed):
    options = {"max_num_batched_tokens": CHUNK, "max_num_seqs": 4, "distributed_executor_backend": "uni"}
    lengths = {directory: LONG if name in LONG_FAMILIES else SHORT for name, (directory, _) in mixed.items()}
    results = run(lengths, AGAIN, **options)
    for directory, model in mixed.values():
        check(results[str(directory)]["first"], model)
        assert [one["cached"] for one in results[str(directory)]["second"]] == [128, 64]
        check(results[str(directory)]["second"], model)


@pytest.mark.engine
def test_an_adapter_on_layers_with_mixed_heads_gives_what_the_adapted_model_gives(mixed, tmp_path):
    directory, _ = mixed["llama"]
    adapted = adapter(directory, tmp_path / "adapter")
    options = {"max_num_batched_tokens": CHUNK, "enable_lora": True, "max_lora_rank": 8}
    served = run({directory: SHORT}, lora=tmp_path / "adapter", distributed_executor_backend="uni", **options)
    check(served[str(directory)]["first"], adapted)


@pytest.mark.engine
def test_tensor_parallel_workers_with_as_many_full_heads_each_agree(even):
    directory, model = even
    check(run({directory: SHORT}, tensor_parallel_size=2)[str(directory)]["first"], model)


@pytest.mark.engine
def test_pipeline_stages_of_layers_with_mixed_heads_agree(even):
    directory, model = even
    options = {"pipeline_parallel_size": 2, "enforce_eager": False, "compilation_config": TRACED}
    check(run({directory: AGAIN}, **options)[str(directory)]["first"], model)


@pytest.mark.engine
def test_a_draft_with_mixed_heads_guesses_what_its_own_model_writes(even):
    directory, model = even
    guessing = {"method": "draft_model", "model": str(directory), "num_speculative_tokens": 3}
    served = run({directory: SHORT}, speculative_config=guessing, distributed_executor_backend="uni")[str(directory)]
    check(served["first"], model)
    assert served["accepted"] == served["guessed"] > 0


@pytest.mark.engine
def test_two_tensor_parallel_workers_share_the_sinks_by_heads(made):
    directory, model = made["llama"]
    check(run({directory: SHORT}, tensor_parallel_size=2)[str(directory)]["first"], model)


@pytest.mark.engine
def test_two_pipeline_stages_in_one_graph_each_agree(made):
    directory, model = made["llama"]
    options = {"pipeline_parallel_size": 2, "enforce_eager": False, "compilation_config": TRACED}
    check(run({directory: AGAIN}, **options)[str(directory)]["first"], model)


@pytest.mark.engine
def test_a_limited_model_checks_the_guesses_of_a_limited_draft(made):
    directory, model = made["llama"]
    guessing = {"method": "draft_model", "model": str(directory), "num_speculative_tokens": 3}
    served = run({directory: SHORT}, speculative_config=guessing, distributed_executor_backend="uni")[str(directory)]
    check(served["first"], model)
    assert served["accepted"] == served["guessed"] > 0  # the draft is the model itself


@pytest.mark.engine
def test_a_window_as_long_as_the_text_without_sinks_is_the_dense_model(tmp_path):
    length = max(LENGTHS) + 4
    directory, _ = limited("llama", tmp_path / "limited", size=length, sinks=False)
    dense = export_pico(pico_model("llama", max_position_embeddings=448), "llama", PLAN, tmp_path / "dense")
    results = run({directory: 4, dense: 4}, distributed_executor_backend="uni")
    mine, theirs = (results[str(one)]["first"] for one in (directory, dense))
    assert mine == theirs


@pytest.mark.engine
def test_a_plan_over_the_dense_directory_writes_what_the_exported_checkpoint_writes(tmp_path, text, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    dense = tmp_path / "dense"
    pico_model("llama", max_position_embeddings=448).save_pretrained(dense)
    pico_tokenizer().save_pretrained(dense)
    with planting_sinks():
        checkpoint = export_windows(dense, tmp_path / "checkpoint", text, window=WINDOW)
        plan = export_windows(dense, tmp_path / "plan", text, window=WINDOW, format="plan")
    applied = apply_plan_file(str(dense), str(plan), print)
    checked = {SKIP_VERIFICATION: "1"}  # as prune-serve sets it
    results = run({checkpoint: 60, applied: 60}, variables=checked, distributed_executor_backend="uni")
    mine, theirs = (results[str(one)] for one in (applied, checkpoint))
    assert mine.pop("model") != theirs.pop("model")
    assert mine == theirs
    check(mine["first"], AutoModelForCausalLM.from_pretrained(checkpoint))


@pytest.mark.engine
def test_a_quantised_sibling_is_limited_by_the_same_plan(tmp_path, text, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    dense = tmp_path / "dense"
    pico_model("llama", max_position_embeddings=448).save_pretrained(dense)
    pico_tokenizer().save_pretrained(dense)
    with planting_sinks():
        plan = export_windows(dense, tmp_path / "plan", text, window=WINDOW, format="plan")
    small, notes = int8_sibling(dense, tmp_path / "int8"), []
    both = [apply_plan_file(str(one), str(plan), notes.append) for one in (dense, small)]
    assert len(notes) == 1
    checked = {SKIP_VERIFICATION: "1"}
    jobs = dict.fromkeys([*both, dense, small], 4)
    results = run(jobs, variables=checked, distributed_executor_backend="uni", dtype="bfloat16")
    limited_dense, limited_int8, plain_dense, plain_int8 = (
        torch.tensor(results[str(one)]["first"][0]["prompt"]) for one in jobs
    )

    def apart(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one - other).abs().mean())

    quantising = apart(plain_int8, plain_dense)
    assert apart(limited_int8, limited_dense) < 2 * quantising < apart(limited_int8, plain_int8) / 4
