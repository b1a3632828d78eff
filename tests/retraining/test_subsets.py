"""Random subsets: of the right size, all different, uniform, the same for a seed."""

import pytest
import torch

from lightning_trak.retraining import random_subsets


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
    [((10, 0), "num_subsets must be at least 1"), ((10, 3, 1.0), "hold 10"), ((10, 3, 0.01), "hold 0; expected some")],
)
def test_subsets_that_do_not_exist(args, match):
    with pytest.raises(ValueError, match=match):
        random_subsets(*args)
