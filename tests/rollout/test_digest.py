import random

import pytest
import torch

from rlalign.rollout.digest import COLUMNS, WeightDigest, digest_of

LENGTHS = (1, 7, 2 * COLUMNS, 2 * COLUMNS + 1, 4 * COLUMNS + 5)  # float32: two to a word


def digest(**tensors):
    return digest_of(tensors)


def words_by_hand(tensor):
    """Python integers, 64 bits each, of a CPU tensor's bytes."""
    raw = bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())
    raw += bytes(-len(raw) % 8)
    return [int.from_bytes(raw[i : i + 8], "little") for i in range(0, len(raw), 8)]


def sum_by_hand(tensor):
    mask = 2**64 - 1

    def fold(x):
        return x ^ (x >> 29)

    def weight(position):
        x = fold(position * 0x9E3779B97F4A7C15 & mask)
        return fold(x * 0xBF58476D1CE4E5B9 & mask) | 1

    total = 0
    for i, word in enumerate(words_by_hand(tensor)):
        row, column = divmod(i, COLUMNS)
        total += weight(-1 - row) * weight(column) * fold(word)
    return total & mask


@pytest.mark.parametrize("length", LENGTHS)
def test_the_word_sum_is_the_formula_in_python_integers(length):
    from rlalign.rollout.digest import _word_sum

    tensor = torch.randn(length, generator=torch.Generator().manual_seed(length))
    assert int(_word_sum(tensor)) % 2**64 == sum_by_hand(tensor)


def test_order_of_the_stream_does_not_matter():
    tensors = {f"w{i}": torch.randn(5, i + 1) for i in range(6)}
    names = list(tensors)
    expected = digest_of(tensors)
    for _ in range(5):
        random.shuffle(names)
        assert digest_of({name: tensors[name] for name in names}) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
@pytest.mark.parametrize("length", LENGTHS)
def test_any_single_changed_bit_changes_the_digest(dtype, length):
    tensor = (torch.randn(length) * 50).to(dtype)
    expected = digest(w=tensor)
    raw = tensor.view(torch.uint8)
    for _ in range(40):
        at, bit = random.randrange(len(raw)), 1 << random.randrange(8)
        raw[at] ^= bit
        assert digest(w=tensor) != expected
        raw[at] ^= bit
    assert digest(w=tensor) == expected


@pytest.mark.parametrize("shape", [(6, 4), (300, 1024)])
def test_swapped_elements_rows_and_halves_change_the_digest(shape):
    tensor = torch.randn(shape)
    flat = tensor.flatten()
    variants = [tensor.flip(0), tensor.flip(1), tensor.roll(1, 0), tensor.roll(1, 1), -tensor]
    variants.append(torch.cat([tensor[shape[0] // 2 :], tensor[: shape[0] // 2]]))
    for i, j in [(0, 1), (0, len(flat) - 1), (2, 3), (1, 2)]:
        swapped = flat.clone()
        swapped[i], swapped[j] = flat[j], flat[i]
        variants.append(swapped.view(shape))
    digests = {digest(w=variant) for variant in [tensor, *variants]}
    assert len(digests) == 1 + len(variants)


def test_sign_flips_of_many_elements_do_not_cancel():
    tensor = torch.randn(4096)
    digests = {digest(w=tensor)}
    for k in range(1, 200):
        sign = torch.ones(4096)
        sign[torch.randperm(4096)[: 2 * k]] = -1
        digests.add(digest(w=tensor * sign))
    assert len(digests) == 200


def test_names_shapes_dtypes_and_swapped_tensors_matter():
    a, b = torch.zeros(4, 6), torch.ones(4, 6)
    digests = [
        digest(a=a, b=b),
        digest(a=b, b=a),
        digest(a=a, c=b),
        digest(a=a.view(6, 4), b=b),
        digest(a=a.to(torch.float64), b=b),
        digest(a=a.to(torch.int32), b=b),
        digest(a=a),
        digest(a=a, b=b, c=a[:0]),
    ]
    assert len(set(digests)) == len(digests)


def test_layout_and_alignment_do_not_matter():
    base = torch.randn(1001)
    view = base[1:]  # starts in the middle of a 64-bit word
    assert digest(w=view) == digest(w=view.clone())
    matrix = torch.randn(64, 48)
    assert digest(w=matrix.t()) == digest(w=matrix.t().contiguous())
    assert digest(w=torch.tensor(3.0)) == digest(w=torch.tensor(3.0))


def test_many_rows_at_a_time_give_the_same_sum(monkeypatch):
    # What an accelerator does, done on the CPU.
    tensor = torch.randn(2 * 5 * COLUMNS + 3)
    expected = digest(w=tensor)
    monkeypatch.setattr("rlalign.rollout.digest.CPU_ROWS", 3)
    assert digest(w=tensor) == expected


def test_tensors_may_change_after_they_were_added():
    tensor = torch.randn(100)
    stream = WeightDigest()
    stream.add("w", tensor)
    expected = digest(w=tensor)
    tensor.zero_()
    assert stream.hexdigest() == expected


def test_a_name_may_be_sent_once():
    stream = WeightDigest()
    stream.add("w", torch.zeros(2))
    with pytest.raises(ValueError, match=r"'w'.*twice"):
        stream.add("w", torch.zeros(2))
