"""Completions as text: the same token by token as at once, however the tokens are dealt out, and
cut where a stop string begins."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from rlalign.models.tokenizer import build_tokenizer
from rlalign.rollout.server.texts import Reader, Text, Texts, read_whole


def with_byte_fallback() -> PreTrainedTokenizerFast:
    """As SentencePiece's: a word begins with a blank, the first one loses it, and a byte that makes
    up no character spoils those next to it."""
    words = ["<eos>", "▁a", "a", "é", "日", "▁", "▁日本", "\n"]
    vocab = {token: i for i, token in enumerate([*words, *(f"<0x{b:02X}>" for b in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


BYTE_LEVEL = build_tokenizer()
TOKENIZERS = {"byte level": BYTE_LEVEL, "byte fallback": with_byte_fallback()}
SAMPLES = ["plain", "naïve café", "日本語のテキスト", "a <think>b</think> 🙂🙃 c", "é" * 20]
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)

kinds = pytest.mark.parametrize("kind", TOKENIZERS)


def spelled(kind: str, text: str) -> list[int]:
    """A text byte by byte."""
    if kind == "byte level":
        return BYTE_LEVEL(text)["input_ids"]
    return [len(TOKENIZERS[kind]) - 256 + byte for byte in text.encode()]


def any_tokens(kind: str) -> st.SearchStrategy[list[int]]:
    """Also parts of characters, whole ones, and bytes that are none."""
    one = st.integers(0, len(TOKENIZERS[kind]) - 1).map(lambda token: [token])
    whole = st.sampled_from([spelled(kind, character) for character in "🙂日éa"])
    return st.lists(one | whole, max_size=25).map(lambda parts: [*itertools.chain(*parts)])


def dealt(reader: Reader, ids: list[int], cuts: list[int]) -> list[Text]:
    """What a reader gives that gets the tokens in several parts."""
    given, begin = [], 0
    for end in sorted({cut % (len(ids) + 1) for cut in cuts}):
        given.append(reader.read(ids[begin:end], last=False))
        if given[-1].stopped:
            return given
        begin = end
    return [*given, reader.read(ids[begin:], last=True)]


@kinds
@settings(deadline=None, max_examples=200)
@given(st.data())
def test_the_pieces_of_any_tokens_make_up_the_text(kind, data):
    tokenizer, ids = TOKENIZERS[kind], data.draw(any_tokens(kind))
    text = read_whole(tokenizer, ids, (), by_token=True)
    assert text.text == "".join(text.pieces) == read_whole(tokenizer, ids, (), False).text
    assert text.num_tokens == len(text.pieces) == len(ids)
    at_once = tokenizer.decode(ids, skip_special_tokens=True)
    if kind == "byte level" or "\ufffd" not in at_once:
        assert text.text == at_once


@kinds
@settings(deadline=None, max_examples=300)
@given(st.data())
def test_however_the_tokens_are_dealt_out_the_text_is_the_same(kind, data):
    tokenizer, ids = TOKENIZERS[kind], data.draw(any_tokens(kind))
    stop = data.draw(st.lists(st.sampled_from(["a", "aa", "é日", "🙂", "a a"]), max_size=2))
    given = dealt(Reader(tokenizer, stop), ids, data.draw(st.lists(st.integers(0, 99))))
    whole = read_whole(tokenizer, ids, stop, by_token=True)
    assert "".join(part.text for part in given) == whole.text
    assert sum((part.pieces for part in given), ()) == whole.pieces
    assert sum(part.num_tokens for part in given) == whole.num_tokens
    assert given[-1].stopped == whole.stopped and not any(part.stopped for part in given[:-1])
    assert all("".join(part.pieces) == part.text for part in given)
    assert all(part.text for part in given[:-1] if part.num_tokens)


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_character_is_given_when_it_is_whole_and_no_later(sample):
    reader, text, ids = Reader(BYTE_LEVEL, ()), "", BYTE_LEVEL(sample)["input_ids"]
    for i, token in enumerate(ids):
        text += reader.read([token], last=False).text
        assert text == BYTE_LEVEL.decode(ids[: i + 1]).rstrip("\ufffd")
    assert text == sample


def test_what_may_become_a_stop_string_is_held_back_and_nothing_else():
    reader, given = Reader(BYTE_LEVEL, ["\n\nUser:", "\n#"]), []
    for letter in "a\n\nb\n\nUs\n\nUser: no":
        given.append(reader.read(BYTE_LEVEL(letter)["input_ids"], last=False))
        if given[-1].stopped:
            break
    assert [part.text for part in given] == [
        "a", "", "", "\n\nb", "", "", "", "", "\n\nUs", "", "", "", "", "", ""
    ]  # fmt: skip
    assert given[-1].stopped and sum(part.num_tokens for part in given) == 15


@settings(deadline=None, max_examples=300)
@given(st.text("ab", max_size=30), STOPS, st.lists(st.integers(0, 30)))
def test_the_cut_is_where_reading_letter_by_letter_finds_a_stop_string(sample, stop, cuts):
    want, tokens, stopped = sample, len(sample), False
    for end in range(1, len(sample) + 1):
        ending = [s for s in stop if sample[:end].endswith(s)]
        if ending:
            want, tokens, stopped = sample[: end - max(map(len, ending))], end, True
            break
    ids = BYTE_LEVEL(sample)["input_ids"]
    text = read_whole(BYTE_LEVEL, ids, stop, by_token=True)
    assert (text.text, text.num_tokens, text.stopped) == (want, tokens, stopped)
    assert "".join(text.pieces) == want and len(text.pieces) == tokens
    assert "".join(part.text for part in dealt(Reader(BYTE_LEVEL, stop), ids, cuts)) == want


async def _decoded(texts: Texts, ids) -> list[str]:
    return [(await texts.decode(ids, (), by_token)).text for by_token in (True, False)]


def test_text_by_token_and_at_once_is_the_same(tmp_path):
    BYTE_LEVEL.save_pretrained(tmp_path)
    texts = Texts(str(tmp_path))
    for sample in SAMPLES:
        ids = BYTE_LEVEL(sample)["input_ids"]
        assert asyncio.run(_decoded(texts, ids)) == [sample, sample]
    texts.close()
