"""The tree of the report: where nodes stand, what colours say, and what a browser makes of it."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch

from rlalign.algos.tree_shape import full_tree, tree_shape
from rlalign.tracking.report import SCRIPTS, TEMPLATE, write_report
from rlalign.tracking.rundir import RunDir
from tests.page_scripts import call_script

HOSTILE = "</script><script>document.title='owned'</script><b id=\"owned\">&amp; é</b>"


def call(function: str, rows: list[list[Any]]) -> list[Any]:
    """What the JavaScript `function` of the page's first script returns for each row."""
    return call_script(SCRIPTS[0], function, rows)


def random_nodes(rng: random.Random) -> dict[str, list]:
    """A tree in level order, with chains and leaves of any depth."""
    parent, depth, front = [-1], [0], [0]
    for level in range(1, rng.randint(2, 9)):
        widths = [rng.choice([0, 1, 1, 2, 3]) for _ in front]
        widths[0] = max(1, widths[0])
        parents = [p for p, width in zip(front, widths, strict=True) for _ in range(width)]
        front = list(range(len(parent), len(parent) + len(parents)))
        parent += parents
        depth += [level] * len(parents)
    return _nodes(parent, depth)


def _nodes(parent: list[int], depth: list[int], **columns: list) -> dict[str, list]:
    count = len(parent)
    leaf = [i not in parent for i in range(count)]
    same = {
        "parent": parent,
        "depth": depth,
        "kind": ["root", *["policy"] * (count - 1)],
        "value": [i / count for i in range(count)],
        "advantage": [0.0] * count,
        "kept": [True] * count,
        "reward": [i / count if leaf[i] else None for i in range(count)],
    }
    return same | columns


def denoising_nodes() -> dict[str, list]:
    """20 steps with splits at 0, 3, 6 and 9: 16 leaves."""
    tree = full_tree(torch.zeros(1, dtype=torch.long), tree_shape(20, [0, 3, 6, 9], [2]))
    return _nodes(tree.parent_N.tolist(), tree.depth_N.tolist())


@pytest.fixture(scope="module")
def forest() -> list[dict[str, list]]:
    rng = random.Random(0)
    return [random_nodes(rng) for _ in range(150)] + [denoising_nodes(), _nodes([-1], [0])]


@pytest.fixture(scope="module")
def placed(forest) -> list[dict]:
    return call("n => layoutTree(n, treeShape(n), 740, 20)", [[nodes] for nodes in forest])


def leaves_under(parent: list[int]) -> list[list[int]]:
    under = [[i] if i not in parent else [] for i in range(len(parent))]
    for i in range(len(parent) - 1, 0, -1):
        under[parent[i]] += under[i]
    return under


def test_leaves_are_evenly_spread_and_no_two_branches_cross(forest, placed):
    for nodes, place in zip(forest, placed, strict=True):
        under = leaves_under(nodes["parent"])
        rows = sorted(place["y"][leaf] for leaf in under[0])
        assert rows == [20 * k + 10 for k in range(len(rows))] and place["height"] == 20 * len(rows)
        for i, leaves in enumerate(under):
            own = sorted(place["y"][leaf] for leaf in leaves)
            assert own[-1] - own[0] == 20 * (len(own) - 1)  # nothing of another branch between
            assert own[0] <= place["y"][i] <= own[-1]


def test_a_column_is_a_depth_and_only_levels_after_a_split_are_wide(forest, placed):
    for nodes, place in zip(forest, placed, strict=True):
        parent, depth = nodes["parent"], nodes["depth"]
        split = {depth[i] for i in range(len(parent)) if parent.count(i) > 1}
        column = dict(zip(depth, place["x"], strict=True))
        assert [column[d] for d in depth] == place["x"]
        widths = {d: column[d] - column[d - 1] for d in column if d}
        assert all(width > 0 for width in widths.values())
        wide = [widths[d] for d in widths if d - 1 in split]
        narrow = [widths[d] for d in widths if d - 1 not in split]
        assert wide == pytest.approx([max([0, *wide])] * len(wide))
        assert narrow == pytest.approx([0.3 * wide[0] if wide else max([0, *narrow])] * len(narrow))


