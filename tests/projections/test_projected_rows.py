"""Gradients that are projected some rows at a time, or of which few rows are not zero."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from lightning_trak.projections import KroneckerProjection
from lightning_trak.projections.blocks import RandomProjection
from tests.projections.test_projections import ALL, CPU, kind, project, random_gradients


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
@pytest.mark.parametrize("projection", [*ALL, KroneckerProjection(3, 2), KroneckerProjection(9, 9, dim=32)], ids=kind)
def test_rows_of_a_gradient_add_up(projection, cache_bytes, monkeypatch):
    monkeypatch.setattr("lightning_trak.projections.blocks._BLOCK_VALUES", 50)  # blocks end within rows
    if isinstance(projection, RandomProjection):
        projection = replace(projection, cache_bytes=cache_bytes)
    bound = projection.bind({"a": (5,), "b": (7, 2, 5)}, 0, 0, CPU)
    gradients = random_gradients(3, {"a": 5, "b": 70}, torch.float64)
    expected = project(bound, gradients, torch.float64)
    features = torch.zeros_like(expected)
    for name, cuts in {"a": (0, 2, 5), "b": (0, 1, 3, 7)}.items():
        columns = bound.sizes[name] // cuts[-1]
        for start, stop in pairwise(cuts):
            part = gradients[name][:, start * columns : stop * columns]
            bound.add_(features, name, part, range(start, stop))
    torch.testing.assert_close(features, expected)
    with pytest.raises(ValueError, match=r"gradients of 'b' to have shape \(batch, 20\) but got \(3, 70\)"):
        bound.add_(features, "b", gradients["b"], range(2, 4))
