"""llama.cpp computes what transformers computes, from the file that `--format gguf` writes."""

import json

import gguf
import pytest
import torch
import xllamacpp
from transformers import AutoModelForCausalLM

from pruning.console import Reporter
from pruning.errors import CheckpointError
from pruning.export.convert import convert
from pruning.models.checkpoint import read_manifest, write_manifest
from pruning.plan import Plan, Sublayer
from tests.conftest import export_pico, pico_model, pico_tokenizer

PLAN = Plan(
    6,
    {
        Sublayer(1, "ffn"): "none",
        Sublayer(2, "attention"): "low_rank",
        Sublayer(2, "ffn"): "bias",
        Sublayer(4, "attention"): "low_rank",
        Sublayer(5, "attention"): "none",
    },
    rank=4,
)
PROMPT = [5, 77, 130, 9, 250, 31, 8, 200, 14, 90, 61, 44, 17]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def written(request, pico, tmp_path_factory):
    """A fused checkpoint, and the directory with its GGUF file."""
    place = tmp_path_factory.mktemp("gguf")
    source = export_pico(pico_model(request.param), request.param, PLAN, place / "shoal", fused=True)
    pico_tokenizer().save_pretrained(source)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["ab"] = len(tokenizer["model"]["vocab"])
    tokenizer["model"]["merges"] = [["a", "b"]]  # llama.cpp does not load a tokenizer without merges
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    write_manifest(source, read_manifest(source))
    convert(source, "gguf", place / "gguf", overwrite=False, reporter=Reporter())
    return source, place / "gguf"


def test_llama_cpp_computes_the_same_tokens_and_probabilities(written):
    source, directory = written
    model = AutoModelForCausalLM.from_pretrained(source)
    params = xllamacpp.CommonParams()
    params.model.path = str(directory / "model.gguf")
    params.n_ctx, params.n_gpu_layers, params.cpuparams.n_threads = 64, 0, 1
    # By default attention rounds keys, values and probabilities to float16, worth 1e-3 here.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    letters, compared = pico_tokenizer().convert_ids_to_tokens(range(259)), 0
    for prompt in ([*PROMPT, last] for last in range(20, 80)):
        with torch.inference_mode():
            expected = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        greedy = int(expected.argmax())
        if greedy >= len(letters) or not "!" <= letters[greedy] <= "~":
            continue  # the server reports nothing for bytes that are no whole character
        request = {"prompt": prompt, "temperature": 0, "max_tokens": 1, "ignore_eos": True, "logprobs": 5}
        (entry,) = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
        found = {token["id"]: token["logprob"] for token in entry["top_logprobs"]}
        assert len(found) == 5
        for token, logprob in found.items():
            assert abs(logprob - float(expected[token])) < 1e-5
        assert max(found, key=lambda token: found[token]) == greedy
        compared += 1
    assert compared >= 5


def test_the_file_says_which_blocks_have_attention_and_how_large_ffns_are(written):
    reader = gguf.GGUFReader(written[1] / "model.gguf")

    def values(key):
        return reader.fields[f"deci.{key}"].contents()

    assert [bool(heads) for heads in values("attention.head_count")] == [True, True, False, True, False, False]
    assert values("attention.head_count_kv") == [2, 2, 0, 2, 0, 0]
    sizes = values("feed_forward_length")
    assert sizes[1] == 32
    assert sizes[2] == 8
    names = {tensor.name for tensor in reader.tensors}
    assert "blk.0.attn_q.weight" in names
    assert not [name for name in names if name.startswith(("blk.2.attn", "blk.4.attn", "blk.5.attn"))]


def test_block_0_without_attention_and_unknown_tokenizers_are_refused(pico_checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="block 0, which has to keep its attention"):
        convert(pico_checkpoint("llama fused")[0], "gguf", tmp_path / "out", overwrite=False, reporter=Reporter())
    source = export_pico(pico_model("llama"), "llama", PLAN, tmp_path / "shoal", fused=True)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["model"]["type"] = "Unigram"
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    write_manifest(source, read_manifest(source))
    with pytest.raises(CheckpointError, match="the tokenizer is not one of those"):
        convert(source, "gguf", tmp_path / "out", overwrite=False, reporter=Reporter())
