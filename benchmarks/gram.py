"""Time and memory of TRAK's Gram matrix and its factor: `python -m benchmarks.gram --k 2048 8192 --threads 1 2`."""

import argparse

import torch
from torch import Tensor

from benchmarks.memory import MIB, in_new_process, reset_peak, status
from benchmarks.timing import seconds
from lightning_trak.features.dtypes import DtypeName, feature_dtype
from lightning_trak.features.rows import Features, StoredFeatures
from lightning_trak.scoring.newton.gram import DampedGram, gram_matrix

ROWS = 1024  # a shard


def measure(k: int, dtype: DtypeName, threads: int, shards: int) -> dict[str, float]:
    """Seconds and peak MiB of each step, for random features.

    Returns:
        ``rows``: seconds for 1,000 rows of the Gram matrix; ``factor``: seconds for the Cholesky factor and the checks
        of the condition number; ``solve``: seconds for 256 targets; and the peak memory of the Gram matrix and of the
        factor, beyond what the process held before.
    """
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    rows = Features(torch.randn(ROWS, k, generator=generator), *torch.rand(3, ROWS, generator=generator))
    stored = StoredFeatures.encode(rows, feature_dtype(dtype))
    del rows
    cpu, made = torch.device("cpu"), dict[str, Tensor | DampedGram]()

    def gram(count: int) -> None:
        made.clear()
        blocks = (block for _ in range(count) for block in stored.blocks())
        made["gram"] = gram_matrix(blocks, "gauss_newton", k, cpu)[0]

    def factor() -> None:
        found = made["gram"]
        assert isinstance(found, Tensor)
        made["factor"] = DampedGram(found, 1.0, torch.float32, "noise", 0.01)

    before = status("VmRSS")
    reset_peak()
    fixed, more = seconds(lambda: gram(1)), seconds(lambda: gram(1 + shards))
    gram_peak = status("VmHWM") - before
    reset_peak()
    factored = seconds(factor)
    factor_peak = status("VmHWM") - before
    found, targets = made["factor"], torch.randn(256, k, generator=generator)
    assert isinstance(found, DampedGram)
    return {
        "rows": (more - fixed) / shards / ROWS * 1000,
        "factor": factored,
        "solve": seconds(lambda: found.solve(targets)),
        "gram MiB": gram_peak / MIB,
        "factor MiB": factor_peak / MIB,
    }


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--k", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--dtype", default="int8", help="how features are stored")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shards", type=int, default=2, help="how many shards of 1,024 rows are timed")
    settings = parser.parse_args()
    print(
        "| k | threads | seconds for 1,000 rows | factor, seconds | 256 targets, seconds | peak MiB: matrix, factor |"
    )
    print("|---|---|---|---|---|---|")
    for k in settings.k:
        for threads in settings.threads:
            found = in_new_process(measure, k, settings.dtype, threads, settings.shards)
            print(
                f"| {k} | {threads} | {found['rows']:.3f} | {found['factor']:.1f} | {found['solve']:.1f} |"
                f" {found['gram MiB']:.0f}, {found['factor MiB']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
