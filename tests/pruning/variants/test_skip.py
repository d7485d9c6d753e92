"""FFNs that tokens skip: none skipped is the dense model, all skipped is a constant, the rate is what was asked for."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from pruning.console import Reporter
from pruning.families import FAMILIES
from pruning.forward.evaluator import Evaluator
from pruning.models.checkpoint import verify
from pruning.models.modeling import blocks_of
from pruning.models.surgery import apply_plan
from pruning.plan import FIRST_TOKENS, Plan, Sublayer
from pruning.recovery.emulation import recover
from pruning.search.skips import chosen, cost, predicted
from pruning.variants.bias import BiasEmulation
from pruning.variants.skip import Skip, counting
from tests.conftest import BLOCKS, check_exported_equals_masked, pico_model, tokens
from tests.conftest import run_prune_export as run

HAVE_IT = ["llama", "phi3", "granite", "stablelm", "cohere"]
QUICK = ["--calibration-tokens", "1024", "--sequence-length", "32"]
BLOCK = Sublayer(2, "ffn")


def skip(threshold: float, first: int = 0) -> Skip:
    """A random predictor, a random constant, and a map of zeros."""
    generator = torch.Generator().manual_seed(3)
    made = Skip(128, threshold, 2, first)
    for parameter in (made.skip_weight, made.skip_update):
        parameter.data = torch.randn(128, generator=generator)
    return made.requires_grad_(False)


def evaluator_of(model_type: str, rows: int = 8) -> Evaluator:
    return Evaluator(pico_model(model_type), FAMILIES[model_type], tokens(rows))


@pytest.mark.parametrize("model_type", HAVE_IT)
def test_where_nothing_is_skipped_the_model_is_the_dense_one(model_type):
    evaluator = evaluator_of(model_type)
    assert torch.equal(evaluator.loss({BLOCK: skip(-1e9)}), evaluator.loss({}))


@pytest.mark.parametrize("model_type", HAVE_IT)
def test_where_all_is_skipped_a_constant_takes_the_place_of_the_ffn(model_type):
    evaluator, every = evaluator_of(model_type), skip(1e9)
    bias = BiasEmulation(128)
    bias.bias.data = every.skip_update.data
    torch.testing.assert_close(evaluator.loss({BLOCK: every}), evaluator.loss({BLOCK: bias}))


def test_first_tokens_skip_nothing_at_their_own_positions():
    model, family = pico_model("llama"), FAMILIES["llama"]
    every, ids = skip(1e9, first=5), tokens(2, 20)
    apply_plan(model, family, Plan(BLOCKS, {BLOCK: "skip"}), {BLOCK: every})
    with torch.inference_mode(), counting({BLOCK: every}, BLOCKS) as rates:
        model(ids)
    assert rates["blocks"] == {"2": 15 / 20}
    with torch.inference_mode(), counting({BLOCK: every}, BLOCKS) as rates:
        cache = model(ids[:, :7], use_cache=True).past_key_values
        model(ids[:, 7:], past_key_values=cache)
    assert every.seen == 40
    assert every.skipped == 30
    with torch.inference_mode():
        padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), ids], 1)
        mask = torch.cat([torch.zeros(2, 3, dtype=torch.int64), torch.ones_like(ids)], 1)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        left = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
        torch.testing.assert_close(left, model(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model_type", HAVE_IT)
@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_as_many_runs_are_skipped_as_were_asked_for(model_type, rate):
    evaluator = evaluator_of(model_type)
    found = predicted(evaluator, range(1, BLOCKS - 1), 4, 0, Reporter())
    runs = round(rate * BLOCKS * 8 * 48)
    shares = chosen(found, runs)
    assert sum(share.tokens for share in shares.values()) == runs
    removed = dict.fromkeys(shares, "skip")
    emulations = recover(evaluator, removed, 0, Reporter(), compensated=False, prepared=shares).emulations
    with counting(emulations, BLOCKS) as rates:
        after = evaluator.loss(emulations)
    assert rates["share"] * BLOCKS * 8 * 48 == pytest.approx(runs, abs=len(shares))
    assert {int(block) for block in rates["blocks"]} <= set(range(1, BLOCKS - 1))
    assert torch.isfinite(after).all()


def test_the_least_predicted_cost_is_skipped_first():
    found = predicted(evaluator_of("llama"), [1, 2], 4, 0, Reporter())
    assert all(len(each.costs) == 8 * (48 - FIRST_TOKENS) for each in found.values())
    costs = torch.cat([each.costs for each in found.values()])
    assert cost(found, 10) == pytest.approx(float(costs.sort().values[:10].sum()) / (8 * 44))
    shares = chosen(found, 100)
    most = costs.sort().values[99]
    assert {s: share.tokens for s, share in shares.items()} == {
        s: int((each.costs <= most).sum()) for s, each in found.items() if (each.costs <= most).any()
    }


def test_what_is_predicted_cheap_costs_less_than_what_is_predicted_dear():
    evaluator = evaluator_of("llama", 32)
    found = predicted(evaluator, [2], 4, 0, Reporter())[BLOCK]
    assert 0 < found.explained < 1
    cheap, dear = skip(0.0, FIRST_TOKENS), skip(0.0, FIRST_TOKENS)
    middle = None
    for made, sign in ((cheap, 1), (dear, -1)):
        made.skip_weight.data = sign * found.weight.float()
        made.skip_update.data.zero_()
        if middle is None:
            seen: list[torch.Tensor] = []
            ffn = evaluator.blocks[2].mlp
            handle = ffn.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
            evaluator.loss({})
            handle.remove()
            middle = float((torch.cat([x.flatten(0, 1) for x in seen]) @ found.weight.float()).median())
        made.threshold = sign * middle
    lost = evaluator.values([{}, {BLOCK: cheap}, {BLOCK: dear}], "kl").mean(1)
    assert lost[1] < lost[2]


@pytest.mark.parametrize("model_type", ["llama", "cohere"])
def test_a_checkpoint_computes_what_was_fitted(model_type, pico_directory, text, tmp_path, monkeypatch, capsys):
    dense, output = pico_directory(model_type), tmp_path / "skip"
    assert run(monkeypatch, dense, "--output", output, "--calibration", text, "--ffn-skip", "25%", *QUICK) == 0
    assert "FFN runs skipped on the same rows" in capsys.readouterr().err
    manifest, config = verify(output), json.loads((output / "config.json").read_text())
    assert set(manifest.removed.values()) == {"skip"}
    assert 0.1 < manifest.quality["ffn_skipped"]["share"] < 0.4
    entries = {b: each["ffn"]["skip"] for b, each in enumerate(config["block_configs"]) if "skip" in each["ffn"]}
    assert {f"ffn.{block}" for block in entries} == set(manifest.removed)
    assert all(entry["first"] == FIRST_TOKENS for entry in entries.values())
    model = AutoModelForCausalLM.from_pretrained(output)
    assert manifest.sizes["weights"] == sum(parameter.nbytes for parameter in model.parameters())
    for block in entries:
        assert bool(blocks_of(model, FAMILIES[model_type])[block].mlp.skip_weight.any())
    ids = tokens(4)
    masked = Evaluator(model, FAMILIES[model_type], ids).loss({})
    check_exported_equals_masked(model, ids, masked, 2)
    card = (output / "README.md").read_text()
    assert f"{len(entries)} skipped by some tokens" in card
    assert "of all FFN runs are skipped" in card
    assert (output / "model-base.safetensors").read_bytes() == (dense / "model.safetensors").read_bytes()
    assert run(monkeypatch, "convert", output, "--to", "plan", "--output", tmp_path / "plan") == 0
    assert run(monkeypatch, output, "--output", tmp_path / "again", "--attention", "1") == 2
    assert "holds the skipped FFN of ffn." in capsys.readouterr().err


def test_it_goes_beside_windows(pico_directory, text, tmp_path, monkeypatch, capsys):
    wanted = ["--kv-budget", "60%", "--context", "128", "--calibration", text, "--ffn-skip", "20%", "--codes", "0"]
    assert run(monkeypatch, pico_directory("llama"), "--output", tmp_path / "o", *wanted, *QUICK) == 0
    manifest = verify(tmp_path / "o")
    assert set(manifest.removed.values()) == {"window", "skip"}
    assert 0.1 < manifest.quality["ffn_skipped"]["share"] < 0.3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    ids = tokens(2, 100)
    check_exported_equals_masked(model, ids, Evaluator(model, FAMILIES["llama"], ids).loss({}), 2)
    assert "--emulation window" in (tmp_path / "o/README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--emulation", "skip"], "error: --emulation skip needs --ffn-skip, such as 25%"),
        (["--ffn-skip", "25%", "--ffn", "2"], "asks for low-rank; leave it out"),
        (["--ffn-skip", "25%", "--emulation", "skip", "--kv-budget", "50%"], "leave --kv-budget out"),
        (["--ffn-skip", "25%", "--emulation", "window", "--max-loss-increase", "0.1"], "leave --max-loss-increase out"),
        (["--ffn-skip", "25%", "--heal", "lora"], "leave --heal lora out"),
        (["--ffn-skip", "25%", "--stream"], "leave --stream out"),
        (["--ffn-skip", "25%", "--emulation", "skip", "--compensate"], "leave --compensate out"),
        (["--ffn-skip", "25"], "is not a share such as 66%"),
        (["--ffn-skip", "90%"], "--ffn-skip 90% is out of reach"),
    ],
)
def test_what_contradicts_it_is_refused_in_one_line(flags, message, pico_directory, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, pico_directory("llama"), "--output", tmp_path / "o", *flags) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("model_type", "message"),
    [("mixtral", "has experts"), ("qwen3_moe", "has experts"), ("gemma2", "norm after each FFN"),
     ("gemma3_text", "norm after each FFN"), ("olmo2", "norm after each FFN")],
)  # fmt: skip
def test_families_that_cannot_have_it_are_refused(model_type, message, pico_directory, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, pico_directory(model_type), "--output", tmp_path / "o", "--ffn-skip", "25%") == 2
    assert message in capsys.readouterr().err


def test_formats_that_cannot_hold_it_say_so(pico_directory, tmp_path, monkeypatch, capsys):
    wanted = ["--output", tmp_path / "o", "--ffn-skip", "25%", "--emulation", "skip", "--format", "nemotron-nas"]
    assert run(monkeypatch, pico_directory("llama"), *wanted) == 2
    assert "--format nemotron-nas holds no" in capsys.readouterr().err
