"""Scores are not measured on subsets that they were made from."""

import pytest
import torch

from lightning_trak import LinearDatamodelingScore
from lightning_trak.metrics.functional import used_subsets

MASKS = torch.rand(12, 30, generator=torch.Generator().manual_seed(0)) < 0.5


def test_used_rows_are_found_whatever_their_order():
    assert used_subsets(MASKS, MASKS[[7, 2, 7]]) == [2, 7]
    assert used_subsets(MASKS, ~MASKS) == []
    assert used_subsets(MASKS, MASKS[:0]) == []


def test_the_metric_refuses_them_and_names_them():
    assert LinearDatamodelingScore(MASKS[3:], used_masks=MASKS[:3]).masks.shape == (9, 30)
    with pytest.raises(ValueError, match=r"2 of 9 were: rows 0, 8 of `masks`.*`split`"):
        LinearDatamodelingScore(MASKS[3:], used_masks=MASKS[[3, 0, 11]])
    with pytest.raises(ValueError, match=r"12 of 12 were: rows 0, 1, .*9, \.\.\. of"):
        LinearDatamodelingScore(MASKS, used_masks=MASKS)


@pytest.mark.parametrize("used", [MASKS.float(), MASKS[0], MASKS[:, :29]])
def test_masks_that_do_not_fit(used):
    with pytest.raises(ValueError, match="Expected `used_masks` of dtype"):
        used_subsets(MASKS, used)
