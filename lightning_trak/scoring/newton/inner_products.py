"""Inner products of gradients that are stored in a shorter form, parameter by parameter.

For two gradients A^T B and C^T D with positions t and s, <A^T B, C^T D> = sum_ts (A C^T)_ts (B D^T)_ts. So a linear
layer on one position needs no gradient at all. With T positions this takes T^2 (a + b) products for a pair of examples,
where the gradients themselves take a b, and are formed if that is less. (Goodfellow 2015, arXiv 1510.01799, has norms.)
"""

import torch
from torch import Tensor

from lightning_trak.gradients.hooks.factors import GradientForm, GradientForms

_BYTES = 1 << 28  # of intermediate numbers in float64


def inner_products(forms: GradientForms, first: Tensor, second: Tensor) -> Tensor:
    """Inner products of the gradients of two sets of examples.

    Args:
        forms: how the gradients are stored.
        first: stored gradients, shape ``(n, width)``.
        second: stored gradients, shape ``(m, width)``.

    Returns:
        float64, shape ``(n, m)``.

    Raises:
        ValueError: if the rows are not those of the forms.
    """
    for rows in (first, second):
        if rows.shape[1] != forms.width:
            raise ValueError(f"expected stored gradients of {forms.width} numbers, received {rows.shape[1]} a row")
    total = torch.zeros(len(first), len(second), dtype=torch.float64, device=first.device)
    for form, columns in forms:
        mine, others = first[:, columns], second[:, columns]
        if form.kind == "gradient":
            _add_whole(total, mine, others)
        elif form.kind == "factors" and form.positions**2 * (form.rows + form.columns) > form.rows * form.columns:
            _add_formed(total, form, mine, others)
        else:
            _add_pairs(total, form, mine, others)
    return total


def _add_whole(total: Tensor, first: Tensor, second: Tensor) -> None:
    step = max(1, _BYTES // (8 * sum(total.shape)))
    for start in range(0, first.shape[1], step):
        total.addmm_(first[:, start : start + step].double(), second[:, start : start + step].double().T)


def _add_formed(total: Tensor, form: GradientForm, first: Tensor, second: Tensor) -> None:
    """Form the gradients, a few rows of all of them at a time."""
    (left, right), (others_left, others_right) = form.parts(first), form.parts(second)
    right, others_right = right.double(), others_right.double()
    step = max(1, _BYTES // (8 * form.columns * sum(total.shape)))
    for start in range(0, form.rows, step):
        some = slice(start, start + step)
        mine = (left[:, :, some].double().mT @ right).flatten(1)
        others = (others_left[:, :, some].double().mT @ others_right).flatten(1)
        total.addmm_(mine, others.T)


def _add_pairs(total: Tensor, form: GradientForm, first: Tensor, second: Tensor) -> None:
    """Multiply the factors of pairs of positions, or stored rows with the same index."""
    positions = form.positions
    step = max(1, min(_BYTES // (16 * form.width), int((_BYTES / 32) ** 0.5) // positions))
    for row in range(0, len(first), step):
        left, right = form.parts(first[row : row + step])
        for column in range(0, len(second), step):
            others_left, others_right = form.parts(second[column : column + step])
            products = _all_pairs(left, others_left)
            if form.kind == "factors":
                products *= _all_pairs(right, others_right)
            else:
                products *= right.reshape(-1, 1) == others_right.reshape(1, -1)
            if positions > 1:
                products = products.view(len(left), positions, len(others_left), positions).sum((1, 3))
            total[row : row + step, column : column + step] += products


def _all_pairs(one: Tensor, other: Tensor) -> Tensor:
    return one.flatten(0, 1).double() @ other.flatten(0, 1).double().T
