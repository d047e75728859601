"""Rows that begin alike: each token of their tree once, and the numbers of rows that run alone."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoConfig

from rlalign.models.pack import make_pack
from rlalign.models.random import init_model, small_config
from rlalign.trainer.batch import bare_batch
from rlalign.trainer.packing import load
from rlalign.trainer.policy import Policy
from rlalign.trainer.rows import plan_rows, rows_to_run

VOCAB = 61
SHAPE = dict(
    vocab=VOCAB, hidden=32, layers=2, heads=4, kv_heads=2, mlp=48, max_positions=128, tied=True,
    init_std=0.2,
)  # fmt: skip
FAMILIES = {
    "qwen2": {},
    "mistral": {"sliding_window": 7},
    "gemma2": {"attn_logit_softcapping": 2.0, "sliding_window": 5},
}
PHI = "phi in float64"  # it normalises in the type of its input, RMSNorms compute in float32


def forest(seed: int, prompts: int = 3, rows: int = 9, longest: int = 40):
    """Trees of rows: tails of any length behind any beginning of another row, also of its prompt
    alone, and of another prompt; equal rows, rows that others continue, rows without completion."""
    rng = random.Random(seed)

    def tokens(count):
        return tuple(rng.randrange(VOCAB) for _ in range(count))

    drawn, header = [], tokens(rng.randint(0, 4))
    for _ in range(prompts):
        prompt = header + tokens(rng.randint(1, 9))
        group = [prompt]
        for _ in range(rows):
            kept = rng.choice(group)
            kept = kept[: rng.randint(len(prompt), len(kept))]
            group.append(kept + tokens(rng.choice((0, 0, 1, 1, 5, longest - len(kept)))))
        drawn += [(row, len(row) - len(prompt)) for row in group]
    different = (*drawn[-1][0][:-1], (drawn[-1][0][-1] + 1) % VOCAB)  # in the last token alone
    drawn += [drawn[-1], (different, drawn[-1][1])]
    rng.shuffle(drawn)
    return bare_batch(*zip(*drawn, strict=True))


def tree(rows):
    """The different beginnings of `rows`."""
    return {row[:length] for row in rows for length in range(1, len(row) + 1)}


def run_tokens(batch, share_prefixes=True):
    """Token ids that go through the model, each behind its path."""
    plan = plan_rows(batch, share_prefixes=share_prefixes)
    pack = make_pack(plan.sequences, plan.parents)
    paths = []
    for i, sequence in enumerate(plan.sequences):
        first, parent = pack.path_start[i], plan.parents[i]
        context = parent[1] if parent else 0
        path = pack.input_ids_N[pack.path_M[first : first + context + len(sequence)]].tolist()
        paths += [tuple(path[: context + n + 1]) for n in range(len(sequence))]
    assert len(paths) == len(pack.input_ids_N)
    return paths


@pytest.mark.parametrize("seed", range(20))
def test_each_node_of_the_tree_of_rows_runs_once(seed):
    batch = forest(seed)
    lengths = batch.completion_len_B.tolist()
    rows = [row[:-1] for row, n in zip(batch.sequences, lengths, strict=True) if n]
    paths = run_tokens(batch)
    assert len(paths) == len(set(paths))
    assert set(paths) == tree(rows)
    apart = plan_rows(batch, share_prefixes=False)
    assert sum(map(len, apart.sequences)) == sum(map(len, rows))


@pytest.mark.parametrize("seed", range(20))
def test_each_token_is_predicted_from_the_one_before_it_and_once(seed):
    batch = forest(seed)
    plan = plan_rows(batch, share_prefixes=True)
    pack = make_pack(plan.sequences, plan.parents)
    found = plan.predictions(pack)
    beginnings = {}
    lengths = batch.completion_len_B.tolist()
    width = batch.mask_BT.shape[1]
    at = {cell: m for m, cell in enumerate(plan.cell_M.tolist())}
    assert len(at) == sum(lengths)
    for b, (row, length) in enumerate(zip(batch.sequences, lengths, strict=True)):
        for t in range(length):
            n = len(row) - length + t
            u = int(found.index_M[at[b * width + t]])
            assert found.target_U[u] == row[n]
            assert pack.position_ids_N[found.place_U[u]] == n - 1
            assert pack.input_ids_N[found.place_U[u]] == row[n - 1]
            assert beginnings.setdefault(u, row[: n + 1]) == row[: n + 1]
    assert len(beginnings) == len(found.place_U) == len(set(beginnings.values()))


def test_a_sequence_is_a_leaf():
    """A row that another one continues, and the second of equals, need none."""
    rows = [(1, 2, 3), (1, 2, 3, 4, 5), (1, 2, 3), (1, 2, 3, 4, 5), (1, 2, 9, 9), (7, 7)]
    plan = plan_rows(bare_batch(rows, [1] * 6), share_prefixes=True)
    assert [tuple(s.tolist()) for s in plan.sequences] == [(7,), (1, 2, 9), (3, 4)]
    assert plan.parents == [None, None, (1, 2)]


def build(family: str, packing: bool = True) -> Policy:
    if family == PHI:
        config = AutoConfig.for_model(
            "phi", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=48, initializer_range=0.2, bos_token_id=None,
            eos_token_id=1, attention_dropout=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
        )  # fmt: skip
        return Policy(init_model(config, seed=0).double(), packing=packing)
    config = small_config(family, eos_token_id=1, pad_token_id=None, **SHAPE, **FAMILIES[family])
    return Policy(init_model(config, seed=0), packing=packing)


@pytest.mark.parametrize("family", [*FAMILIES, PHI])
@pytest.mark.parametrize("seed", range(3))
def test_log_probs_and_gradients_are_those_of_rows_that_run_alone(family, seed):
    """Which are padded, and go through transformers' own attention."""
    batch = forest(seed)
    assert len(run_tokens(batch)) < 0.6 * len(run_tokens(batch, share_prefixes=False))
    dtype, tolerance = (torch.float64, 1e-12) if family == PHI else (torch.float32, 1e-5)
    rng = torch.Generator().manual_seed(seed)
    weight_BT = torch.randn(batch.mask_BT.shape, generator=rng, dtype=dtype)
    found = []
    for packing in (True, False):
        policy = build(family, packing)
        out = policy(batch, 0.8, entropy=True)
        (weight_BT * (out.logp_BT + 0.3 * out.entropy_BT)).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in policy.parameters()])
        found.append((out.logp_BT.detach(), out.entropy_BT.detach(), gradient))
    for ours, alone in zip(*found, strict=True):
        assert ours.dtype == dtype
        assert float((ours - alone).norm()) <= tolerance * float(alone.norm())


