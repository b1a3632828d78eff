"""The preconditioner of conjugate gradients: EK-FAC, whose inverse is cheap."""

from collections.abc import Callable

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lightning_trak.methods.influence.blocks import find_blocks
from lightning_trak.methods.influence.eigenbases import Basis, diagonals, divided, fit_bases, unseen_uses
from lightning_trak.methods.influence.hessian import Hessian
from lightning_trak.texts.messages import in_one_line, with_reasons

_LARGEST_SIDE = 8192  # of a layer's covariance: its eigenvectors take minutes, and half a gibibyte


def ekfac_preconditioner(hessian: Hessian) -> Callable[[Tensor], Tensor]:
    """(E + lambda I)^-1, with E the EK-FAC of the Gauss-Newton matrix (George et al. 2018, arXiv 1806.03884).

    lambda is that of the damped Hessian. In the eigenbasis of each layer, the diagonal of E is the diagonal of the
    Gauss-Newton matrix, found from per-example gradients. Parameters that EK-FAC leaves out are divided by the diagonal
    of the damped Gauss-Newton matrix itself. A log line names them. Two passes over the training data.

    Every choice of bases gives a positive definite matrix, so conjugate gradients find the same solution with each. For
    this reason layers may be called several times or have uses that hooks do not see. Both only cost iterations.

    Args:
        hessian: the matrix at a checkpoint.

    Returns:
        The function that applies it to rows ``(n, p)``.
    """
    passes = hessian.passes
    bases, left_out = _bases(hessian)
    covered, rest = diagonals(passes, bases, lambda rows: hessian.counts(rows.curvatures), left_out)
    ridge = max(hessian.ridge, torch.finfo(passes.dtype).eps * float(hessian.weights.max()))  # without damping too
    covered = [total + ridge for total in covered]
    rest = {name: total + ridge for name, total in rest.items()}
    return lambda rows: divided(passes, rows, bases, covered, rest)


def _bases(hessian: Hessian) -> tuple[list[Basis], dict[str, str]]:
    """The bases of the layers that EK-FAC covers, and the other parameters, each with the reason."""
    passes = hessian.passes
    blocks, left_out = find_blocks(passes.model.module, passes.model.names)
    for block in blocks:
        shape = passes.model.shapes[block.weight]
        if max(shape[0], shape[1:].numel()) >= _LARGEST_SIDE:
            left_out |= dict.fromkeys(block.names, f"{block.tracked.description}: it is wider than {_LARGEST_SIDE}")
    blocks = [block for block in blocks if block.weight not in left_out]
    bases: list[Basis] = []
    try:
        if blocks:
            unseen = unseen_uses(passes, blocks)
            for block in blocks:
                if unseen.keys() & set(block.names):
                    left_out |= {name: unseen.get(name, "in the same layer") for name in block.names}
            blocks = [block for block in blocks if block.weight not in left_out]
            bases = fit_bases(passes, blocks, lambda _, curvatures: hessian.counts(curvatures), several_calls=True)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # the preconditioner is no part of the result
        reason = f"hooks fail: {in_one_line(error)}"
        left_out |= {name: reason for block in blocks for name in block.names}
    if left_out:
        rank_zero_info(
            f"conjugate gradients at {passes.where}: EK-FAC covers {len(passes.model.names) - len(left_out)} of"
            f" {len(passes.model.names)} parameters, and the others are divided by the diagonal:"
            f" {with_reasons(left_out)}"
        )
    return bases, left_out
