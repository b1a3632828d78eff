"""Scores of two methods as one."""

from typing import Any

import numpy as np
import pytest
import torch

from lightning_trak.scoring import combine_scores

GENERATOR = torch.Generator().manual_seed(0)
SCORES = torch.randn(4, 9, generator=GENERATOR) + 0.5
OTHERS = 20 * (SCORES + torch.randn(4, 9, generator=GENERATOR)) - 3


def test_is_the_mean_of_the_scores_and_of_their_fit_by_the_others() -> None:
    combined = combine_scores(SCORES, OTHERS).numpy()
    for scores, others, found in zip(SCORES.double().numpy(), OTHERS.double().numpy(), combined, strict=True):
        slope, constant = np.polyfit(others, scores, 1)
        assert slope > 0
        np.testing.assert_allclose(found, (scores + constant + slope * others) / 2, rtol=1e-10)


def test_the_others_count_as_much_as_they_correlate() -> None:
    combined = combine_scores(SCORES, OTHERS)
    for scores, others, found in zip(SCORES, OTHERS, combined, strict=True):
        first, second = ((row - row.mean()) / row.std() for row in (scores.double(), others.double()))
        correlation = torch.corrcoef(torch.stack([first, second]))[0, 1]
        expected = first + correlation * second
        assert torch.corrcoef(torch.stack([expected, found]))[0, 1] > 1 - 1e-12


@pytest.mark.parametrize("others", [-SCORES, torch.full_like(SCORES, 0.1), torch.zeros_like(SCORES)])
def test_others_that_do_not_agree_change_no_order(others: torch.Tensor) -> None:
    mean = SCORES.double().mean(1, keepdim=True)
    torch.testing.assert_close(combine_scores(SCORES, others) - mean, (SCORES - mean) / 2)


def test_unit_and_level_of_the_others_do_not_count() -> None:
    combined = combine_scores(SCORES, OTHERS)
    torch.testing.assert_close(combine_scores(SCORES, 1e-200 * OTHERS.double()), combined)
    torch.testing.assert_close(combine_scores(SCORES, 1e200 * OTHERS.double()), combined)
    torch.testing.assert_close(combine_scores(SCORES, OTHERS + 7), combined, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(combine_scores(2 * SCORES, OTHERS), 2 * combined)


def test_targets_are_treated_alone() -> None:
    torch.testing.assert_close(combine_scores(SCORES, OTHERS)[2:3], combine_scores(SCORES[2:3], OTHERS[2:3]))


def test_equal_scores_stay() -> None:
    torch.testing.assert_close(combine_scores(SCORES, SCORES), SCORES.double())
    torch.testing.assert_close(combine_scores(SCORES[:, :1], OTHERS[:, :1]), SCORES[:, :1].double())


@pytest.mark.parametrize(
    ("others", "error", "match"),
    [
        (OTHERS[:2], ValueError, r"\(4, 9\) and others \(2, 9\); expected scores of the same targets"),
        (OTHERS[0], ValueError, r"others of shape \(num_targets, num_train\), got \(9,\)"),
        (OTHERS[:, :0], ValueError, r"got \(4, 0\)"),
        (OTHERS.index_fill(0, torch.tensor([1]), torch.nan), ValueError, "others of target 1 are not finite"),
        (OTHERS.numpy(), TypeError, "others as a tensor of real numbers, got ndarray"),
        (OTHERS + 0j, TypeError, "got torch.complex64"),
    ],
)
def test_refusals(others: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        combine_scores(SCORES, others)
