"""`prune-export evaluate` end to end on a small checkpoint and its dense model."""

import json

import pytest
import torch

from pruning import cli
from pruning.evaluation.generation import Recall, agreement, copy_prompts, greedy, recall_prompts, recalled
from tests.conftest import pico_tokenizer, tokens


@pytest.fixture
def files(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Herring swim in shoals of many thousands. " * 40)
    questions = tmp_path / "fish.jsonl"
    fields = {"task": "fish", "choices": [" herring", " cod"]}
    rows = [{**fields, "id": str(i), "context": f"Number {i} is a", "label": i % 2} for i in range(6)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return text, questions


def run(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["prune-export", "evaluate", *map(str, words)])
    try:
        cli.main()
    except SystemExit as end:
        if end.code:
            raise


def test_pruned_against_dense(pico_checkpoint, pico_directory, files, tmp_path, monkeypatch, capsys):
    directory, _ = pico_checkpoint("llama")
    dense = pico_directory("llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (directory / name).exists():
            (directory / name).write_bytes((dense / name).read_bytes())
    text, questions = files
    output = tmp_path / "found.json"
    run(
        monkeypatch, directory, "--against", dense, "--text", text, "--text-tokens", 512, "--window", 64,
        "--long-context", 128, 256, "--choice", questions, "--generate", 2, "--new-tokens", 8, "--output", output,
    )  # fmt: skip
    found = json.loads(output.read_text())
    one = found["text"]["text.txt"]
    assert one["ratio"]["value"] == pytest.approx(one["perplexity"] / one["dense_perplexity"])
    assert one["ratio"]["low"] <= one["ratio"]["value"] <= one["ratio"]["high"]
    assert one["kl"]["value"] > 0
    assert set(found["long_context"]) == {"128", "256"}
    task = found["choice"]["fish"]
    assert task["acc_difference"]["value"] == pytest.approx(task["acc"] - task["dense_acc"])
    assert len(found["generation"]["lengths"]) == 2
    shown = capsys.readouterr().out
    assert f"{one['perplexity']:.3f}" in shown
    assert f"{task['acc']:.4f}" in shown


def test_a_model_agrees_with_itself(pico_directory, files, tmp_path, monkeypatch):
    dense, output = pico_directory("llama"), tmp_path / "found.json"
    run(monkeypatch, dense, "--against", dense, "--text", files[0], "--text-tokens", 256, "--window", 64,
        "--generate", 2, "--new-tokens", 8, "--recall", 2, "--output", output)  # fmt: skip
    found = json.loads(output.read_text())
    assert found["text"]["text.txt"]["ratio"]["value"] == pytest.approx(1, abs=1e-6)
    assert found["text"]["text.txt"]["top1_agreement"]["value"] == 1
    assert found["generation"]["all_agree"] == 1


def test_long_context_tasks_beside_dense(pico_checkpoint, pico_directory, tmp_path, monkeypatch, capsys):
    directory, dense, output = pico_checkpoint("llama")[0], pico_directory("llama"), tmp_path / "found.json"
    run(
        monkeypatch, directory, "--against", dense, "--long-context-tasks", "needle", "values", "--lengths", 200, 250,
        "--depths", 0.25, 1, "--prompts", 2, "--output", output, "--report", tmp_path / "report",
    )  # fmt: skip
    cells = json.loads(output.read_text())["long_context_tasks"]
    assert [(c["kind"], c["length"], c["depth"]) for c in cells] == [
        ("needle", 200, 0.25), ("needle", 200, 1), ("needle", 250, 0.25), ("needle", 250, 1),
        ("values", 200, None), ("values", 250, None),
    ]  # fmt: skip
    for cell in cells:
        assert cell["n"] == 2
        assert cell["found"]["low"] <= cell["found"]["value"] <= cell["found"]["high"]
        gap = cell["nll_difference"]
        assert gap["value"] == pytest.approx(cell["nll"]["value"] - cell["dense_nll"]["value"])
        assert gap["low"] <= gap["value"] <= gap["high"]
    shown = capsys.readouterr().out
    assert "needle, 250 tokens, depth 0.25: found of 2" in shown
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("<svg") == 1
    for text in ("needle, 25%", "needle, 100%", "values", "this model", "dense", "250", "prune-export evaluate"):
        assert text in page
    assert f"{cells[0]['nll']['value']:.4f}" in page
    assert (tmp_path / "report" / "found.png").read_bytes().startswith(b"\x89PNG")


def test_long_context_tasks_of_one_model_in_a_text_of_ones_own(pico_directory, files, tmp_path, monkeypatch):
    output = tmp_path / "found.json"
    run(monkeypatch, pico_directory("llama"), "--long-context-tasks", "needle", "--lengths", 256, "--depths", 0.5,
        "--prompts", 1, "--filler", files[0], "--output", output)  # fmt: skip
    (cell,) = json.loads(output.read_text())["long_context_tasks"]
    assert cell["answers"] == 1
    assert "dense_found" not in cell


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to measure"),
        (["--text", "absent.txt"], "absent.txt"),
        (["--choice", "absent.jsonl"], "cannot read absent.jsonl"),
        (["--generate", "2"], "--against and --text"),
        (["--letter", "x.jsonl"], "--letter-examples go together"),
        (["--tasks", "x", "--url", "http://127.0.0.1:1"], "no model server answers at http://127.0.0.1:1/v1/models"),
        (["--tasks", "x", "--url", "nonsense"], "no model server answers at nonsense"),
        (["--long-context-tasks", "needles"], "unknown long-context task 'needles'; there are needle, keys, values"),
        (["--long-context-tasks", "needle", "--depths", "2"], "from 0 (start) to 1 (end), not 2"),
        (["--long-context-tasks", "needle", "--prompts", "0"], "--prompts of at least 1"),
        (
            ["--long-context-tasks", "needle"],
            "a prompt of 4096 tokens is over the model's 256 positions; lower --lengths",
        ),
        (["--long-context-tasks", "keys", "--lengths", "64"], "64 tokens hold no prompt of kind keys"),
        (["--long-context-tasks", "needle", "--filler", "absent.txt"], "cannot read"),
        (["--recall", "1", "--report", "no/such/directory"], "cannot write no/such/directory"),
        (["--recall", "1", "--output", "no/such/directory/x.json"], "no such directory"),
    ],
)
def test_bad_requests_end_in_one_line(words, message, pico_directory, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, pico_directory("llama"), *words)
    assert end.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert message in lines[0]


def test_greedy_takes_the_likeliest_token(pico):
    model, prompts = pico("llama"), tokens(rows=2, length=8)
    ids = prompts.clone()
    for _ in range(5):
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[:, -1].clone()
            logits[:, model.config.eos_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1)[:, None]], 1)
    assert torch.equal(greedy(model, prompts, 5), ids[:, 8:])


