"""What a diffusion language model reads when its log-probs are taken: the right tokens masked, and
those of the sampler's own masks give the sampler's own log-probs.

Legend: B rows, J passes, T completion tokens.
"""

import pytest
import torch

from rlalign import algos
from rlalign.config.schema import DiffusionConfig
from rlalign.models.masked_random import masked_tokenizer
from rlalign.rollout.engine import GenerateRequest, SamplingParams
from rlalign.rollout.masked_diffusion import MaskedDiffusionEngine
from rlalign.trainer.masked_policy import make_passes
from rlalign.types import Group, Prompt, Sample
from tests.trainer.masked_cases import EOS, MASK, Case, make_groups, naive_logp, settings, tiny_lm


def ended_groups() -> list[Group]:
    """Completions of six tokens: an end in the middle, at the last place, two, none, at once."""
    rows = [(1, 2, EOS, 3, 4, 5), (1, 2, 3, 4, 5, EOS), (1, EOS, 2, EOS, 3, 4), (1,) * 6]
    rows.append((EOS, 1, 2, 3, 4, 5))
    samples = [Sample("p", i, row, (-1.0,) * 6, "stop", ()) for i, row in enumerate(rows)]
    return [Group(Prompt("p", (7, 8, 9), ""), tuple(samples))]


def ended_case(policy: str, *overrides: str) -> Case:
    config = settings(f"rollout.diffusion.eos_policy={policy}", *overrides)
    return Case(config, ended_groups(), [1.0, 0.0, 0.5, 0.0, 1.0])


INSIDE = [3, 6, 2, 6, 1]  # tokens up to the first end


@pytest.mark.parametrize("policy", ["all", "visible", "masked"])
def test_tokens_behind_the_end(policy):
    case = ended_case(policy)
    hidden_BJT, weight_BJT = case.batch.masks.hidden_BJT, case.batch.masks.weight_BJT
    for b, inside in enumerate(INSIDE):
        behind_JT, scored_JT = hidden_BJT[b, :, inside:], weight_BJT[b, :, inside:] != 0
        if policy == "all":
            assert scored_JT.any() or inside == 6
            assert case.batch.mask_BT[b].sum() == 6
        else:
            assert not scored_JT.any()
            assert case.batch.mask_BT[b].sum() == inside
            assert bool(behind_JT.all()) if policy == "masked" else not behind_JT.any()
        counts = (weight_BJT[b] != 0).sum(1)
        assert sorted(counts.unique().tolist())[0] >= 1
        assert counts.max() == (6 if policy == "all" else inside)


@pytest.mark.parametrize("policy", ["visible", "masked"])
def test_what_is_behind_the_end_is_seen_or_not(policy):
    """Changing those tokens changes the log-probs only where they are visible."""
    case = ended_case(policy)
    before_BJT = case.likelihood.logp(case.engine, case.batch, case.config, case.engine.world)
    sequences = list(case.batch.sequences)
    sequences[0] = (*sequences[0][:-1], 9)
    changed = case.batch.replace(sequences=tuple(sequences))
    after_BJT = case.likelihood.logp(case.engine, changed, case.config, case.engine.world)
    assert before_BJT[1:].equal(after_BJT[1:])
    assert before_BJT[0].equal(after_BJT[0]) is (policy == "masked")


def test_prompts_are_masked_only_where_asked():
    for prob, share in ((0.0, 0.0), (0.5, 0.5), (1.0, 1.0)):
        case = Case(settings(f"algo.likelihood.prompt_mask_prob={prob}", loss_type="wd1"))
        pairs = [(b, 0) for b in range(len(case.batch))]
        row_R, pass_R = torch.tensor(pairs).T
        ids_RS = make_passes(case.batch, row_R, pass_R, MASK).canvas.ids_BT
        masked = []
        for b, sequence in enumerate(case.batch.sequences):
            start = len(sequence) - int(case.batch.completion_len_B[b])
            masked += (ids_RS[b, :start] == MASK).tolist()
            assert bool((ids_RS[b, start : len(sequence)] == MASK).all())
        assert sum(masked) / len(masked) == pytest.approx(share, abs=0.35 if prob == 0.5 else 0)


