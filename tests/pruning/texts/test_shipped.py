"""The text inside the package: every document has an origin, rows alternate, and nothing measured is chosen on."""

import pytest
import torch

from pruning.errors import CalibrationError
from pruning.texts import shipped
from pruning.texts.shipped import DATA, Document, documents, rows_held_out, rows_to_choose_on
from tests.conftest import pico_tokenizer

LENGTH = 512


def test_every_file_has_an_origin_and_every_origin_a_file():
    listed = [document.file for document in documents()]
    assert len(listed) == len(set(listed))
    assert {"ORIGIN.toml", *listed} == {path.name for path in DATA.iterdir()}
    for document in documents():
        assert document.use in ("choose", "held out")
        assert document.licence.startswith(("public domain", "Apache-2.0"))
        assert all((document.kind, document.title, document.author, document.source, document.made))
        assert "gutenberg" not in document.text.lower()


def test_it_is_small_and_of_many_kinds():
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 2**21
    for use in ("choose", "held out"):
        kinds = {document.kind for document in documents() if document.use == use}
        assert {"fiction", "play", "code", "documentation", "speech", "other language"} <= kinds


def test_first_rows_are_of_as_many_documents():
    tokenizer = pico_tokenizer()
    rows = rows_to_choose_on(tokenizer, LENGTH, 12)
    chosen = [document for document in documents() if document.use == "choose"]
    for document, row in zip(chosen, rows, strict=False):
        assert row.shape == (LENGTH,)
        assert row.tolist() == tokenizer(document.text, add_special_tokens=False)["input_ids"][:LENGTH]
    assert len({document.kind for document in chosen[:4]}) == 4
    assert torch.equal(rows_to_choose_on(tokenizer, LENGTH, 40)[:12], rows[:12])


def test_held_out_rows_are_of_other_documents():
    tokenizer = pico_tokenizer()
    chosen = {row.numpy().tobytes() for row in rows_to_choose_on(tokenizer, LENGTH, 100)}
    held = rows_held_out(tokenizer, LENGTH, 40)
    assert held.shape == (40, LENGTH)
    assert not chosen & {row.numpy().tobytes() for row in held}


@pytest.fixture
def shortened(monkeypatch):
    """Documents of 500 characters."""
    whole = Document.text.fget
    monkeypatch.setattr(Document, "text", property(lambda document: whole(document)[:500]))


def test_long_rows_go_on_in_the_next_document_and_then_in_pythons_documentation(shortened, monkeypatch):
    tokenizer = pico_tokenizer()
    texts = [document.text for document in documents() if document.use == "held out"]
    length = len(texts[0].encode()) + 200  # one token a byte
    row = rows_held_out(tokenizer, length, 1)[0]
    assert tokenizer.decode(row[-300:]) in "".join(texts)
    monkeypatch.setattr(shipped, "standard_library_text", lambda: "x" * 3000)
    whole = sum(len(text.encode()) + 2 for text in texts)
    assert rows_held_out(tokenizer, whole + 2000, 1)[0, -1] == tokenizer("x")["input_ids"][-1]
    with pytest.raises(CalibrationError, match=r"does not hold 1 rows of \d+ tokens .*give --calibration files"):
        rows_held_out(tokenizer, whole + 4000, 1)


def test_rows_to_choose_on_are_integers_and_as_many_as_asked_for(shortened):
    assert rows_to_choose_on(pico_tokenizer(), LENGTH, 1).dtype == torch.int64
    with pytest.raises(CalibrationError, match=r"holds 0 rows of 9999999 tokens, not 1"):
        rows_to_choose_on(pico_tokenizer(), 9_999_999, 1)
