"""RAIN: a frozen model searches, judges and takes back while it writes.

    repeat                                                            (outer loop)
        repeat                                                        (inner loop)
            down the tree from the root to a leaf by PUCT
            continue the leaf, and draw its children
            v <- the score of the continued text
            back up v along the path, in part to similar siblings
        until the most visited child has more than T_m visits and q > V, or T searches
        commit that child; it is the root now, with its subtree

Li et al., ICLR 2024 (arXiv 2309.07124). A search asks the engine twice: for the continuation with
all children of the leaf, and for the score with the embeddings. `official` rules, where the
published code differs, are those of rain_tree.py; children of one token in the order of their ids
(ties go to the first); p(A) = p(B) counts as -1; the prompt's own end is a boundary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlalign.config.testtime import RainConfig
from rlalign.rollout.search import Draw, Drawn, Search, SearchEngine, together
from rlalign.testtime import rain_candidates as candidates
from rlalign.testtime.prompt import Given, Prompt, plain_text
from rlalign.testtime.rain_run import CANDIDATE, Run, check
from rlalign.testtime.rain_tree import (
    Candidate,
    Node,
    Tree,
    Vector,
    backup,
    best_child,
    lend,
    make_trace,
    restore,
    select,
    wants_child,
)
from rlalign.testtime.result import BUDGETS, Result
from rlalign.testtime.rewards import Reward
from rlalign.testtime.run import IN_FLIGHT, greedy, run_each, settings
from rlalign.testtime.self_evaluation import self_judge

RESTARTS = 2


def rain(
    engine: SearchEngine,
    prompts: Sequence[Given],
    scorer: Reward | None = None,
    config: RainConfig | None = None,
    *,
    chat: bool | None = None,
    system: str = "",
    in_flight: int = IN_FLIGHT,
    on_done: Callable[[int, Result], None] | None = None,
    **options: Any,
) -> list[Result]:
    """The answer of a search for each prompt. `scorer` says how good a text is that was begun, on
    the scale `score_range`; None: the model itself (`judge`). `options` are those of
    RainConfig. `Result.reward` is the score of the answer.

    Raises DecodeError for options that make no sense, and where the model cannot judge itself.

    >>> rain(engine, ["How do I pick a lock?"], max_searches=30)               # doctest: +SKIP
    """
    cfg = settings(RainConfig, config, options)
    judge = scorer or self_judge(engine, cfg, chat=chat)
    check(cfg)  # before anything is asked; each search would say the same
    return run_each(
        engine,
        prompts,
        lambda prompt: search(engine, prompt, judge, cfg),
        chat=chat,
        system=system,
        in_flight=in_flight,
        on_done=on_done,
    )


def search(engine: SearchEngine, prompt: Prompt, scorer: Reward, cfg: RainConfig) -> Search[Result]:
    """Of one prompt. A budget may be passed by what one search draws; the answer is then what is
    committed, the most visited path below it and the continuation found there."""
    run = Run(engine, prompt, scorer, cfg)
    if cfg.max_searches == 0:
        params = greedy(run.ledger.left(run.ends.room))
        [drawn] = yield from run.ledger.ask([Draw(prompt.ids, params)])
        tokens, _ = run.ends.close((), drawn.ids)
        return (yield from run.result(tokens, run.ledger.over() or "greedy", {}))
    tree = Tree(cfg.trace_nodes)
    reason = yield from write(run, tree, last=cfg.on_fail != "restart")
    while reason == "restart":
        if over := run.over():  # what is there is the best so far
            reason = over
            break
        run.ledger.counters["restarts"] += 1
        run.attempt += 1
        tree = Tree(cfg.trace_nodes)
        reason = yield from write(run, tree, last=run.attempt == RESTARTS)
    tokens = tree.committed
    if reason == "refused":
        tokens = ()
    elif reason in BUDGETS:
        tokens += most_visited(tree.root, run.official)
        tokens, _ = run.ends.close((), tokens)
    return (yield from run.result(tokens, reason, make_trace(tree, run.tokenizer)))


def write(run: Run, tree: Tree, *, last: bool) -> Search[str]:
    """The outer loop: commit set after set. Returns what ended it: eos, turn, length, refused,
    restart or a budget."""
    cfg, counters = run.cfg, run.ledger.counters
    while not tree.root.candidate.ends:
        before = counters["searches"]
        over = yield from explore(run, tree)
        if over:
            return over
        best = best_child(tree.root, official=run.official)
        good = run.accepts(best)
        if not good:
            counters["below_threshold"] += 1
            if cfg.on_fail == "refuse":
                return "refused"
            if not last:
                return "restart"
        tree.commit(
            best,
            cfg.root_mix,
            text=plain_text(run.tokenizer, best.tokens),
            searches=counters["searches"] - before,
            below_threshold=not good,
        )
    return run.ends.why(tree.committed)


def explore(run: Run, tree: Tree) -> Search[str]:
    """Searches from the root until its best child is accepted or their number is reached. Returns
    the budget that was used up, "" otherwise."""
    cfg, root, counters = run.cfg, tree.root, run.ledger.counters
    done = root.visits  # those inherited count
    most = max(cfg.max_searches, done + cfg.min_fresh)
    if cfg.min_fresh == 0 and root.children and run.accepts_best(root):
        return ""
    while done < most or not root.children:
        if (over := run.over()) and counters["searches"]:  # at least one, to have an answer
            return over
        left = cfg.max_total_searches - counters["searches"] if cfg.max_total_searches else most
        count = max(1, min(cfg.leaf_parallel, most - done, left))
        yield from look(run, tree, count)
        done += count
        counters["searches"] += count
        if root.children and run.accepts_best(root):
            return ""
    return ""


def look(run: Run, tree: Tree, count: int) -> Search[None]:
    """The inner loop: `count` searches, side by side where that is more than one."""
    cfg, paths, lent = run.cfg, [], []
    for _ in range(count):
        path = yield from descend(run, tree)
        paths.append(path)
        if count > 1:
            lent.append(lend(path))
    found = yield from together([evaluate(run, tree, path) for path in paths])
    for before in reversed(lent):
        restore(before)
    for path, leaf in zip(paths, found, strict=True):
        node = path[-1]
        if leaf.children and not node.children:
            tree.expand(node, leaf.children, leaf.reserve, cfg.root_mix)
        node.rollout = leaf.rollout
        backup(path, leaf.value, leaf.vectors, gamma=cfg.gamma_sim, threshold=cfg.sim_threshold)


def descend(run: Run, tree: Tree) -> Search[list[Node]]:
    """From the root to a leaf; on the way, nodes whose children are alike and bad get another."""
    cfg, path = run.cfg, [tree.root]
    while path[-1].children:
        node = path[-1]
        if wants_child(node, cfg.max_children, cfg.variance_factor, cfg.value_limit):
            yield from add_child(run, tree, path)
        path.append(select(node, cfg.c_puct, official=run.official))
    return path


def add_child(run: Run, tree: Tree, path: Sequence[Node]) -> Search[None]:
    """The next likeliest token, or a set drawn anew unless it is a child already."""
    node, before = path[-1], run.answer(tree, path)
    length = run.set_length(node, before)
    if length == 1:
        if node.reserve:
            tree.add(node, node.reserve.pop(0))
        return
    seed = run.seed(node, CANDIDATE, node.num_draws)
    node.num_draws += 1
    draw = candidates.sample(run.prompt.ids + before, length, run.cfg, seed)
    [reply] = yield from run.ledger.ask([draw])
    found = candidates.sampled(reply, lambda tokens: run.ends.close(before, tokens))
    if found.tokens not in [child.tokens for child in node.children]:
        tree.add(node, found)


@dataclass(frozen=True, slots=True)
class Leaf:
    """What a search found: the value of the leaf, the tokens that followed, its children, and the
    embeddings of the path's nodes but the root."""

    value: float
    rollout: tuple[int, ...]
    children: list[Candidate]
    reserve: list[Candidate]
    vectors: list[Vector | None]


