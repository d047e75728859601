"""Trees of tokens from any rollout engine: all trees of all prompts grow together.

    level: what every tree wants drawn next (segmenters.py) -> one `generate` of all of it, each
           request a prompt with the tokens up to the split -> new segments; until nothing is wanted

Only the ids of tokens cross a split: text is decoded from whole completions, for rewards and
people. An engine with a prefix cache reads a shared beginning once, in whole blocks.

Each segment has a name in its tree and a seed of its own (seeds.py), so a tree is the same whatever
grows beside it. Under `fixed` the name is the numbers of the children on the way there; a
continuation of `surprisal` is named after the segment it leaves, the token it replaces there, and
its own number. Generated are the tokens of the nodes, each once:

    sum over nodes of len(node) = (1 - tokens saved) * sum over leaves of len(completion)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from rlalign.config.schema import TokenTreeConfig
from rlalign.rollout.engine import GenerateRequest, RolloutEngine, SamplingParams
from rlalign.rollout.segmenters import SEGMENTERS, Draw, GrowingTree, Node
from rlalign.types import POLICY, ROOT, Group, Prompt, Sample, Tree, VersionSpan


def grow_trees(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    first_tree: Sequence[int],
    cfg: TokenTreeConfig,
    params: SamplingParams,
    decode: Callable[[list[int]], str],
    *,
    seed: int,
    step: int,
) -> list[Group]:
    """`cfg.num_trees` trees of each prompt, numbered from `first_tree[i]`, one group a prompt.

    `params.max_completion_length` bounds a leaf; `decode` makes text of token ids. Raises what the
    engine raises.
    """
    limit = params.max_completion_length
    groups = [
        [GrowingTree(prompt, first + i, limit, seed, step) for i in range(cfg.num_trees)]
        for prompt, first in zip(prompts, first_tree, strict=True)
    ]
    wanted = SEGMENTERS[cfg.segmenter]
    trees = [tree for group in groups for tree in group]
    while draws := [(tree, draw) for tree in trees for draw in wanted(tree, cfg)]:
        drawn = engine.generate([_request(tree, draw) for tree, draw in draws], params)
        for (tree, draw), samples in zip(draws, drawn, strict=True):
            tree.grow(draw, samples)
    return [_group(*pair, decode) for pair in zip(prompts, groups, strict=True)]


def _request(tree: GrowingTree, draw: Draw) -> GenerateRequest:
    return GenerateRequest(
        tree.prompt.id,
        tree.prefix(draw.node),
        seeds=tuple(tree.seed_of(name) for name in draw.names),
        max_completion_length=draw.limit,
    )


def _group(
    prompt: Prompt, trees: Sequence[GrowingTree], decode: Callable[[list[int]], str]
) -> Group:
    """The leaves of finished trees as samples, and the trees."""
    nodes, tree_of = [], []
    for number, tree in enumerate(trees):
        nodes += tree.nodes()
        tree_of += [number] * (len(nodes) - len(tree_of))
    at = {node: i for i, node in enumerate(nodes)}
    parents = [-1 if node.parent is None else at[node.parent] for node in nodes]
    path: dict[Node, tuple[int, ...]] = {}
    for node in nodes:
        path[node] = () if node.parent is None else (*path[node.parent], at[node])
    tree = Tree(
        parent_N=torch.tensor(parents),
        depth_N=torch.tensor([len(path[node]) for node in nodes]),
        tree_N=torch.tensor(tree_of),
        group_N=torch.zeros(len(nodes), dtype=torch.int64),
        kind_N=torch.tensor([ROOT if parent < 0 else POLICY for parent in parents]),
        reward_N=torch.full((len(nodes),), torch.nan),
        logp_N=torch.tensor([sum(node.logp) / max(len(node.logp), 1) for node in nodes]),
        num_actions_N=torch.tensor([len(node.tokens) for node in nodes]),
    )
    leaves = [node for node in nodes if not node.children]
    samples = tuple(
        _sample(prompt.id, rank, [nodes[i] for i in path[leaf]], decode)
        for rank, leaf in enumerate(leaves)
    )
    return Group(prompt, samples, tree=tree, paths=tuple(path[leaf] for leaf in leaves))


def _sample(
    prompt_id: str, index: int, path: Sequence[Node], decode: Callable[[list[int]], str]
) -> Sample:
    tokens = [token for node in path for token in node.tokens]
    versions = itertools.groupby(version for node in path for version in node.versions)
    return Sample(
        prompt_id=prompt_id,
        index=index,
        token_ids=tuple(tokens),
        logp=tuple(logp for node in path for logp in node.logp),
        finish_reason=path[-1].finish_reason,
        spans=tuple(VersionSpan(len(list(run)), version) for version, run in versions),
        text=decode(tokens),
    )