@pytest.mark.parametrize("grad_params", ["lm_head", "embed_tokens"])
def test_norms_of_gradients_are_those_of_rows_that_run_alone(grad_params):
    policy, batch = build("qwen2"), forest(5, prompts=2)
    found = policy(batch, 0.8, grad_params=grad_params).norm_B
    single = [batch.rows([b]) for b in range(len(batch))]
    expected = torch.cat([policy(row, 0.8, grad_params=grad_params).norm_B for row in single])
    assert (found > 0).sum() > 10
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-5)


def test_the_head_sees_each_prediction_once():
    policy, batch, seen = build("qwen2"), forest(1), []
    policy.head.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    policy(batch)
    lengths = batch.completion_len_B.tolist()
    rows = zip(batch.sequences, lengths, strict=True)
    predicted = {row[:n] for row, c in rows for n in range(len(row) - c + 1, len(row) + 1)}
    assert seen == [len(predicted)]
    assert len(predicted) < 0.75 * sum(lengths)


@pytest.mark.parametrize("seed", range(5))
def test_the_plan_of_micro_batches_counts_what_runs(seed):
    batch = forest(seed)
    batch = batch.rows(batch.completion_len_B.nonzero().flatten().tolist())
    order, rows = rows_to_run(batch, share_prefixes=True)
    assert sorted(order) == list(range(len(batch)))
    for first in range(0, len(rows), 4):
        run = list(range(first, min(first + 7, len(rows)), 2))
        together = batch.rows([order[at] for at in run])
        assert load(run, rows) == len(run_tokens(together))


def test_rows_that_run_alone_come_longest_first():
    """What is padded travels with its like."""
    batch = bare_batch([(5,) * n for n in (10, 90, 12, 88, 11, 91)], [1] * 6)
    order, rows = rows_to_run(batch, share_prefixes=False)
    assert order == [5, 1, 3, 2, 4, 0]
    assert load(range(6), rows) == sum((9, 89, 11, 87, 10, 90))
    assert len({row.key for row in rows}) == 6


@pytest.mark.parametrize("share_prefixes", [True, False])
def test_a_completion_without_a_prompt_is_refused(share_prefixes):
    with pytest.raises(ValueError, match="prompt token"):
        plan_rows(bare_batch([(1, 2), (3, 4)], [1, 2]), share_prefixes=share_prefixes)
