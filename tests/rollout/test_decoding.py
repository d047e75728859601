"""Scheduling, on a decoder whose every logit depends on the row's own history alone."""

import hashlib
from dataclasses import replace

import pytest
import torch

from rlalign.rollout.decoding import AHEAD, PREFILL_TOKENS, Row, decode, plan, survivors, take
from rlalign.rollout.engine import GenerateRequest, SamplingParams
from rlalign.rollout.sampling import sample

VOCAB = 13
STOP = frozenset({0})
CPU = torch.device("cpu")


class HistoryDecoder:
    """Keeps the token history of every row; counts what it is asked to do."""

    def __init__(self, refills: bool):
        self.refills = refills
        self.rows: list[tuple[int, ...]] = []
        self.prompts_read: list[tuple[int, ...]] = []
        self.steps = self.row_steps = 0
        self.most_rows = 0
        self.largest_prefill = 0

    def admit(self, prompts, copies):
        assert self.refills or not self.rows
        self.prompts_read += prompts
        self.largest_prefill = max(self.largest_prefill, len(prompts) * max(map(len, prompts)))
        new = [tuple(p) for p, n in zip(prompts, copies, strict=True) for _ in range(n)]
        self.rows += new
        self.most_rows = max(self.most_rows, len(self.rows))
        return self.logits(new)

    def step(self, tokens):
        self.steps += 1
        self.row_steps += len(tokens)
        self.rows = [(*row, token) for row, token in zip(self.rows, tokens, strict=True)]
        return self.logits(self.rows)

    def keep(self, index):
        self.rows = [self.rows[i] for i in index]

    def logits(self, rows):
        digests = [hashlib.blake2b(str(row).encode(), digest_size=VOCAB).digest() for row in rows]
        return torch.tensor([[byte / 64 for byte in digest] for digest in digests])


def new_row(seed, finish_reason=""):
    return Row(seed, 9, SamplingParams(1), STOP, finish_reason=finish_reason)


def requests(sizes, lengths=(3, 9, 1, 5)):
    return [
        GenerateRequest(
            f"p{i}",
            tuple((i + j) % VOCAB for j in range(lengths[i % len(lengths)])),
            tuple(range(100 * i, 100 * i + n)),
        )
        for i, n in enumerate(sizes)
    ]


def run(refills, batch, wanted, params=None):
    decoder = HistoryDecoder(refills)
    done = decode(decoder, wanted, params or SamplingParams(20), STOP, batch, CPU)
    return decoder, done


@pytest.mark.parametrize("refills", [True, False])
@pytest.mark.parametrize("batch", [1, 3, 8, 64])
def test_completions_do_not_depend_on_the_schedule(refills, batch):
    wanted = requests((4, 1, 0, 7, 2, 5))
    _, alone = run(True, 1, wanted)
    decoder, done = run(refills, batch, wanted)
    assert [[row.tokens for row in group] for group in done] == [
        [row.tokens for row in group] for group in alone
    ]
    assert decoder.most_rows <= batch
    assert [len(group) for group in done] == [4, 1, 0, 7, 2, 5]


def test_every_token_has_its_own_random_number_however_many_are_made_ahead():
    """Rows that are short of them at different times, each longer than a few rounds of AHEAD."""
    count = 3 * AHEAD + 5
    params = SamplingParams(count, ignore_eos=True)
    shorter = replace(params, max_completion_length=AHEAD + 1)
    asked = [
        GenerateRequest("a", (1, 2), (7, 8), params=shorter),
        GenerateRequest("b", (3,), (9, 7), params=params),
    ]
    decoder = HistoryDecoder(True)
    groups = decode(decoder, asked, params, STOP, 3, CPU)
    for request, rows in zip(asked, groups, strict=True):
        for seed, row in zip(request.seeds, rows, strict=True):
            history = request.token_ids
            for step, token in enumerate(row.tokens):
                logits = decoder.logits([history])
                drawn, _ = sample(logits, torch.tensor([seed]), torch.tensor([step]), params)
                assert drawn.item() == token, (request.prompt_id, seed, step)
                history += (token,)
            assert len(row.tokens) == (count if request.params is params else AHEAD + 1)


