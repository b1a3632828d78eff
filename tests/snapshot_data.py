"""A state dict with what is hard to save, and a series of snapshots of it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lightning_trak.checkpoints.series import ParameterGroup, SnapshotSeries

GROUPS = [ParameterGroup(0, "AdamW", 0.1, 0.01, ("a.weight", "e")), ParameterGroup(1, "Rprop", 1e-3, None, ())]


def make_state_dict(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 4, generator=generator)
    return {
        "a.weight": weight,
        "b.tied": weight,
        "c.transposed": torch.randn(5, 2, generator=generator).T,
        "d.half": torch.randn(6, generator=generator).to(torch.bfloat16),
        "e.count": torch.tensor(7 + seed),
        "f.empty": torch.zeros(0, 3),
        "g.view": weight[:2],
        "h.flat": weight.view(-1),
        "i.mask": torch.tensor([True, False]),
    }


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype, name
        assert torch.equal(first[name], second[name]), name


def fill(directory: str | Path, steps: tuple[int, ...] = (10, 20)) -> SnapshotSeries:
    series = SnapshotSeries(directory)
    series.open()
    for step in steps:
        series.save(make_state_dict(step), step, step // 10, GROUPS)
    return series
