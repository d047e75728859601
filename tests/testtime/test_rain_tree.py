"""The arithmetic of RAIN's tree, against loops and replayed logs."""

from __future__ import annotations

import copy
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlalign.models.tokenizer import build_tokenizer
from rlalign.testtime.rain_tree import (
    Candidate,
    Node,
    Tree,
    backup,
    best_child,
    cosine,
    lend,
    make_trace,
    restore,
    select,
    wants_child,
)


def make_family(*facts: tuple[float, float, float], n: float | None = None) -> Node:
    """A parent with a child for each (n, q, prior)."""
    total = sum(fact[0] for fact in facts)
    parent = Node(0, Candidate((), 1.0), 1.0, None, 0, n=total + 1 if n is None else n)
    for i, (own, q, prior) in enumerate(facts):
        parent.children.append(Node(i + 1, Candidate((i,), prior), prior, parent, 1, n=own, q=q))
    return parent


def grow(
    searches: int, gamma: float, seed: int, *, mix: float = 0.25, tree: Tree | None = None
) -> tuple[Tree, list[tuple[list[Node], float, list[np.ndarray]]]]:
    """A tree under random values and embeddings, and the log of its backups."""
    rng, vectors = random.Random(seed), np.random.default_rng(seed)
    tree, log = tree or Tree(10**6), []
    for _ in range(searches):
        path = [tree.root]
        while path[-1].children:
            path.append(select(path[-1], 2.0, official=False))
        leaf = path[-1]
        if len(path) < 4:
            tree.expand(leaf, [Candidate((i,), rng.random()) for i in range(4)], [], mix)
        value = rng.choice((-1.0, 0.0, 1.0))
        near = [np.ones(8) + 0.3 * vectors.normal(size=8) for _ in path[1:]]
        log.append((path, value, near))
        backup(path, value, near, gamma=gamma, threshold=0.9)
    return tree, log


def below(node: Node) -> list[Node]:
    return [node, *(other for child in node.children for other in below(child))]


def test_an_unvisited_child_counts_as_zero_and_the_square_root_covers_the_children_alone():
    # 0.3 + 2 * 0.5 * sqrt(4) / 5 = 0.7 against 0 + 2 * 0.36 * 2 = 1.44, though -1 + 1.44 < 0.7.
    parent = make_family((4, 0.3, 0.5), (0, 0.0, 0.36), (0, 0.0, 0.14), n=100)
    assert select(parent, 2.0, official=False) is parent.children[1]
    # With nothing visited all are equal, and the likeliest comes first.
    fresh = make_family((0, 0.0, 0.2), (0, 0.0, 0.5), (0, 0.0, 0.3))
    assert select(fresh, 2.0, official=False) is fresh.children[1]
    # With the parent's n, 100, the second would win here: 2 * 0.174 * 10.
    just = make_family((4, 0.3, 0.5), (0, 0.0, 0.174), n=100)
    assert select(just, 2.0, official=False) is just.children[0]


@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.floats(-1, 1), st.floats(0.01, 1)), min_size=2, max_size=6
    ),
    st.floats(0.1, 4),
)
def test_official_selection_is_the_paper_s_with_twice_the_c_where_all_were_visited(facts, c):
    parent = make_family(*facts)
    chosen = select(parent, c, official=True)
    root = math.sqrt(parent.n)
    scores = [q + 2 * c * p * root / (1 + n) for n, q, p in facts]
    # q-hat is (q + 1) / (2 + 1e-5): the last digits do not decide.
    assert scores[parent.children.index(chosen)] >= max(scores) - 3e-5


def test_official_counts_an_unvisited_child_as_minus_one_and_takes_the_first_of_equals():
    parent = make_family((1, -0.9, 0.5), (0, 0.0, 0.5), n=0.01)
    assert select(parent, 1e-3, official=True) is parent.children[0]
    assert select(parent, 1e-3, official=False) is parent.children[1]
    equal = make_family((1, 0.0, 0.2), (1, 0.0, 0.2))
    assert select(equal, 2.0, official=True) is equal.children[0]


