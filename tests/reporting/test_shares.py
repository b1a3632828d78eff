"""Shares of groups, and their intervals against SciPy's bootstrap."""

import pytest
import torch
from scipy.stats import bootstrap

from lightning_trak.reporting.shares import shares_table
from lightning_trak.scoring import Groups


def test_intervals_are_those_of_scipy():
    scores = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    groups = Groups([0, 1, 2])
    found = bootstrap(
        (scores.numpy(),), lambda x, axis: x.mean(axis), axis=0, confidence_level=0.9, method="percentile"
    )
    rows = sorted(shares_table(scores, groups, 0.9).rows)
    for column, theirs in ((3, found.confidence_interval.low), (4, found.confidence_interval.high)):
        mine = torch.tensor([float(row[column]) for row in rows], dtype=torch.float64)
        torch.testing.assert_close(mine, torch.from_numpy(theirs), rtol=0, atol=0.02)
    assert shares_table(scores, groups, seed=3).rows == shares_table(scores, groups, seed=3).rows


@pytest.mark.parametrize(
    ("scores", "confidence", "error"),
    [
        (torch.ones(1, 3), 0.95, "at least two targets"),
        (torch.ones(3, 3), 1.0, "between 0 and 1"),
        (torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, float("nan")]]), 0.95, "NaN or infinite"),
    ],
)
def test_what_is_refused(scores, confidence, error):
    with pytest.raises(ValueError, match=error):
        shares_table(scores, Groups([0, 1, 2]), confidence)


def test_the_table_of_shares():
    table = shares_table(torch.tensor([[1.0, -3.0], [1.0, -3.0]]), Groups(["b", "a", "a"], names=["b", "a"]))
    assert table.rows == [("b", 1, 1.0, 1.0, 1.0, 0.25, 1.0), ("a", 2, -3.0, -3.0, -3.0, -0.75, -1.5)]
    with pytest.raises(ValueError, match=r"expected scores of shape \(num_targets, 2\)"):
        shares_table(torch.ones(2, 3), Groups([0, 1]))
