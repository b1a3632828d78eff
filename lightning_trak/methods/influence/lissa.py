"""LiSSA: the inverse of the Hessian as a series, a random batch of training examples for each term."""

import math
import random
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_trak.checks import positive, real
from lightning_trak.methods.influence.hessian import Hessian
from lightning_trak.methods.influence.score_error import large_score_error
from lightning_trak.methods.influence.solvers import InverseProduct, Solver

_POWER_ITERATIONS = 10
_DIVERGED = 10.0


@dataclass(frozen=True)
class LiSSA(Solver):
    """Stochastic Neumann series (Agarwal et al. 2017, arXiv 1602.03943; Koh and Liang 2017, section 3).

    From s = v, each of ``depth`` steps takes a random batch B of b of the n training examples and sets
    ``s <- v + s - ((n / b) H_B + lambda I) s / scale``. Then s / scale comes near (H + lambda I)^-1 v, if ``scale`` is
    large enough and ``depth`` several times scale / lambda.

    Args:
        depth: number of steps.
        repeats: number of independent runs, which are averaged.
        batch_size: examples in a step.
        scale: what H + lambda I is divided by; default: 1 / the step size with which stochastic gradient descent on
            least squares converges fastest, ``n max_j w_j / b + (1 - 1 / b) |H| + lambda`` with ``w_j = R_j |g_j|^2``
            (Ma, Bassily and Belkin 2018, arXiv 1712.06559).
        tolerance: warn if the residual is larger than this, relative to the target's gradient, or the error of scores,
            relative to their size. The latter is measured by five more passes where the residual leaves room for it.
    """

    depth: int = 1000
    repeats: int = 1
    batch_size: int = 32
    scale: float | None = None
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        for name in ("depth", "repeats", "batch_size"):
            positive(name, getattr(self, name))
        if self.scale is not None and not 0 < real("scale", self.scale) < math.inf:
            raise ValueError(f"scale must be above 0 and finite, or None; got {self.scale!r}")
        if not real("tolerance", self.tolerance) >= 0:
            raise ValueError(f"tolerance must be at least 0, got {self.tolerance!r}")

    def prepare(self, hessian: Hessian) -> InverseProduct:
        """Find the scale."""
        scale = self._default_scale(hessian) if self.scale is None else self.scale
        return lambda rows, _: self._solve(hessian, rows, scale)

    def _solve(self, hessian: Hessian, rows: Tensor, scale: float) -> Tensor:
        total = torch.zeros_like(rows)
        for repeat in range(self.repeats):
            total += self._run(hessian, rows, scale, repeat)
        solution = total / (self.repeats * scale)
        residual = rows - hessian.damped_product(solution)
        tiny = torch.finfo(rows.dtype).tiny  # for a target without gradient
        error = float((residual.norm(dim=1) / rows.norm(dim=1).clamp_min(tiny)).max())
        advice = f"use a larger scale (now {scale:.3g}), batch_size or damping"
        # The relative residual of zero is 1, and random batches add some noise to that of a series that converges.
        if not error <= _DIVERGED:
            raise ValueError(
                f"LiSSA diverged at {hessian.passes.where}: after {self.depth} steps the relative residual is"
                f" {error:.3g}; {advice}"
                + (
                    "; the exact Hessian may also have negative eigenvalues there"
                    if hessian.curvature == "exact"
                    else ""
                )
            )
        if error > self.tolerance:
            what = f"LiSSA at {hessian.passes.where} has a relative residual of {error:.2g}"
        else:
            found = large_score_error(hessian, rows, solution, residual, self.tolerance)
            if found is None:
                return solution
            what = f"{found.message}, by LiSSA"
        warnings.warn(
            f"{what} after {self.depth} steps: use more depth or repeats; {advice}", RuntimeWarning, stacklevel=2
        )
        return solution

    def _run(self, hessian: Hessian, rows: Tensor, scale: float, repeat: int) -> Tensor:
        passes = hessian.passes
        draw = random.Random(passes.key(f"lissa/{repeat}"))
        count = len(passes.train)
        size = min(self.batch_size, count)
        series = rows.clone()
        positions = (draw.sample(range(count), size) for _ in range(self.depth))
        for batch, _ in passes.batches(passes.train, positions):
            product = hessian.batch_product(batch, size, series) * (count / size) + hessian.ridge * series
            series = rows + series - product / scale
            if not series.isfinite().all():
                break  # the residual will tell
        return series

    def _default_scale(self, hessian: Hessian) -> float:
        count = len(hessian.passes.train)
        batch = min(self.batch_size, count)
        vector = hessian.passes.random_vector("power").unsqueeze(0)
        for _ in range(_POWER_ITERATIONS):
            vector = hessian.product(vector / vector.norm())
        return count * float(hessian.weights.max()) / batch + (1 - 1 / batch) * float(vector.norm()) + hessian.ridge
