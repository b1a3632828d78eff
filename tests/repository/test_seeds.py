"""What a module, a fixture and a test draw from the global generators does not depend on what ran before."""

import random
import zlib

import numpy as np
import pytest
import torch


def draw():
    return torch.rand(()).item(), np.random.rand(), random.random()  # noqa: NPY002


OF_THE_MODULE = draw()


@pytest.fixture(params=range(2))
def of_a_fixture(request):
    return draw()


@pytest.fixture(scope="module")
def of_a_module_fixture():
    return draw()


def first_draws(seed):
    torch_generator, numpy_generator = torch.Generator().manual_seed(seed), np.random.RandomState(seed)
    return torch.rand((), generator=torch_generator).item(), numpy_generator.rand(), random.Random(seed).random()


def test_each_begins_anew_with_a_seed_of_its_own(of_a_fixture, of_a_module_fixture):
    assert draw() == first_draws(0)
    assert of_a_fixture == first_draws(zlib.crc32(b"of_a_fixture"))
    assert of_a_module_fixture == first_draws(zlib.crc32(b"of_a_module_fixture"))
    assert first_draws(zlib.crc32(b"tests/repository/test_seeds.py")) == OF_THE_MODULE
