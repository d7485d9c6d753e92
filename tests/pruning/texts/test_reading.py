"""What may be calibrated on: files, also compressed, rows of text and of chats, data sets of a hub; and what not."""

import gzip
import http.server
import json
import threading
from pathlib import Path
from urllib.parse import unquote

import pyarrow
import pyarrow.parquet
import pytest

from pruning.errors import CalibrationError, EvaluationError
from pruning.evaluation.questions import holds_questions, read_questions
from pruning.texts import rows
from pruning.texts.reading import read_text
from tests.conftest import pico_tokenizer

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
CHAT = [{"role": "user", "content": "Which way?"}, {"role": "assistant", "content": "North. ☃"}]
SHARED = [{"from": "human", "value": "Which way?"}, {"from": "gpt", "value": "North. ☃"}]
QUESTION = {"context": "One and one is", "choices": [" two", " three"], "label": 0}


@pytest.fixture
def tokenizer():
    found = pico_tokenizer()
    found.chat_template = TEMPLATE
    return found


def as_jsonl(path: Path, *lines: dict) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def as_parquet(path: Path, *lines: dict) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(lines)), path)
    return path


def compressed(path: Path, raw: bytes) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(raw))
    else:
        path.write_bytes(pyarrow.compress(raw, codec="zstd", asbytes=True))
    return path


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_files_hold_what_was_compressed(tmp_path, tokenizer, ending):
    text = "One line.\nAnother: ☃.\n"
    assert read_text(compressed(tmp_path / f"a.txt{ending}", text.encode())) == text
    lines = "".join(json.dumps({"text": part}) + "\n" for part in ("first", "second")).encode()
    assert read_text(compressed(tmp_path / f"a.jsonl{ending}", lines), tokenizer) == "first\n\nsecond"


@pytest.mark.parametrize("write", [as_jsonl, as_parquet])
@pytest.mark.parametrize("row", [{"messages": CHAT}, {"conversations": SHARED}])
def test_chats_are_written_with_the_models_template(tmp_path, tokenizer, write, row):
    path = write(tmp_path / f"chat{'.jsonl' if write is as_jsonl else '.parquet'}", row, row)
    assert read_text(path, tokenizer) == 2 * "<user>Which way?</><assistant>North. ☃</>"
    assert "Which way?" in read_text(path)


def test_parquet_holds_text_in_a_column_of_that_name(tmp_path):
    assert (
        read_text(as_parquet(tmp_path / "a.parquet", {"text": "one", "id": 1}, {"text": "two", "id": 2}))
        == "one\n\ntwo"
    )
    assert read_text(as_parquet(tmp_path / "b.parquet", {"content": "one"}, {"content": "two"})) == "one\n\ntwo"


def test_of_endless_rows_only_the_start_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("pruning.texts.reading.ENOUGH", 100)
    path = as_jsonl(tmp_path / "a.jsonl", *[{"text": 40 * "a"}] * 5)
    assert read_text(path).count("a") == 120
    snow = compressed(tmp_path / "b.txt.gz", 50 * "☃".encode())
    assert read_text(snow) == 33 * "☃"  # 3 bytes each: the last one that fits is not cut in half


def test_questions_may_be_parquet_and_compressed(tmp_path):
    path = as_parquet(tmp_path / "a.parquet", QUESTION, QUESTION)
    assert holds_questions(path)
    assert [question.choices for question in read_questions(path)] == [(" two", " three")] * 2
    packed = compressed(tmp_path / "a.jsonl.zst", json.dumps(QUESTION).encode())
    assert holds_questions(packed)
    assert len(read_questions(packed)) == 1
    assert not holds_questions(as_parquet(tmp_path / "b.parquet", {"text": "one"}))
    with pytest.raises(EvaluationError, match=r"c\.jsonl:2: expected a context"):
        read_questions(as_jsonl(tmp_path / "c.jsonl", QUESTION, {**QUESTION, "label": 2}))


