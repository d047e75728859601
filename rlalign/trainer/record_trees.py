"""What trees leave behind: figures, and the first trees of each step node by node.

trees/step_<n>.jsonl, one line a tree, its nodes numbered from the root, 0, on:

    {"step", "tree", "prompt_id", "prompt", "answer", "nodes": {"parent": [], "depth": [],
     "kind": [], "value": [], "advantage": [], "kept": [], "reward": [], <payload>: []}}

`tree` is unique within the step, `kind` a word (root, policy, env, ode), `kept` whether the edge
trains, and the payload what people look at: the text of a token tree's segments, images.

Shapes: B leaves, N nodes of all trees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from rlalign import algos
from rlalign.config import Config
from rlalign.trainer import token_trees
from rlalign.types import Group, Prompt, TrainBatch, Tree

TREES_A_STEP = 4  # whose nodes are recorded
KINDS = ("root", "policy", "env", "ode")  # by the numbers of rlalign.types


def token_trees_record(
    step: int,
    batch: TrainBatch,
    groups: Sequence[Group],
    config: Config,
    decode: Callable[[list[int]], str],
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Figures and lines of `step` (from 0), whose `batch` are the leaves of `groups`; nothing where
    there are no trees."""
    if batch.tree is None:
        return {}, []
    found = token_trees.credit(batch, config, step)
    figures = tree_metrics(batch.tree, found) | {"tree/tokens_saved": tokens_saved(batch)}
    texts = segment_texts(batch.tree, groups, decode)
    prompts = [group.prompt for group in groups]
    return figures, list(tree_rows(step + 1, batch.tree, found, prompts, {"text": texts}))


def tree_metrics(tree: Tree, credit: algos.TreeCredit) -> dict[str, float]:
    """Leaves and nodes of all trees, and which depths decide the rewards."""
    leaf_N = torch.ones(len(tree), dtype=torch.bool)
    leaf_N[tree.parent_N[tree.parent_N >= 0]] = False
    metrics = {
        "tree/leaves": float(leaf_N.sum()),
        "tree/nodes": float(len(tree)),
        "tree/kept_edges": float(credit.keep_N.sum()),
    }
    shares = algos.explained_variance(tree, credit.value_N)
    metrics |= {f"tree/explained_variance/{depth}": shares[depth] for depth in shares if depth}
    return metrics


def tokens_saved(batch: TrainBatch) -> float:
    """Share of the leaves' tokens that were not generated, since others have them too."""
    assert batch.tree is not None
    whole = int(batch.completion_len_B.sum())
    return 1 - int(batch.tree.num_actions_N.sum()) / max(whole, 1)


def tree_rows(
    step: int,
    tree: Tree,
    credit: algos.TreeCredit,
    prompts: Sequence[Prompt],
    payload: Mapping[str, Sequence[Any]],
) -> Iterator[dict[str, Any]]:
    """The lines of the first TREES_A_STEP trees, which are numbered from 0; `step` is from 1.

    prompts: of each group. payload: columns with an entry for each of the N nodes, of which those
    of the trees that are recorded matter.
    """
    for number in range(min(int(tree.tree_N.max()) + 1, TREES_A_STEP)):
        at = (tree.tree_N == number).nonzero()[:, 0]
        prompt = prompts[int(tree.group_N[at[0]])]
        place_N = torch.full((len(tree),), -1)
        place_N[at] = torch.arange(len(at))
        parent = tree.parent_N[at]
        yield {
            "step": step,
            "tree": number,
            "prompt_id": prompt.id,
            "prompt": prompt.source,
            "answer": prompt.answer,
            "nodes": {
                "parent": torch.where(parent < 0, -1, place_N[parent]).tolist(),
                "depth": tree.depth_N[at].tolist(),
                "kind": [KINDS[kind] for kind in tree.kind_N[at].tolist()],
                "value": credit.value_N[at].tolist(),
                "advantage": credit.advantage_N[at].tolist(),
                "kept": credit.keep_N[at].tolist(),
                "reward": tree.reward_N[at].tolist(),
                **{name: [column[i] for i in at.tolist()] for name, column in payload.items()},
            },
        }


def segment_texts(
    tree: Tree, groups: Sequence[Group], decode: Callable[[list[int]], str]
) -> list[str]:
    """What each node of the recorded trees adds to the completion: "" for roots and other trees."""
    texts = [""] * len(tree)
    tree_N, length_N = tree.tree_N.tolist(), tree.num_actions_N.tolist()
    first = 0  # node of the group
    for group in groups:
        assert group.tree is not None
        for sample, path in zip(group.samples, group.paths, strict=True):
            at = 0
            for node in (first + i for i in path):
                tokens = sample.token_ids[at : at + length_N[node]]
                at += len(tokens)
                if tree_N[node] < TREES_A_STEP:
                    texts[node] = texts[node] or decode(list(tokens))
        first += len(group.tree)
    return texts


def places_in_trees(groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    """`tree` and `path` of each sample, as the lines number trees and nodes: columns of the
    rollouts file."""
    num_trees = 0
    for group in groups:
        assert group.tree is not None
        tree_N = group.tree.tree_N.tolist()
        first = {number: tree_N.index(number) for number in set(tree_N)}
        for path in group.paths:
            number = tree_N[path[0]]
            yield {
                "tree": num_trees + number,
                "path": [node - first[number] for node in path],
            }
        num_trees += len(first)
