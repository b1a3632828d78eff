"""Pictures of attributions and results, by matplotlib. Needs the extra ``plots``."""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from lightning_trak.checks import needs_extra, positive, require_tensor
from lightning_trak.scoring.topk import block_top_k
from lightning_trak.texts.printable import printable, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_trak.metrics.functional import DetectionCurve
    from lightning_trak.reporting.explanations import Example, Explanation
    from lightning_trak.retraining import Brittleness

_STYLES = {
    "proponents": ("tab:green", "proponents: highest scores"),
    "opponents": ("tab:red", "opponents: lowest scores"),
}


class Picture(NamedTuple):
    """An image and its title.

    Attributes:
        image: ``(height, width)`` or ``(1 or 3, height, width)``, with values in [0, 1].
        title: stands above the image.
    """

    image: Tensor
    title: str


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
        targets: images ``(num_targets, height, width)`` or ``(num_targets, 1 or 3, height, width)``, with values in
            [0, 1].
        train: images of the whole training set, of the same form.
        scores: ``(num_targets, num_train)``.
        k: how many proponents and how many opponents each target gets.
        target_names: titles of the targets, such as their labels.
        train_names: titles of the training images; the score stands below. Default: their positions.

    Returns:
        A matplotlib figure with one row for each target: target, ``k`` proponents, ``k`` opponents, strongest first.

    Raises:
        ValueError: if the shape of ``scores`` is not that of targets and training images.
        ModuleNotFoundError: if matplotlib is not installed.
    """
    for what, tensor in (("targets", targets), ("train", train), ("scores", scores)):
        require_tensor(what, tensor)
    if scores.shape != (len(targets), len(train)):
        raise ValueError(f"expected scores of shape {(len(targets), len(train))}, got {tuple(scores.shape)}")
    for what, names, images in (("target_names", target_names, targets), ("train_names", train_names, train)):
        if names is not None and len(names) != len(images):
            raise ValueError(f"expected {what} of {len(images)} images, got {len(names)}")
    k = min(positive("k", k), len(train))

    def picture(index: int, value: float) -> Picture:
        name = train_names[index] if train_names else f"#{index}"
        return Picture(train[index], f"{name}\n{value:+.2g}")

    rows = {}
    for name, largest in (("proponents", True), ("opponents", False)):
        best = block_top_k(scores, 0, k, largest)
        rows[name] = [
            [picture(index, value) for index, value in zip(indices, values, strict=True)]
            for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
    names = target_names or [""] * len(targets)
    return plot_pictures([Picture(image, name) for image, name in zip(targets, names, strict=True)], rows)


def plot_pictures(targets: Sequence[Picture], rows: Mapping[str, Sequence[Sequence[Picture]]]) -> "Figure":
    """Draw each target beside groups of training images, such as the proponents that several methods find.

    Args:
        targets: the leftmost column.
        rows: for each group by its title, a row of images for each target. All rows of a group have the same length.
            ``"proponents"`` and ``"opponents"`` get colours and longer titles of their own.

    Returns:
        A matplotlib figure with one row for each target.
    """
    counts = [len(group[0]) for group in rows.values()]
    styles = [_STYLES.get(name, ("black", name)) for name in rows]
    titles = [textwrap.fill(printable(title), 12 * count) for (_, title), count in zip(styles, counts, strict=True)]
    lines = max(title.count("\n") for title in titles)  # every group gets as many, so that the images are level
    deepest = max(len(_wrapped(picture)) for group in (targets, *chain(*rows.values())) for picture in group)
    height = (1.15 + 0.13 * deepest) * len(targets) + 0.25 + 0.15 * lines
    figure = _figure(1.0 * (sum(counts) + 1.2), height)
    left, *parts = cast(Any, figure.subfigures(1, 1 + len(counts), width_ratios=[1.2, *counts], wspace=0.05))
    left.suptitle("target" + "\n" * lines, fontsize=10)
    for axis, target in zip(left.subplots(len(targets), 1, squeeze=False)[:, 0], targets, strict=True):
        _draw(axis, target, "black")
    for part, (colour, _), title, group in zip(parts, styles, titles, rows.values(), strict=True):
        part.suptitle(title + "\n" * (lines - title.count("\n")), fontsize=10, color=colour)
        for axes, pictures in zip(part.subplots(len(targets), len(group[0]), squeeze=False), group, strict=True):
            for axis, picture in zip(axes, pictures, strict=True):
                _draw(axis, picture, colour)
    return _plain(figure)


def plot_explanations(explanations: Sequence["Explanation"]) -> "Figure":
    """Draw explanations: targets beside their proponents and opponents, with their texts.

    Args:
        explanations: at least one, all with the same groups and as many entries in each.

    Returns:
        A matplotlib figure with one row for each target.

    Raises:
        ValueError: if an item holds no image.
    """
    return plot_pictures(
        [
            _picture(entry.target, f"#{entry.position} {entry.target.text}", *filter(None, [entry.prediction]))
            for entry in explanations
        ],
        {
            name: [
                [
                    _picture(entry.example, f"#{entry.position} {entry.example.text}", f"{entry.score:+.2g}")
                    for entry in explanation.groups[name]
                ]
                for explanation in explanations
            ]
            for name in explanations[0].groups
        },
    )


def plot_brittleness(brittleness: "Brittleness") -> "Figure":
    """Draw how far outputs fall, and how many predictions flip, against the number of proponents removed.

    Args:
        brittleness: from :meth:`~lightning_trak.retraining.Counterfactuals.brittleness`.

    Returns:
        A matplotlib figure with a line for each method. Vertical bars are intervals; methods are shifted sideways a
        little, so that their bars do not overlap.
    """
    figure = _figure(10, 4)
    left, right = figure.subplots(1, 2)
    for axis, estimate in ((left, brittleness.drop()), (right, brittleness.flips())):
        axis.set_xscale("log")
        for row, method in enumerate(brittleness.methods):
            mean, low, high = (values[row] for values in estimate)
            places = [k * 1.02 ** (row - len(brittleness.methods) / 2) for k in brittleness.ks]
            bars = [(mean - low).clamp(min=0).tolist(), (high - mean).clamp(min=0).tolist()]
            style = {"marker": "o", "markersize": 4, "elinewidth": 1, "capsize": 2}
            axis.errorbar(places, mean.tolist(), bars, label=_label(method), **style)
        axis.set_xlabel("proponents taken away")
        axis.set_xticks(brittleness.ks, [str(k) for k in brittleness.ks], minor=False)
        axis.minorticks_off()
    noise = float(brittleness.noise_flips().mean)
    right.axhline(noise, color="gray", linestyle="--", label="trained again on everything")
    left.axhline(0, color="gray", linestyle="--", label="trained again on everything")
    left.set_ylabel("fall of the output")
    right.set_ylabel("predictions that flip")
    right.set_ylim(bottom=0)
    left.legend(fontsize=8)
    return _plain(figure)


def plot_outcomes(sets: Sequence[str], outcomes: Mapping[str, Tensor], label: str) -> "Figure":
    """Draw how models did that were trained on several sets: a bar for the mean, a dot for each model.

    Args:
        sets: names of the training sets, such as what each lacks.
        outcomes: several measures by name, each ``(num_sets, num_seeds)``. They are drawn side by side.
        label: of the axis, such as "correct predictions".

    Returns:
        A matplotlib figure with a row for each set.
    """
    figure = _figure(6.4, 0.9 + 0.34 * len(sets))
    axis, width = figure.subplots(), 0.8 / len(outcomes)
    for number, (name, values) in enumerate(outcomes.items()):
        places = [row + (number + 0.5) * width - 0.4 for row in range(len(sets))]
        axis.barh(places, values.mean(1).tolist(), width, label=_label(name), alpha=0.6)
        axis.plot(values.T.tolist(), [places] * values.shape[1], "k.", markersize=3)
    axis.set_yticks(range(len(sets)), list(map(printable, sets)))
    axis.invert_yaxis()
    axis.set_xlabel(printable(label))
    if len(outcomes) > 1:
        figure.legend(loc="outside upper center", ncols=len(outcomes), frameon=False)
    return _plain(figure)


def plot_mislabel_curves(curves: Mapping[str, "DetectionCurve"]) -> "Figure":
    """Draw how many wrong labels are found against how many examples are inspected.

    Args:
        curves: by the name of the suspicion, each from
            :func:`~lightning_trak.metrics.functional.mislabel_detection_curve`.

    Returns:
        A matplotlib figure: on the left whole curves, on the right the same enlarged, around the fraction of wrong
        labels, where good methods differ. The legend shows the area under each curve. Gray lines are what is expected
        at random, and what is best, for each fraction of wrong labels among the curves.

    Raises:
        ValueError: if there are no curves.
        ModuleNotFoundError: if matplotlib is not installed.
    """
    if not curves:
        raise ValueError("there are no curves to draw; pass at least one")
    shares = sorted({float(curve.share) for curve in curves.values()})
    figure = _figure(9, 4.5 + 0.1 * len(curves))
    whole, enlarged = figure.subplots(1, 2)
    for axis in (whole, enlarged):
        for number, (name, curve) in enumerate(curves.items()):
            style = "-" if number < 10 else "-."  # there are ten colours
            label = _label(f"{name}: area {float(curve.area):.3f}")
            axis.plot(curve.inspected.tolist(), curve.found.tolist(), label=label, linestyle=style)
        axis.plot([0, 1], [0, 1], color="gray", linestyle="--", label="at random: area 0.500")
        for share in shares:
            label = f"at best: area {1 - share / 2:.3f}"
            axis.plot([0, share, 1], [0, 1, 1], color="gray", linestyle=":", label=label)
        axis.set_xlabel("examples inspected, most suspicious first")
    whole.set_ylabel("wrong labels found")
    enlarged.set(xlim=(shares[0] / 2, min(1, 2 * shares[-1])), ylim=(0.5, 1.01), title="enlarged")
    figure.legend(*whole.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return _plain(figure)


def plot_histogram(values: Tensor, label: str) -> "Figure":
    """Draw the distribution of one number per target, and its mean.

    Args:
        values: shape ``(num_targets,)``; NaNs are left out.
        label: of the axis: what the numbers are.

    Returns:
        A matplotlib figure.
    """
    known = values[~values.isnan()].double().cpu()
    figure = _figure(5, 3.5)
    axis = figure.subplots()
    axis.hist(known.tolist(), bins=min(30, max(5, len(known) // 5)), color="tab:blue", alpha=0.7)
    axis.axvline(float(known.mean()), color="black", linestyle="--", label=f"mean {float(known.mean()):.3f}")
    axis.set_xlabel(printable(label))
    axis.set_ylabel("targets")
    axis.legend()
    return _plain(figure)


def require_drawing() -> None:
    """Refuse before long work what cannot be drawn after it.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    _figure(1, 1)


