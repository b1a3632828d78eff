"""Random states are the user's, whatever happens."""

import random

import numpy as np
import pytest
import torch

from lightning_trak.running.random_states import isolated_random_states


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
