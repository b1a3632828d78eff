"""The preconditioner of conjugate gradients: what the heaviest training examples alone give."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_trak.methods.influence.hessian import Hessian

_COUNT = 512
_BYTES = 1 << 30  # the gradients of the landmarks are kept in this much memory, at most
_SMALL = 100  # an eigenvalue this much smaller than lambda changes the inverse by a hundredth


def landmark_preconditioner(hessian: Hessian) -> Callable[[Tensor], Tensor]:
    """(G_L + lambda I)^-1, with G_L = sum_j R_j g_j g_j^T over few training examples: the landmarks.

    The landmarks are the examples with the largest ``R_j |g_j|^2``, which carry most of the Gauss-Newton matrix. With W
    the matrix of their gradients times sqrt(R_j), W^T W = G_L, and its eigenvectors follow from those of the small
    matrix W W^T: the inverse is 1 / (e + lambda) along those with eigenvalue e, and 1 / lambda across them. This is the
    preconditioner of Frangella, Tropp and Udell 2021 (arXiv 2110.02820) with chosen examples instead of random vectors.

    Args:
        hessian: the matrix at a checkpoint.

    Returns:
        The function that applies it to rows ``(n, p)``.
    """
    passes = hessian.passes
    fitting = max(1, _BYTES // (passes.size * passes.dtype.itemsize))
    factor = hessian.heaviest(min(_COUNT, fitting))
    values, vectors = torch.linalg.eigh((factor @ factor.T).double())
    # Values below this are rounding. With a smaller lambda, 1 / lambda would be so large that its rounding exceeds the
    # inverse of the largest value.
    smallest = 100 * torch.finfo(passes.dtype).eps * float(values[-1])
    ridge = max(hessian.ridge, smallest)
    kept = values > max(ridge / _SMALL, smallest)
    basis = (vectors[:, kept] / values[kept].sqrt()).T.to(factor) @ factor
    removed = (1 / ridge - 1 / (values[kept] + ridge)).to(factor)

    def apply(rows: Tensor) -> Tensor:
        solved: Tensor = rows / ridge - (rows @ basis.T * removed) @ basis
        return solved

    return apply