def test_agreement_ends_at_the_first_difference():
    a = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [1, 1, 1, 1]])
    b = torch.tensor([[1, 2, 9, 4], [5, 6, 7, 8], [2, 1, 1, 1]])
    assert agreement(a, b) == [2, 4, 0]


def test_recall_asks_for_a_code_that_was_given():
    for one in recall_prompts(20, facts=6, seed=4):
        facts, _, asked = one.prompt.rpartition("\n")
        assert f"{asked} {one.answer}." in facts
    assert recall_prompts(3, 6, seed=4) == recall_prompts(3, 6, seed=4)


def test_copying_asks_for_what_came_next():
    for one in copy_prompts(20, length=12, ahead=3, seed=1):
        listed, again = one.prompt.split(".\n")
        assert listed.startswith(f"{again} {one.answer}")
        assert len(one.answer.split()) == 3


def test_prompts_together_are_answered_as_alone(pico):
    model, tokenizer = pico("llama"), pico_tokenizer()
    prompts = copy_prompts(12, length=6, ahead=1, seed=2)
    written = {one.prompt: tokenizer.decode(greedy(model, torch.tensor([tokenizer(one.prompt)["input_ids"]]), 2)[0])
               for one in prompts}  # fmt: skip
    prompts = [Recall(one.prompt, written[one.prompt].strip()[: 1 + i % 3]) if i % 2 else one
               for i, one in enumerate(prompts)]  # fmt: skip
    alone = [recalled(model, tokenizer, [one])[0] for one in prompts]
    assert recalled(model, tokenizer, prompts) == alone
    assert any(alone)
