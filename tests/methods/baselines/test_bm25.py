"""BM25 against its formula, and random scores."""

import sys
import zlib
from math import log

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_trak.methods import BM25, RandomScores
from tests.lit import make_data, make_trainer

TRAIN = ["The cat sat on the mat.", "A dog, a DOG!", "the end", ""]
TARGETS = ["the dog dog", "an unseen thing", "Cat"]


class Texts(Dataset):
    def __init__(self, texts):
        self.items = [
            {"text": text, "ids": torch.tensor([zlib.crc32(word.encode()) for word in text.split()])} for text in texts
        ]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def by_hand(k1, b):
    """Lengths are 6, 4, 2, 0, on average 3; "the" is in two of four texts, "dog" and "cat" in one."""
    the, rare = log(1 + (4 - 2 + 0.5) / (2 + 0.5)), log(1 + (4 - 1 + 0.5) / (1 + 0.5))

    def term(count, length):
        return count / (count + k1 * (1 - b + b * length / 3))

    return torch.tensor(
        [
            [the * term(2, 6), 2 * rare * term(2, 4), the * term(1, 2), 0],
            [0, 0, 0, 0],
            [rare * term(1, 6), 0, 0, 0],
        ]
    )


@pytest.mark.parametrize(("k1", "b"), [(1.2, 0.75), (2.0, 0.0), (0.5, 1.0)])
def test_bm25_by_hand(k1, b):
    scores = BM25("text", k1=k1, b=b).attribute(make_trainer(), Texts(TRAIN), Texts(TARGETS))
    torch.testing.assert_close(scores, by_hand(k1, b))


def test_tokens_of_ones_own_and_loaders():
    train, targets = (Texts([text.lower().replace(",", "").rstrip(".!") for text in part]) for part in (TRAIN, TARGETS))
    trainer = make_trainer()
    for text in ("ids", lambda item: item["text"].split(), lambda item: item["ids"]):
        torch.testing.assert_close(BM25(text).attribute(trainer, train, targets), by_hand(1.2, 0.75))
    loaders = [
        DataLoader(part, batch_size=3, shuffle=True, num_workers=1, collate_fn=list) for part in (train, targets)
    ]
    state = torch.get_rng_state()
    torch.testing.assert_close(BM25("ids").attribute(trainer, *loaders), by_hand(1.2, 0.75))
    assert torch.equal(torch.get_rng_state(), state)


def test_texts_without_a_token():
    assert BM25("text").attribute(make_trainer(), Texts(["", "?"]), Texts(TARGETS)).tolist() == [[0, 0]] * 3


def test_many_targets():
    many = Texts(TARGETS * 100)
    scores = BM25("text").attribute(make_trainer(), Texts(TRAIN), many)
    torch.testing.assert_close(scores, by_hand(1.2, 0.75).repeat(100, 1))


def test_long_texts_against_the_formula_in_float64():
    generator = torch.Generator().manual_seed(0)
    train, targets = (
        [(torch.rand(length, generator=generator) ** 3 * 50).long() for length in range(low, high)]
        for low, high in ((1, 60), (5, 25))
    )
    every = torch.arange(50)
    counts, asked = (
        torch.stack([(text[:, None] == every).sum(0) for text in texts]).double() for texts in (train, targets)
    )
    lengths, holding = counts.sum(1, keepdim=True), (counts > 0).double().sum(0)
    rarity = torch.log(1 + (len(train) - holding + 0.5) / (holding + 0.5))
    saturated = counts / (counts + 1.2 * (1 - 0.75 + 0.75 * lengths / lengths.mean()))
    expected = asked @ (rarity * saturated).T
    scores = BM25("ids").attribute(make_trainer(), *([{"ids": text} for text in texts] for texts in (train, targets)))
    torch.testing.assert_close(scores, expected.float(), rtol=2e-7, atol=0)  # one rounding to float32


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ModuleNotFoundError, match=r'^BM25 needs bm25s: pip install "lightning-trak\[text\]"$'):
        BM25("text").attribute(make_trainer(), Texts(TRAIN), Texts(TARGETS))


def test_bad_options_and_texts():
    with pytest.raises(ValueError, match=r"got k1=-1 and b=0.75"):
        BM25("text", k1=-1)
    with pytest.raises(ValueError, match=r"got k1=1.2 and b=2"):
        BM25("text", b=2)
    with pytest.raises(TypeError, match=r"text='txt' names nothing in .* a dict with 'text', 'ids': give a key"):
        BM25("txt").attribute(make_trainer(), Texts(TRAIN), Texts(TARGETS))
    with pytest.raises(TypeError, match="expected a string or a sequence of tokens from text=, got bytes"):
        BM25(lambda item: item["text"].encode()).attribute(make_trainer(), Texts(TRAIN), Texts(TARGETS))


def test_random_scores_depend_on_seed_and_place_alone():
    trainer = make_trainer()
    scores = RandomScores(3).attribute(trainer, make_data(50), make_data(200, seed=1))
    fewer = RandomScores(3).attribute(trainer, DataLoader(make_data(30, seed=9), 7), DataLoader(make_data(5), 2))
    assert torch.equal(fewer, scores[:5, :30])
    assert not torch.isclose(RandomScores(4).attribute(trainer, make_data(30), make_data(5)), fewer).any()
    assert scores.unique().numel() > 0.99 * scores.numel()
    assert abs(float(scores.mean())) < 0.03
    assert float(scores.var()) == pytest.approx(1 / 3, abs=0.02)
    assert float(scores.abs().max()) <= 1
