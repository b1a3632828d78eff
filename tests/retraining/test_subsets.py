"""Random subsets: of the right size, all different, uniform, the same for a seed."""

import math

import pytest
import torch

from lightning_trak.retraining import random_removals, random_subsets
from lightning_trak.retraining.fleets.subsets import checked_masks


@pytest.mark.parametrize(("fraction", "size"), [(0.5, 50), (0.1, 10), (0.333, 34), (0.8, 81)])
def test_random_subsets(fraction, size):
    before = torch.get_rng_state()
    masks = random_subsets(101, 400, fraction, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert masks.dtype == torch.bool
    assert masks.shape == (400, 101)
    assert (masks.sum(1) == size).all()
    assert len(masks.unique(dim=0)) == 400
    often = masks.float().mean(0)  # of each example, binomial
    p = size / 101
    assert ((often - p).abs() < 4.5 * (p * (1 - p) / 400) ** 0.5).all()
    assert torch.equal(masks[:7], random_subsets(101, 7, fraction, seed=3))
    assert not torch.equal(masks[:7], random_subsets(101, 7, fraction, seed=4))


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ((10, 0), "`num_subsets` to be a positive integer but got 0"),
        ((10, 2.5), "`num_subsets` to be a positive integer but got 2.5"),
        (("10", 3), "`num_train` to be a positive integer but got '10'"),
        ((10, 3, 1.0), r"fraction in \(0, 1\) .* some of 10 examples.*, got 1\.0"),
        ((10, 3, math.nan), "some of 10 examples.*, got nan"),
    ],
)
@pytest.mark.parametrize("draw", [random_subsets, random_removals])
def test_subsets_that_do_not_exist(draw, args, match):
    with pytest.raises(ValueError, match=match):
        draw(*args)


def test_subsets_of_nothing_and_more_removals_than_there_are():
    with pytest.raises(ValueError, match=r"some of 10 examples and not all, got 0\.01"):
        random_subsets(10, 3, 0.01)
    with pytest.raises(ValueError, match="10 ways to remove 1 of 10 examples; got num_subsets=11"):
        random_removals(10, 11)


def test_subsets_of_a_fleet_do_not_change_with_those_that_were_passed():
    masks = random_subsets(10, 3)
    kept = checked_masks(masks, 10)
    masks.logical_not_()
    assert torch.equal(kept, random_subsets(10, 3))
