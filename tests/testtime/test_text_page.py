"""The page of decode records: what its scripts compute, and what a browser makes of it."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from rlalign.testtime.errors import DecodeError
from rlalign.testtime.result import BUDGETS
from rlalign.testtime.text_page import SCRIPTS, TEMPLATE, collect, write_text_page
from tests.page_scripts import call_script
from tests.testtime.page_records import HOSTILE, node, one_of_each, rain_trace, record


def call(function: str, rows: list[list[Any]]) -> list[Any]:
    """What the JavaScript `function` of the page's first script returns for each row."""
    return call_script(SCRIPTS[0], function, rows)


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def random_tree(rng: random.Random) -> list[dict[str, Any]]:
    """Nodes in any order, with a committed path from the root."""
    nodes = [node(0, -1, "", 9.0, committed=True)]
    for i in range(1, rng.randint(2, 60)):
        nodes.append(node(i, rng.randrange(i), f"t{i}", rng.choice([0.0, 1.0, 2.5, 7.0])))
    at = 0
    while below := [one for one in nodes if one["parent"] == at]:
        at = rng.choice(below)["id"]
        nodes[at]["committed"] = True
    rng.shuffle(nodes)
    return nodes


@pytest.fixture(scope="module")
def forest() -> list[list[dict[str, Any]]]:
    rng = random.Random(0)
    return [random_tree(rng) for _ in range(60)]


def test_all_nodes_are_seen_once_and_parents_stand_before_their_children(forest):
    found = call(
        "n => { const t = treeOf(n); return visibleNodes(t, new Set(t.byId.keys())); }",
        [[nodes] for nodes in forest],
    )
    for nodes, seen in zip(forest, found, strict=True):
        assert sorted(seen) == sorted(one["id"] for one in nodes)
        place = {name: i for i, name in enumerate(seen)}
        for one in nodes:
            if one["id"]:
                assert place[one["parent"]] < place[one["id"]]


def test_the_committed_path_is_a_trunk_and_the_others_go_by_visits(forest):
    found = call(
        "n => { const t = treeOf(n); const s = visibleNodes(t, openAtFirst(t));"
        " return s.map(i => [i, t.indent.get(i), t.level.get(i)]); }",
        [[nodes] for nodes in forest],
    )
    for nodes, rows in zip(forest, found, strict=True):
        by_id = {one["id"]: one for one in nodes}
        trunk = [name for name, _, _ in rows if by_id[name]["committed"]]
        assert sorted(trunk) == sorted(one["id"] for one in nodes if one["committed"])
        assert [level for name, _, level in rows if name in trunk] == [
            i + 1 for i in range(len(trunk))
        ]
        for name, indent, _ in rows:
            assert indent == (0 if by_id[name]["committed"] else 1)
        beside = [row[0] for row in rows if row[0] not in trunk]
        assert {by_id[name]["parent"] for name in beside} <= set(trunk)
        for parent in trunk:
            visits = [by_id[name]["n"] for name in beside if by_id[name]["parent"] == parent]
            assert visits == sorted(visits, reverse=True)


def test_nodes_without_their_parents_are_roots_behind_the_root():
    [[roots, seen]] = call(
        "n => { const t = treeOf(n); return [t.roots, visibleNodes(t, openAtFirst(t))]; }",
        [[rain_trace()["nodes"]]],
    )
    assert roots == [0, 14] and seen[0] == 0 and 14 in seen
    assert not {5, 6, 11, 12} & set(seen)  # below nodes that were not committed


def test_keys_move_as_in_any_tree():
    nodes = [node(0, -1, "", 9.0), node(1, 0, "a", 5.0), node(2, 0, "b", 3.0), node(3, 1, "c", 1.0)]
    act = "(n, open, id, key) => treeKey(treeOf(n), new Set(open), id, key)"
    cases = [
        ([], 0, "ArrowRight", {"id": 0, "open": True}),
        ([0], 0, "ArrowRight", {"id": 1}),
        ([0], 0, "ArrowLeft", {"id": 0, "open": False}),
        ([0], 1, "ArrowLeft", {"id": 0}),
        ([0], 2, "ArrowRight", {"id": 2}),
        ([], 0, "ArrowLeft", {"id": 0}),
        ([0], 1, "ArrowDown", {"id": 2}),
        ([0, 1], 1, "ArrowDown", {"id": 3}),
        ([0, 1], 2, "ArrowUp", {"id": 3}),
        ([0], 2, "ArrowDown", {"id": 2}),
        ([0, 1], 0, "End", {"id": 2}),
        ([0, 1], 3, "Home", {"id": 0}),
        ([0], 1, "Enter", {"id": 1, "open": True}),
        ([0, 1], 1, " ", {"id": 1, "open": False}),
        ([0], 1, "x", None),
    ]
    assert call(act, [[nodes, *case[:3]] for case in cases]) == [case[3] for case in cases]