def _figure(width: float, height: float) -> "Figure":
    """A figure of some inches that needs no display.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    with needs_extra("plots", "pictures need matplotlib"):
        from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def _plain(figure: "Figure") -> "Figure":
    """Show texts as they are: a `$` does not begin a formula. TeX, which can run commands, is not used."""
    from matplotlib.text import Text

    for text in cast("list[Text]", figure.findobj(Text)):
        text.set_usetex(False)
        if text.get_text():  # tick labels are still empty, and may become formulas
            text.set_parse_math(False)
    return figure


def _label(name: str) -> str:
    """A text for a legend. A legend leaves out texts that begin with an underscore, so a space goes in front."""
    text = printable(name)
    return f" {text}" if text.startswith("_") else text


def _wrapped(picture: Picture) -> list[str]:
    """The title in lines that are as wide as an image."""
    lines = map(printable, picture.title.split("\n"))
    return [part for line in lines for part in textwrap.wrap(line, 15, max_lines=5) or [""]]


def _picture(example: "Example", name: str, *more: str) -> Picture:
    if example.image is None:
        raise ValueError(
            f"{printable(name)} holds no image, so there is no picture to draw; write a .html page, or a table"
        )
    image = example.image
    # in colour, so that grey images are not drawn as ink on paper
    return Picture(image.expand(3, -1, -1) if image.ndim == 2 else image, "\n".join((shortened(name, 15), *more)))


def _draw(axis: "Axes", picture: Picture, colour: str) -> None:
    shape = tuple(picture.image.shape)
    if len(shape) != 2 and (len(shape) != 3 or shape[0] not in (1, 3)):
        raise ValueError(f"expected an image (height, width) or (1 or 3, height, width), got {shape}")
    pixels = picture.image.detach().cpu().to(torch.float32)
    if pixels.ndim == 3:
        pixels = pixels.permute(1, 2, 0).squeeze(2)
    axis.imshow(pixels.numpy(), cmap="gray_r" if pixels.ndim == 2 else None)
    axis.set_title("\n".join(_wrapped(picture)), fontsize=8, pad=3)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_color(colour)
