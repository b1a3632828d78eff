"""Positions of batches as a loader draws them, and random states that are put back."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Sampler

from lightning_trak.running.data.positions import PositionLog
from lightning_trak.running.random_states import RandomWatch, restore_random_states

CPU = torch.device("cpu")


def test_positions_come_in_order_and_an_unfinished_pass_is_forgotten():
    log, loader = PositionLog(), DataLoader(range(10), batch_size=4, shuffle=True)
    watched = log.watched(loader)
    assert len(watched) == 3
    passes = iter(watched)
    next(passes)
    for batch in watched:
        assert list(log.take()) == batch.tolist()
    with pytest.raises(RuntimeError, match="has no positions"):
        log.take()
    list(loader)
    with pytest.raises(RuntimeError, match="has no positions"):
        log.take()


@pytest.mark.parametrize("drawn", [["a", "b"], [1, -1], [0, 2]])
def test_a_sampler_without_positions(drawn):
    class Names(Sampler):
        def __iter__(self):
            return iter(drawn)

    watched = PositionLog().watched(DataLoader({"a": 1, "b": 2}, batch_size=2, sampler=Names()))
    with pytest.raises(ValueError, match="are not positions in the dataset"):
        list(watched)


@pytest.mark.skipif(not hasattr(DataLoader(range(1)), "in_order"), reason="this torch always keeps the order")
def test_a_loader_that_does_not_keep_the_order():
    with pytest.raises(ValueError, match="in_order=False"):
        PositionLog().watched(DataLoader(range(10), batch_size=4, in_order=False))


DRAWS = {
    "torch": lambda: torch.randn(3).tolist(),
    "python": lambda: [random.gauss(0, 1), random.random()],
    "numpy": lambda: [np.random.standard_normal(), np.random.rand()],  # noqa: NPY002
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("earlier", [0, 1, 700])  # Gaussian numbers come in pairs, and states are made for 624 numbers
@pytest.mark.parametrize("quiet", [0, 100])  # steps before
def test_a_generator_is_set_back(name, earlier, quiet):
    watch = RandomWatch(CPU)
    for _ in range(quiet):
        watch.before()
        assert watch.drawn() == {}
    for _step in range(3):
        for _ in range(earlier):
            DRAWS[name]()
        watch.before()
        drawn = DRAWS[name]()
        states = watch.drawn()
        assert list(states) == [name]
        assert all(draw() for draw in DRAWS.values())
        restore_random_states(states, CPU)
        assert DRAWS[name]() == drawn


def test_another_generator_of_numpy_is_refused():
    own = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(0))
    try:
        with pytest.raises(ValueError, match="draws from PCG64"):
            RandomWatch(CPU).before()
    finally:
        np.random.set_bit_generator(own)
