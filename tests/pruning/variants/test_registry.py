"""A kind of variant is two files: here they are written, registered, and carried through everything."""

import json
import textwrap
from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM

from pruning import variants
from pruning.console import Reporter
from pruning.errors import CheckpointError, RecipeError
from pruning.export.formats import FORMATS, PrunedModel
from pruning.families import FAMILIES
from pruning.forward.evaluator import Evaluator
from pruning.models.checkpoint import verify
from pruning.models.loading import load_dense
from pruning.models.sizes import predicted_bytes, weight_bytes
from pruning.plan import Plan, Sublayer
from pruning.recovery.emulation import fit_candidates, fit_plan
from tests.conftest import BLOCKS, check_exported_equals_masked, export_pico, tokens
from tests.conftest import run_prune_export as run

OFFLINE = '''
"""`diagonal`: every channel of the normalised stream by a factor of its own, and a constant."""

import torch
from torch import nn

from pruning.errors import RecipeError
from pruning.variants.base import Emulation, Variant
from pruning.variants.low_rank import moments_of
from pruning.variants.taps import rms_normalise


class DiagonalEmulation(Emulation):
    def __init__(self, hidden_size):
        super().__init__()
        self.factor = nn.Parameter(torch.zeros(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden):
        return rms_normalise(hidden) * self.factor + self.bias

    def describe(self):
        return {"kind": "diagonal"}


class Diagonal(Variant):
    title = "the diagonal adapter"
    way_out = "goes no further; use --format shoal"

    def check(self, family, config):
        if family.parallel:
            raise RecipeError("--emulation diagonal is for blocks one after the other")

    def fit(self, job):
        module = DiagonalEmulation(job.inputs[0].shape[-1])
        scale = job.evaluator.family.scale(job.evaluator.model.config)
        read = torch.cat([rms_normalise(x).flatten(0, 1) for x in job.inputs]).double()
        update = torch.cat([((y - x) / scale).flatten(0, 1) for x, y in zip(job.inputs, job.targets)]).double()
        mean, aim = read.mean(0), update.mean(0)
        factor = ((read - mean) * (update - aim)).mean(0) / (read - mean).square().mean(0)
        module.factor.data, module.bias.data = factor.float(), (aim - factor * mean).float()
        return module.requires_grad_(False)

    def build(self, entry, own, config, output):
        return DiagonalEmulation(config.hidden_size)

    def weight_bytes(self, shape):
        return 2 * shape.hidden_size * shape.dtype_bytes


DIAGONAL = Diagonal()
'''

SERVED = '''
"""`diagonal` in vLLM."""

import torch
from torch import nn

from server.engine.variants.interface import Emulation, StandInVariant


class Diagonal(Emulation):
    def __init__(self, hidden_size):
        super().__init__()
        self.hidden_size = hidden_size
        self.factor = nn.Parameter(torch.zeros(hidden_size), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(hidden_size), requires_grad=False)

    def forward(self, hidden, positions=None):
        return hidden * self.factor + self.bias


VARIANT = StandInVariant(lambda spec, hidden_size, fused: Diagonal(hidden_size))
'''

SOME = {Sublayer(2, "attention"): "diagonal", Sublayer(3, "ffn"): "diagonal", Sublayer(4, "attention"): "diagonal"}
PLAN = Plan(BLOCKS, SOME)
QUICK = ["--calibration-tokens", "256", "--score-tokens", "128", "--sequence-length", "32", "--dtype", "float32"]


