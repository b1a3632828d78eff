"""Pictures of attributions; needs the ``plots`` extra (matplotlib)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_trak.scorers.topk import block_top_k

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_attributions(
    targets: Tensor,
    train: Tensor,
    scores: Tensor,
    k: int = 5,
    target_names: Sequence[str] | None = None,
    train_names: Sequence[str] | None = None,
) -> "Figure":
    """Draw each target image beside its strongest proponents and opponents.

    Args:
        targets: images ``(num_targets, height, width)``, ``(num_targets, 1 or 3, height, width)``; colours in [0, 1].
        train: images of the whole training set, alike.
        scores: ``(num_targets, num_train)``.
        k: proponents and opponents of each target.
        target_names: titles of the targets, such as their labels.
        train_names: titles of the training images; the score is written below.

    Returns:
        A matplotlib figure with one row for each target: target, ``k`` proponents, ``k`` opponents, strongest first.

    Raises:
        ValueError: if the shapes do not belong together.
    """
    if scores.shape != (len(targets), len(train)):
        raise ValueError(f"expected scores of shape {(len(targets), len(train))}, got {tuple(scores.shape)}")
    from matplotlib.figure import Figure

    k = min(k, len(train))
    figure = Figure(figsize=(1.1 * (2 * k + 1) + 0.8, 1.45 * len(targets) + 0.5), layout="constrained")
    axes = figure.subplots(
        len(targets), 2 * k + 3, squeeze=False, gridspec_kw={"width_ratios": [1.2, 0.15, *[1] * k, 0.15, *[1] * k]}
    )
    proponents, opponents = (block_top_k(scores, 0, k, largest) for largest in (True, False))
    for row in range(len(targets)):
        for axis in axes[row]:
            axis.set_axis_off()
        _draw(axes[row, 0], targets[row], target_names[row] if target_names else "")
        for offset, best, colour in ((2, proponents, "tab:green"), (k + 3, opponents, "tab:red")):
            for j in range(k):
                index, value = int(best.indices[row, j]), float(best.values[row, j])
                name = train_names[index] if train_names else f"#{index}"
                _draw(axes[row, offset + j], train[index], f"{name}\n{value:+.2g}", colour)
    for column, title in ((0, "target"), (2, "proponents: raise the output most"), (k + 3, "opponents: lower it most")):
        axis = axes[0, column]
        axis.annotate(
            title, (0, 1), (0, 22), xycoords="axes fraction", textcoords="offset points", fontsize=9, weight="bold"
        )
    return figure


def _draw(axis: "Axes", image: Tensor, title: str, colour: str = "black") -> None:
    pixels = image.detach().cpu().to(torch.float32)
    if pixels.ndim == 3:
        pixels = pixels.permute(1, 2, 0).squeeze(2)
    axis.imshow(pixels.numpy(), cmap="gray_r" if pixels.ndim == 2 else None)
    axis.set_title(title, fontsize=7, color=colour, pad=2)