def test_ties_at_the_end_go_to_q_then_to_the_prior():
    family = make_family((2, 0.1, 0.1), (3, 0.2, 0.1), (3, 0.2, 0.5), (3, 0.1, 0.9))
    assert best_child(family, official=False) is family.children[2]
    assert best_child(family, official=True) is family.children[1]


@pytest.mark.parametrize("seed", range(5))
def test_without_similarity_visits_are_conserved_and_q_is_the_mean_of_what_was_backed_up(seed):
    tree, log = grow(120, 0.0, seed)
    for node in below(tree.root):
        assert node.n == node.visits
        if node.children:
            assert node.visits == 1 + sum(child.visits for child in node.children)
        through = [value for path, value, _ in log if node in path]
        assert node.visits == len(through)
        if through:
            assert node.q == pytest.approx(sum(through) / len(through), abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_similar_siblings_get_a_share_as_a_replay_of_the_log_says(seed):
    tree, log = grow(150, 0.2, seed)
    total, weight, mean, seen = {}, {}, {}, {}
    lent = 0
    for path, value, vectors in log:
        for node, vector in list(zip(path, [None, *vectors], strict=True))[::-1]:
            key = node.id
            weight[key] = weight.get(key, 0.0) + 1
            total[key] = total.get(key, 0.0) + value
            if vector is None:
                continue
            seen[key] = seen.get(key, 0) + 1
            mean[key] = mean.get(key, 0.0) + (vector - mean.get(key, 0.0)) / seen[key]
            for other in node.parent.children:
                if other is node or other.id not in mean:
                    continue
                a, b = mean[key], mean[other.id]
                similarity = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
                if similarity >= 0.9:
                    lent += 1
                    weight[other.id] += 0.2 * similarity
                    total[other.id] += 0.2 * similarity * value
    assert lent > 50
    for node in below(tree.root):
        assert node.n >= node.visits and -1 <= node.q <= 1
        assert node.n == pytest.approx(weight.get(node.id, 0.0), abs=1e-9)
        if node.visits:
            assert node.q == pytest.approx(total[node.id] / weight[node.id], abs=1e-9)


@given(st.floats(-1, 1), st.floats(-1, 1), st.floats(0, 20))
def test_what_is_lent_moves_q_towards_the_value(value, q, n):
    parent = make_family((1, 0.0, 0.5), (n, q, 0.5))
    node, sibling = parent.children
    node.embedding = sibling.embedding = np.ones(3)
    backup([parent, node], value, [np.ones(3)], gamma=0.2, threshold=0.95)
    if n == 0:
        assert sibling.q == pytest.approx(value, abs=1e-12)
    else:
        assert abs(sibling.q - value) <= abs(q - value) + 1e-12
        assert (sibling.q == q) or value != q
    assert sibling.n == pytest.approx(n + 0.2) and sibling.visits == 0


def test_below_the_threshold_and_without_an_embedding_nothing_is_lent():
    parent = make_family((1, 0.0, 0.3), (1, 0.5, 0.3), (0, 0.0, 0.4))
    node, far, unseen = parent.children
    far.embedding = np.array([0.3, 1.0])
    backup([parent, node], -1.0, [np.array([1.0, 0.0])], gamma=0.2, threshold=0.95)
    assert (far.n, far.q, unseen.n) == (1, 0.5, 0)
    assert cosine(np.zeros(2), far.embedding) == 0


def test_priors_add_up_to_one_and_those_of_a_root_are_mixed():
    tree, _ = grow(60, 0.0, 0)
    for node in below(tree.root):
        if node.children:
            assert sum(child.prior for child in node.children) == pytest.approx(1)
    assert all(child.prior >= 0.25 / 4 for child in tree.root.children)
    raw = [child.candidate.p for child in tree.root.children]
    for child, p in zip(tree.root.children, raw, strict=True):
        assert child.prior == pytest.approx(0.75 * p / sum(raw) + 0.25 / 4)
    inner = next(child for child in tree.root.children if child.children)
    raw = [child.candidate.p for child in inner.children]
    assert inner.children[0].prior == pytest.approx(raw[0] / sum(raw))


def test_the_new_root_keeps_its_subtree_to_the_bit_and_its_children_are_mixed():
    tree, _ = grow(100, 0.2, 1)
    best = best_child(tree.root, official=False)
    nodes = below(best)
    before = copy.deepcopy([(n.n, n.visits, n.q, n.embedding, n.prior) for n in nodes])
    siblings = [child for child in tree.root.children if child is not best]
    tree.commit(best, 0.25, searches=3)
    assert tree.root is best and tree.committed == best.tokens
    assert below(best) == nodes
    for node, (n, visits, q, embedding, prior) in zip(nodes, before, strict=True):
        assert (node.n, node.visits, node.q) == (n, visits, q)
        assert embedding is None or (node.embedding == embedding).all()
        mixed = 0.75 * prior + 0.25 / 4 if node.parent is best else prior
        assert node.prior == pytest.approx(mixed, abs=1e-15)
    assert all(sibling.children == [] and sibling.embedding is None for sibling in siblings)


def test_a_child_is_wanted_where_all_were_seen_are_alike_and_bad():
    def family(spread: float, q: float = -0.5, tokens: int = 1) -> Node:
        parent = make_family(*[(1, q, 0.25)] * 4)
        for i, child in enumerate(parent.children):
            child.embedding = np.eye(4)[i] * spread + np.ones(4)
            child.candidate = Candidate((7,) * tokens, 0.25)
        return parent

    # Each dimension has variance spread^2 / 4 (unbiased), the norm over four is half of spread^2.
    assert wants_child(family(0.24), 20, 0.03, 0.0)
    assert not wants_child(family(0.25), 20, 0.03, 0.0)
    assert wants_child(family(0.34, tokens=2), 20, 0.03, 0.0)
    assert not wants_child(family(0.0), 4, 0.03, 0.0)
    good = family(0.0)
    good.children[2].q = 0.0
    assert not wants_child(good, 20, 0.03, 0.0)
    unseen = family(0.0)
    unseen.children[3].embedding = None
    assert not wants_child(unseen, 20, 0.03, 0.0)
    assert not wants_child(make_family((1, -1.0, 1.0)), 20, 0.03, 0.0)


def test_a_child_added_later_has_its_share_and_the_others_keep_theirs():
    tree = Tree(10)
    tree.expand(tree.root, [Candidate((1,), 0.3), Candidate((2,), 0.1)], [], 0.0)
    priors = [child.prior for child in tree.root.children]
    tree.add(tree.root, Candidate((3,), 0.1))
    assert [child.prior for child in tree.root.children] == [*priors, pytest.approx(0.2)]


def test_a_virtual_loss_is_given_back_to_the_bit():
    tree, _ = grow(40, 0.2, 2)
    path = [tree.root, tree.root.children[0]]
    before = [(node.n, node.q) for node in path]
    first = lend(path)
    assert path[1].q < before[1][1] or before[1][1] == -1
    second = lend(path)
    restore(second)
    restore(first)
    assert [(node.n, node.q) for node in path] == before


def test_the_trace_keeps_what_was_committed_and_counts_the_rest():
    tokenizer = build_tokenizer()
    for limit in (0, 3, 10**6):
        tree, _ = grow(50, 0.0, 3, tree=Tree(limit))
        for _ in range(2):
            best = best_child(tree.root, official=False)
            tree.commit(best, 0.25, text="x", searches=1, below_threshold=False)
        trace = make_trace(tree, tokenizer)
        if limit == 0:
            assert trace == {}
            continue
        nodes = {node["id"]: node for node in trace["nodes"]}
        assert len(nodes) == len(trace["nodes"]) and len(nodes) <= limit + 2
        assert trace["dropped"] == tree.num_nodes - len(nodes)
        assert [nodes[c["node"]]["committed"] for c in trace["commits"]] == [True, True]
        assert all(node["parent"] in {-1, *nodes} for node in trace["nodes"])
        assert [node["id"] for node in trace["nodes"] if node["parent"] == -1] == [0]
