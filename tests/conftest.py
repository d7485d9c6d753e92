"""Small real models of every family, and checkpoints made from them."""

import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import pruning
from pruning.export.writing import pruned_config, state_dict, write_weights
from pruning.families import FAMILIES, has_biases, own_window
from pruning.forward.evaluator import Evaluator
from pruning.models.checkpoint import MANIFEST, Manifest, hash_files, write_manifest
from pruning.models.configuration import base_config_class
from pruning.models.modeling import base_model_class
from pruning.narrowing import orders
from pruning.plan import KINDS, Plan, Sublayer
from pruning.recovery.apply import apply_recovery
from pruning.recovery.emulation import Recovery, fit_plan, recover
from pruning.recovery.fuse import Fusion, fuse
from pruning.search.skips import predicted
from pruning.variants import skips, window_fit
from pruning.variants.skip_fit import Share

VOCABULARY = 320
CACHE = tempfile.TemporaryDirectory()
EMBEDDED = "smollm2-135m"
BLOCKS = 6

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

OWN_SIZES: dict[str, dict[str, Any]] = {
    "mistral": {"head_dim": 32, "sliding_window": 16},
    "qwen3": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16},
    "gemma3_text": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16},
    "granite": {"residual_multiplier": 0.5, "attention_multiplier": 0.2, "embedding_multiplier": 4.0},
    "stablelm": {"use_qkv_bias": True, "partial_rotary_factor": 0.5},
    "cohere": {"logit_scale": 0.5},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {
        "head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "mlp_only_layers": [5],
    },
}


QUICK_FAMILIES = ("llama", "cohere")
"""Of what is repeated for every family, the runs that are not marked `slow`: the usual block, and a parallel one."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as `slow` what another family's run stands for."""
    for item in items:
        parameters = getattr(item, "callspec", None)
        values = [] if parameters is None else [str(value).split()[0:1] for value in parameters.params.values()]
        families = {first for value in values for first in value} & FAMILIES.keys()
        if families - set(QUICK_FAMILIES):
            item.add_marker(pytest.mark.slow)


def pico_config(model_type: str, **fields: Any) -> Any:
    """A tiny configuration of a family."""
    return base_config_class(FAMILIES[model_type])(**{**SIZES, **OWN_SIZES.get(model_type, {}), **fields})