BAD_ROWS = {
    "no field": ({"body": "x"}, "expected 'text', or a chat in 'messages'"),
    "no object": (["x"], "expected a JSON object"),
    "text is a number": ({"text": 3}, "expected 'text'"),
    "messages is text": ({"messages": "hello"}, "'messages' to be a list of turns"),
    "no turns": ({"messages": []}, "'messages' to be a list of turns"),
    "a turn is text": ({"messages": ["hello"]}, "turn 1 of 'messages' needs 'role' and 'content'"),
    "no content": ({"messages": [*CHAT, {"role": "user"}]}, "turn 3 of 'messages' needs 'role' and 'content'"),
    "content is a list": ({"messages": [{"role": "user", "content": [1]}]}, "turn 1 of 'messages' needs"),
    "no value": ({"conversations": [{"from": "human"}]}, "turn 1 of 'conversations' needs 'from' and 'value'"),
    "unknown speaker": ({"conversations": [{"from": "cat", "value": "x"}]}, "turn 1 is from 'cat', not human"),
    "half a character": ({"text": "\ud800"}, r"half of a character, \\ud800"),
    "half a character in a chat": ({"messages": [{"role": "user", "content": "\udc00"}]}, r"half of a character"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named(tmp_path, name):
    row, message = BAD_ROWS[name]
    path = as_jsonl(tmp_path / "a.jsonl", {"text": "good"}, row)
    with pytest.raises(CalibrationError, match=rf"a\.jsonl:2: .*{message}"):
        read_text(path)


def test_lines_that_are_not_json_or_not_utf8_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    for line, message in ((b"{", "not JSON"), (b'{"text": "\xff"}', "not UTF-8"), (b"[" * 100_000, "not JSON")):
        path.write_bytes(b'{"text": "good"}\n\n' + line)
        with pytest.raises(CalibrationError, match=rf"a\.jsonl:3: {message}"):
            read_text(path)


def test_a_chat_that_the_template_does_not_take_is_named(tmp_path, tokenizer):
    path = as_jsonl(tmp_path / "a.jsonl", {"messages": CHAT})
    tokenizer.chat_template = "{{ raise_exception('only cats may speak') }}"
    with pytest.raises(CalibrationError, match=r"a\.jsonl:1: .*template does not take this chat: only cats may speak"):
        read_text(path, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(CalibrationError, match=r"a\.jsonl:1: the model has no chat template"):
        read_text(path, tokenizer)


@pytest.mark.parametrize("ending", [".txt.gz", ".txt.zst", ".jsonl.gz", ".jsonl.zst"])
def test_a_compressed_file_that_is_cut_off_is_refused(tmp_path, ending):
    lines = "".join(json.dumps({"text": f"{number**7} is a number"}) + "\n" for number in range(3000)).encode()
    path = compressed(tmp_path / f"a{ending}", lines)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CalibrationError, match=r"cannot read .*a\.(txt|jsonl)\.(gz|zst): .+"):
        read_text(path)
    path.write_bytes(b"hello")
    with pytest.raises(CalibrationError, match=r"cannot read .*a\.(txt|jsonl)\.(gz|zst): .+"):
        read_text(path)


def test_parquet_without_text_or_that_is_none_is_refused(tmp_path):
    path = as_parquet(tmp_path / "a.parquet", {"title": "x", "body": "y"})
    with pytest.raises(
        CalibrationError, match="has no column text, content, messages, conversations; it has title, body"
    ):
        read_text(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CalibrationError, match=r"cannot read .*a\.parquet: not a Parquet file"):
        read_text(path)
    with pytest.raises(CalibrationError, match=r"b\.parquet:2: expected 'text'"):
        read_text(as_parquet(tmp_path / "b.parquet", {"text": "x"}, {"text": None}))
    with pytest.raises(CalibrationError, match=r"cannot read .*absent\.parquet: No such file"):
        read_text(tmp_path / "absent.parquet")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server on this machine with one data set, as the hub's client asks for it."""
    table = as_parquet(tmp_path / "0000.parquet", {"text": "from the hub"}, {"text": "☃"}).read_bytes()
    listing = "/api/datasets/some/texts/revision/refs/convert/parquet"
    files = [f"{config}/{split}/0000.parquet" for config in ("a", "default") for split in ("test", "train")]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = unquote(self.path).split("?")[0]
            body, kind = None, "application/json"
            if path == listing:
                body = json.dumps({"id": "some/texts", "siblings": [{"rfilename": file} for file in files]}).encode()
            elif path == "/datasets/some/texts/resolve/refs/convert/parquet/default/train/0000.parquet":
                body, kind = table, "application/octet-stream"
            self.send_response(200 if body else 404)
            self.send_header("Content-Length", str(len(body or b"")))
            self.send_header("Content-Type", kind)
            self.send_header("ETag", '"1234"')
            self.send_header("X-Repo-Commit", "1" * 40)
            self.end_headers()
            if body and self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    files_at = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", files_at)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    rows._downloaded.cache_clear()
    yield
    server.shutdown()
    thread.join()
    server.server_close()
    rows._downloaded.cache_clear()


def test_a_data_set_of_the_hub_is_named_as_there(hub):
    assert read_text(Path("some/texts")) == "from the hub\n\n☃"
    assert read_text(Path("some/texts:train")) == "from the hub\n\n☃"
    with pytest.raises(CalibrationError, match="the data set some/texts has no split 'dev'; it has test, train"):
        read_text(Path("some/texts:dev"))
    with pytest.raises(CalibrationError, match="some/others is neither a file nor a data set"):
        read_text(Path("some/others"))


def test_without_the_hub_one_line_says_so(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    rows._downloaded.cache_clear()
    with pytest.raises(
        CalibrationError, match="neither a file nor a data set that the Hugging Face hub has, or the hub"
    ):
        read_text(Path("some/texts"))
    with pytest.raises(CalibrationError, match=r"cannot read some/texts\.txt: No such file"):
        read_text(Path("some/texts.txt"))
