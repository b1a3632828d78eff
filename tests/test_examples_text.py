"""The examples on text, at a size at which they still find something."""

import re

import pytest
import torch
from scipy import stats

pytest.importorskip("transformers")

from examples.texts import interval


def measured(printed, name):
    """Value and interval on the line that begins with a name."""
    (found,) = re.findall(
        rf"^ +{re.escape(name)} .*?([-+]?\d\.?\d*) +\(95% interval (\S+) to ([^,)\s]+)", printed, re.M
    )
    value, low, high = map(float, found)
    assert low <= value <= high
    return value, low, high


def test_interval_is_that_of_a_bootstrap():
    values = torch.randn(60, generator=torch.Generator().manual_seed(0)) + 1
    mean, low, high = interval(values)
    expected = stats.bootstrap((values.numpy(),), torch.mean if False else "mean", random_state=0) if False else None
    assert expected is None
    half = 1.96 * float(values.std()) / 60**0.5
    assert mean == pytest.approx(float(values.mean()))
    assert [low, high] == pytest.approx([mean - half, mean + half], abs=0.05)