def pico_model(model_type: str, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """A tiny random model of a family whose logits are decided enough for greedy decoding to be stable."""
    torch.manual_seed(seed)
    family = FAMILIES[model_type]
    model = base_model_class(family)(pico_config(model_type, **fields)).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.data += 0.2 * noise
        else:
            parameter.data = noise * (0.5 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.1)
    return model.requires_grad_(False)


def pico_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes."""
    special = ["<pad>", "<s>", "</s>"]
    letters = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )


MIXED_PLAN = Plan(
    BLOCKS,
    {
        Sublayer(0, "attention"): "bias",
        Sublayer(1, "ffn"): "none",
        Sublayer(2, "attention"): "context",
        Sublayer(2, "ffn"): "bias",
        Sublayer(3, "attention"): "none",
        Sublayer(3, "ffn"): "none",
        Sublayer(4, "attention"): "none",
        Sublayer(4, "ffn"): "low_rank",
    },
    rank=4,
)

KV_SHARE_PLAN = Plan(
    BLOCKS,
    {
        **MIXED_PLAN.removed,
        Sublayer(2, "attention"): "kv_share",
        Sublayer(4, "attention"): "kv_share_low_rank",
    },
    rank=4,
)

WINDOW = 8


def window_plan(model_type: str) -> Plan:
    """Three limited attention layers of those that see all tokens, a removed one, and an emulated FFN."""
    config = pico_config(model_type)
    free = [block for block in range(BLOCKS) if own_window(config, block) is None]
    limited = {Sublayer(block, "attention"): "window" for block in (free if len(free) < 4 else free[:3])}
    return Plan(BLOCKS, {**limited, Sublayer(4, "ffn"): "low_rank"}, rank=4, window=WINDOW)


UNITS = {1: 96, 3: 64, 4: 184}
NARROW_PLAN = Plan(
    BLOCKS, {**{Sublayer(block, "ffn"): "narrow" for block in UNITS}, Sublayer(2, "attention"): "bias"}, units=UNITS
)

SKIP_PLAN = Plan(BLOCKS, {**{Sublayer(block, "ffn"): "skip" for block in (1, 3, 4)}, Sublayer(2, "attention"): "bias"})

SHARED_PLAN = Plan(BLOCKS, {Sublayer(b, kind): "shared" for b in (2, 4) for kind in KINDS}, rank=4)

FUSIBLE_PLAN = Plan(BLOCKS, {**MIXED_PLAN.removed, Sublayer(2, "attention"): "low_rank"}, rank=4)


def tokens(rows: int = 8, length: int = 48, seed: int = 1) -> torch.Tensor:
    """Random token windows, int64 [rows, length]."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss of every window: logits [b, T, V] of ids [b, T] -> float64 [b]."""
    per_token = functional.cross_entropy(logits.float()[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return per_token.mean(1).double()


def check_exported_equals_masked(model: PreTrainedModel, ids: torch.Tensor, masked: torch.Tensor, prompts: int) -> None:
    """A checkpoint gives the losses [b] that the evaluator gave, and writes the same with any cache as with none.

    Args:
        model: Loaded from the checkpoint.
        ids: [b, T].
        masked: The evaluator's losses of `ids`.
        prompts: How many of `ids`, cut to 20 tokens, it goes on writing.
    """
    with torch.inference_mode():
        torch.testing.assert_close(losses(model(ids).logits, ids), masked, atol=1e-5, rtol=0)
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    plain = model.generate(ids[:prompts, :20], use_cache=False, **options)
    assert torch.equal(model.generate(ids[:prompts, :20], **options), plain)
    assert torch.equal(model.generate(ids[:prompts, :20], cache_implementation="static", **options), plain)


def plain_logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits of all positions but the last, by transformers."""
    with torch.inference_mode():
        return model(input_ids=ids).logits.float()[:, :-1]


def divergence(dense: torch.Tensor, pruned: torch.Tensor) -> torch.Tensor:
    """Mean KL(dense || pruned) of logits, by PyTorch."""
    each = functional.kl_div(pruned.log_softmax(-1), dense.log_softmax(-1), reduction="none", log_target=True)
    return each.sum(-1).mean()


def export_pico(model: PreTrainedModel, model_type: str, plan: Plan, directory: Path, *, fused: bool = False) -> Path:
    """Prune a tiny model in place by a plan and write the checkpoint."""
    from pruning.console import Reporter

    family, evaluator = FAMILIES[model_type], Evaluator(model, FAMILIES[model_type], tokens())
    if fused:
        recovery: Recovery | Fusion = fuse(
            evaluator, plan.removed, plan.rank, Reporter(), biased=has_biases(model.config)
        )
    elif plan.units:
        found = orders(evaluator, plan.units, 0, Reporter())
        kept = {sublayer: each.kept(plan.units[sublayer.block]) for sublayer, each in found.items()}
        recovery = recover(evaluator, plan.removed, plan.rank, Reporter(), compensated=False, prepared=kept)
    elif any(map(skips, plan.removed.values())):
        predictors = predicted(
            evaluator, [s.block for s, kind in plan.removed.items() if skips(kind)], 4, 0, Reporter()
        )
        shares = {s: Share(each.weight, each.map, len(each.costs) // 2) for s, each in predictors.items()}
        recovery = recover(evaluator, plan.removed, plan.rank, Reporter(), compensated=False, prepared=shares)
    else:
        emulations = fit_plan(evaluator, plan.removed, plan.rank, Reporter(), plan.sources, plan.window)
        recovery = Recovery(emulations, {})
    apply_recovery(model, family, plan, recovery)
    directory.mkdir(parents=True, exist_ok=True)
    pico_tokenizer().save_pretrained(directory)
    write_weights(state_dict(model), directory)
    pruned_config(model, family).save_pretrained(directory)
    manifest = Manifest(
        shoal_version=pruning.__version__,
        base={"model": model_type, "weight_hash": "", "dtype": "float32"},
        recipe={},
        num_blocks=plan.num_blocks,
        removed={str(s): kind for s, kind in plan.removed.items()},
        importance={},
        quality={"dense_loss": 1.0, "pruned_loss": 1.0, "text": "none"},
        sizes={"weights_dense": 2, "weights": 1, "kv_per_token_dense": 2, "kv_per_token": 1},
        stages={},
        files={},
    )
    write_manifest(directory, manifest)
    return directory


def rewrite_manifest(directory: Path) -> None:
    """Hash the files of a checkpoint again after a test has changed them."""
    fields = json.loads((directory / "pruning.json").read_text())
    (directory / "pruning.json").unlink()
    write_manifest(directory, Manifest.model_validate(fields))


def name_base(directory: Path, dense: Path) -> Path:
    """Let a checkpoint name the weights of `dense` as what it was made from, as prune-export does."""
    fields = json.loads((directory / MANIFEST).read_text())
    fields["base"]["weight_hash"] = hash_files(sorted(dense.glob("*.safetensors")))
    (directory / MANIFEST).write_bytes(Manifest.model_validate(fields).render())
    return directory


def engine_environment() -> dict[str, str]:
    """The environment of a process that runs vLLM in itself."""
    return os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # a function is sent to the workers to list their modules
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }


@pytest.fixture(scope="session")
def pico() -> Callable[..., PreTrainedModel]:
    """Factory of tiny random models: `pico("llama")`."""
    pruning.register()
    return pico_model


@pytest.fixture(scope="session")
def pico_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Factory of dense model directories with a tokenizer: `pico_directory("llama")`."""
    made: dict[str, Path] = {}

    def make(model_type: str = "llama") -> Path:
        if model_type not in made:
            directory = tmp_path_factory.mktemp(f"dense-{model_type}")
            pico_model(model_type).save_pretrained(directory)
            pico_tokenizer().save_pretrained(directory)
            made[model_type] = directory
        return made[model_type]

    return make


@pytest.fixture(scope="session")
def pico_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, PreTrainedModel]]:
    """Factory of (checkpoint directory, the model in memory it was written from): `pico_checkpoint("llama")`.

    `"llama fused"` is the same with its emulations fused; in `"llama kv-share"` two of them attend to block 1's cache;
    in `"llama shared"` blocks 2 and 4 have the weights of others and differences of rank 4; `"llama window"` has
    limited attention layers; `"llama narrow"` has three FFNs of fewer units; half of the tokens skip three FFNs of
    `"llama skip"`.
    """
    pruning.register()
    made: dict[str, tuple[Path, PreTrainedModel]] = {}

    def make(name: str = "llama") -> tuple[Path, PreTrainedModel]:
        if name not in made:
            model_type, _, variant = name.partition(" ")
            model = pico_model(model_type)
            directory = tmp_path_factory.mktemp(f"pruned-{name.replace(' ', '-')}")
            plans = {
                "fused": FUSIBLE_PLAN, "kv-share": KV_SHARE_PLAN, "narrow": NARROW_PLAN, "shared": SHARED_PLAN,
                "skip": SKIP_PLAN, "": MIXED_PLAN,
            }  # fmt: skip
            plan = window_plan(model_type) if variant == "window" else plans[variant]
            made[name] = export_pico(model, model_type, plan, directory, fused=variant == "fused"), model
        return made[name]

    return make


@contextmanager
def planting_sinks() -> Iterator[None]:
    """Have every limited layer but the first planted with a sink, by which tiny random models gain nothing."""
    usual = window_fit.first_tokens

    def candidates(evaluator: Evaluator) -> list[dict[str, Any]]:
        first, *others = usual(evaluator)
        return [first, *({name: sink for name, sink in each.items() if name != "none"} for each in others)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window_fit, "first_tokens", candidates)
        yield


def export_windows(model: Path, output: Path, text: Path, **recipe: Any) -> Path:
    """Limit three attention layers of a tiny model to windows of 8 tokens, with prune-export."""
    from pruning.console import Reporter
    from pruning.pipeline import run
    from pruning.recipe import Recipe
    from pruning.request import checked_export

    long = output.parent / "long.txt"  # thousands of tokens of it are held out
    long.write_text(text.read_text() * 4)
    fixed = {
        "calibration": [long], "calibration_tokens": 1024, "score_tokens": 128, "sequence_length": 32,
        "emulation": "window", "window": 8, "context": 64, "attention": 3, "importance": "random",
    }  # fmt: skip
    asked = checked_export(str(model), Recipe(**fixed | recipe), output, overwrite=False, reporter=Reporter())
    run(asked, output, dry_run=False, reporter=Reporter())
    return output


def int8_sibling(dense: Path, directory: Path) -> Path:
    """The same model with projections in int8 (compressed-tensors: a scale for each row, and for each token)."""
    shutil.copytree(dense, directory)
    tensors = {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        tensors[name] = tensor
        if name.endswith("_proj.weight"):
            scale = tensor.abs().amax(1, keepdim=True) / 127
            tensors |= {name: (tensor / scale).round().to(torch.int8), f"{name}_scale": scale}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    numbers = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**numbers, "strategy": "channel", "dynamic": False},
        "input_activations": {**numbers, "strategy": "token", "dynamic": True},
    }
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": group},
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def pico_plan(
    pico_directory: Callable[..., Path], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Path]]:
    """Factory of (directory of a plan file, checkpoint of the same plan) for `pico_directory` of a family."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(model_type: str = "llama") -> tuple[Path, Path]:
        if model_type not in made:
            place, dense = tmp_path_factory.mktemp(f"windows-{model_type}"), pico_directory(model_type)
            with planting_sinks():
                made[model_type] = (
                    export_windows(dense, place / "plan", text, format="plan"),
                    export_windows(dense, place / "checkpoint", text),
                )
        return made[model_type]

    return make


@pytest.fixture(scope="session")
def smollm2_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M pruned by the command line with its defaults (24 of 30 attention layers limited).

    `SHOAL_TEST_CHECKPOINT` names one made before, to save minutes while developing.
    """
    if made := os.environ.get("SHOAL_TEST_CHECKPOINT"):
        return Path(made)
    directory = tmp_path_factory.mktemp("smollm2") / "smollm2-135m-pruned"
    command = [Path(sys.executable).with_name("prune-export"), "smollm2-135m", "--output", directory]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (directory.parent / "log").write_text(done.stderr)
    return directory