def test_sixteen_leaves_of_twenty_steps_fit_a_laptop(placed):
    place = placed[-2]
    assert place["width"] <= 740.001 and place["height"] <= 430
    assert min(place["gaps"][1:]) > 20  # pixels between the steps of a chain


def test_a_chain_is_a_straight_line(forest, placed):
    for nodes, place in zip(forest, placed, strict=True):
        for i, p in enumerate(nodes["parent"]):
            if nodes["parent"].count(p) == 1 and p >= 0:
                assert place["y"][i] == place["y"][p]


def test_a_path_leads_from_the_root_to_the_node(forest):
    nodes = [(tree, len(tree["parent"]) - 1) for tree in forest]
    for (tree, node), path in zip(nodes, call("pathTo", [list(n) for n in nodes]), strict=True):
        assert path[0] == 0 and path[-1] == node
        assert [tree["parent"][i] for i in path[1:]] == path[:-1]


def test_arrow_keys_walk_the_whole_tree(forest):
    keys = ("ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "a")
    walk = f"n => n.parent.map((_, i) => {list(keys)}.map(k => nextNode(n, treeShape(n), i, k)))"
    for tree, moves in zip(forest, call(walk, [[tree] for tree in forest]), strict=True):
        parent, depth = tree["parent"], tree["depth"]
        for i, (left, right, up, down, home, other) in enumerate(moves):
            assert left == (parent[i] if i else 0)
            assert (parent[right] == i) if i in parent else right == i
            assert depth[up] == depth[down] == depth[i]
            assert down == i or moves[down][2] == i  # up takes down back
            assert (home, other) == (0, i)
        for family in range(len(parent)):
            siblings = [i for i, p in enumerate(parent) if p == family]
            reached = [moves[family][1]] if siblings else []
            for _ in siblings[1:]:
                reached.append(moves[reached[-1]][3])
            assert reached == siblings


def test_leaves_come_by_reward_and_those_without_one_last():
    tree = _nodes([-1, 0, 0, 0, 0], [0, 1, 1, 1, 1], reward=[None, 0.2, None, 0.9, -1.0])
    assert call("n => leavesByReward(n, treeShape(n))", [[tree]]) == [[3, 1, 4, 2]]


def test_only_edges_of_the_policy_are_pruned_and_what_has_no_value_is_dead():
    tree = _nodes(
        [-1, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 1, 1],
        kind=["root", "policy", "policy", "policy", "env", "ode"],
        value=[0.5, 0.5, None, 0.5, 0.5, 0.5],
        kept=[False, True, False, False, False, False],
    )
    states = call("n => n.parent.map((_, i) => stateOf(n, i))", [[tree]])
    assert states == [["", "", "dead", "pruned", "", ""]]


def test_the_scale_of_advantages_is_symmetric_and_shared_by_the_trees_of_a_step():
    one = _nodes([-1, 0], [0, 1], advantage=[0.0, -3.0], value=[None, 0.25])
    two = _nodes([-1, 0], [0, 1], advantage=[None, 2.0], value=[-1.0, 0.5])
    [scales] = call("scalesOf", [[[{"nodes": one}, {"nodes": two}]]])
    assert scales == {"advantage": 3.0, "low": -1.0, "high": 0.5}
    rows = [[a, 3.0] for a in (3.0, -3.0, 1.5, -1.5, 0.0, None, 7.0)] + [[1.0, 0.0]]
    assert call("advantageShare", rows) == [1, -1, 0.5, -0.5, 0, 0, 1, 0]
    assert call("valueShare", [[v, scales] for v in (-1.0, 0.5, -0.25, None)]) == [0, 1, 0.5, None]
    same = {"advantage": 0.0, "low": 2.0, "high": 2.0}
    assert call("valueShare", [[2.0, same]]) == [0.5]


def test_a_colour_says_sign_and_size():
    colours = call("advantageColour", [[1], [-1], [0], [0.25], [-0.25]])
    found = [re.findall(r"var\((--\w+)\) (\d+)%", colour)[0] for colour in colours]
    assert found[:2] == [("--more", "100"), ("--less", "100")]
    assert found[2][1] == "0"
    assert found[3:] == [("--more", "25"), ("--less", "25")]


def test_a_snippet_is_one_line_of_whole_letters():
    rows = [
        ["  a\n\tb  c ", 9],
        ["abcdef", 6],
        ["abcdefg", 6],
        ["😀😀😀😀", 3],
        ["abc def", 5],
        ["ab", 0],
    ]
    found = call("snippet", rows)
    assert found == ["a b c", "abcdef", "abcde…", "😀😀…", "abc…", "…"]


def test_only_images_inside_the_page_are_shown():
    good = ["data:image/png;base64,iVBORw0KGgo=", "data:image/webp;base64,AAAA"]
    bad = [
        "https://example.com/a.png",
        "//example.com/a.png",
        "javascript:alert(1)",
        "data:text/html;base64,AAAA",
        "data:image/svg+xml;base64,AAAA",
        'data:image/png;base64,AA" onerror="alert(1)',
        7,
        None,
    ]
    rows = [[{"image": [uri]}, 0] for uri in good + bad] + [[{}, 0]]
    assert call("imageOf", rows) == good + [None] * (len(bad) + 1)


# Machado, Oliveira and Fernandes 2009, table 1, severity 1.0, for linear RGB.
COLOUR_BLIND = {
    "none": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}


def linear(colour: str) -> np.ndarray:
    digits = colour.removeprefix("#")
    pairs = [c * 2 for c in digits] if len(digits) == 3 else re.findall("..", digits)
    part = np.array([int(pair, 16) for pair in pairs]) / 255
    return np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    xyz = np.array(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    ) @ np.clip(rgb, 0, 1)
    f = np.cbrt(xyz / np.array([0.95047, 1.0, 1.08883]))  # all of these colours lie in this branch
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(a: str, b: str) -> float:
    light = sorted(float(np.array([0.2126, 0.7152, 0.0722]) @ linear(c)) for c in (a, b))
    return (light[1] + 0.05) / (light[0] + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_can_be_told_apart_by_everyone(scheme):
    block = re.findall(r":root \{(.*?)\}", TEMPLATE.read_text(), re.S)[scheme]
    colour = dict(re.findall(r"--(\w+): (#\w+)", block))
    for matrix in COLOUR_BLIND.values():
        less, zero, more = (lab(matrix @ linear(colour[c])) for c in ("less", "zero", "more"))
        assert np.linalg.norm(less - more) > 40
        assert min(np.linalg.norm(less - zero), np.linalg.norm(more - zero)) > 20
    for end in ("less", "more"):
        assert contrast(colour[end], colour["card"]) > 4.5
    assert contrast(colour["low"], colour["high"]) > 7
    assert contrast(colour["ink"], colour["card"]) > 7


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.title, self.inside = "", ""

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data):
        if self.inside == "title":
            self.title += data


def test_a_browser_draws_every_node_and_takes_no_text_for_markup(tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if browser is None:
        pytest.skip("there is no chromium")
    run = RunDir(tmp_path / "run")
    run.create("name: run\n", {"seed": 0, "started": "today"})
    nodes = denoising_nodes()
    count = len(nodes["parent"])
    nodes |= {"text": [HOSTILE] * count, "kept": [i % 2 == 0 for i in range(count)]}
    row = {"step": 1, "tree": 0, "prompt_id": HOSTILE, "prompt": HOSTILE, "answer": HOSTILE}
    (run.path / "trees").mkdir()
    (run.path / "trees" / "step_000001.jsonl").write_text(json.dumps(row | {"nodes": nodes}))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000"]
    page = subprocess.run(
        [*command, write_report(run.path).as_uri()], capture_output=True, text=True, timeout=120
    )
    parser = Elements()
    parser.feed(page.stdout)
    drawn = [attributes for _, attributes in parser.found if "data-node" in attributes]
    assert [int(a["data-node"] or -1) for a in drawn] == list(range(count))
    assert all(a["role"] == "treeitem" and a["aria-label"] for a in drawn)
    assert sum(a["aria-selected"] == "true" for a in drawn) == 1
    edges = [a["class"] or "" for tag, a in parser.found if (a.get("class") or "")[:5] == "edge "]
    assert len(edges) == count - 1
    assert sum("pruned" in classes for classes in edges) == count // 2
    assert parser.title.strip() == "run · rlalign"
    assert not any(attributes.get("id") == "owned" for _, attributes in parser.found)
