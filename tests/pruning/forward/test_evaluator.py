import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

import pruning
from pruning.families import FAMILIES
from pruning.forward.evaluator import Evaluator
from pruning.forward.streams import describe
from pruning.models.surgery import apply_plan
from pruning.plan import KINDS, Plan, Sublayer
from pruning.variants.bias import BiasEmulation
from pruning.variants.low_rank import LowRankEmulation
from tests.conftest import plain_logits

EVERY = [Sublayer(block, kind) for block in range(6) for kind in KINDS]
PLANS = [
    {},
    {Sublayer(0, "attention"): None},
    {Sublayer(0, "attention"): None, Sublayer(3, "ffn"): None},
    {Sublayer(2, "ffn"): None, Sublayer(2, "attention"): None},
    {Sublayer(5, "ffn"): None},
]


def tokens(rows: int = 6, length: int = 24) -> torch.Tensor:
    return torch.randint(3, 320, (rows, length), generator=torch.Generator().manual_seed(1))


def plain_loss(logits, ids):
    return functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").double().mean(1)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_many_plans_at_once_equal_one_cut_model_each(pico, model_type):
    family, ids = FAMILIES[model_type], tokens()
    table = Evaluator(pico(model_type), family, ids, batch_size=2).values(PLANS)
    for plan, row in zip(PLANS, table, strict=True):
        model = pico(model_type)
        apply_plan(model, family, Plan(6, dict.fromkeys(plan, "none")), {})
        torch.testing.assert_close(row, plain_loss(plain_logits(model, ids), ids), atol=1e-5, rtol=0)


def test_divergence_and_logit_distance_equal_whole_logits(pico):
    family, ids = FAMILIES["llama"], tokens()
    evaluator = Evaluator(pico("llama"), family, ids, batch_size=4)
    dense = plain_logits(pico("llama"), ids)
    model = pico("llama")
    apply_plan(model, family, Plan(6, dict.fromkeys(PLANS[2], "none")), {})
    pruned = plain_logits(model, ids)
    p, q = dense.log_softmax(-1), pruned.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).double().mean(1)
    torch.testing.assert_close(evaluator.values([PLANS[2]], "kl")[0], kl, atol=1e-5, rtol=0)
    distance = (pruned - dense).norm(dim=-1).double().mean(1)
    torch.testing.assert_close(evaluator.values([PLANS[2]], "logits")[0], distance, atol=1e-4, rtol=1e-4)


def test_emulations_take_part_and_plans_that_differ_only_in_them_are_apart(pico):
    evaluator = Evaluator(pico("llama"), FAMILIES["llama"], tokens())
    one, other = BiasEmulation(128), BiasEmulation(128)
    other.bias.data += 1.0
    cut, zero, shifted = evaluator.values([{Sublayer(1, "attention"): m} for m in (None, one, other)])
    torch.testing.assert_close(cut, zero, atol=1e-6, rtol=0)
    assert (shifted - cut).abs().min() > 1e-3


def test_shared_prefixes_are_computed_once(pico):
    evaluator = Evaluator(pico("llama"), FAMILIES["llama"], tokens(), batch_size=6)
    rows = 0
    run = evaluator.run_sublayer

    def counted(sublayer, hidden, *rest):
        nonlocal rows
        rows += len(hidden)
        return run(sublayer, hidden, *rest)

    evaluator.run_sublayer = counted
    evaluator.values([{s: None} for s in EVERY])
    # Candidate i leaves the shared stream at its own sublayer and runs the 11 - i after it.
    assert rows == 6 * (sum(11 - i for i in range(12)) + 11)


def test_values_do_not_depend_on_batches_or_on_the_memory_bound(pico):
    model, family = pico("mistral"), FAMILIES["mistral"]
    reference = Evaluator(model, family, tokens()).values(PLANS)
    for evaluator in (
        Evaluator(model, family, tokens(), batch_size=1),
        Evaluator(model, family, tokens(), batch_size=5),
        Evaluator(model, family, tokens(), state_bytes=1),
    ):
        torch.testing.assert_close(evaluator.values(PLANS), reference, atol=1e-5, rtol=0)


def test_only_counted_tokens_count(pico):
    ids = tokens()
    counted = torch.zeros(6, 23, dtype=torch.bool)
    counted[:, 10:12] = True
    evaluator = Evaluator(pico("llama"), FAMILIES["llama"], ids.split(2), counted=counted.split(2))
    logits = plain_logits(pico("llama"), ids)
    losses = functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(evaluator.loss({}), losses[:, 10:12].double().mean(1), atol=1e-5, rtol=0)


WORKER = """
import sys
import torch
from transformers import AutoModelForCausalLM
from pruning.forward import parallel
from pruning.console import Reporter
from pruning.families import FAMILIES
from pruning.importance import Sampling, metric
from pruning.plan import Sublayer, Unit
from pruning.forward.evaluator import Evaluator
from pruning.forward.streams import describe

torch.set_num_threads(1)
parallel.start()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
ids = torch.randint(3, 320, (6, 24), generator=torch.Generator().manual_seed(1))
plans = [{}, *({Sublayer(block, "attention"): None} for block in range(6))]
table = Evaluator(model, FAMILIES["llama"], ids, batch_size=1).values(plans)
units = [Unit(block, kind) for block in range(6) for kind in ("attention", "ffn")]
evaluator = Evaluator(model, FAMILIES["llama"], ids, batch_size=1)
names = ("cosine", "bip", "kl", "taylor", "shapley", "logit-shapley", "random")
scores = {n: metric(n).load()(evaluator, units, Sampling(samples=1, depth=3), Reporter()).values for n in names}
table = torch.cat([table.flatten(), *(torch.tensor(list(s.values()), dtype=torch.float64) for s in scores.values())])
rank, processes = parallel.process()
torch.save((table, processes), f"{sys.argv[2]}.{rank}")
"""


@pytest.mark.slow
def test_two_processes_give_the_same_losses_and_scores_bit_for_bit(pico_directory, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    environment = {**os.environ, "PYTHONPATH": str(Path(pruning.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    tables = []
    for processes in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        paths = [str(tmp_path / "worker.py"), str(pico_directory("llama")), str(tmp_path / f"of{processes}")]
        subprocess.run([sys.executable, *launcher, *paths], env=environment, check=True, timeout=120)
        for rank in range(processes):
            table, seen = torch.load(tmp_path / f"of{processes}.{rank}")
            assert seen == processes
            tables.append(table)
    assert torch.equal(tables[0], tables[1])
    assert torch.equal(tables[0], tables[2])


def test_adapters_of_rank_1_have_names_that_tell_them_apart():
    names = set()
    for seed in (0, 1):
        module = LowRankEmulation(8, 1)
        column = torch.empty_strided((8, 1), (1, 8))  # as the last eigenvector of a matrix comes
        module.up.weight.data = column.copy_(torch.randn(8, 1, generator=torch.Generator().manual_seed(seed)))
        names.add(tuple(describe({Sublayer(2, "attention"): module})))
    assert len(names) == 2