@dataclass
class LiveServer:
    """A running `prune-serve`."""

    url: str
    model: str
    process: subprocess.Popen[str]
    checkpoint: Path
    log: Path
    operations_url: str


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_prune_export(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit code of `prune-export ARGUMENTS`, run in this process, with a cache of its own."""
    from pruning.cli import main

    if "XDG_CACHE_HOME" not in os.environ and EMBEDDED not in arguments:
        monkeypatch.setenv("XDG_CACHE_HOME", CACHE.name)
    monkeypatch.setattr(sys, "argv", ["prune-export", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of calibration text."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, again and again; so it goes. " * 200)
    return path


@contextmanager
def serve(
    checkpoint: Path,
    log: Path,
    *flags: str | Path | int,
    engine: Sequence[str | Path | int] = (),
    scheme: str = "http",
    operations: bool = False,
    start_seconds: float = 400,
) -> Iterator[LiveServer]:
    """Start `prune-serve` on a free port and wait until it is ready.

    Args:
        checkpoint: What to serve.
        log: File for all it writes.
        flags: Its own.
        engine: vLLM's.
        scheme: https where the flags ask for TLS.
        operations: Have health and metrics on a port of their own.
        start_seconds: It may take to be ready.
    """
    port, other = free_port(), free_port()
    if operations:
        flags = (*flags, "--operations-port", other)
    program = Path(sys.executable).with_name("prune-serve")
    command = [program, checkpoint, "--host", "127.0.0.1", "--port", str(port), *flags, "--", *engine]
    with log.open("w") as stream:
        process = subprocess.Popen(list(map(str, command)), stdout=stream, stderr=subprocess.STDOUT, text=True)
    url = f"{scheme}://127.0.0.1:{port}"
    operations_url = f"{scheme}://127.0.0.1:{other}" if operations else url
    try:
        deadline = time.monotonic() + start_seconds
        while not _answers(f"{operations_url}/health/ready"):
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)
        yield LiveServer(url, checkpoint.name, process, checkpoint, log, operations_url)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5, context=ssl._create_unverified_context()) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError):
        return False


@pytest.fixture(scope="session")
def start_server() -> Callable[..., AbstractContextManager[LiveServer]]:
    """How to start a server of a test's own: `with start_server(checkpoint, log, "--flag") as server`."""
    return serve


@pytest.fixture(scope="session")
def live_server(smollm2_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One real server with the pruned SmolLM2 for the whole session."""
    log = tmp_path_factory.mktemp("server") / "log"
    with serve(smollm2_checkpoint, log, engine=["--max-num-batched-tokens", "1024"]) as server:
        yield server