@pytest.mark.parametrize("loss_type", ["bgpo", "spg", "tracerl", "coupled_grpo"])
def test_log_probs_of_a_batch_are_those_of_each_pass_alone(loss_type):
    """Rows of all lengths, padded together, and an independent way to mask them."""
    config = settings("algo.num_iterations=2", "rollout.temperature=0.6", loss_type=loss_type)
    case = Case(config)
    found_BJT = case.likelihood.logp(case.engine, case.batch, config, case.engine.world)
    used = 0.6 if loss_type == "tracerl" else 1.0
    with torch.no_grad():
        naive_BJT = naive_logp(case.policy.lm, case.batch, used)
    torch.testing.assert_close(found_BJT.double(), naive_BJT, rtol=0, atol=2e-6)


def test_the_cells_of_passes_are_their_places():
    case = Case(settings("algo.likelihood.num_mc_samples=4"))
    masks = case.batch.masks
    row_R, pass_R = torch.tensor([[5, 3], [0, 1], [2, 0]]).T
    passes = make_passes(case.batch, row_R, pass_R, MASK)
    shape = masks.weight_BJT.shape
    for r, column, target, cell in zip(
        passes.row_M, passes.column_M, passes.target_M, passes.cell_M, strict=True
    ):
        b, j, t = (int(i) for i in torch.unravel_index(cell, shape))
        assert (b, j) == (int(row_R[r]), int(pass_R[r])) and masks.weight_BJT[b, j, t] != 0
        prompt = len(case.batch.sequences[b]) - int(case.batch.completion_len_B[b])
        assert int(column) == prompt + t
        assert int(target) == case.batch.sequences[b][prompt + t]
        assert int(passes.canvas.ids_BT[r, column]) == MASK


SAMPLERS = {
    "three steps": {"steps": 3},
    "four blocks": {"steps": 8, "block_size": 3},
    "uneven steps": {"steps": 9, "block_size": 4},
    "any order": {"steps": 4, "order": "random"},
    "when sure": {"steps": 6, "threshold": 0.3},
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_trace_estimates_what_the_sampler_reported(sampler, temperature):
    """Each token's estimate is the log-prob at which the engine committed it."""
    options = SAMPLERS[sampler]
    lm = tiny_lm(dtype=torch.float32)
    tokenizer = masked_tokenizer(64)
    diffusion = DiffusionConfig(**options, eos_policy="all")
    engine = MaskedDiffusionEngine(lm, tokenizer, diffusion)
    params = SamplingParams(max_completion_length=12, temperature=temperature)
    requests = [
        GenerateRequest("a", (1, 2, 3), seeds=(1, 2, 3)),
        GenerateRequest("b", (4, 5, 6, 7, 8), seeds=(4, 5)),
    ]
    groups = [
        Group(Prompt(request.prompt_id, request.token_ids, ""), tuple(samples))
        for request, samples in zip(requests, engine.generate(requests, params), strict=True)
    ]
    overrides = [f"rollout.diffusion.{name}={value}" for name, value in options.items()]
    config = settings(
        *overrides,
        f"rollout.temperature={temperature}",
        "rollout.max_completion_length=12",
        "algo.num_iterations=2",  # so that old log-probs are taken
        loss_type="tracerl",
    )
    case = Case(config, groups, [1.0, 0.0, 0.0, 1.0, 0.0], lm=lm)
    steps = {len(set(sample.steps)) for group in groups for sample in group.samples}
    assert min(steps) > 1
    estimate_BT = algos.combine(case.batch.logp_old_BJT, case.batch.masks)
    torch.testing.assert_close(estimate_BT, case.batch.logp_rollout_BT, rtol=0, atol=1e-5)
    if temperature != 1.0:  # and only at that temperature
        plain_BT = naive_logp(lm, case.batch).sum(1)
        assert float((plain_BT - case.batch.logp_rollout_BT).abs().max()) > 0.1


def test_trace_with_shrink_takes_fewer_passes():
    steps = {}
    for shrink in (1, 2, 6):
        config = settings(f"algo.likelihood.shrink={shrink}", loss_type="tracerl")
        steps[shrink] = Case(config, make_groups([[6, 6]])).batch.masks.weight_BJT.shape[1]
    assert steps == {1: 3, 2: 2, 6: 1}