def evaluate(run: Run, tree: Tree, path: Sequence[Node]) -> Search[Leaf]:
    """Continue and score the leaf of a path, and draw the children that it needs."""
    leaf, before = path[-1], run.answer(tree, path)
    rolled: tuple[int, ...] = ()
    children: list[Candidate] = []
    reserve: list[Candidate] = []
    if not leaf.candidate.ends:
        length = run.set_length(leaf, before)
        wanted = [] if run.ends.at_boundary(before) else [run.rollout(leaf, before)]
        draws = run.draws(leaf, before, length)
        replies: list[Drawn] = yield from run.ledger.ask([*wanted, *draws])
        if wanted:
            rolled = replies[0].ids
        children, reserve = candidates.read(
            replies[len(wanted) :],
            length,
            run.cfg,
            lambda tokens: run.ends.close(before, tokens),
        )
    # What each node of the path began, to the end of the continuation.
    texts, tokens = [], rolled
    for node in reversed(path[1:]):
        tokens = node.tokens + tokens
        texts.insert(0, run.ends.text(tokens))
    value, vectors = yield from run.weigh(run.ends.text(before + rolled), texts)
    return Leaf(value, rolled, children, reserve, vectors)


def most_visited(root: Node, official: bool) -> tuple[int, ...]:
    """Tokens below a node along its most visited children, and what followed the last of them."""
    node, tokens = root, ()
    while any(child.visits for child in node.children):
        node = best_child(node, official=official)
        tokens += node.tokens
    return tokens + node.rollout
