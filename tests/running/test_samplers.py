"""A loader may draw in any order and number, but from all of its dataset."""

import random

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_trak.running.data.loaders import as_loader
from lightning_trak.running.data.loading import batch_size_of
from tests.lit import TRAIN, attribute

COUNT = len(TRAIN)


class Own(Sampler):
    """A user's sampler: a function that gives what is drawn in an epoch."""

    def __init__(self, draw):
        self.draw = draw
        self.epochs = 0

    def __iter__(self):
        self.epochs += 1
        return iter(self.draw())

    def __len__(self):
        return COUNT


def shuffled(count):
    order = list(range(count))
    random.shuffle(order)
    return order


def by_length(drop_last=False, low=0):
    """Batches of varying size, in which items of about the same length come together."""
    order, batches = sorted(range(low, COUNT), key=lambda position: float(TRAIN[position][0].sum())), []
    while order:
        size = random.randint(3, 7)
        if len(order) >= size or not drop_last:
            batches.append(order[:size])
        order = order[size:]
    random.shuffle(batches)
    return batches


def endless(count):
    while True:
        yield from shuffled(count)


def batched(sampler, drop_last=False):
    return {"batch_sampler": BatchSampler(sampler, 8, drop_last)}


WHOLE = {
    "order": {"shuffle": True, "drop_last": True},
    "sequential": {"sampler": SequentialSampler(TRAIN)},
    "of the same size": {"sampler": SequentialSampler(range(COUNT))},
    "with replacement": {"sampler": RandomSampler(TRAIN, replacement=True)},
    "some at a time": {"sampler": RandomSampler(TRAIN, num_samples=7)},
    "more at a time": {"sampler": RandomSampler(TRAIN, replacement=True, num_samples=300)},
    "weighted": {"sampler": WeightedRandomSampler([1.0] * (COUNT - 1) + [1e-9], 5)},
    "a rank's share": {"sampler": DistributedSampler(TRAIN, 4, 2, drop_last=True)},
    "a permutation": {"sampler": SubsetRandomSampler(range(COUNT))},
    "a list": {"sampler": shuffled(COUNT)},
    "lists": {"batch_sampler": [list(range(30)), list(range(30, COUNT))]},
    "batches": batched(SequentialSampler(TRAIN), True),
    "batches of a list": batched(shuffled(COUNT)),
    "own": {"sampler": Own(lambda: shuffled(COUNT))},
    "own, of tensors": {"sampler": Own(lambda: torch.randperm(COUNT))},
    "own, with replacement": {"sampler": Own(lambda: torch.randint(COUNT, (COUNT,)).tolist())},
    "own, endless": {"sampler": Own(lambda: endless(COUNT))},
    "by length": {"batch_sampler": Own(by_length)},
    "by length, the last one dropped": {"batch_sampler": Own(lambda: by_length(drop_last=True))},
    "batches of own": batched(Own(lambda: shuffled(COUNT))),
}

PARTS = {
    "sequential": ({"sampler": SequentialSampler(range(8))}, 8),
    "random": ({"sampler": RandomSampler(range(8), replacement=True, num_samples=COUNT)}, 8),
    "subset": ({"sampler": SubsetRandomSampler(range(8))}, 8),
    "as long": ({"sampler": SubsetRandomSampler([3] * COUNT)}, 1),
    "weights": ({"sampler": WeightedRandomSampler([1.0] * 8, COUNT)}, 8),
    "weights of zero": ({"sampler": WeightedRandomSampler([1.0] * 9 + [0.0] * (COUNT - 9), COUNT)}, 9),
    "a rank's share": ({"sampler": DistributedSampler(Subset(TRAIN, range(8)), 2, 0)}, 8),
    "a list": ({"sampler": [3, 4, 3]}, 2),
    "lists": ({"batch_sampler": [[0, 1], [2, 3]]}, 4),
    "batches": (batched(SubsetRandomSampler(range(8))), 8),
    "batches of a sequence": (batched(SequentialSampler(range(8))), 8),
    "batches of weights": (batched(WeightedRandomSampler([1.0] * 8, COUNT)), 8),
    "batches of batches": ({"batch_sampler": BatchSampler(BatchSampler([0, 1], 1, False), 2, False)}, 2),
    "own": ({"sampler": Own(lambda: shuffled(8) * 7)}, 8),
    "own, endless": ({"sampler": Own(lambda: endless(8))}, 8),
    "by length": ({"batch_sampler": Own(lambda: by_length(low=10))}, 40),
    "nothing": ({"sampler": Own(list)}, 0),
    "some negative": ({"sampler": Own(lambda: range(-COUNT + 1, 1))}, 1),
}


