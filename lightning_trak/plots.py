"""Pictures of attributions; needs the ``plots`` extra (matplotlib)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

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
        targets: images ``(num_targets, height, width)`` or ``(num_targets, 1 or 3, height, width)``, colours in [0, 1].
        train: images of the whole training set, alike.
        scores: ``(num_targets, num_train)``.
        k: proponents and opponents of each target.
        target_names: titles of the targets, such as their labels.
        train_names: titles of the training images, above their scores; default: their positions.

    Returns:
        A matplotlib figure with one row for each target: target, ``k`` proponents, ``k`` opponents, strongest first.

    Raises:
        ValueError: if the shapes do not belong together.
    """
    if scores.shape != (len(targets), len(train)):
        raise ValueError(f"expected scores of shape {(len(targets), len(train))}, got {tuple(scores.shape)}")
    from matplotlib.figure import Figure

    k = min(k, len(train))
    figure = Figure(figsize=(1.0 * (2 * k + 1.2), 1.45 * len(targets) + 0.4), layout="constrained")
    left, middle, right = cast(Any, figure.subfigures(1, 3, width_ratios=[1.2, k, k], wspace=0.05))
    left.suptitle("target", fontsize=10)
    for row, axis in enumerate(left.subplots(len(targets), 1, squeeze=False)[:, 0]):
        _draw(axis, targets[row], target_names[row] if target_names else "", "black")
    for part, largest, colour, title in (
        (middle, True, "tab:green", "proponents: training on them raises the output most"),
        (right, False, "tab:red", "opponents: training on them lowers it most"),
    ):
        part.suptitle(title, fontsize=10, color=colour)
        best = block_top_k(scores, 0, k, largest)
        for row, axes in enumerate(part.subplots(len(targets), k, squeeze=False)):
            for axis, index, value in zip(axes, best.indices[row].tolist(), best.values[row].tolist(), strict=True):
                name = train_names[index] if train_names else f"#{index}"
                _draw(axis, train[index], f"{name}\n{value:+.2g}", colour)
    return figure


def _draw(axis: "Axes", image: Tensor, title: str, colour: str) -> None:
    pixels = image.detach().cpu().to(torch.float32)
    if pixels.ndim == 3:
        pixels = pixels.permute(1, 2, 0).squeeze(2)
    axis.imshow(pixels.numpy(), cmap="gray_r" if pixels.ndim == 2 else None)
    axis.set_title(title, fontsize=8, pad=3)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_color(colour)
