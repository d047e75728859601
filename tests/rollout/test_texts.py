"""Completions as text: the same token by token as at once, and cut where a stop string begins."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign.models.tokenizer import build_tokenizer
from rlalign.rollout.server.texts import Texts, cut, pieces

TOKENIZER = build_tokenizer()
VOCAB = len(TOKENIZER)
SAMPLES = ["plain", "naïve café", "日本語のテキスト", "a <think>b</think> 🙂🙃 c", "é" * 20]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, VOCAB - 1), max_size=40))
def test_the_pieces_of_any_tokens_make_up_the_text(ids):
    text = cut(pieces(TOKENIZER, ids), ())
    assert text.text == "".join(text.pieces) == TOKENIZER.decode(ids, skip_special_tokens=True)
    assert text.num_tokens == len(text.pieces) == len(ids)


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_character_belongs_to_the_token_that_completes_it(sample):
    ids = TOKENIZER(sample)["input_ids"]
    for i in range(len(ids) + 1):
        text = cut(pieces(TOKENIZER, ids[:i]), ())
        assert sample.startswith(text.text.rstrip("\ufffd"))


@settings(deadline=None, max_examples=300)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_the_cut_is_where_reading_letter_by_letter_finds_a_stop_string(sample, stop):
    want, tokens, stopped = sample, len(sample), False
    for end in range(1, len(sample) + 1):
        ending = [s for s in stop if sample[:end].endswith(s)]
        if ending:
            want, tokens, stopped = sample[: end - max(map(len, ending))], end, True
            break
    text = cut(pieces(TOKENIZER, TOKENIZER(sample)["input_ids"]), stop)
    assert (text.text, text.num_tokens, text.stopped) == (want, tokens, stopped)
    assert "".join(text.pieces) == want and len(text.pieces) == tokens


async def _decoded(texts: Texts, ids) -> list[str]:
    return [(await texts.decode(ids, (), by_token)).text for by_token in (True, False)]


def test_text_by_token_and_at_once_is_the_same(tmp_path):
    import asyncio

    TOKENIZER.save_pretrained(tmp_path)
    texts = Texts(str(tmp_path))
    for sample in SAMPLES:
        ids = TOKENIZER(sample)["input_ids"]
        assert asyncio.run(_decoded(texts, ids)) == [sample, sample]
    texts.close()
