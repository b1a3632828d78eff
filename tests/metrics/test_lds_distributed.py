"""The linear datamodeling score over real processes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_trak.metrics import LinearDatamodelingScore
from lightning_trak.metrics.functional import linear_datamodeling_interval, linear_datamodeling_score, noise_ceiling

pytestmark = pytest.mark.slow


def make_task():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(10, 20, generator=generator) < 0.5
    scores = torch.randn(9, 20, generator=generator)
    noise = torch.randn(9, 10, 2, generator=generator)
    return scores, (scores @ masks.float().T)[..., None] + 2 * noise, masks


# the ranges of targets that each of the two processes sees, one batch a range
LAYOUTS = [
    [[(0, 4), (4, 6)], [(6, 9)]],
    [[], [(0, 5), (5, 9)]],
    [[(0, 9)], []],
]


def run_rank(rank, init_file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=2)
    try:
        scores, outputs, masks = make_task()
        metric = LinearDatamodelingScore(masks)
        for shares, round_scores in zip(LAYOUTS, (scores, -scores, scores), strict=True):
            for start, stop in shares[rank]:
                metric.update(round_scores[start:stop], outputs[start:stop])
            order = torch.tensor([i for share in shares for start, stop in share for i in range(start, stop)])
            everything = (round_scores[order], outputs[order], masks)
            values = linear_datamodeling_score(*everything, reduction="none")
            torch.testing.assert_close(metric.compute(), values.mean())
            torch.testing.assert_close(metric.per_target(), values)
            interval = linear_datamodeling_interval(*everything, num_bootstraps=100)
            torch.testing.assert_close(metric.interval(num_bootstraps=100), interval)
            torch.testing.assert_close(metric.noise_ceiling(), noise_ceiling(outputs[order]).mean())
            with pytest.raises(ValueError, match="between 0 and 1"):
                metric.interval(confidence=2)
            local = sum(stop - start for start, stop in shares[rank])
            assert sum(map(len, metric.predictions)) == local  # what was gathered is let go, after an error too
            metric.reset()
        for without_targets in (metric.per_target, metric.compute):
            with pytest.raises(RuntimeError, match="none were seen"):
                without_targets()
        metric.update(scores[rank::2], outputs[rank::2])
        torch.testing.assert_close(metric.compute(), linear_datamodeling_score(scores, outputs, masks))
        metric = LinearDatamodelingScore(masks.flip(rank))
        metric.update(scores, outputs)
        with pytest.raises(ValueError, match="the same `masks`, but theirs differ"):
            metric.compute()
    finally:
        dist.destroy_process_group()


def test_two_processes_uneven_or_without_targets(tmp_path):
    mp.start_processes(run_rank, args=(tmp_path / "init",), nprocs=2, start_method="forkserver")
