"""Random states are the user's, whatever happens."""

import random

import numpy as np
import pytest
import torch

from lightning_trak.running.random_states import RandomWatch, isolated_random_states, restore_random_states


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


@pytest.mark.parametrize("fails", [False, True])
def test_they_are_as_they_were(fails):
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    expected = draw()
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    try:
        with isolated_random_states():
            draw()
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert draw() == expected


DRAWS = {
    "torch": lambda: float(torch.rand(())),
    "numpy": np.random.rand,
    "python": random.random,
    # a second number waits, and the 624 numbers do not change
    "python, again": lambda: random.gauss(0, 1),
    "numpy, again": np.random.standard_normal,
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_watch_notices_who_draws(name):
    with isolated_random_states():
        random.gauss(0, 1), np.random.standard_normal()  # noqa: NPY002
        watch, cpu = RandomWatch(torch.device("cpu")), torch.device("cpu")
        for _ in range(40):
            watch.before()
            assert watch.drawn() == {}
        watch.before()
        expected = DRAWS[name]()
        states = watch.drawn()
        assert list(states) == [name.partition(",")[0]]
        DRAWS[name]()
        restore_random_states(states, cpu)
        assert DRAWS[name]() == expected


def test_a_state_that_is_set_back_was_not_drawn_from():
    watch = RandomWatch(torch.device("cpu"))
    watch.before()
    with isolated_random_states():
        draw(), torch.randn(1), random.gauss(0, 1), np.random.standard_normal()  # noqa: NPY002
    assert watch.drawn() == {}


def test_random_numbers_of_a_gpu_are_refused_on_a_cpu():
    with pytest.raises(ValueError, match=r'random numbers on a GPU.* cpu cannot draw them again; .*accelerator="gpu"'):
        restore_random_states({"cuda": torch.zeros(16, dtype=torch.uint8)}, torch.device("cpu"))
