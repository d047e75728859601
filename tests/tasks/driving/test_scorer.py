"""The PDM score: scenes judged by hand, and a slow reading of the same rules with polygons."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from rlalign.tasks.driving import Scene, Scorer, make_scene, track
from rlalign.tasks.driving.scorer import Scores
from rlalign.tasks.errors import TaskError
from tests.tasks.driving.by_hand import (
    END,
    moved,
    random_plans,
    road_user,
    straight_plan,
    straight_scene,
)

shapely = pytest.importorskip("shapely")

FRONT = 3.7  # of the ego vehicle, from its rear axle
REAR = 1.1


def judge(scene: Scene, plan: np.ndarray, fidelity: str = "simple") -> Scores:
    return Scorer(scene, "gt", fidelity).score(plan)


@pytest.mark.parametrize("fidelity", ["simple", "full"])
class TestByHand:
    def test_a_free_road(self, fidelity):
        scores = judge(straight_scene(progress_m=END), straight_plan(), fidelity)
        assert scores.pdms_K == pytest.approx(1) and scores.safe(with_ttc=True).min() == 1

    def test_head_on(self, fidelity):
        scores = judge(straight_scene([road_user(40, vx=-5)]), straight_plan(), fidelity)
        assert scores.nc_K == 0 and scores.pdms_K == 0
        # Bumpers meet when 40 - 2 - 5 t = 3.7 + 8 t, at 2.64 s: not before the fifth waypoint.
        assert list(scores.safe()[0][:4]) == [1, 1, 1, 1] and scores.safe()[0, 5] == 0
        assert scores.nc_KT[0, 26] == 1 and scores.nc_KT[0, 27] == 0

    @pytest.mark.parametrize(("kind", "value"), [("static", 0.5), ("vehicle", 0), ("bicycle", 0)])
    def test_what_stands_in_the_way(self, fidelity, kind, value):
        scores = judge(straight_scene([road_user(25, kind=kind)]), straight_plan(), fidelity)
        assert scores.nc_K == value and scores.hard_K == value

    def test_a_side_that_meets_what_stands_is_at_fault_and_what_moves_is_not(self, fidelity):
        plan = straight_plan(0.5)
        plan[0, :, 1] = np.linspace(0, 1.0, 41)  # it slides to the left, within its lane
        for vx, value in ((0.0, 0), (0.5, 1)):
            user = road_user(1.0, 2.5, vx=vx)
            assert judge(straight_scene([user], speed=0.5), plan, fidelity).nc_K == value

    def test_it_is_a_matter_of_centimetres(self, fidelity):
        for gap, value in ((-0.01, 0.5), (0.01, 1)):
            user = road_user(END + FRONT + 2 + gap, kind="static")
            assert judge(straight_scene([user]), straight_plan(), fidelity).nc_K == value

    def test_rear_ended(self, fidelity):
        scores = judge(straight_scene([road_user(-8, vx=16)]), straight_plan(), fidelity)
        assert scores.nc_K == 1

    def test_a_vehicle_that_stands_is_never_at_fault(self, fidelity):
        scene = straight_scene([road_user(12, vx=-5)], speed=0)
        assert judge(scene, straight_plan(0.0), fidelity).nc_K == 1

    def test_who_overlaps_at_the_start_does_not_count(self, fidelity):
        scene = straight_scene([road_user(4.0, kind="static")])
        scores = judge(scene, straight_plan(), fidelity)
        assert scores.nc_K == 1 and scores.ttc_K == 1

    def test_who_was_first_touched_without_fault_does_not_count_later(self, fidelity):
        """It hits the standing ego vehicle, which then drives into it."""
        user = road_user(12, vx=-4)  # bumpers meet after 1.575 s
        plan = straight_plan(0.0)
        plan[0, 20:, 0] = 4.0 * (0.1 * np.arange(21)) ** 2 / 2
        assert judge(straight_scene([user], speed=0), plan, fidelity).nc_K == 1
        parked = road_user(6, kind="vehicle")  # the same plan does collide
        assert judge(straight_scene([parked], speed=0), plan, fidelity).nc_K == 0

    def test_a_corner_out_by_a_centimetre(self, fidelity):
        for y, value in ((5.0, 1), (5.01, 0)):  # the border itself is inside
            scores = judge(straight_scene(), straight_plan(y=y), fidelity)
            assert scores.dac_K == value and scores.safe().max() == value

    def test_too_close_but_no_collision(self, fidelity):
        """The car stands 2 m beyond where the plan ends: on its way there in 0.25 s."""
        scene = straight_scene([road_user(END + FRONT + 2 + 2)])
        scores = judge(scene, straight_plan(), fidelity)
        assert (scores.nc_K, scores.ttc_K) == (1, 0) and scores.pdms_K == pytest.approx(7 / 12)
        assert scores.safe().min() == 1 and scores.safe(with_ttc=True)[0, -1] == 0.5
        far = road_user(END + FRONT + 2 + 7.3)  # 0.9 s away is 7.2 m
        assert judge(straight_scene([far]), straight_plan(), fidelity).ttc_K == 1

    def test_near_collisions_look_at_where_the_others_will_be(self, fidelity):
        """A leader of the same speed, 2 m ahead, is none; the same one standing would be."""
        leader = road_user(FRONT + 2 + 2, vx=8)
        assert judge(straight_scene([leader]), straight_plan(), fidelity).ttc_K == 1

    def test_hard_braking(self, fidelity):
        seconds = 0.1 * np.arange(41)
        for braking, value in ((3.9, 1), (4.2, 0)):
            plan = straight_plan()
            plan[0, :, 0] = 18 * seconds - braking * seconds**2 / 2
            assert judge(straight_scene(), plan, fidelity).comfort_K == value

    def test_progress(self, fidelity):
        still = straight_plan(0.0)
        assert judge(straight_scene(progress_m=5.0), still, fidelity).progress_K == 1
        assert judge(straight_scene(progress_m=5.1), still, fidelity).progress_K == 0
        half = judge(straight_scene(progress_m=2 * END), straight_plan(), fidelity)
        assert half.progress_K == pytest.approx(0.5)
        assert half.pdms_K == pytest.approx((2.5 + 5 + 2) / 12)
        faster = judge(straight_scene(progress_m=END / 2), straight_plan(), fidelity)
        assert faster.progress_K == 1

    def test_a_plan_that_is_no_number_has_no_score(self, fidelity):
        plans = np.concatenate([straight_plan(), straight_plan()])
        plans[1, 20:] = np.nan
        scores = judge(straight_scene(progress_m=END), plans, fidelity)
        assert scores.pdms_K[0] == pytest.approx(1) and np.isnan(scores.pdms_K[1])


def test_only_full_sees_the_side_and_only_off_lane():
    """Astride two lanes, into a car that is beside the ego vehicle."""
    beside = road_user(1.0, 5.0, vx=8.0)
    lean = straight_plan(heading=np.arctan2(3.5, 32.0))
    for fidelity, value in (("simple", 1), ("full", 0)):
        assert judge(straight_scene([beside]), lean, fidelity).nc_K == value
    # In its own lane it is the other who came too close; with its side on the line it is in it.
    cutting_in = road_user(1.0, 4.0, vx=8.0, vy=-1.0)
    for fidelity in ("simple", "full"):
        for y in (0.0, 1.0):
            assert judge(straight_scene([cutting_in]), straight_plan(y=y), fidelity).nc_K == 1


def test_full_gives_no_credit_for_the_way_that_broke_a_hard_rule():
    off_road = straight_plan(y=9)
    for bound in (0.0, END):
        assert judge(straight_scene(progress_m=bound), off_road).progress_K == 1
        assert judge(straight_scene(progress_m=bound), off_road, "full").progress_K == 0


@pytest.mark.parametrize("fidelity", ["simple", "full"])
def test_a_slow_reading_of_the_rules_agrees(fidelity):
    """Shapely polygons and loops over instants and users, in the order that navsim goes."""
    seen: set[tuple[float, ...]] = set()
    for seed in range(8):
        scene = make_scene(seed)
        plans = random_plans(scene, 6, seed)
        scores = Scorer(scene, "gt", fidelity).score(plans)
        for k, plan in enumerate(plans):
            expected = slow_reading(scene, plan, fidelity == "full")
            assert (scores.nc_K[k], scores.dac_K[k], scores.ttc_K[k]) == expected, (seed, k)
            seen.add(expected)
    assert len(seen) >= 4  # enough of the combinations came up


def slow_reading(scene: Scene, plan: np.ndarray, full: bool) -> tuple[float, float, float]:
    velocity = np.gradient(plan[:, :2], 0.1, axis=0)
    speed = np.linalg.norm(velocity, axis=1)
    area = shapely.Polygon(scene.drivable_P2)
    lanes = [lane_strip(lane.points_P2, lane.width_m) for lane in scene.lanes]
    boxes = [ego_box(*pose) for pose in plan]

    def loose(t):
        held = [sum(lane.covers(shapely.Point(c)) for c in corners_of(boxes[t])) for lane in lanes]
        astride = sum(h > 0 for h in held) > 1 and 4 not in held
        return full and (astride or not area.covers(boxes[t]))

    def bearing(t, x, y):
        return np.arctan2(y - plan[t, 1], x - plan[t, 0]) - plan[t, 2]

    ignored = {u for u, user in enumerate(scene.users) if boxes[0].intersects(user_box(user, 0))}
    nc, excused = 1.0, set(ignored)
    for t in range(41):
        for u, user in enumerate(scene.users):
            if u in excused or not boxes[t].intersects(user_box(user, t)):
                continue
            behind = np.cos(bearing(t, *user.pose_T3[t, :2])) < 0
            front = shapely.LineString(corners_of(boxes[t])[:2]).intersects(user_box(user, t))
            stopped = user.speed_T[t] <= 0.05
            fault = speed[t] > 0.05 and (stopped or (not behind and (front or loose(t))))
            if fault:
                nc = min(nc, 0.5 if user.kind == "static" else 0.0)
            else:
                excused.add(u)
    ttc, passed = 1.0, set(ignored)
    for t in range(41):
        for later in (0, 3, 6, 9) if full else (3, 6, 9):
            box = shapely.affinity.translate(boxes[t], *(0.1 * later * velocity[t]))
            for u, user in enumerate(scene.users):
                if u in passed or speed[t] < 0.005:
                    continue
                if not box.intersects(user_box(user, t + later)):
                    continue
                angle = np.degrees(np.arccos(np.cos(bearing(t, *user.pose_T3[t + later, :2]))))
                if angle < 30 or (loose(t) and angle <= 150):
                    ttc = 0.0
                else:
                    passed.add(u)
    return nc, float(all(area.covers(box) for box in boxes)), ttc


def lane_strip(points, width):
    return shapely.LineString(points).buffer(width / 2, cap_style="flat", join_style="mitre")


def ego_box(x, y, heading):
    box = shapely.Polygon([(FRONT, 1), (FRONT, -1), (-REAR, -1), (-REAR, 1)])
    turned = shapely.affinity.rotate(box, heading, origin=(0, 0), use_radians=True)
    return shapely.affinity.translate(turned, x, y)


def corners_of(box):
    return list(box.exterior.coords)[:4]


def user_box(user, t):
    x, y, heading = user.pose_T3[t]
    length, width = user.length_m / 2, user.width_m / 2
    box = shapely.Polygon([(length, width), (length, -width), (-length, -width), (-length, width)])
    turned = shapely.affinity.rotate(box, heading, origin=(0, 0), use_radians=True)
    return shapely.affinity.translate(turned, x, y)


@pytest.mark.parametrize("fidelity", ["simple", "full"])
def test_where_the_world_lies_does_not_matter(fidelity):
    for seed in range(6):
        scene = make_scene(seed)
        plans = random_plans(scene, 10, seed)
        there, moved_plans = moved(scene, plans, 2.3, (31.0, -17.0))
        before, after = (
            Scorer(s, "gt", fidelity).score(p) for s, p in ((scene, plans), (there, moved_plans))
        )
        for name in ("nc_K", "dac_K", "ttc_K", "comfort_K", "progress_K", "pdms_K"):
            assert np.allclose(getattr(before, name), getattr(after, name), atol=1e-9), name


def test_looking_more_often_never_brings_a_plan_back_onto_the_road():
    left = 0
    for seed in range(8):
        scene = make_scene(seed)
        plans, scorer = random_plans(scene, 10, seed), Scorer(scene)
        between = (plans[:, :-1] + plans[:, 1:]) / 2
        finer = np.stack([plans[:, :-1], between], 2).reshape(len(plans), -1, 3)
        finer = np.concatenate([finer, plans[:, -1:]], 1)
        coarse_K, fine_K = scorer.inside(plans).all(1), scorer.inside(finer).all(1)
        assert not (fine_K & ~coarse_K).any()
        left += (~coarse_K).sum()
    assert left > 5


@pytest.mark.parametrize("fidelity", ["simple", "full"])
def test_every_waypoint_is_safe_exactly_if_no_hard_rule_is_broken(fidelity):
    safe_and_not = []
    for seed in range(10):
        scene = make_scene(seed)
        scores = Scorer(scene, "gt", fidelity).score(random_plans(scene, 20, seed))
        all_safe_K = (scores.safe() == 1).all(1)
        assert (all_safe_K == (scores.hard_K == 1)).all()
        safe_and_not += all_safe_K.tolist()
    assert 0.1 < np.mean(safe_and_not) < 0.9


def test_a_violation_before_the_first_waypoint_s_window_is_the_first_one_s():
    plan = straight_plan()
    plan[0, :2, 1] = 7.0  # off the road at the first two instants alone
    scores = judge(straight_scene(), plan)
    assert scores.hard_K == 0 and list(scores.safe()[0]) == [0, 1, 1, 1, 1, 1, 1, 1]


def test_a_plan_s_score_does_not_depend_on_the_others():
    scene = make_scene(3)
    plans, scorer = random_plans(scene, 12, 0), Scorer(scene, "cv", "full")
    together = scorer.score(plans)
    alone = [scorer.score(plan[None]).pdms_K[0] for plan in plans]
    assert np.array_equal(together.pdms_K, alone)


def test_a_braking_leader_is_what_tells_the_oracles_apart():
    leader = road_user(18, vx=8)
    leader.pose_T3[:, 0] = 18 + 8 * np.minimum(0.1 * np.arange(51), 1)  # it stops after a second
    leader.speed_T[10:] = 0
    scene = straight_scene([leader])
    for oracle, value in (("gt", 0), ("cv", 1), (lambda s: s.futures("cv"), 1)):
        assert Scorer(scene, oracle).score(straight_plan()).nc_K == value


def test_a_narrower_road():
    plan = straight_plan(y=4.8)
    assert Scorer(straight_scene()).score(plan).dac_K == 1
    assert Scorer(straight_scene(), margin_m=0.3).score(plan).dac_K == 0


def test_what_cannot_be_judged_is_refused():
    bow_tie = np.array([[0.0, 0.0], [10.0, 10.0], [10.0, 0.0], [0.0, 10.0]])
    scene = straight_scene()
    crossed = Scene(0, "straight", 8, scene.lanes, 0, bow_tie, ())
    with pytest.raises(TaskError, match="no polygon"):
        Scorer(crossed)
    with pytest.raises(TaskError, match="no polygon"):
        Scorer(Scene(0, "straight", 8, scene.lanes, 0, bow_tie[:2], ()))
    with pytest.raises(TaskError, match="fidelity"):
        Scorer(scene, fidelity="exact")
    with pytest.raises(TaskError, match="41"):
        Scorer(scene).score(straight_plan()[:, :40])


def test_coarse_tokens_followed_to_the_letter_ruin_an_expert():
    """The negative control: with 0.4 m tokens and no smoothing, discretisation is the limit."""
    from rlalign.tasks.driving import Codebook, Tracker

    scenes = [make_scene(seed) for seed in range(50)]

    def mean_pdms(step_m, tracker):
        codebook = Codebook(50.0, step_m)
        scores = []
        for scene in scenes:
            tokens = codebook.decode(codebook.encode(scene.expert_N2))[None]
            scores.append(Scorer(scene).score(track(tokens, scene.speed, tracker)).pdms_K[0])
        return 100 * float(np.mean(scores))

    literal = Tracker(jerk=1e-9, acceleration=1e-9)
    assert mean_pdms(0.4, literal) < 82 < 88 < mean_pdms(0.4, Tracker())
    assert mean_pdms(0.25, Tracker()) > 93


def test_without_shapely_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "shapely", None)
    with pytest.raises(TaskError, match=r"rlalign\[drive\]"):
        Scorer(straight_scene())
