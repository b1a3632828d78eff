import hashlib
import itertools
import random

import pytest
import torch
from scipy import stats

from lightning_trak.projections.philox import Stream, philox4x32


def reference_philox(counter, key):
    """Philox4x32-10 in Python's unbounded integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(c[0] * 0xD2511F53, 2**32)
        high1, low1 = divmod(c[2] * 0xCD9E8D57, 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def encrypt(counter, key):
    words = philox4x32(tuple(torch.tensor([word]) for word in counter), key)
    return [int(word) for word in words]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers_of_random123(counter, key, expected):
    counter, key, expected = ([int(word, 16) for word in words.split()] for words in (counter, key, expected))
    assert encrypt(counter, key) == expected
    assert reference_philox(counter, key) == expected


def test_agrees_with_unbounded_integers():
    rng = random.Random(0)
    edges = [0, 1, 2**31 - 1, 2**31, 2**32 - 1]
    counters = [[rng.choice([rng.getrandbits(32), *edges]) for _ in range(4)] for _ in range(300)]
    key = (rng.getrandbits(32), rng.getrandbits(32))
    words = torch.stack(philox4x32(tuple(torch.tensor(counters).unbind(1)), key), dim=1)
    assert words.tolist() == [reference_philox(counter, key) for counter in counters]


def test_stream_words_are_philox_of_row_block_and_tag():
    stream = Stream.derive("purpose", 3, 1, "layer.weight")
    digest = hashlib.sha256(b'["purpose", 3, 1, "layer.weight"]').digest()
    key0, key1, tag = (int.from_bytes(digest[i : i + 4], "little") for i in (0, 4, 8))
    assert stream == Stream((key0, key1), tag)
    rows = [0, 7, 2**31, 2**32 - 1, 2**32, 2**32 + 7, 2**40 + 1]
    words = stream.words(torch.tensor(rows), 3)
    assert words.shape == (len(rows), 3, 4)
    for (i, row), block in itertools.product(enumerate(rows), range(3)):
        assert words[i, block].tolist() == reference_philox((row % 2**32, row >> 32, block, tag), (key0, key1))


def test_words_do_not_depend_on_the_pass_they_are_made_in(monkeypatch):
    stream, rows = Stream.derive("p", 0, 0, "w"), torch.arange(101)
    expected = stream.words(rows, 5)
    for counters in (1, 12, 499):
        monkeypatch.setattr("lightning_trak.projections.philox._CPU_COUNTERS", counters)
        assert torch.equal(stream.words(rows, 5), expected)
    assert torch.equal(stream.words(rows[40:60], 2), expected[40:60, :2])
    assert stream.words(rows[:0], 5).shape == (0, 5, 4)


def test_words_are_uniform():
    words = Stream.derive("p", 0, 0, "w").words(torch.arange(1 << 14), 1).flatten()
    for byte in range(4):
        counts = torch.bincount(words >> 8 * byte & 0xFF, minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-3
    assert stats.kstest(words.numpy() / 2**32, "uniform").pvalue > 1e-3


def test_streams_of_a_large_grid_are_distinct():
    names = [f"layers.{layer}.{part}" for layer in range(10) for part in ("weight", "bias")]
    grid = list(itertools.product(range(500), range(10), names))
    streams = {Stream.derive("sparse", seed, checkpoint, name) for seed, checkpoint, name in grid}
    assert len(streams) == len(grid) == 100_000
    # The key alone already tells them apart, so no two differ by the counter word only.
    assert len({stream.key for stream in streams}) == len(grid)


def test_twenty_parts_never_share_a_stream():
    """Seeds made by arithmetic do meet: with 20 parts, in a third of all seeds of a well-known implementation."""
    for seed in range(2000):
        assert len({Stream.derive("gaussian", seed, 0, f"part{part}") for part in range(20)}) == 20


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("p", 11, 2, "w"), ("p", 1, 12, "w")),
        (("p", 1, 2, "1w"), ("p", 1, 21, "w")),
        (("p1", 1, 2, "w"), ("p", 11, 2, "w")),
        (("p", 1, 2, 'a", "b'), ("p", 1, 2, 'a\\", \\"b')),
        (("p", 1, 2, "w"), ("q", 1, 2, "w")),
        (("p", 1, 2, "w"), ("p", 2, 1, "w")),
        (("p", 2**64 + 1, 2, "w"), ("p", 1, 2, "w")),
        (("p", 1, 2, "w "), ("p", 1, 2, "w")),
    ],
)
def test_identities_with_shifted_boundaries_differ(one, other):
    assert Stream.derive(*one).key != Stream.derive(*other).key


def test_refuses_negative_seeds():
    with pytest.raises(ValueError, match=r"`seed` to be a non-negative integer but got -1"):
        Stream.derive("p", -1, 0, "w")
    with pytest.raises(ValueError, match=r"`checkpoint` to be a non-negative integer but got -2"):
        Stream.derive("p", 0, -2, "w")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_same_words_on_cuda():
    stream, rows = Stream.derive("p", 0, 0, "w"), torch.cat((torch.arange(1000), torch.arange(2**32 - 9, 2**32 + 9)))
    assert torch.equal(stream.words(rows.cuda(), 7).cpu(), stream.words(rows, 7))
