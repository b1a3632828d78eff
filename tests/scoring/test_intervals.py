"""The bootstrap over targets, against SciPy's."""

import pytest
import torch
from scipy.stats import bootstrap

from lightning_trak.reporting.shares import shares_table
from lightning_trak.scoring import Groups
from lightning_trak.scoring.intervals import bootstrap_interval


def test_it_is_that_of_scipy():
    scores = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = bootstrap_interval(scores, 0.9, resamples=5000)
    found = bootstrap(
        (scores.numpy(),), lambda x, axis: x.mean(axis), axis=0, confidence_level=0.9, method="percentile"
    )
    for mine, theirs in ((low, found.confidence_interval.low), (high, found.confidence_interval.high)):
        torch.testing.assert_close(mine, torch.from_numpy(theirs), rtol=0, atol=0.02)
    assert torch.equal(bootstrap_interval(scores, seed=3), bootstrap_interval(scores, seed=3))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((torch.ones(1, 3),), "at least two targets"),
        ((torch.ones(3, 3), 1.0), "between 0 and 1"),
        ((torch.tensor([[1.0], [float("nan")]]),), "NaN or infinite"),
    ],
)
def test_what_is_refused(arguments, error):
    with pytest.raises(ValueError, match=error):
        bootstrap_interval(*arguments)


def test_the_table_of_shares():
    table = shares_table(torch.tensor([[1.0, -3.0], [1.0, -3.0]]), Groups(["b", "a", "a"], names=["b", "a"]))
    assert table.rows == [("b", 1, 1.0, 1.0, 1.0, 0.25, 1.0), ("a", 2, -3.0, -3.0, -3.0, -0.75, -1.5)]
    with pytest.raises(ValueError, match=r"expected scores of shape \(num_targets, 2\)"):
        shares_table(torch.ones(2, 3), Groups([0, 1]))
