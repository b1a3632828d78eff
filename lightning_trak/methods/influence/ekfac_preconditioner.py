"""The preconditioner of conjugate gradients: EK-FAC, whose inverse is cheap."""

from collections.abc import Callable

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lightning_trak.methods.influence.blocks import Block, find_blocks
from lightning_trak.methods.influence.eigenbases import Basis, fit_bases, unseen_uses
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
    blocks, bases, left_out = _bases(hessian)
    covered = [torch.zeros(len(basis.outputs), len(basis.inputs), device=passes.device).double() for basis in bases]
    rest = {name: torch.zeros(size, device=passes.device).double() for name, size in passes.model.sizes.items()}
    rest = {name: total for name, total in rest.items() if name in left_out}
    for _, rows in passes.rows(passes.train):
        counts, parts = hessian.counts(rows.curvatures), passes.split(rows.features)
        for block, basis, total in zip(blocks, bases, covered, strict=True):
            total += basis.diagonal(block.gather(parts), counts)
        for name, total in rest.items():
            total += counts.to(rows.features) @ parts[name].flatten(1).square()
    ridge = max(hessian.ridge, torch.finfo(passes.dtype).eps * float(hessian.weights.max()))  # without damping too
    covered = [total + ridge for total in covered]
    rest = {name: total + ridge for name, total in rest.items()}

    def apply(rows: Tensor) -> Tensor:
        solved = torch.empty_like(rows)
        source, target = passes.split(rows), passes.split(solved)
        for block, basis, values in zip(blocks, bases, covered, strict=True):
            block.scatter(basis.divide(block.gather(source), values), target)
        for name, values in rest.items():
            target[name].flatten(1).copy_(source[name].flatten(1) / values.to(rows))
        return solved

    return apply


def _bases(hessian: Hessian) -> tuple[list[Block], list[Basis], dict[str, str]]:
    """The layers that EK-FAC covers, their bases, and the other parameters, each with the reason."""
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
        blocks, bases = [], []
    if left_out:
        rank_zero_info(
            f"conjugate gradients at {passes.where}: EK-FAC covers {len(passes.model.names) - len(left_out)} of"
            f" {len(passes.model.names)} parameters, and the others are divided by the diagonal:"
            f" {with_reasons(left_out)}"
        )
    return blocks, bases, left_out
