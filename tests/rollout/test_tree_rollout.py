"""Trees of tokens: leaves are whole samples of the policy, a shared token is drawn once, and a tree
does not depend on what grows beside it."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlalign.algos import tree as trees
from rlalign.config.schema import RolloutConfig, TokenTreeConfig, VllmConfig
from rlalign.rollout.engine import EngineError, GenerateRequest, SamplingParams
from rlalign.rollout.hf import HFEngine
from rlalign.rollout.seeds import sample_seed, segment_seed
from rlalign.rollout.tree_rollout import grow_trees
from rlalign.types import Group, Prompt, Sample, VersionSpan

EOS, LIMIT = 0, 20
PROMPTS = [Prompt(f"p{i}", (5, 6 + i), "?") for i in range(4)]


def digest(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")


class Engine:
    """Draws a token by a hash of all before it and the seed; one in `ends` (0: none) ends."""

    def __init__(self, ends: int = 0) -> None:
        self.ends = ends
        self.calls: list[Sequence[GenerateRequest]] = []
        self.generated = 0

    def generate(self, requests, params) -> list[list[Sample]]:
        self.calls.append(requests)
        return [
            [self._draw(request, params, seed) for seed in request.seeds] for request in requests
        ]

    def _draw(self, request: GenerateRequest, params: SamplingParams, seed: int) -> Sample:
        limit = request.limited(params).max_completion_length
        tokens, logp = [], []
        while len(tokens) < limit and EOS not in tokens:
            word = digest(request.token_ids, tokens, seed)
            tokens.append(EOS if self.ends and word % self.ends == 0 else 1 + word % 50)
            logp.append(-(word % 997) / 100)
        self.generated += len(tokens)
        finish = "stop" if EOS in tokens else "length"
        spans = (VersionSpan(len(tokens), 3),)
        return Sample(request.prompt_id, 0, tuple(tokens), tuple(logp), finish, spans)


def grow(engine, prompts=PROMPTS, first_tree=None, step: int = 1, **settings) -> list[Group]:
    cfg = TokenTreeConfig(**{"num_trees": 2, "segment_length": 4, "max_depth": 3} | settings)
    first = first_tree or [0] * len(prompts)
    return grow_trees(engine, prompts, first, cfg, SamplingParams(LIMIT), str, seed=7, step=step)


def node_tokens(group: Group) -> dict[int, tuple[int, ...]]:
    """The tokens of each node, which must be the same in every leaf that has it."""
    assert group.tree is not None
    found: dict[int, tuple[int, ...]] = {}
    for sample, path in zip(group.samples, group.paths, strict=True):
        at = 0
        for node in path:
            tokens = sample.token_ids[at : at + int(group.tree.num_actions_N[node])]
            assert found.setdefault(node, tokens) == tokens
            at += len(tokens)
        assert at == len(sample.token_ids)
    return found


SETTINGS = {
    "fixed": {},
    "few leaves": {"max_leaves": 5, "branch_factor": [3, 2]},
    "fallback": {"fallback": True, "max_depth": 4},
    "surprisal": {"segmenter": "surprisal", "num_rounds": 3, "num_forks": 2, "max_leaves": 99},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_samples_are_the_tokens_of_their_nodes_and_generated_is_each_node_once(case):
    engine = Engine(ends=12)
    for group in grow(engine, **SETTINGS[case]):
        tree = group.tree
        assert tree is not None
        trees.validate(tree)
        leaves = trees.is_leaf(tree).nonzero()[:, 0].tolist()
        assert [path[-1] for path in group.paths] == leaves
        assert [sample.index for sample in group.samples] == list(range(len(leaves)))
        for sample, path in zip(group.samples, group.paths, strict=True):
            parents = tree.parent_N[list(path)].tolist()
            assert parents[1:] == list(path[:-1]) and tree.parent_N[parents[0]] == -1
            of_nodes = (tree.logp_N.double() * tree.num_actions_N)[list(path)]
            assert sum(sample.logp) == pytest.approx(float(of_nodes.sum()), rel=1e-5)
            assert sample.spans == (VersionSpan(len(sample.token_ids), 3),)
            assert sample.text == str(list(sample.token_ids))
            assert (sample.finish_reason == "stop") == (sample.token_ids[-1] == EOS)
            assert sample.token_ids.count(EOS) <= 1 and len(sample.token_ids) <= LIMIT
            assert sample.finish_reason == "stop" or len(sample.token_ids) == LIMIT
        lengths = {node: len(tokens) for node, tokens in node_tokens(group).items()}
        assert len(lengths) == int((tree.parent_N >= 0).sum()) and min(lengths.values()) > 0
        engine.generated -= sum(lengths.values())
    assert engine.generated == 0


def test_the_number_of_generated_tokens_is_that_of_the_formula():
    """Two trees of 2, 4 and 8 branches, 4 tokens each, and the last level to the end: 12."""
    engine = Engine()
    groups = grow(engine, branch_factor=[2])
    assert engine.generated == len(PROMPTS) * 2 * (2 * 4 + 4 * 4 + 8 * 12)
    assert [len(group.samples) for group in groups] == [2 * 8] * len(PROMPTS)
    assert [len(requests) for requests in engine.calls] == [8, 16, 32]  # one call a level


def test_a_full_tree_splits_no_more_and_runs_to_its_end_in_one_go():
    engine = Engine()
    [group] = grow(engine, PROMPTS[:1], num_trees=1, max_leaves=3, max_depth=9)
    assert len(group.samples) == 3
    assert [len(requests) for requests in engine.calls] == [1, 2]
    [(one, first), (other, second)] = [(r.limited(SamplingParams(LIMIT)), len(r.seeds))
                                       for r in engine.calls[1]]  # fmt: skip
    assert (first, second) == (2, 1)  # the room goes round
    assert one.max_completion_length == other.max_completion_length == LIMIT - 4


def test_an_early_end_is_a_leaf_at_its_depth():
    seen = Counter()
    for group in grow(Engine(ends=6), branch_factor=[2]):
        assert group.tree is not None
        for sample, path in zip(group.samples, group.paths, strict=True):
            assert len(path) == min(-(-len(sample.token_ids) // 4), 3)
            seen[len(path)] += 1
    assert set(seen) == {1, 2, 3}


def test_fallback_makes_up_for_branches_that_ended_early():
    """From splits that there are, the root among them; each as many as are missing."""
    settings = {"branch_factor": [2], "max_depth": 3, "num_trees": 1}
    prompts = [Prompt(f"q{i}", (i,), "?") for i in range(30)]
    without = grow(Engine(ends=9), prompts, **settings)
    engine = Engine(ends=9)
    groups = grow(engine, prompts, **settings, fallback=True)
    assert min(len(group.samples) for group in without) < 5
    assert {len(group.samples) for group in groups} == {8}
    reopened = Counter()
    for before, group in zip(without, groups, strict=True):
        assert before.tree is not None and group.tree is not None
        kept = {sample.token_ids for sample in before.samples}
        assert kept <= {sample.token_ids for sample in group.samples}
        omega_N = trees.sampling_weights(group.tree.replace(reward_N=torch.ones(len(group.tree))))
        assert float(omega_N[trees.is_leaf(group.tree)].sum()) == pytest.approx(1)
        for sample, path in zip(group.samples, group.paths, strict=True):
            if sample.token_ids not in kept:
                reopened[int(group.tree.depth_N[path[-1]])] += 1
    assert set(reopened) == {1, 2, 3}


def test_no_two_leaves_are_equal_by_accident_of_their_seeds():
    [group, *_] = grow(Engine())
    assert len({sample.token_ids for sample in group.samples}) == len(group.samples) == 16


@pytest.mark.parametrize("case", SETTINGS)
def test_a_tree_is_the_same_whatever_grows_beside_it(case):
    together = grow(Engine(12), **SETTINGS[case])
    backwards = grow(Engine(12), PROMPTS[::-1], **SETTINGS[case])[::-1]
    alone = [group for p in PROMPTS for group in grow(Engine(12), [p], **SETTINGS[case])]
    second = grow(Engine(12), PROMPTS, [1] * 4, **SETTINGS[case], num_trees=1)
    for group, *others, later in zip(together, backwards, alone, second, strict=True):
        assert group.tree is not None
        for other in others:
            assert other.samples == group.samples and other.paths == group.paths
            assert torch.equal(other.tree.parent_N, group.tree.parent_N)
            assert torch.equal(other.tree.logp_N, group.tree.logp_N)
        assert [s.token_ids for s in group.samples][-len(later.samples) :] == [
            s.token_ids for s in later.samples
        ]
    assert grow(Engine(12), step=2, **SETTINGS[case])[0].samples != together[0].samples


def test_trees_that_never_branch_are_the_flat_samples():
    engine = Engine(ends=15)
    seeds = tuple(sample_seed(7, "p0", i, 1) for i in range(6))
    [flat] = engine.generate(
        [GenerateRequest("p0", PROMPTS[0].token_ids, seeds)], SamplingParams(LIMIT)
    )
    for settings in ({"branch_factor": [1]}, {"segmenter": "surprisal", "num_rounds": 0}):
        [group] = grow(engine, PROMPTS[:1], num_trees=6, **settings)
        assert [s.token_ids for s in group.samples] == [s.token_ids for s in flat]
        assert [s.logp for s in group.samples] == [s.logp for s in flat]
        assert len(engine.calls[-1]) == 6


def test_no_two_segments_share_a_seed():
    names = [name for size in (1, 2, 3) for name in itertools.product(range(4), repeat=size)]
    keys = itertools.product((0, 1), ("p", "p1", ""), (0, 1, 2), names, (0, 1))
    seeds = [segment_seed(*key) for key in keys]
    assert len(set(seeds)) == len(seeds) and 0 <= min(seeds) <= max(seeds) < 2**63


def test_surprisal_forks_at_the_least_likely_tokens():
    """One round against a plain search of the chain: continuations replace those tokens."""
    settings = {"segmenter": "surprisal", "num_forks": 3, "fork_width": 2, "num_trees": 1}
    for prompt in PROMPTS:
        [group] = grow(Engine(), [prompt], **settings, num_rounds=1)
        [chain] = grow(Engine(), [prompt], **settings, num_rounds=0)
        [whole] = chain.samples
        places = sorted(range(LIMIT), key=lambda i: whole.logp[i])[:3]
        others = Counter()
        for sample in group.samples:
            same = [a == b for a, b in zip(sample.token_ids, whole.token_ids, strict=True)]
            others[same.index(False) if False in same else None] += 1
        assert others == {None: 1, **{place: 2 for place in places}}


def test_surprisal_has_the_published_number_of_leaves_and_forks_no_token_twice():
    """M (1 + N L T) with M = 2, N = 3, L = 4, T = 2; where a chain parts, 1 + T branches do."""
    settings = {"segmenter": "surprisal", "num_forks": 3, "num_rounds": 4, "fork_width": 2}
    for group in grow(Engine(), **settings, max_leaves=99):
        assert group.tree is not None
        assert len(group.samples) == 2 * (1 + 3 * 4 * 2)
        count_N = trees.sum_over_children(group.tree, torch.ones(len(group.tree)))
        inner = ~trees.is_leaf(group.tree) & (group.tree.parent_N >= 0)
        assert set(count_N[inner].tolist()) == {3}
    for group in grow(Engine(), **settings, max_leaves=10):
        assert len(group.samples) == 2 * 10


def test_an_error_of_the_engine_reaches_the_caller():
    class Fails(Engine):
        def generate(self, requests, params):
            if len(self.calls) == 1:
                raise EngineError("gone")
            return super().generate(requests, params)

    with pytest.raises(EngineError, match="gone"):
        grow(Fails())


def test_a_segment_that_the_engine_gave_up_is_a_leaf():
    class Aborts(Engine):
        def _draw(self, request, params, seed):
            if request.token_ids == PROMPTS[0].token_ids and seed % 2:
                return Sample(request.prompt_id, 0, (), (), "abort", ())
            return super()._draw(request, params, seed)

    [group] = grow(Aborts(), PROMPTS[:1], num_trees=8)
    finish = [sample.finish_reason for sample in group.samples]
    assert 0 < finish.count("abort") < len(finish)
    assert all(s.token_ids == () for s in group.samples if s.finish_reason == "abort")


def check_leaves(engine, model, prompts: list[Prompt]) -> None:
    """Log-probs are those that a plain forward pass gives the whole leaf, and a shared prefix is
    shared."""
    for settings in ({}, {"segmenter": "surprisal", "num_rounds": 2}):
        for group in grow(engine, prompts, num_trees=1, **settings):
            assert len(group.samples) >= 8 and len(node_tokens(group)) > 8
            for sample in group.samples:
                ids = torch.tensor([[*group.prompt.token_ids, *sample.token_ids]])
                with torch.no_grad():
                    logp_TV = model(ids).logits[0].double().log_softmax(-1)
                start = len(group.prompt.token_ids)
                target = ids[0, start:, None]
                logp = logp_TV[start - 1 : -1].gather(-1, target)[:, 0]
                assert (logp - torch.tensor(sample.logp).double()).abs().max() < 1e-3


def real_prompts(count: int = 2) -> list[Prompt]:
    return [Prompt(f"r{i}", tuple(range(7, 40 + i)), "?") for i in range(count)]


def test_leaves_are_samples_of_the_model(folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(folder)
    check_leaves(HFEngine(model, tokenizer, max_batch_size=24), model, real_prompts())


@pytest.mark.xdist_group("vllm")
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_leaves_are_samples_of_the_model_that_vllm_runs(folder, tokenizer):
    """The prompts fill a block of its prefix cache, which the branches then share."""
    from rlalign.rollout.vllm import VllmEngine

    cfg = RolloutConfig(max_completion_length=LIMIT, vllm=VllmConfig(max_num_seqs=16))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with VllmEngine(str(folder), tokenizer, cfg, max_prompt_length=44) as engine:
        check_leaves(engine, model, real_prompts())


@pytest.mark.parametrize("segment", [1, 4, 5, 9])
def test_aligned_splits_leave_one_token_beyond_whole_blocks(segment):
    """Prompts of different lengths split at the same places of the sequence."""
    prompts = [Prompt(f"p{n}", tuple(range(1, 1 + n)), "?") for n in range(1, 8)]
    for group in grow(Engine(), prompts, segment_length=segment, align=4, max_depth=4):
        assert group.tree is not None
        here = len(group.prompt.token_ids)
        for path in group.paths:
            lengths = group.tree.num_actions_N[list(path)].tolist()
            ends = [here + sum(lengths[: i + 1]) for i in range(len(path) - 1)]
            assert ends and all(end % 4 == 1 for end in ends), ends
            steps = [b - a for a, b in itertools.pairwise([here, *ends])]
            assert all(step >= 1 and abs(step - segment) <= max(4 - segment, 2) for step in steps)


def test_what_ended_early_leaves_its_room_to_the_others():
    """A split of up to `max_leaves` shares out what is left."""
    groups = grow(Engine(ends=9), num_trees=1, branch_factor=[3, 12], max_leaves=12, max_depth=2)
    early = 0
    for group in groups:
        assert group.tree is not None
        ended = sum(len(path) == 1 for path in group.paths)
        early += ended
        assert len(group.samples) == (12 if ended < 3 else 3)
    assert early