def test_records_are_chosen_by_kind_and_words():
    records = one_of_each()
    rows = [[records, kind, words] for kind, words in (
        ("all", ""), ("right", ""), ("wrong", ""), ("over", ""), ("error", ""), ("cut", ""),
        ("all", "ask RAIN"), ("all", " end. "), ("right", "ask rain"), ("all", "decodeerror"),
    )]  # fmt: skip
    assert call("choose", rows) == [
        [0, 1, 2, 3, 4, 5], [0, 1, 2], [3, 4], [3], [5], [], [3], [3], [], [5],
    ]  # fmt: skip


def test_the_page_knows_the_same_budgets():
    assert call("() => BUDGETS", [[]]) == [list(BUDGETS)]


def test_a_curve_goes_from_edge_to_edge_and_leaves_gaps():
    found = call("curvePoints", [[[-1, None, 1], 100, 50, 10], [[4], 100, 50, 10], [[], 9, 9, 1]])
    assert found == [[[10, 40], None, [90, 10]], [[50, 25]], []]


def test_a_step_is_its_tokens_and_what_follows():
    steps = [
        {"prefix": ["a", " b"], "changed": [1], "text": "a b c"},
        {"prefix": ["<s>", "b"], "changed": [], "text": "b c"},
        {"text": "x"},
    ]
    first, other, bare = call("pathPieces", [[step] for step in steps])
    assert first["tokens"] == [
        {"token": "a", "changed": False},
        {"token": " b", "changed": True},
    ]
    assert first["rest"] == " c" and other["rest"] is None and bare["rest"] == "x"
    texts = [{"text": t} for t in ("a", "b", "a", "c")]
    assert call("chosenStep", [[texts, "a"], [texts, "z"], [[], "z"]]) == [2, 3, 0]


def test_a_token_set_is_one_line_that_shows_what_is_blank():
    rows = [["a\nb c"], ["\n "], [""], [" x"]]
    assert call("oneLine", rows) == ["a↵b c", "↵␣", "(empty)", " x"]


def test_a_page_that_would_be_too_large_says_what_is_left_out(tmp_path):
    trace = {"method": "best_of_n", "samples": [{"text": "t" * 3000, "reward": 1.0}]}
    path = write(tmp_path / "out.jsonl", [record(str(i), "1", trace) for i in range(200)])
    line = len(path.read_text().splitlines()[0])
    data = collect(path, 10 * line + 60)
    bare = [one["id"] for one in data["records"] if one["trace"] is None]
    assert len(data["records"]) - len(bare) == 10 and data["without_trace"] == len(bare) > 10
    assert data["omitted"] == 200 - len(data["records"]) > 0
    assert ["problems", "200"] in [list(row) for row in data["summary"]]
    assert all("token_ids" not in one for one in data["records"])
    assert collect(path, 10**9)["omitted"] == collect(path, 10**9)["without_trace"] == 0


@pytest.mark.parametrize("content", [None, "{}\n", "x\n", '{"id": "1", "method": "rain"}\n', "\n"])
def test_what_is_no_record_is_refused_and_nothing_written(content, tmp_path):
    path = tmp_path / "out.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DecodeError, match=r"out\.jsonl"):
        write_text_page(path)
    assert not (tmp_path / "out.html").exists()


def test_the_page_loads_nothing_and_knows_both_schemes(tmp_path):
    page = write_text_page(write(tmp_path / "out.jsonl", one_of_each())).read_text()
    outside = page.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//\w+\.|<link|<img|@import|url\(", outside)
    assert "prefers-color-scheme: dark" in page and "default-src 'none'" in page
    assert HOSTILE not in page and "__DATA__" not in page and "__SCRIPTS__" not in page
    for path in SCRIPTS:
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write", path.read_text()
        )
    assert TEMPLATE.read_text().count("<script") == 2


