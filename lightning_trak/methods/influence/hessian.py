"""The Hessian of the training loss: products with vectors, without ever forming it, or the matrix of a small model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_trak.features.rows import Features
from lightning_trak.gradients.batch import ExampleBatch
from lightning_trak.gradients.leaves import require_own_leaves
from lightning_trak.gradients.precision import in_double, output_in_double
from lightning_trak.gradients.second_derivatives import CAUSES, differentiating_twice, has_derivative
from lightning_trak.methods.influence.passes import Passes
from lightning_trak.outputs.evaluating import modules_of
from lightning_trak.scoring.damping import Damping, absolute_damping
from lightning_trak.scoring.newton.gram import gram_matrix, require_convex
from lightning_trak.scoring.newton.noise import Noise

HessianCurvature = Literal["gauss_newton", "identity", "exact"]

_INSTEAD = (
    "Use EKFACInfluence, or Explicit() with curvature='gauss_newton', which differentiate once; or leave the parameters"
    " before this operation out by parameters="
)
_CHECKED = 4  # examples whose second derivatives are compared with differences of gradients
_TOGETHER = 32  # vectors multiplied at once, in the memory of as many backward passes


@dataclass(frozen=True)
class Convergence:
    """How an iterative solver went at a checkpoint, for a block of targets.

    Attributes:
        where: the checkpoint's number and name.
        targets: the numbers of the targets.
        iterations: of each target: products of the Hessian with vectors, int64 ``(num_targets,)``.
        residuals: of each target, relative to its gradient, float64 ``(num_targets,)``.
    """

    where: str
    targets: range
    iterations: Tensor
    residuals: Tensor

    def __str__(self) -> str:
        first, last = self.targets[0], self.targets[-1]
        which = f"target {first}" if first == last else f"targets {first} to {last}"
        return (
            f"{self.where}, {which}: {int(self.iterations.min())} to {int(self.iterations.max())} iterations, relative"
            f" residuals up to {float(self.residuals.max()):.2g}"
        )


class Hessian:
    """H + lambda I at one checkpoint, with H the Hessian of the *sum* of the training examples' losses.

    ``"gauss_newton"`` is sum_j R_j g_j g_j^T, with g_j the gradient of output j: never negative (Schraudolph 2002, Fast
    curvature matrix-vector products). ``"exact"`` adds sum_j l'(f_j) times the Hessian of f_j, and may have negative
    eigenvalues. Where outputs are linear in the parameters, they are the same. ``"identity"`` is sum_j g_j g_j^T.

    Args:
        passes: the model at the checkpoint, and the training data.
        curvature: which of them H is.
        damping: as for :class:`~lightning_trak.methods.InfluenceFunction`: relative to the mean eigenvalue of the
            Gauss-Newton matrix, for either curvature.
        check: called with the positions and rows of the training examples, batch by batch; it may raise.

    Attributes:
        passes: as given.
        weights: R_j |g_j|^2, what each example adds to the trace of the Gauss-Newton matrix, float64 ``(num_train,)``;
            for ``"identity"``, with R_j = 1.
        ridge: lambda itself, in the units of H.
        convergence: how iterative solvers went, one entry for each block of targets.

    Raises:
        ValueError: if some R_j is negative, for ``"gauss_newton"``, or all are zero.
    """

    def __init__(
        self,
        passes: Passes,
        curvature: HessianCurvature,
        damping: Damping,
        check: Callable[[Sequence[int], Features], None] | None = None,
    ) -> None:
        self.passes = passes
        self.curvature = curvature
        self.convergence: list[Convergence] = []
        self._has_derivative = False
        weights, noise = [], Noise(1)
        for positions, rows in passes.rows(passes.train):
            if check is not None:
                check(positions, rows)
            noise.add(rows.loss_gradients[None], rows.curvatures[None])
            weights.append(self.counts(rows.curvatures).double() * rows.features.double().square().sum(1))
        self.weights = torch.cat(weights)
        (level,) = noise.levels(weighted=curvature != "identity")
        level *= passes.noise_level
        self.ridge = absolute_damping(damping, self.weights, passes.size, passes.where, level)

    def counts(self, curvatures: Tensor) -> Tensor:
        """What g_j g_j^T counts: R_j; 1 for ``"identity"``; |R_j| for the exact Hessian, which has its own signs.

        Raises:
            ValueError: if some R_j is negative, for ``"gauss_newton"``.
        """
        if self.curvature == "gauss_newton":
            require_convex(curvatures, 'curvature="exact"')
        return torch.ones_like(curvatures) if self.curvature == "identity" else curvatures.abs()

    def heaviest(self, count: int) -> Tensor:
        """The rows sqrt(R_j) g_j of this many training examples with the largest weights, shape ``(count, p)``."""
        chosen = self.weights.topk(min(count, len(self.weights))).indices.sort().values.tolist()
        rows = (found for _, found in self.passes.rows(self.passes.train, chosen))
        return torch.cat(
            [part.features * self.counts(part.curvatures).sqrt().to(part.features)[:, None] for part in rows]
        )

    def damped_product(self, vectors: Tensor) -> Tensor:
        """(H + lambda I) v for each row v of ``vectors``, shape ``(n, p)``: one pass over the training data."""
        return self.product(vectors).add_(vectors, alpha=self.ridge)

    def product(self, vectors: Tensor) -> Tensor:
        """H v for each row v of ``vectors``, shape ``(n, p)``: one pass over the training data."""
        total = torch.zeros_like(vectors)
        for batch, size in self.passes.batches(self.passes.train):
            total += self.batch_product(batch, size, vectors)
        return total

    def batch_product(self, batch: Any, size: int, vectors: Tensor) -> Tensor:
        """What a batch of training examples adds to H v, for each row v of ``vectors``, shape ``(n, p)``."""
        parameters: list[Tensor] = list(self.passes.parameters.values())
        output = self.passes.model.output
        multiply = self._exact if self.curvature == "exact" else self._gauss_newton
        with self.passes.differentiable(), differentiating_twice("this solver", _INSTEAD):
            model = self.passes.model
            if not self._has_derivative:
                self._require_derivative(ExampleBatch(batch, size, self.passes.layout).take(slice(0, _CHECKED)))
            outputs = output.output(model.module, ExampleBatch(batch, size, self.passes.layout).fresh())
            require_own_leaves(outputs, model.module, *modules_of(output))
            slopes_of = output.loss(outputs).sum() if self.curvature == "exact" else outputs
            return torch.cat(multiply(slopes_of, parameters, torch.split(vectors, _TOGETHER)))

    def _require_derivative(self, batch: ExampleBatch) -> None:
        """Check that gradients have the derivative that autograd gives, on a few examples.

        The exact Hessian is the derivative of the loss's gradient by the parameters. The Gauss-Newton matrix needs that
        of a gradient by the weights of the outputs.
        """
        model, exact = self.passes.model, self.curvature == "exact"
        batch = ExampleBatch(in_double(batch.content), batch.size, batch.layout)
        output = output_in_double(model.output)

        def scalar(module: nn.Module, weights: Tensor) -> Tensor:
            outputs = output.output(module, batch.fresh())
            return (weights * (output.loss(outputs) if exact else outputs)).sum()

        ones = torch.ones(batch.size, device=self.passes.device)
        self._has_derivative = has_derivative(model.module, self.passes.parameters.values(), scalar, ones, exact)
        if not self._has_derivative:
            raise ValueError(
                f"{self.passes.where}: gradients change in another way than autograd's second derivatives say, so"
                f" products with the {'Hessian' if exact else 'Gauss-Newton matrix'} would be wrong. {CAUSES}. Use"
                " EKFACInfluence, or Explicit() with curvature='gauss_newton', which differentiate once"
            )

    def _exact(self, loss: Tensor, parameters: list[Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
        slopes = _dense(torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True))
        return [_vector_jacobian(slopes, parameters, self._split(part)) for part in parts]

    def _gauss_newton(self, outputs: Tensor, parameters: list[Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
        # The vector-Jacobian product is linear in its vector. Its derivative by that vector is the Jacobian-vector
        # product: by reverse mode alone, which every operation has.
        vector = torch.zeros_like(outputs, requires_grad=True)
        slopes = _dense(torch.autograd.grad(outputs, parameters, vector, create_graph=True, allow_unused=True))
        counts = self.counts(self.passes.model.output.derivatives(outputs)[1]).to(outputs)
        changes = (_vector_jacobian(slopes, [vector], self._split(part)) for part in parts)
        return [_vector_jacobian([outputs], parameters, [change * counts]) for change in changes]

    def _split(self, vectors: Tensor) -> list[Tensor]:
        return list(self.passes.split(vectors).values())

    def matrix(self) -> Tensor:
        """H itself, float64 ``(p, p)``."""
        if self.curvature != "exact":
            rows = (features for _, features in self.passes.rows(self.passes.train))
            return gram_matrix(rows, self.curvature, self.passes.size, self.passes.device)[0]
        product = self.product(torch.eye(self.passes.size, dtype=self.passes.dtype, device=self.passes.device)).double()
        return (product + product.T) / 2


def _vector_jacobian(outputs: Sequence[Tensor | None], inputs: Sequence[Tensor], vectors: Sequence[Tensor]) -> Tensor:
    """The derivative, by all inputs side by side, of the inner products of outputs and vectors: a row per vector."""
    pairs = [(out, vector.to(out)) for out, vector in zip(outputs, vectors, strict=True) if out is not None]
    pairs = [(out, vector) for out, vector in pairs if out.requires_grad]
    count, working = len(vectors[0]), vectors[0]
    if not pairs:
        return working.new_zeros(count, sum(part.numel() for part in inputs))
    live, along = zip(*pairs, strict=True)
    slopes = _dense(
        torch.autograd.grad(live, inputs, along, retain_graph=True, allow_unused=True, is_grads_batched=True)
    )
    return torch.cat(
        [
            working.new_zeros(count, part.numel()) if slope is None else slope.reshape(count, -1).to(working)
            for slope, part in zip(slopes, inputs, strict=True)
        ],
        dim=1,
    )


def _dense(slopes: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of embeddings may come as sparse tensors."""
    return [slope.to_dense() if slope is not None and slope.is_sparse else slope for slope in slopes]
