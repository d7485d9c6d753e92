"""Evaluate any subnetwork of a model without copying or editing it, reusing what subnetworks share."""

import copy
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.families import Family
from pruning.forward import parallel
from pruning.forward.blocks import Arguments, Blocks, Gone, Taps
from pruning.forward.objective import Head, Objective
from pruning.forward.streams import State, describe, only, tile
from pruning.models.modeling import emulation_in, sources_of
from pruning.models.residency import Residency
from pruning.plan import KINDS, Sublayer
from pruning.variants.taps import Tap
from pruning.workdir import Journal

STATE_BYTES = 2**30
FORWARD_TOKENS = {"cpu": 512, "cuda": 16384}
_LAST = Sublayer(2**31, "ffn")

Visitor = Callable[[int, Sublayer, Tensor, Tensor], None]
"""Called with the batch's number, a sublayer, and the residual stream before and after it, [b, T, D] each."""


Given = Sequence[Mapping[str, Any]]
"""What the model gives to one block, for each batch."""

Found = TypeVar("Found")


class Evaluator(Blocks):
    """Runs subnetworks of one model over calibration windows.

    All plans asked for at once go through the model in lock step: they share one residual stream until the first
    sublayer in which they differ, and streams that meet the same sublayer are batched.

    Args:
        model: Dense model, left as it is.
        family: Where its parts are.
        tokens: int64 [n, T], or batches [b_i, T_i].
        batch_size: Windows in one batch, where `tokens` is one tensor.
        counted: Which next tokens the objectives count, bool [n, T-1] or batches of it; all by default.
        state_bytes: Bound on the residual streams held at once.
        residency: Where the weights are.
        journal: Values already computed; none are kept by default.
    """

    answers_questions = False

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        tokens: Tensor | Sequence[Tensor],
        batch_size: int = 4,
        *,
        counted: Tensor | Sequence[Tensor] | None = None,
        state_bytes: int = STATE_BYTES,
        residency: Residency | None = None,
        journal: Journal | None = None,
    ) -> None:
        super().__init__(model, family)

        def batched(each: Tensor | Sequence[Tensor]) -> list[Tensor]:
            return list(each.split(batch_size)) if isinstance(each, Tensor) else list(each)

        self.batches = batched(tokens)
        self.counted = None if counted is None else batched(counted)
        self.state_bytes = state_bytes
        self.residency = residency or Residency()
        self.journal = Journal() if journal is None else journal
        self.base: Gone = {}
        self.emulations: Mapping[Sublayer, nn.Module] = {}
        self._head = Head(model, family)
        self._dense: dict[int, tuple[Tensor, Tensor]] = {}
        self._texts: dict[int, str] = {}

    def view(self, base: Collection[Sublayer], emulations: Mapping[Sublayer, nn.Module] | None = None) -> "Evaluator":
        """The same model and tokens, seen from a subnetwork.

        Whatever is asked of the view has `base` removed as well, and where it removes a sublayer that `emulations`
        holds, the emulation takes its place; so every metric can be taken of a pruned or of a recovered model.
        """
        other = copy.copy(self)
        other.emulations = emulations or {}
        other.base = dict.fromkeys(base)
        return other

    def part(self, share: float) -> "Evaluator":
        """The same view on the first batches only, at least one."""
        many = max(1, round(share * len(self.batches)))
        if many == len(self.batches):
            return self
        other = copy.copy(self)
        other.batches = self.batches[:many]
        return other

    @property
    def windows(self) -> int:
        """n, windows in all batches."""
        return sum(len(batch) for batch in self.batches)

    @property
    def text(self) -> list[str]:
        """Digests of all batches."""
        return [self._text(number) for number in range(len(self.batches))]

    def mine(self) -> list[int]:
        """Numbers of the batches that this process computes."""
        rank, processes = parallel.process()
        return list(range(rank, len(self.batches), processes))

    def span(self, number: int) -> slice:
        """Where batch `number` lies among all windows."""
        first = sum(len(batch) for batch in self.batches[:number])
        return slice(first, first + len(self.batches[number]))

    def window_loss(self, hidden: Tensor, number: int) -> Tensor:
        """Mean loss of every window of a batch from what leaves the last block [b, T, D]: float64 [b], nats/token."""
        return self._reduce(self._head.cross_entropy(hidden, self.batches[number][:, 1:]), number)

    def head_loss(self, hidden: Tensor, batch: Tensor) -> Tensor:
        """Next-token cross-entropy of every window, float64 [b] in nats/token; logits come in chunks."""
        return self._head.cross_entropy(hidden, batch[:, 1:]).double().mean(1).cpu()

    @torch.inference_mode()
    def values(
        self, plans: Sequence[Gone], objective: Objective = "loss", advance: Callable[[], None] | None = None
    ) -> Tensor:
        """Objective of many subnetworks.

        Args:
            plans: Subnetworks.
            objective: "loss" (next-token cross-entropy), "kl" (dense || plan) or "logits" (distance to the dense
                model's).
            advance: Called `len(plans)` times for every batch.

        Returns:
            float64 [len(plans), n]: means over the counted tokens of every window, nats/token (loss, kl).
        """
        table = torch.zeros(len(plans), self.windows, dtype=torch.float64)
        plans = [self.complete(plan) for plan in plans]
        order = sorted(range(len(plans)), key=lambda p: (min(plans[p], default=_LAST), p))
        for numbers in self.rounds():
            tensors = 1 + self.family.parallel + len(self.sources(plans))
            for group in self._groups(order, numbers, tensors):
                for number, rows in self._group_rows(numbers, [plans[p] for p in group], objective):
                    table[group, self.span(number)] = rows
                    for _ in group if advance else ():
                        advance()  # type: ignore[misc]
        return parallel.gather(table)

    def complete(self, plan: Gone) -> Gone:
        """The plan with what the view removes, every emulation in its place."""
        whole = {**self.base, **plan}
        return {s: self.emulations.get(s) if module is None else module for s, module in whole.items()}

    def _group_rows(
        self, numbers: list[int], plans: Sequence[Gone], objective: Objective
    ) -> Iterator[tuple[int, Tensor]]:
        """Rows float64 [plans, b] of every batch, from the journal where they were computed before.

        Plans are journalled as they were computed together: what shares a matrix product decides its last bits.
        """
        key = [objective, [describe(plan) for plan in plans], [self._text(number) for number in numbers]]
        if (known := self.journal.recall(key)) is not None:
            for number, rows in zip(numbers, known, strict=True):
                yield number, torch.tensor(rows, dtype=torch.float64)
            return
        if objective != "loss":
            self._remember_dense(numbers)
        computed = []
        for number, finals in self.finals(numbers, plans):
            rows = self._score(finals, number, objective)
            computed.append(rows.tolist())
            yield number, rows
        self.journal.keep(key, computed)

    def _text(self, number: int) -> str:
        """Digest of a batch's tokens and of which of them count."""
        if number not in self._texts:
            batch = self.batches[number]
            parts = [str(tuple(batch.shape)).encode(), batch.cpu().numpy().tobytes()]
            if self.counted is not None:
                parts.append(self.counted[number].cpu().numpy().tobytes())
            self._texts[number] = hashlib.sha256(b"".join(parts)).hexdigest()
        return self._texts[number]

    def loss(self, gone: Gone) -> Tensor:
        """Loss of one subnetwork, float64 [n] (nats/token, one value a window)."""
        return self.values([gone])[0]

    def leave_one_out(
        self, candidates: Iterable[Sublayer], base: Collection[Sublayer] = (), advance: Any = None
    ) -> tuple[Tensor, dict[Sublayer, Tensor]]:
        """Loss of `base` removed, and of `base` and one candidate removed, for every candidate.

        Returns:
            Base loss float64 [n] and candidate -> loss float64 [n], nats/token.
        """
        candidates = sorted(candidates)
        gone: dict[Sublayer, None] = dict.fromkeys(base)
        table = self.values([gone, *({**gone, candidate: None} for candidate in candidates)], advance=advance)
        return table[0], dict(zip(candidates, table[1:], strict=True))

    @torch.inference_mode()
    def walk(self, visit: Visitor, gone: Gone | None = None) -> None:
        """Run one subnetwork and show every kept sublayer's input and output to `visit`."""
        gone = self.complete(gone or {})
        for numbers in self.rounds():
            streams = self.embedded(numbers)
            taps: dict[int, Taps] = {number: {} for number in numbers}
            for index in range(len(self.blocks)):
                with self.residency.block(index):
                    for number in numbers:
                        hidden, kwargs = streams[number]
                        for kind in KINDS:
                            sublayer = Sublayer(index, kind)
                            if sublayer in gone and gone[sublayer] is None:
                                continue
                            emulation = gone.get(sublayer)
                            after = self.run_and_tap(sublayer, hidden, kwargs[index], emulation, taps[number])
                            if sublayer not in gone:
                                visit(number, sublayer, hidden, after)
                            hidden = after
                        streams[number] = hidden, kwargs

    def each_ffn(
        self, blocks: Collection[int], visit: Callable[[Sublayer, list[Tensor], Given, Sequence[Taps]], Found],
        advance: Callable[[], None],
    ) -> dict[Sublayer, Found]:  # fmt: skip
        """Look at some FFNs of the dense model, one after another, on its own streams.

        Args:
            blocks: Whose FFN is looked at.
            visit: (FFN, streams before it, what is given, taps) -> what is found. It takes the streams through the FFN,
                in place.
            advance: Called after every block up to the last of these.
        """
        found: dict[Sublayer, Found] = {}
        embedded = [self.embed(batch) for batch in self.batches]
        streams, arguments = [hidden for hidden, _ in embedded], [each for _, each in embedded]
        taps: list[Taps] = [{} for _ in streams]
        for index in range(max(blocks, default=-1) + 1):
            given = [each[index] for each in arguments]
            with self.residency.block(index):
                for kind in KINDS:
                    sublayer = Sublayer(index, kind)
                    if kind == "ffn" and index in blocks:
                        found[sublayer] = visit(sublayer, streams, given, taps)
                        continue
                    for number, hidden in enumerate(streams):
                        streams[number] = self.run_and_tap(sublayer, hidden, given[number], None, taps[number])
            for of_batch in taps:
                of_batch.clear()
            advance()
        return found

    def rounds(self, numbers: list[int] | None = None) -> list[list[int]]:
        """Batches that go through the blocks together: one at a time, or all when blocks come from disk.

        Args:
            numbers: Of these; by default of those that this process computes.
        """
        some = self.mine() if numbers is None else numbers
        return [[number] for number in some] if self.residency.keeps_blocks else [some]

    def _groups(self, order: list[int], numbers: list[int], tensors: int) -> list[list[int]]:
        size = tensors * self.model.config.hidden_size * self.model.dtype.itemsize
        held = sum(self.batches[number].numel() for number in numbers) * size
        many = max(1, self.state_bytes // max(1, held))
        return [order[first : first + many] for first in range(0, len(order), many)]

    def embedded(self, numbers: list[int]) -> dict[int, tuple[Tensor, Arguments]]:
        """Batch number -> what enters block 0, float [b, T, D], and what the model gives to every block."""
        with self.residency.embedding():
            return {number: self.embed(self.batches[number]) for number in numbers}

    def finals(self, numbers: list[int], plans: Sequence[Gone]) -> Iterator[tuple[int, list[Tensor]]]:
        """For every batch, what leaves the last block under each plan, [b, T, D]."""
        entering = self.embedded(numbers)
        arguments = {number: kwargs for number, (_, kwargs) in entering.items()}
        states = {number: [State(hidden, list(range(len(plans))))] for number, (hidden, _) in entering.items()}
        del entering
        sources = self.sources(plans)
        for index in range(len(self.blocks)):
            with self.residency.block(index):
                for number in numbers:
                    for kind in KINDS:
                        kwargs = arguments[number][index]
                        states[number] = self._advance(Sublayer(index, kind), states[number], kwargs, plans, sources)
        with self.residency.head():
            for number in numbers:
                finals: list[Any] = [None] * len(plans)
                for state in states.pop(number):
                    for plan in state.plans:
                        finals[plan] = state.hidden
                yield number, finals

    def _advance(
        self,
        sublayer: Sublayer,
        states: list[State],
        kwargs: Mapping[str, Any],
        plans: Sequence[Gone],
        sources: Collection[int],
    ) -> list[State]:
        """Take every stream through one sublayer, splitting those whose plans differ in it."""
        out: list[State] = []
        keeping: list[State] = []
        keeps = {*sources, sublayer.block} if self.family.parallel else sources
        for state in states:
            variants: dict[int, tuple[nn.Module, list[int]]] = {}
            kept, cut = [], []
            for plan in state.plans:
                if sublayer not in plans[plan]:
                    kept.append(plan)
                elif (emulation := plans[plan][sublayer]) is None:
                    cut.append(plan)
                else:
                    variants.setdefault(id(emulation), (emulation, []))[1].append(plan)
            if cut:
                out.append(State(state.hidden, cut, only(state.taps, keeps)))
            for emulation, members in variants.values():
                taps = dict(state.taps)
                hidden = self.run_and_tap(sublayer, state.hidden, kwargs, emulation, taps)
                out.append(State(hidden, members, only(taps, keeps)))
            if kept:
                keeping.append(State(state.hidden, kept, only(state.taps, keeps)))
        self._run_together(sublayer, keeping, kwargs, keeps)
        return out + keeping

    def _run_together(
        self, sublayer: Sublayer, states: list[State], kwargs: Mapping[str, Any], sources: Collection[int]
    ) -> None:
        """Advance streams through one sublayer, several in a forward while they are small, in place."""
        if not states:
            return
        rows, length = states[0].hidden.shape[:2]
        device = states[0].hidden.device.type
        many = max(1, FORWARD_TOKENS.get(device, 4096) // (rows * length))
        own = emulation_in(self.blocks[sublayer.block], self.family, sublayer.kind)
        if sources_of(own):
            many = 1  # it reads what is each stream's own
        for first in range(0, len(states), many):
            part = states[first : first + many]
            together = torch.cat([state.hidden for state in part]) if len(part) > 1 else part[0].hidden
            taps = dict(part[0].taps) if len(part) == 1 else self._shared(sublayer, part)
            after = self.run_and_tap(sublayer, together, tile(kwargs, rows, len(part)), None, taps)
            for state, hidden in zip(part, after.split(rows), strict=True):
                state.hidden = hidden
            if sublayer.kind == "attention" and sublayer.block in sources:
                for state, tap in zip(part, taps[sublayer.block].split(rows), strict=True):
                    state.taps[sublayer.block] = tap

    def _shared(self, sublayer: Sublayer, states: Sequence[State]) -> Taps:
        """What several streams know when they go through a sublayer together: what entered the block."""
        entered = [self.entered_of(sublayer, state.taps) for state in states]
        if all(start is None for start in entered):
            return {}
        starts = [state.hidden if s is None else s for state, s in zip(states, entered, strict=True)]
        return {sublayer.block: Tap(entered=torch.cat(starts))}

    def _remember_dense(self, numbers: list[int]) -> None:
        missing = [number for number in numbers if number not in self._dense]
        if missing:
            for number, finals in self.finals(missing, [{}]):
                self._dense[number] = finals[0], self._head.normaliser(finals[0])

    def _score(self, finals: list[Tensor], number: int, objective: Objective) -> Tensor:
        """Rows float64 [plans, b] of the table; equal finals are scored once."""
        distinct = {id(hidden): hidden for hidden in finals}
        if objective == "loss":
            targets = self.batches[number][:, 1:]
            scored = {key: self._head.cross_entropy(hidden, targets) for key, hidden in distinct.items()}
        elif objective == "kl":
            found = self._head.divergence(*self._dense[number], list(distinct.values()))
            scored = dict(zip(distinct, found, strict=True))
        else:
            dense, _ = self._dense[number]
            scored = {key: self._head.logit_distance(dense, hidden) for key, hidden in distinct.items()}
        return torch.stack([self._reduce(scored[id(hidden)], number) for hidden in finals])

    def _reduce(self, values: Tensor, number: int) -> Tensor:
        wide = values.double().cpu()
        if self.counted is None:
            return wide.mean(1)
        counted = self.counted[number].double()
        return (wide * counted).sum(1) / counted.sum(1)