def browse(page: Path, script: str, tmp_path: Path) -> Any:
    """What `script`, run after the page's own in a browser, returns."""
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if browser is None:
        pytest.skip("there is no chromium")
    end = (
        "<script>(async () => { const q = s => [...document.querySelectorAll(s)];"
        "const text = s => q(s).map(e => e.textContent);"
        "const press = name => q('.controls button').find("
        "b => (b.getAttribute('aria-label') ?? b.textContent) === name).click();"
        "const send = (s, kind) => q(s)[0].dispatchEvent(new Event(kind, { bubbles: true }));"
        "const key = (s, k) => document.querySelector(s).dispatchEvent("
        "new KeyboardEvent('keydown', { key: k, bubbles: true }));"
        f"let out; try {{ out = await (async () => {{ {script} }})(); }}"
        "catch (e) { out = String(e.stack); }"
        "const box = document.createElement('textarea'); box.id = 'result';"
        "box.textContent = encodeURIComponent(JSON.stringify(out)); document.body.append(box);"
        "})();"
        "</script>"
    )
    page.write_text(page.read_text() + end)
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000"]
    shown = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r'<textarea id="result">(.*?)</textarea>', shown.stdout, re.DOTALL)
    assert found, shown.stdout[-2000:]
    return json.loads(unquote(found.group(1)))


def test_a_browser_shows_every_method_and_takes_no_text_for_markup(tmp_path):
    page = write_text_page(write(tmp_path / "out.jsonl", one_of_each()))
    script = """
      const seen = [];
      for (let i = 0; i < 6; i++) {
        q("[role=option]")[i].click();
        seen.push([text("#record h2")[0], text("#record h3")[0] ?? "", q("#record *").length]);
      }
      return { seen, title: document.title, owned: q("#owned").length, errors: text(".bad"),
        selected: q("[aria-selected=true]").map(e => e.id) };
    """
    found = browse(page, script, tmp_path)
    assert [row[0] for row in found["seen"]] == [one["id"] for one in one_of_each()]
    assert [row[1] for row in found["seen"]] == [
        "3 samples",
        "2 answers of 3 samples",
        "path of 3 latents",
        "search tree",
        "strength at each token",
        "",
    ]
    assert found["title"] == "out.jsonl · rlalign decode" and found["owned"] == 0
    assert found["errors"] == [f"DecodeError: {HOSTILE}"] and found["selected"] == ["item-5"]


def test_the_search_tree_opens_closes_and_tells_of_its_nodes(tmp_path):
    page = write_text_page(write(tmp_path / "out.jsonl", [one_of_each()[3]]))
    script = """
      const rows = () => q("[role=treeitem]").map(e => +e.dataset.node), steps = [rows()];
      const on = () => q("[role=treeitem][aria-selected=true]").map(e => +e.dataset.node)[0];
      const node = i => document.querySelector(`[data-node="${i}"]`);
      const out = { committed: q(".row.committed").map(e => +e.dataset.node), first: on() };
      node(1).querySelector(".twist").click(); steps.push(rows());
      node(5).click();
      out.clicked = [on(), text(".node h4")[0], text(".node mark")[0], text(".node pre")[0]];
      key("[role=tree]", "ArrowLeft"); out.left = on();
      key("[role=tree]", "ArrowLeft"); steps.push(rows());
      key("[role=tree]", "End"); out.end = on(); out.focus = document.activeElement.dataset.node;
      press("close all"); steps.push(rows());
      q(".commits button")[1].click(); steps.push(rows()); out.commit = [on(), text(".node dl")[0]];
      press("open all"); steps.push(rows());
      out.expanded = node(1).getAttribute("aria-expanded");
      out.level = node(5).getAttribute("aria-level");
      return { ...out, steps };
    """
    found = browse(page, script, tmp_path)
    at_first = [0, 1, 2, 4, 3, 7, 8, 10, 9, 13, 14]
    assert found["committed"] == [0, 3, 9, 13] and found["first"] == 13
    assert found["steps"][0] == at_first
    assert found["steps"][1] == [0, 1, 6, 5, *at_first[2:]]
    assert found["clicked"] == [5, "node 5", "below00 ", "set00 below00 "]
    assert found["left"] == 1 and found["steps"][2] == at_first
    assert found["end"] == 14 and found["focus"] == "14"
    assert found["steps"][3] == [0, 14]
    assert found["steps"][4] == [*at_first[:-4], 10, 9, 14]  # the way to it is opened, not it
    assert found["commit"][0] == 9 and "searches7" in found["commit"][1]
    assert "below the thresholdyes" in found["commit"][1]
    assert sorted(found["steps"][5]) == list(range(15))
    assert found["expanded"] == "true" and found["level"] == "3"