@pytest.mark.parametrize("options", WHOLE.values(), ids=WHOLE)
def test_all_positions_in_any_order(options):
    options = {"batch_size": 8} | options if "batch_sampler" not in options else options
    loader = DataLoader(TRAIN, **options)
    random.seed(0)
    before = random.getstate(), torch.get_rng_state()
    assert as_loader(loader) is loader
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize(("options", "count"), PARTS.values(), ids=PARTS)
def test_a_subset_is_refused(options, count):
    with pytest.raises(ValueError, match=rf"draws a subset with \w+ \({count} of {COUNT} examples\).*Subset\(dataset"):
        as_loader(DataLoader(TRAIN, **options))


def test_the_users_sampler_is_not_advanced():
    class Stateful(Own):
        generator = None

        def __iter__(self):
            self.epochs += 1
            random.shuffle(self.order)
            return iter(torch.randperm(COUNT, generator=self.generator).tolist())

    sampler = Stateful(None)
    sampler.generator, sampler.order = torch.Generator().manual_seed(4), list(range(9))
    as_loader(DataLoader(TRAIN, sampler=sampler))
    assert sampler.epochs == 0
    assert sampler.order == list(range(9))
    assert torch.equal(sampler.generator.get_state(), torch.Generator().manual_seed(4).get_state())


def test_the_dataset_is_not_copied():
    class Uncopied(Subset):
        def __deepcopy__(self, memo):
            raise AssertionError("it may be large")

    class Holding(Own):
        def __init__(self, data):
            super().__init__(lambda: shuffled(COUNT))
            self.data = data

    data = Uncopied(TRAIN, range(COUNT))
    as_loader(DataLoader(data, sampler=Holding(data)))


def test_positions_that_there_are_not():
    with pytest.raises(ValueError, match=r"SequentialSampler draws from 99 positions, but its dataset has 50"):
        as_loader(DataLoader(TRAIN, sampler=SequentialSampler(range(99))))
    with pytest.raises(ValueError, match=r"Own draws 'a', which is not a position"):
        as_loader(DataLoader(TRAIN, sampler=Own(lambda: "abc")))
    with pytest.raises(ValueError, match=r"Own draws from 51 positions"):
        as_loader(DataLoader(TRAIN, sampler=Own(lambda: range(1, COUNT + 1))))


def test_samplers_that_cannot_be_copied():
    sampler = Own(lambda: shuffled(COUNT))
    sampler.source = (number for number in range(3))
    with pytest.raises(ValueError, match=r"cannot check .*: its Own cannot be copied \(TypeError"):
        as_loader(DataLoader(TRAIN, sampler=sampler))


def test_batches_of_varying_size_give_the_same_scores(tmp_path, checkpoints, expected):
    loader = DataLoader(TRAIN, batch_sampler=Own(by_length))
    assert batch_size_of(loader) == 32
    torch.testing.assert_close(attribute(tmp_path, checkpoints, loader), expected)


@pytest.mark.parametrize("size", [None, "many", 0, [4, 8]])
def test_batch_sizes_that_are_none(size):
    sampler = Own(by_length)
    sampler.batch_size = size
    assert batch_size_of(DataLoader(TRAIN, batch_sampler=sampler)) == 32