@pytest.fixture
def files(tmp_path, monkeypatch) -> None:
    """The two files, where Python finds them."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files/diagonal_offline.py").write_text(textwrap.dedent(OFFLINE))
    (tmp_path / "files/diagonal_served.py").write_text(textwrap.dedent(SERVED))
    monkeypatch.syspath_prepend(str(tmp_path / "files"))


@pytest.fixture
def diagonal(files) -> Iterator[None]:
    """The kind, known offline."""
    variants.add("diagonal", variants.Row("diagonal_offline:DIAGONAL", "a factor a channel", "a test", "diagonal"))
    yield
    del variants.VARIANTS["diagonal"]


def test_the_exported_model_computes_what_was_measured_and_weighs_what_was_predicted(diagonal, pico, tmp_path):
    model, family, ids = pico("llama"), FAMILIES["llama"], tokens(4, 40, seed=7)
    evaluator = Evaluator(model, family, tokens())
    emulations = fit_plan(evaluator, PLAN.removed, 0, Reporter())
    judging = Evaluator(model, family, ids)
    masked = judging.loss(emulations)
    with_it, without = judging.values([emulations, dict.fromkeys(PLAN.removed)], "kl").mean(1)
    assert with_it < without
    export_pico(model, "llama", PLAN, tmp_path / "out")
    entries = json.loads((tmp_path / "out/config.json").read_text())["block_configs"]
    assert entries[2]["attention"] == {"no_op": True, "emulation": {"kind": "diagonal"}}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    check_exported_equals_masked(loaded, ids, masked, 2)
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert 0 <= written - weight_bytes(model) < 16384  # the header


def test_searches_fit_it_for_every_candidate(diagonal, pico):
    evaluator = Evaluator(pico("llama"), FAMILIES["llama"], tokens())
    base, candidate = Sublayer(1, "attention"), Sublayer(3, "attention")
    found = fit_candidates(evaluator, [base], [candidate], "diagonal", 0, Reporter())
    alone = fit_plan(evaluator, {base: "diagonal", candidate: "diagonal"}, 0, Reporter())
    for sublayer in (base, candidate):
        torch.testing.assert_close(found[sublayer].factor, alone[sublayer].factor)


@pytest.mark.parametrize(
    "flags",
    [
        ["--attention", "2"],
        ["--attention", "2", "--search", "greedy", "--recovery-aware"],
        ["--weight-budget", "80%"],
        ["--attention", "2", "--heal", "adapters", "--heal-steps", "1"],
    ],
)
def test_the_command_prunes_with_it_and_evaluates(diagonal, monkeypatch, pico_directory, text, tmp_path, flags, capsys):
    output = tmp_path / "out"
    arguments = ["--output", output, "--calibration", text, "--emulation", "diagonal", *flags, *QUICK]
    assert run(monkeypatch, pico_directory(), *arguments) == 0
    manifest = verify(output)
    assert set(manifest.removed.values()) == {"diagonal"}
    plan = Plan(BLOCKS, {_sublayer(name): kind for name, kind in manifest.removed.items()})
    dense = load_dense(str(pico_directory()), "float32", "cpu", Reporter())
    assert manifest.sizes["weights"] == predicted_bytes(dense, plan, 64)["weights"]
    assert manifest.sizes["weights"] == weight_bytes(AutoModelForCausalLM.from_pretrained(output))
    capsys.readouterr()
    assert run(monkeypatch, "evaluate", output, "--text", text, "--window", 32, "--text-tokens", 128) == 0
    assert "perplexity" in capsys.readouterr().out


def _sublayer(name: str) -> Sublayer:
    kind, _, block = name.partition(".")
    return Sublayer(int(block), "ffn" if kind == "ffn" else "attention")


def test_formats_that_cannot_hold_it_say_so_in_its_words(diagonal, pico, tmp_path):
    model = pico("llama")
    export_pico(model, "llama", PLAN, tmp_path / "out")
    pruned = PrunedModel.of(model, FAMILIES["llama"], tmp_path / "out")
    says = "the diagonal adapter of attention.2 and 2 more goes no further; use --format shoal"
    assert "weights of the dense model go" in (FORMATS["plan"].refusal(pruned) or "")
    assert {name: form.refusal(pruned) for name, form in FORMATS.items() if name != "plan"} == {
        "shoal": None, "nemotron-nas": says, "gguf": says, "llama": says
    }  # fmt: skip


def test_it_is_refused_where_it_does_not_fit(diagonal, monkeypatch, pico_directory, tmp_path, capsys):
    arguments = ["--output", tmp_path / "out", "--emulation", "diagonal", "--attention", "2"]
    assert run(monkeypatch, pico_directory("cohere"), *arguments) == 2
    assert "diagonal is for blocks one after the other" in capsys.readouterr().err
    assert run(monkeypatch, pico_directory("llama"), *arguments, "--fuse") == 2
    assert "no FFN can hold the diagonal of" in capsys.readouterr().err


def test_without_its_file_it_is_unknown(pico, files, tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match="unknown emulation 'diagonal'"):
        variants.variant("diagonal")
    with pytest.raises(CheckpointError, match="'diagonal' is not known"):
        variants.of_entry({"no_op": True, "emulation": {"kind": "diagonal"}})
    with pytest.raises(ValueError, match="there is a variant"):
        variants.add("low_rank", variants.VARIANTS["bias"])
    monkeypatch.setitem(variants.VARIANTS, "diagonal", variants.Row("diagonal_offline:DIAGONAL", "", "", "diagonal"))
    assert variants.variant("diagonal").title == "the diagonal adapter"


def test_the_engine_builds_its_twin_which_computes_the_same(diagonal, pico, tmp_path, monkeypatch):
    served = pytest.importorskip("server.engine.variants")
    monkeypatch.setattr(served, "STAND_INS", dict(served.STAND_INS))
    served.add("diagonal", "diagonal_served:VARIANT")
    with pytest.raises(ValueError, match="registered already"):
        served.add("diagonal", "diagonal_served:VARIANT")
    evaluator = Evaluator(pico("llama"), FAMILIES["llama"], tokens())
    mine = fit_plan(evaluator, SOME, 0, Reporter())[Sublayer(2, "attention")]
    assert mine is not None
    twin = served.stand_in(mine.describe()).build(mine.describe(), 128, True)
    twin.load_state_dict(mine.state_dict())
    hidden = torch.randn(5, 128)
    normalised = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(twin(normalised), mine(hidden))