@pytest.mark.parametrize("refills", [True, False])
def test_a_prompt_is_read_once_and_no_finished_row_is_decoded(refills):
    wanted = requests((4, 4, 4, 4, 4))
    decoder, done = run(refills, 8, wanted)
    assert sorted(decoder.prompts_read) == sorted(request.token_ids for request in wanted)
    # The first token of a row comes with its prompt, each further one costs one row of one step.
    assert decoder.row_steps == sum(len(row.tokens) - 1 for group in done for row in group)


def test_free_rows_are_refilled():
    wanted = requests((2,) * 30)
    waves, _ = run(False, 8, wanted)
    steady, _ = run(True, 8, wanted)
    assert steady.row_steps == waves.row_steps
    assert steady.steps < 0.8 * waves.steps


def test_ends_are_named():
    _, done = run(True, 8, requests((8, 8, 8)), SamplingParams(6))
    reasons = {row.finish_reason for group in done for row in group}
    assert reasons == {"stop", "length"}
    for row in (row for group in done for row in group):
        assert (row.tokens[-1] in STOP) == (row.finish_reason == "stop")
        assert not STOP & set(row.tokens[:-1])
        assert len(row.tokens) == 6 or row.finish_reason == "stop"


def test_a_prefill_is_bounded():
    length = PREFILL_TOKENS // 4 + 1
    wanted = requests((1,) * 10, lengths=(length, length - 5))
    decoder, _ = run(True, 64, wanted, SamplingParams(1))
    assert decoder.largest_prefill <= PREFILL_TOKENS


def test_groups_larger_than_the_batch_are_split_and_longest_prompts_come_first():
    wanted = requests((5, 20, 3))
    queue = plan(wanted, [[new_row(s) for s in r.seeds] for r in wanted], 8)
    assert [(len(a.prompt), len(a.rows)) for a in queue] == [(9, 8), (9, 8), (9, 4), (3, 5), (1, 3)]
    assert [len(a.rows) for a in take(queue, 0, 12, refills=False)] == [8]
    assert take(queue, 4, 12, refills=False) == []


def test_survivors_move_as_few_rows_as_finished():
    rows = [new_row(seed, "stop" if seed in (1, 2, 6) else "") for seed in range(8)]
    index = survivors(rows)
    assert sorted(index) == [0, 3, 4, 5, 7]
    assert sum(i != source for i, source in enumerate(index)) == 2


def test_a_row_whose_logits_are_nan_ends_alone_and_says_so():
    class Diverged(HistoryDecoder):
        def logits(self, rows):
            return torch.full((len(rows), VOCAB), torch.nan)

    class HalfDiverged(HistoryDecoder):
        def logits(self, rows):
            broken = torch.tensor([row[0] == 1 and len(row) > 10 for row in rows])
            return super().logits(rows).masked_fill(broken[:, None], torch.nan)

    for kind, good in ((Diverged, 0), (HalfDiverged, 2)):
        [first, second] = decode(
            kind(True), requests((2, 2)), SamplingParams(12), frozenset(), 8, CPU
        )
        assert [row.finish_reason for row in second] == ["failed"] * 2
        assert [len(row.tokens) for row in second] == [good] * 2
        assert [row.finish_reason for row in first] == (["length"] * 2 if good else ["failed"] * 2)


def test_rows_of_one_prompt_are_drawn_each_in_its_own_way_and_read_it_once():
    greedy, hot = SamplingParams(5, temperature=0, num_top=3), SamplingParams(8, temperature=2.0)
    short = SamplingParams(8, temperature=2.0, top_k=2, stop_token_ids=(3, 5))
    wanted = [
        GenerateRequest("p", (1, 2), (seed,), params=params)
        for seed, params in enumerate([greedy, hot, short, greedy, short])
    ]
    decoder, together = run(True, 8, wanted)
    assert decoder.prompts_read == [(1, 2)]
    for request, [row] in zip(wanted, together, strict=True):
        _, [[alone]] = run(True, 8, [request])
        assert (row.tokens, row.logps, row.tops) == (alone.tokens, alone.logps, alone.tops)
    assert together[0][0].tokens == together[3][0].tokens
    assert [len(top) for top in together[0][0].tops] == [3] * len(together[0][0].tokens)
    row = together[0][0]
    assert [top[0][0] for top in row.tops] == row.tokens
    assert [top[0][1] for top in row.tops] == pytest.approx(row.logps, abs=1e-5)
    assert not together[1][0].tops
