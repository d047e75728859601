"""Embeddings of texts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlalign.models.random import write_random_model
from rlalign.rollout.search import run_searches
from rlalign.testtime.embed import (
    Embeddings,
    NGrams,
    SentenceEncoder,
    load_embeddings,
)
from rlalign.testtime.errors import DecodeError


@given(st.lists(st.text(max_size=60), min_size=1, max_size=4))
def test_ngrams_have_unit_norm_and_know_nothing_but_the_text(texts):
    rows = NGrams().embed(texts)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert all((NGrams().embed([t])[0] == row).all() for t, row in zip(texts, rows, strict=True))


def test_ngrams_are_the_same_everywhere():
    row = NGrams().embed(["That is a fine idea."])[0]
    assert np.flatnonzero(row)[:6].tolist() == PLACES
    assert NGrams().embed([]).shape == (0, 512)


PLACES = [1, 9, 24, 25, 28, 29]  # of the first values that are not zero


def test_ngrams_find_similar_what_reads_alike():
    base, near, far = NGrams().embed(
        ["I can not help you with that, sorry.", "I can not help you with this, sorry.", "Sure! 42"]
    )
    assert base @ near > 0.8 > 0.3 > abs(base @ far)
    # Different texts are, on the whole, at right angles.
    rows = NGrams().embed([f"{math.sqrt(i)}"[2:12] for i in range(2, 60)])
    cosines = rows @ rows.T
    assert abs(cosines[~np.eye(len(rows), dtype=bool)]).mean() < 0.12


def test_a_sentence_encoder_is_the_mean_over_real_tokens(tmp_path):
    folder = write_random_model(tmp_path / "encoder", "qwen2", max_positions=32)
    encoder = SentenceEncoder(str(folder))
    texts = ["short", "a good deal longer than that", "x" * 100, ""]
    rows = encoder.embed(texts)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    # Alone, without padding, it is the same.
    for text, row in zip(texts, rows, strict=True):
        assert np.allclose(encoder.embed([text])[0], row, atol=1e-5)
    ids = encoder._tokenizer(texts[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        mean = encoder._model(ids).last_hidden_state[0].mean(0).numpy()
    assert np.allclose(rows[0], mean / np.linalg.norm(mean), atol=1e-5)


def test_what_searches_in_flight_embed_is_one_call_and_nan_is_none():
    calls = []

    class Counting:
        def embed(self, texts):
            calls.append(list(texts))
            rows = NGrams().embed(texts)
            rows[[text == "bad" for text in texts]] = np.nan
            return rows

    embeddings = Embeddings(Counting())
    wanted = [["a", "b"], [], ["bad", "a"]]
    found = run_searches(None, [embeddings(texts) for texts in wanted])  # type: ignore[arg-type]
    assert calls == [["a", "b", "bad"]]
    assert found[2][0] is None and found[1] == []
    assert (found[2][1] == found[0][0]).all() and (found[0][1] == NGrams().embed(["b"])[0]).all()


def test_by_name():
    assert load_embeddings("none") is None
    assert load_embeddings("ngrams") is load_embeddings("ngrams")
    with pytest.raises(DecodeError, match="ngrams"):
        load_embeddings("/nowhere/at/all")
