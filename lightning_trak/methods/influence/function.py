"""Influence functions, by any solver."""

import lightning as L
import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_trak.checkpoints.reading import CheckpointsLike
from lightning_trak.checks import require_one_of, require_options, shows_options_of
from lightning_trak.methods.examples import Examples
from lightning_trak.methods.influence.base import Influence, InfluenceOptions
from lightning_trak.methods.influence.conjugate_gradient import ConjugateGradient
from lightning_trak.methods.influence.hessian import Convergence, Hessian, HessianCurvature
from lightning_trak.methods.influence.passes import Passes
from lightning_trak.methods.influence.solvers import InverseProduct, Solver
from lightning_trak.scoring.damping import Damping, require_damping
from lightning_trak.scoring.newton.noise import Noise


class InfluenceFunction(Influence):
    """By how much would the output at the target change if the training example counted once more?

    A positive score says that training on the example raises the output at the target. The unit is that of the output:
    a score is the change that one Newton step predicts, averaged over checkpoints. These are influence functions (Koh
    and Liang 2017, arXiv 1703.04730) of the output rather than of the loss, with the Hessian of the sum of the training
    losses: TRAK's question, without a projection.

    Args:
        model: as for :class:`~lightning_trak.TRAK`; it is not touched.
        checkpoints: as for :class:`~lightning_trak.TRAK`; scores are averaged over them.
        solver: how the inverse of the damped Hessian is applied:
            :class:`~lightning_trak.methods.influence.Explicit` for small models,
            :class:`~lightning_trak.methods.influence.ConjugateGradient`,
            :class:`~lightning_trak.methods.influence.LiSSA` or
            :class:`~lightning_trak.methods.influence.Arnoldi`.
        curvature: the matrix H: ``"gauss_newton"`` is sum_j R_j g_j g_j^T; ``"exact"`` is the Hessian, which may have
            negative eigenvalues where the weights are no minimum: see
            :class:`~lightning_trak.methods.influence.hessian.Hessian`.
        damping: lambda relative to the mean eigenvalue of the Gauss-Newton matrix, also where ``curvature="exact"``;
            ``"auto"`` is the rule of :func:`~lightning_trak.scoring.damping.auto_damping`, without TRAK's lag; with
            several checkpoints it takes one more pass over the training set at each. For a model trained with weight
            decay w on the mean of n losses, n w is the lambda of its objective.
        **options: ``output``, ``parameters``, ``seed`` and ``weights_only``, see
            :class:`~lightning_trak.methods.influence.base.Influence`.

    Attributes:
        convergence: how :class:`~lightning_trak.methods.influence.ConjugateGradient` went in the last
            :meth:`attribute` or :meth:`label_suspicion`: iterations and residuals, an entry for each checkpoint and
            block of targets.

    Example::

        solver = ConjugateGradient(preconditioner="ekfac")
        method = InfluenceFunction(model, "run/snapshots", solver=solver)
        # (num_targets, num_train)
        scores = method.attribute(trainer, train_loader, target_loader)
    """

    @shows_options_of(Influence.__init__)
    def __init__(
        self,
        model: nn.Module,
        checkpoints: CheckpointsLike | None = None,
        *,
        solver: Solver | None = None,
        curvature: HessianCurvature = "gauss_newton",
        damping: Damping = "auto",
        **options: Unpack[InfluenceOptions],
    ) -> None:
        require_options(type(self), options, InfluenceOptions)
        require_one_of("curvature", curvature, ("gauss_newton", "exact"))
        super().__init__(model, checkpoints, **options)
        if curvature == "exact":
            self.output.loss(torch.zeros(1))  # refuses before long work if the output does not determine the loss
        self.solver = ConjugateGradient() if solver is None else solver
        if not isinstance(self.solver, Solver):
            raise TypeError(f"expected solver as an object such as ConjugateGradient(), got {solver!r:.80}")
        self.curvature: HessianCurvature = curvature
        self.damping = require_damping(damping)
        self.convergence: list[Convergence] = []

    def _passes(self, trainer: L.Trainer, train: Examples) -> Passes:
        self.convergence = []
        return super()._passes(trainer, train)

    def _noise_level(self, passes: Passes) -> float:
        """For the automatic damping of several checkpoints, which takes one pass over the training set at each."""
        if self.damping != "auto" or len(self.checkpoints) == 1:
            return 1.0
        columns: list[tuple[Tensor, ...]] = []
        for checkpoint in range(len(self.checkpoints)):
            passes.enter(checkpoint)
            rows = [(rows.loss_gradients, rows.curvatures) for _, rows in passes.rows(passes.train)]
            columns.append(tuple(map(torch.cat, zip(*rows, strict=True))))
        noise = Noise(len(self.checkpoints))
        noise.add(*map(torch.stack, zip(*columns, strict=True)))
        return noise.agreement**2

    def _prepare(self, passes: Passes) -> InverseProduct:
        hessian = Hessian(passes, self.curvature, self.damping)
        hessian.convergence = self.convergence
        return self.solver.prepare(hessian)
