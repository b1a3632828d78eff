"""The preconditioner of conjugate gradients: what the heaviest training examples alone give."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_trak.methods.influence.hessian import Hessian

_COUNT = 512
_BYTES = 1 << 30  # the gradients of the landmarks are kept in this much memory, at most


def landmark_preconditioner(hessian: Hessian) -> Callable[[Tensor], Tensor]:
    """(G_L + lambda I)^-1, with G_L = sum_j R_j g_j g_j^T over few training examples: the landmarks.

    The landmarks are the examples with the largest R_j |g_j|^2, which carry most of the Gauss-Newton matrix. With W the
    matrix of their gradients times sqrt(R_j), W^T W = G_L, the inverse is that of a small matrix (Woodbury):
    (1 - W^T (W W^T + lambda I)^-1 W) / lambda. This is the preconditioner of Frangella, Tropp and Udell 2021 (arXiv
    2110.02820) with chosen examples instead of random vectors.

    Args:
        hessian: the matrix at a checkpoint.

    Returns:
        The function that applies it to rows ``(n, p)``.
    """
    passes = hessian.passes
    fitting = max(1, _BYTES // (passes.size * passes.dtype.itemsize))
    count = min(_COUNT, fitting, len(hessian.weights))
    chosen = hessian.weights.topk(count).indices.sort().values.tolist()
    factor = torch.cat(
        [
            rows.features * hessian.counts(rows.curvatures).sqrt().to(rows.features).unsqueeze(1)
            for _, rows in passes.rows(passes.train, chosen)
        ]
    )
    ridge = hessian.positive_ridge
    small = (factor @ factor.T).double()
    small.diagonal().add_(ridge)
    cholesky = torch.linalg.cholesky(small)

    def apply(rows: Tensor) -> Tensor:
        inner = torch.cholesky_solve((rows @ factor.T).double().T, cholesky).T
        return (rows - inner.to(rows) @ factor) / ridge

    return apply
