"""How far scores are off, because a solver stopped early or left something of the inverse out.

A small residual does not say that scores are right. Along directions of little curvature, the inverse makes it large.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_trak.methods.influence.hessian import Hessian
from lightning_trak.texts.printable import counted

ROUGH = 0.02  # of the size of scores: a larger error is worth a warning
_CHECKED = 4  # targets at a time whose scores are compared with better ones
_STEPS = 3  # of conjugate gradients, to the better ones


class ScoreError(NamedTuple):
    """What is known of the error of scores.

    Attributes:
        share: the norm of the error relative to that of the scores, of the worst target.
        message: that, in words.
    """

    share: float
    message: str


def score_error(hessian: Hessian, rows: Tensor, solved: Tensor) -> ScoreError:
    """The error of the scores of the first few targets.

    They are compared with those of a better solution, which is a few steps of conjugate gradients away. Directions that
    a solver leaves out have nearly one curvature, mostly that of the damping, so that few steps say nearly all about
    them. Takes four products with the Hessian, and one pass for the scores.

    Args:
        hessian: the Hessian.
        rows: gradients of the targets, shape ``(n, p)``.
        solved: what the solver makes of them.
    """
    rows, solved = rows[:_CHECKED], solved[:_CHECKED]
    missing, residuals = torch.zeros_like(rows), rows - hessian.damped_product(solved)
    directions, squares = residuals, residuals.square().sum(1, keepdim=True)
    for _ in range(_STEPS):
        products = hessian.damped_product(directions)
        lengths = _ratio(squares, (directions * products).sum(1, keepdim=True))
        missing, residuals = missing + lengths * directions, residuals - lengths * products
        before, squares = squares, residuals.square().sum(1, keepdim=True)
        directions = residuals + _ratio(squares, before) * directions
    off, size = torch.zeros(2, len(rows), dtype=torch.float64, device=rows.device)
    for _, train in hessian.passes.rows(hessian.passes.train):
        gradients = train.features * train.loss_gradients.unsqueeze(1)
        off += (gradients @ missing.T).double().square().sum(0)
        size += (gradients @ (solved + missing).T).double().square().sum(0)
    share = float(torch.where(off > 0, off / size, 0.0).max().sqrt())
    where, judged = hessian.passes.where, f"the worst of {counted(len(rows), 'target')}"
    return ScoreError(share, f"scores at {where} are off by about {share:.0%} of their size, judged by {judged}")


def large_score_error(
    hessian: Hessian, rows: Tensor, solved: Tensor, residuals: Tensor, allowed: float
) -> ScoreError | None:
    """The error of scores, if it is larger than ``allowed``; else None.

    It is measured for the targets whose residuals leave room for it, and costs nothing if there are none.
    With A = H + lambda I, a solution x whose residual is r has an error e with e^T A e = r^T A^-1 r <= |r|^2 / lambda,
    if H has no negative eigenvalue. Relative to x^T A x, this bounds the error of the target's score at itself, and of
    its scores for training examples that carry the curvature.

    Args:
        hessian: as for :func:`score_error`.
        rows: as for :func:`score_error`.
        solved: as for :func:`score_error`.
        residuals: r, shape ``(n, p)``.
        allowed: the largest error, relative to the size of scores, that needs no word.
    """
    squares = residuals.double().square().sum(1)
    most = hessian.ridge * (rows.double() * solved.double()).sum(1).clamp_min(0) * allowed**2
    excess = squares - most
    worst = excess.topk(min(_CHECKED, len(rows))).indices
    worst = worst[excess[worst] > 0]
    if len(worst) == 0:
        return None
    error = score_error(hessian, rows[worst], solved[worst])
    return error if error.share > allowed else None


def _ratio(one: Tensor, other: Tensor) -> Tensor:
    """One number divided by the other; 0 where nothing is left to divide, or curvature is negative."""
    return torch.where(other <= 0, 0.0, one / other)