def test_a_path_of_latents_is_stepped_through(tmp_path):
    page = write_text_page(write(tmp_path / "out.jsonl", [one_of_each()[2]]))
    script = """
      const now = () => ({ where: text(".controls .value")[0], marks: text(".step mark"),
        tokens: q(".latent").length, dot: q(".dot").findIndex(d => d.classList.contains("now")),
        roles: text(".roles span"), facts: text(".step dl")[0] });
      const out = [now()];
      press("next step"); out.push(now());
      press("next step"); out.push(now());
      send(".dot", "click"); out.push(now());
      q("#step-slider")[0].value = 2; send("#step-slider", "input"); out.push(now());
      return out;
    """
    first, second, stays, dot, slid = browse(page, script, tmp_path)
    assert first["where"] == "step 1 of 3" and first["marks"] == [" <b>x</b>"]
    assert first["tokens"] == 3 and first["dot"] == 1 and "returnedyes" in first["facts"]
    assert first["roles"] == [
        "calculation check: approved",
        "answer correct: no verdict",
        "other: refused",
    ]
    assert second["where"] == "step 3 of 3" and second["marks"] == [" y", " z"]
    assert "returnedno" in second["facts"] and stays == second == slid
    assert dot["where"] == "step 0 of 3" and dot["marks"] == [] and dot["dot"] == 0


def test_thousands_of_records_are_rendered_as_they_are_needed(tmp_path):
    trace = {"method": "best_of_n", "samples": [{"text": "1", "reward": 1.0}]}
    records = [record(f"r{i}", "1" if i % 3 else "2", trace) for i in range(3000)]
    page = write_text_page(write(tmp_path / "out.jsonl", records))
    script = """
      const items = () => q("[role=option]").length, out = [[items(), text("#count")[0]]];
      const box = document.getElementById("list");
      box.scrollTop = box.scrollHeight; send("#list", "scroll"); out.push(items());
      key("#list", "ArrowDown"); out.push(text("#record h2")[0]);
      key("#list", "End");
      out.push([items(), text("#record h2")[0], box.getAttribute("aria-activedescendant")]);
      at("kind").value = "wrong"; send("#kind", "input");
      out.push([items(), text("#count")[0], text("#record h2")[0]]);
      at("search").value = "ask r2999"; send("#search", "input");
      out.push([items(), text("#record")[0]]);
      return out;
    """
    found = browse(page, script, tmp_path)
    assert found[0] == [200, "3000 of 3000"] and found[1] == 400 and found[2] == "r1"
    assert found[3] == [3000, "r2999", "item-2999"]
    assert found[4] == [200, "1000 of 3000", "r0"]
    assert found[5] == [0, "No record is like this."]


def test_a_pressed_answer_shows_its_samples_alone(tmp_path):
    page = write_text_page(write(tmp_path / "out.jsonl", [one_of_each()[1]]))
    script = """
      const names = () => text(".sample summary b"), out = [names()];
      q(".vote")[0].click(); out.push(names()); q(".vote")[1].click(); out.push(names());
      out.push(q(".vote").map(b => b.getAttribute("aria-pressed")));
      q(".vote")[1].click(); out.push(names());
      return out;
    """
    found = browse(page, script, tmp_path)
    assert found == [["1", "2", "3"], ["1", "3"], ["2"], ["false", "true"], ["1", "2", "3"]]


def _contrast(a: str, b: str) -> float:
    def light(colour: str) -> float:
        digits = colour.removeprefix("#")
        pairs = [c * 2 for c in digits] if len(digits) == 3 else re.findall("..", digits)
        parts = [int(pair, 16) / 255 for pair in pairs]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((light(a), light(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_words_can_be_read_in_both_schemes(scheme):
    block = re.findall(r":root \{(.*?)\}", TEMPLATE.read_text(), re.DOTALL)[scheme]
    colour = dict(re.findall(r"--(\w+): (#\w+)", block))
    for name in ("ink", "soft", "good", "bad"):
        for ground in ("card", "page"):
            assert _contrast(colour[name], colour[ground]) > 4.5, (name, ground)
