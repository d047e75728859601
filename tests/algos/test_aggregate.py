"""Weights against loops, and the one gradient of every split."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rlalign import algos
from rlalign.algos import AlgoError
from rlalign.config import AlgoConfig
from rlalign.types import TrainBatch
from rlalign.verify import reference

MODES = [
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "token-mean-local",
]


def cfg(**fields) -> AlgoConfig:
    return algos.resolve(AlgoConfig(beta=0.0, **fields), engine_shares_parameters=True)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.lists(st.integers(0, 1), min_size=4, max_size=4)),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from(MODES),
    st.sampled_from(["sample", "prompt"]),
)
def test_weights_of_any_batch(rows, mode, weighting):
    config = cfg(loss_agg_mode=mode, prompt_weighting=weighting)
    group, mask = [g for g, _ in rows], [[float(m) for m in row] for _, row in rows]
    ours_BT = algos.aggregation_weights(
        torch.tensor(mask), torch.tensor(group), config, max_completion_length=4
    )
    expected = torch.tensor(reference.weights(mask, group, config, 4))
    torch.testing.assert_close(ours_BT, expected, rtol=1e-6, atol=0)
    if any(map(any, mask)) and "mean-token-sum" not in mode:
        assert float(ours_BT.sum()) == pytest.approx(1.0, abs=1e-6)


def test_no_token_at_all_gives_zero_weights():
    for mode in MODES:
        for weighting in ("sample", "prompt"):
            weight_BT = algos.aggregation_weights(
                torch.zeros(3, 2),
                torch.tensor([0, 0, 1]),
                cfg(loss_agg_mode=mode, prompt_weighting=weighting),
                max_completion_length=2,
            )
            assert weight_BT.tolist() == [[0.0, 0.0]] * 3


def test_the_norm_mode_divides_by_sequences_and_by_the_factor():
    mask_BT, group_id_B = torch.ones(4, 3), torch.tensor([0, 0, 1, 1])
    for factor, expected in ((None, 1 / (4 * 50)), (7.0, 1 / (4 * 7))):
        config = cfg(loss_type="dr_grpo", loss_scale_factor=factor)
        weight_BT = algos.aggregation_weights(mask_BT, group_id_B, config, max_completion_length=50)
        assert weight_BT.unique().tolist() == pytest.approx([expected])


def test_an_unresolved_config_is_an_error():
    with pytest.raises(AlgoError, match="resolve"):
        algos.aggregation_weights(
            torch.ones(1, 1), torch.tensor([0]), AlgoConfig(), max_completion_length=1
        )


class TinyPolicy(nn.Module):
    """Enough of a language model for a gradient: previous token -> next token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7)

    def logp(self, batch: TrainBatch) -> torch.Tensor:
        logp_BT = torch.zeros_like(batch.mask_BT)
        for i, sequence in enumerate(batch.sequences):
            n = int(batch.completion_len_B[i])
            tokens = torch.tensor(sequence)
            logits = self.head(self.table(tokens[-n - 1 : -1]))
            chosen = torch.log_softmax(logits, -1).gather(1, tokens[-n:, None])[:, 0]
            logp_BT = logp_BT.index_put((torch.full((n,), i), torch.arange(n)), chosen)
        return logp_BT


def random_batch() -> TrainBatch:
    generator = torch.Generator().manual_seed(1)
    lengths = [3, 1, 6, 4, 2, 6, 5, 3]
    sequences = tuple(
        tuple(torch.randint(0, 7, (n + 2,), generator=generator).tolist()) for n in lengths
    )
    mask_BT = (torch.arange(6) < torch.tensor(lengths)[:, None]).float()
    old_BT = -torch.rand(8, 6, generator=generator) - 1.5
    return TrainBatch(
        sequences=sequences,
        completion_len_B=torch.tensor(lengths),
        group_id_B=torch.tensor([4, 2, 4, 2, 4, 9, 9, 9]),
        mask_BT=mask_BT,
        reward_B=torch.tensor([1.0, 0, 0, 1, 0, 1, 1, 0]),
        logp_rollout_BT=old_BT,
        logp_old_BT=old_BT,
    )


def gradient(model: TinyPolicy, batch: TrainBatch, config: AlgoConfig, parts) -> torch.Tensor:
    """Accumulated over micro-batches, as a trainer does it."""
    model.zero_grad()
    for rows in parts:
        micro = batch.rows(rows)
        if algos.depends_on_split(config):
            weight_BT = algos.aggregation_weights(
                micro.mask_BT, micro.group_id_B, config, max_completion_length=6
            )
            micro = micro.replace(weight_BT=weight_BT / len(parts))
        algos.policy_loss(model.logp(micro), micro, config).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


SPLITS = [[[0, 1, 2], [3, 4, 5, 6, 7]], [[7], [3, 5], [0, 6, 1], [2, 4]], [[i] for i in range(8)]]


# CoPG takes whole groups (tests/trainer/test_copg.py), trees weigh edges (test_tree_pruning.py)
ROW_BY_ROW = [
    name
    for name in algos.names()
    if not algos.get(name).couples_rows and algos.get(name).defaults.get("adv_estimator") != "tree"
]


@pytest.mark.parametrize("name", ROW_BY_ROW)
def test_the_gradient_of_a_model_does_not_depend_on_the_split(name):
    config = algos.resolve(AlgoConfig(loss_type=name, beta=0.0), engine_shares_parameters=False)
    batch, model = random_batch(), TinyPolicy()
    advantage_BT = algos.compute_advantages(
        batch.reward_B, batch.reward_B, batch.group_id_B, batch.mask_BT, config
    )
    weight_BT = algos.aggregation_weights(
        batch.mask_BT, batch.group_id_B, config, max_completion_length=6
    )
    batch = batch.replace(advantage_BT=advantage_BT, weight_BT=weight_BT)
    whole = gradient(model, batch, config, [list(range(8))])
    assert whole.abs().max() > 0
    for split in SPLITS:
        error = (gradient(model, batch, config, split) - whole).norm() / whole.norm()
        if algos.depends_on_split(config):
            assert error > 1e-2
        else:
            assert error < 1e-6
