"""Driving by reflection: the shift, the oracle, the pictures; a planner that has learnt nothing."""

from __future__ import annotations

import base64
import dataclasses
import json
import re

import pytest
import torch

pytest.importorskip("shapely")
pytest.importorskip("PIL")
pytest.importorskip("rlalign.tasks.driving")

from rlalign.models.planner import Planner
from rlalign.tasks.driving import DrivingVerifier, make_scene
from rlalign.testtime import DecodeError, decode_reflect, reflect_driving
from rlalign.testtime.domain import open_domain
from rlalign.testtime.repair import Edit

QUICK = ["steps=2", "max_iters=2"]


@pytest.fixture(autouse=True)
def untrained(monkeypatch):
    torch.manual_seed(0)
    planner = Planner().eval()
    monkeypatch.setattr(reflect_driving, "build_planner", lambda *_, **__: "nowhere")
    monkeypatch.setattr(reflect_driving, "load_planner", lambda folder: planner)


def test_records_hold_plans_and_what_the_oracle_did_not_see(tmp_path):
    summary = decode_reflect("driving", QUICK, num=2, out=tmp_path / "out")
    domain = open_domain("driving", QUICK)
    for index, record in enumerate(summary.records):
        scene = make_scene(1_000_000 + index)
        assert record["id"] == f"driving/{1_000_000 + index}"
        for plan, rating, when in (("draft", "before", "before"), ("result", "after", "after")):
            ids_T = domain.codebook.encode(torch.tensor(record[plan]).double().numpy())
            for oracle, told in (
                ("cv", record[rating]["score"]),
                ("gt", record["measured"][when]["pdms_gt"]),
            ):
                judged = DrivingVerifier(scene, domain.codebook, oracle).judge(ids_T[None])
                assert told == pytest.approx(float(judged.score_B[0]))
        assert record["scorer_calls"] <= 1 + 3 + record["iterations"] * (1 + 41 + 13)
        assert record["forwards"] <= 1 + 1 + 2 + record["iterations"] * 2
    page = (tmp_path / "out" / "index.html").read_text()
    gifs = re.findall(r'src="data:image/gif;base64,([^"]+)"', page)
    assert len(gifs) == 2 and all(base64.b64decode(gif)[:6] == b"GIF89a" for gif in gifs)


def test_a_scene_comes_as_a_seed_or_as_json_and_both_are_the_same(tmp_path):
    file = tmp_path / "in.jsonl"
    scene = json.loads(make_scene(1_000_003).to_json())
    rows = [{"seed": 1_000_003, "id": "a"}, {"scene": scene, "id": "a"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = decode_reflect("driving", QUICK, source=file).records
    assert first == second
    scene["expert_N2"][-1][0] += 1.0  # an expert of its own is kept, a missing one is found
    rows = [{"scene": scene}, {"scene": scene | {"expert_N2": None}}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own, found = decode_reflect("driving", QUICK, source=file).records
    distances = [r["measured"]["after"]["expert_distance_m"] for r in (own, found, first)]
    assert distances[0] != distances[1] == distances[2]
    for bad in ({"seed": -1}, {"seed": "7"}, {"scene": {"lanes": []}}, {}):
        file.write_text(json.dumps(bad))
        with pytest.raises(DecodeError, match="line 1"):
            decode_reflect("driving", QUICK, source=file)


def test_pictures_show_what_was_moved_and_what_the_model_made_of_it(monkeypatch):
    drawn = []
    draw = reflect_driving.draw_plans
    monkeypatch.setattr(reflect_driving, "draw_plans", lambda s, v: drawn.append(v) or draw(s, v))
    domain = open_domain("driving", QUICK)
    item = domain.make(0)
    result = domain.reflector.run(item.problem)
    ids, low = tuple(result.draft_T.tolist()), result.before
    high = dataclasses.replace(low, score=0.83)
    moved = Edit(2, (7, 7), (9, 9), ids, low, ids, high)
    idle = Edit(3, (7, 7), (7, 7), ids, low)
    domain.picture(item, dataclasses.replace(result, trace=(moved, idle)))
    assert [view.label.rsplit(" ", 1)[0] for view in drawn[0]] == [
        "draft",
        "repair 1: moved",
        "repair 1: rewritten",
        "repair 2: unchanged",
        "result",
    ]
    assert drawn[0][1].label == "repair 1: moved 0.83"


def test_later_waypoints_move_along_with_a_candidate():
    domain = open_domain("driving", QUICK)
    item = domain.make(0)
    before_T = torch.full((16,), 200)
    candidates_CT = before_T.repeat(2, 1)
    candidates_CT[0, 6:8] = torch.tensor([204, 200])
    moved = domain.reflector.completion(candidates_CT, before_T, 3)
    assert moved[0, 0::2].tolist() == [200, 200, 202, 204, 204, 204, 204, 204]
    assert moved[1].tolist() == before_T.tolist()
    assert item.problem.verifier.num_units == 8


def test_an_unknown_oracle_is_refused_and_one_draft_is_the_greedy_plan():
    with pytest.raises(DecodeError, match="choose cv or gt"):
        open_domain("driving", QUICK, {"oracle": "learned"})
    for drafts in (0, -1):
        with pytest.raises(DecodeError, match=f"drafts={drafts}: at least 1"):
            open_domain("driving", QUICK, {"drafts": drafts})
    [record] = decode_reflect("driving", ["steps=2", "max_iters=0"], num=1, drafts=1).records
    assert record["forwards"] == 2 and record["row_forwards"] == 2
