"""Calibration tokens: from text or JSONL files, or from what is always at hand (no file, no network)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pruning.console import Reporter
from pruning.errors import CalibrationError
from pruning.texts.openings import OPENINGS
from pruning.texts.reading import read_text

GENERATION_BATCH = 64


def windows(ids: Sequence[int] | Tensor, length: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` windows of `length` tokens, evenly spread with a seeded offset, without overlap.

    Returns:
        int64 [count, length].
    """
    available = len(ids) // length
    order = torch.randperm(available, generator=generator)[:count].sort().values
    rows = torch.as_tensor(ids[: available * length], dtype=torch.int64).view(available, length)
    return rows[order]


def from_files(
    files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, tokens: int, length: int, seed: int
) -> Tensor:
    """Calibration windows drawn evenly from every file.

    Returns:
        int64 [ceil(tokens / length), length], the files' windows interleaved.

    Raises:
        CalibrationError: A file holds too few tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    total = -(-tokens // length)
    shares = [total // len(files) + (i < total % len(files)) for i in range(len(files))]
    parts = []
    for path, share in zip(files, shares, strict=True):
        if not share:
            continue
        text = read_text(path, tokenizer)[: share * length * 40]
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) < share * length:
            raise CalibrationError(
                f"calibration file {path} holds {len(ids)} tokens, fewer than the {share * length} asked of it; "
                f"lower --calibration-tokens (now {tokens}) or give more text"
            )
        parts.append(windows(ids, length, share, generator))
    return interleave(parts)


def other_windows(
    files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, tokens: int, length: int, used: Tensor
) -> Tensor:
    """Windows of files that are not among those in use.

    Args:
        files: Those of `read_text`.
        tokenizer: Of the model.
        tokens: To read at most, in equal shares of the files as far as they go.
        length: T.
        used: int64 [m, T].

    Returns:
        int64 [n, T], the files' windows interleaved; n may be 0.
    """
    texts = [read_text(path, tokenizer) for path in files]
    known = {row.numpy().tobytes() for row in used}
    share = tokens // len(texts)
    parts = []
    for text in texts:
        ids = tokenizer(text[: share * 12], add_special_tokens=False, verbose=False)["input_ids"][:share]
        rows = torch.tensor(ids[: len(ids) // length * length], dtype=torch.int64).view(-1, length)
        keep = [i for i, row in enumerate(rows) if row.numpy().tobytes() not in known]
        parts.append(rows[keep])
    return interleave(parts) if any(map(len, parts)) else used[:0]


def last_windows(files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> Tensor:
    """The last windows of files, each file in turn: what `from_files` draws last, or not at all.

    Returns:
        int64 [count, length].

    Raises:
        CalibrationError: The files hold too few tokens for it.
    """
    rows: list[Tensor] = []
    for number in range(count):
        path, nth = files[number % len(files)], number // len(files)
        text = read_text(path, tokenizer)[-(nth + 1) * length * 12 :]
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) < (nth + 1) * length:
            raise CalibrationError(
                f"calibration file {path} holds {len(ids)} tokens, too few to hold {length} out; give more text or a "
                "shorter --context"
            )
        rows.append(torch.tensor(ids[len(ids) - (nth + 1) * length :][:length], dtype=torch.int64))
    return torch.stack(rows)


def interleave(parts: Sequence[Tensor]) -> Tensor:
    """Rows of several [n_i, T] tensors in turn, so that any prefix is a mix."""
    rows: list[Tensor] = []
    for i in range(max(len(part) for part in parts)):
        rows.extend(part[i] for part in parts if i < len(part))
    return torch.stack(rows)


def repeated(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Windows whose second half repeats their first.

    Args:
        rows: int64 [n, T].

    Returns:
        int64 [n, T'], T' = T or T - 1, even; and which of their next tokens are copies, bool [n, T' - 1]: all of the
        second half but its first, which nothing tells.
    """
    half = rows.shape[1] // 2
    copies = torch.arange(2 * half - 1) >= half
    return rows[:, :half].repeat(1, 2), copies.repeat(len(rows), 1)


def standard_library_text() -> str:
    """English prose and code that every Python carries: the topics of `help()`."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def standard_library_ids(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The same as tokens, int64 [n]."""
    return torch.tensor(tokenizer(standard_library_text(), add_special_tokens=False, verbose=False)["input_ids"])


@torch.inference_mode()
def self_generated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    length: int,
    seed: int,
    reporter: Reporter,
) -> Tensor:
    """Text the model itself writes: each row continues one of `OPENINGS`, at temperature 1, nothing cut off.

    The default, where no text is given.

    Args:
        model: Dense model.
        tokenizer: Of the model.
        count: Rows wanted.
        length: T.
        seed: For torch's generator.
        reporter: For progress.

    Returns:
        int64 [count, length].

    Source: calibration by the model's own samples, arXiv 2410.17170 (self-calibration). Inferred: openings of many
        registers in place of the first token alone, which fits adapters far better (docs/decisions/recovery.md).
    """
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    starts = [tokenizer(opening)["input_ids"][:length] for opening in OPENINGS]
    groups = torch.arange(count).tensor_split(-(-count // GENERATION_BATCH))
    rows: list[Tensor] = []
    with torch.random.fork_rng(devices=[]), reporter.progress("self-generated text", len(groups)) as step:
        torch.manual_seed(seed)
        for group in groups:
            prompts = [starts[number % len(starts)] for number in group.tolist()]
            widest = max(map(len, prompts))
            new = length - min(map(len, prompts))
            padded = [[padding] * (widest - len(prompt)) + prompt for prompt in prompts]
            mask = [[0] * (widest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
            out = model.generate(
                torch.tensor(padded, device=model.device), attention_mask=torch.tensor(mask, device=model.device),
                do_sample=True, top_k=0, top_p=1.0, max_new_tokens=new, min_new_tokens=new, pad_token_id=padding,
            ).cpu()  # fmt: skip
            first = [widest - len(prompt) for prompt in prompts]
            rows.extend(row[start : start + length] for row, start in zip(out, first, strict=True))
            step.advance()
    return torch.stack(rows)


def standard_library(tokenizer: PreTrainedTokenizerBase, tokens: int, length: int, seed: int) -> Tensor:
    """Windows of the standard library's text alone, where no model is at hand to write any.

    Returns:
        int64 [ceil(tokens / length), length].

    Raises:
        CalibrationError: More tokens are asked for than there are.
    """
    ids = standard_library_ids(tokenizer)
    rows = windows(ids, length, -(-tokens // length), torch.Generator().manual_seed(seed))
    if rows.numel() < tokens:
        raise CalibrationError(f"the built-in text holds {len(ids)} tokens, not {tokens}; give --calibration files")
    return rows
