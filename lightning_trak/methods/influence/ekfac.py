"""EK-FAC: the Gauss-Newton matrix of each layer, diagonal in a basis of Kronecker products."""

import warnings
from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_trak.checkpoints.reading import CheckpointsLike
from lightning_trak.checks import require_one_of, require_options, shows_options_of
from lightning_trak.gradients import select_parameters
from lightning_trak.methods.influence.base import Influence, InfluenceOptions
from lightning_trak.methods.influence.blocks import find_blocks
from lightning_trak.methods.influence.eigenbases import diagonals, divided, fit_bases, unseen_uses
from lightning_trak.methods.influence.passes import Passes
from lightning_trak.methods.influence.solvers import InverseProduct
from lightning_trak.scoring.newton.gram import require_convex
from lightning_trak.texts.messages import with_reasons

EKFACCurvature = Literal["gauss_newton", "empirical"]


class EKFACInfluence(Influence):
    """By how much would the output at the target change if the training example counted once more?

    A positive score says that training on the example raises the output at the target. The unit is that of the output:
    a score is the change that one Newton step predicts, averaged over checkpoints. These are influence functions with
    the eigenvalue-corrected Kronecker-factored curvature of each layer, EK-FAC (George et al. 2018, arXiv 1806.03884;
    Grosse et al. 2023, arXiv 2308.03296). TRAK's and :class:`InfluenceFunction`'s question, with another matrix.

    Layers are taken to be independent. For a layer with inputs a (and a 1 for the bias) and output gradients s, the
    eigenvectors of sum a a^T and of sum s s^T give a basis of Kronecker products. In this basis the curvature is taken
    to be diagonal; on the diagonal is the sum over training examples of the squared gradients. Inputs where s is zero,
    such as padding, do not count. (kronfluence counts them, unless it is given an attention mask.)

    ``"gauss_newton"`` weighs gradients of the output by sqrt(R_j): the curvature that TRAK uses. For
    :class:`~lightning_trak.outputs.ClassificationMargin`, R = p (1 - p) is the expectation of the squared slope of the
    loss over labels drawn from the model (the label or another), so it is the true Fisher matrix of that output,
    without drawing any. ``"empirical"`` weighs by Q_j: the gradients of the loss.

    Covered are linear layers (those of Hugging Face Transformers too) and convolutions without groups. Other parameters
    are left out, and a warning names them.

    Args:
        model: as for :class:`~lightning_trak.TRAK`; it is not touched.
        checkpoints: as for :class:`~lightning_trak.TRAK`; scores are averaged over them.
        curvature: the matrix H that is approximated: ``"gauss_newton"`` is sum_j R_j g_j g_j^T; ``"empirical"`` is
            sum_j Q_j^2 g_j g_j^T, the empirical Fisher matrix.
        damping: lambda of each layer, relative to the mean eigenvalue of the layer's matrix. The default is the habit
            of the literature. On digits 0.01 and 0.1 were better than 1, and than the rule of
            :func:`~lightning_trak.scoring.damping.auto_damping` in each layer, which is why there is no ``"auto"``.
        **options: ``output``, ``parameters``, ``seed`` and ``weights_only``, see
            :class:`~lightning_trak.methods.influence.base.Influence`.
    """

    @shows_options_of(Influence.__init__)
    def __init__(
        self,
        model: nn.Module,
        checkpoints: CheckpointsLike | None = None,
        *,
        curvature: EKFACCurvature = "gauss_newton",
        damping: float = 0.1,
        **options: Unpack[InfluenceOptions],
    ) -> None:
        require_options(type(self), options, InfluenceOptions)
        require_one_of("curvature", curvature, ("gauss_newton", "empirical"))
        if isinstance(damping, str) or not 0 <= damping < float("inf"):
            raise ValueError(f"damping must be a number of at least 0, got {damping!r}")
        super().__init__(model, checkpoints, **options)
        self.curvature: EKFACCurvature = curvature
        self.damping = damping

    def _selection(self) -> Callable[[str, nn.Parameter], bool]:
        sizes = {name: parameter.numel() for name, parameter in self.model.named_parameters()}
        selected = select_parameters(self.model, self.parameters)
        names = {name: raw for name, raw in selected.items() if sizes[raw]}
        blocks, left_out = find_blocks(self.model, names)
        if not blocks:
            raise ValueError(f"EK-FAC covers none of the selected parameters: {with_reasons(left_out)}")
        if left_out:
            warnings.warn(
                f"EK-FAC leaves out {len(left_out)} of {len(names)} parameters, as if they did not change in training:"
                f" {with_reasons(left_out)}",
                stacklevel=5,
            )
        return lambda name, _: name in names and name not in left_out

    def _prepare(self, passes: Passes) -> InverseProduct:
        blocks = find_blocks(passes.model.module, passes.model.names)[0]
        unseen = unseen_uses(passes, blocks)
        if unseen:
            raise ValueError(
                "EK-FAC does not see all uses of some parameters in the model: leave them out by parameters=."
                f" {with_reasons(unseen)}"
            )
        bases = fit_bases(passes, blocks, self._squared_weights)
        found, _ = diagonals(passes, bases, lambda rows: self._squared_weights(rows.loss_gradients, rows.curvatures))
        for block, values in zip(blocks, found, strict=True):
            if not values.any():
                raise ValueError(
                    f"there is no curvature in {block.tracked.path} at {passes.where}: the output does not depend on"
                    " it, or the loss is linear in the output; leave it out by parameters=, or use"
                    " curvature='empirical'"
                )
        damped = [values + self.damping * values.mean() for values in found]
        return lambda rows, _: divided(passes, rows, bases, damped, {})

    def _squared_weights(self, loss_gradients: Tensor, curvatures: Tensor) -> Tensor:
        """What an example's squared gradient counts: R, or Q squared."""
        if self.curvature == "empirical":
            return loss_gradients.square()
        require_convex(curvatures, 'curvature="empirical"')
        return curvatures
