"""Records of each method, made up, for tests of the page."""

from __future__ import annotations

from typing import Any

from rlalign.testtime.answers import make_extract
from rlalign.testtime.decode_rows import Row
from rlalign.testtime.decode_text import make_record
from rlalign.testtime.result import Result

HOSTILE = "</script><script>document.title='owned'</script><b id=\"owned\">&amp; é</b>"


def record(name: str, text: str, trace: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A record with that trace; `right` if its text is "1"."""
    given = {"stop_reason": "samples", "reward": None, "error": ""} | changes
    result = Result(
        name, text, (5, 6), "stop", given["stop_reason"], given["reward"], 10, 3, 2, 1, 0.5,
        {"oracle": 1}, trace, given["error"],
    )  # fmt: skip
    row = Row(name, {"prompt": f"ask {name} {HOSTILE}", "answer": "1"})
    return make_record("best-of-n", row, result, make_extract("auto"))


def rain_trace() -> dict[str, Any]:
    """Three committed sets; beside each of the first two stand three others, one of which has
    children of its own: ids 0 (root) to 14."""
    nodes = [node(0, -1, "", 30.0, committed=True)]
    trunk = 0
    for level in range(2):
        first = len(nodes)
        nodes += [
            node(first + i, trunk, f"set{level}{i} ", 9.0 - i, q=0.5 - i / 2) for i in range(4)
        ]
        nodes[first + 2]["committed"] = True
        nodes += [node(first + 4 + i, first, f"below{level}{i} ", 1.0 + i) for i in range(2)]
        trunk = first + 2
    nodes += [node(len(nodes), trunk, "end.", 4.0, q=1.0, committed=True, terminal=True)]
    nodes += [node(len(nodes), 99, "lost", 1.0)]
    depth = {-1: -1, 99: 1}
    for one in nodes:
        one["depth"] = depth[one["id"]] = depth[one["parent"]] + 1
    commits = [
        {"node": one["id"], "text": one["text"], "searches": 7, "below_threshold": i == 1}
        for i, one in enumerate(n for n in nodes if n["committed"] and n["id"])
    ]
    return {"method": "rain", "commits": commits, "nodes": nodes, "dropped": 5}


def node(name: int, parent: int, text: str, n: float, q: float = -0.25, **changes: Any) -> dict:
    base = {"id": name, "parent": parent, "text": text, "n": n, "visits": int(n), "q": q, "p": 0.1}
    return base | {"depth": 0, "committed": False, "terminal": False} | changes


def latent_trace() -> dict[str, Any]:
    def step(k: int, reward: float, prefix: list[str], changed: list[int]) -> dict[str, Any]:
        roles = {"calculation_check": reward > -0.5, "answer_correct": None, "other": False}
        text = "".join(prefix) + " so 1"
        made = {"step": k, "text": text, "reward": reward, "prefix": prefix}
        return made | {"changed": changed, "roles": roles}

    steps = [
        step(0, -1.0, ["a", " b", " c"], []),
        step(1, -1 / 6, ["a", " <b>x</b>", " c"], [1]),
        step(3, -0.5, ["a", " y", " z"], [1, 2]) | {"repeats": 1},
    ]
    return {"method": "latent_seek", "num_latents": 3, "steps": steps}


def one_of_each() -> list[dict[str, Any]]:
    samples = [
        {"text": HOSTILE, "reward": 0.5},
        {"text": "1", "reward": 2.0},
        {"text": "x", "reward": None},
    ]
    voters = [{"text": t, "reward": None, "answer": t} for t in ("1", "2", "1.0")]
    answers = [
        {"answer": "1", "votes": 2, "samples": [0, 2]},
        {"answer": "2", "votes": 1, "samples": [1]},
    ]
    latent = latent_trace()
    fusion = {"method": "logit_fusion", "alphas": [0.0, 1.5, 0.5], "experts": [-1, 0, 1]}
    return [
        record("best", "1", {"method": "best_of_n", "samples": samples}, reward=2.0),
        record("vote", "1", {"method": "majority", "answers": answers, "samples": voters}),
        record("latent", latent["steps"][1]["text"], latent, reward=-1 / 6, stop_reason="accepted"),
        record("rain", "set02 set12 end.", rain_trace(), stop_reason="max_total_searches"),
        record("fusion", "2", fusion, stop_reason="eos"),
        record("failed", "", {}, error=f"DecodeError: {HOSTILE}", stop_reason="error"),
    ]
