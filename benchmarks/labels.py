"""Names of curves in a picture, beside the curves instead of in a legend."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

Array = NDArray[np.float64]

DISTANCES = (6, 12, 20, 32, 46, 62, 80, 100)  # of a name from a point of its curve, in points
DIRECTIONS = np.linspace(0, 2 * np.pi, 24, endpoint=False)
# What a place costs, in points of distance: for each name and each piece of a curve that the name would cover, if a
# point of another curve is nearer, and for each piece of a curve that the line from name to point would touch.
COVERED_NAME, COVERED_CURVE, COVERED_ITSELF, NEARER_TO_ANOTHER, CROSSED_BY_LEADER = 100.0, 3.0, 1.5, 25.0, 4.0
PASSES = 3


class Curve(NamedTuple):
    """What is drawn for one name.

    Attributes:
        points: ``(num_points, 2)``, in data coordinates, from left to right. The name stands near one of them.
        ends: ``(num_points, 2)``: the lower and the upper end of each point's error bar.
        color: of the curve and its name.
        weight: of the name's letters.
    """

    points: Array
    ends: Array
    color: str
    weight: str = "normal"


def label_curves(axis: Axes, curves: Mapping[str, Curve], size: float = 8) -> None:
    """Write the name of each curve near one of its points, where it hides as little as possible.

    Each name tries places around all points of its curve. The cost of a place is its distance, what it covers (curves,
    error bars and other names), and whether it is nearer to another curve. Names are placed one after the other, from
    the top, in a few passes.

    Args:
        axis: with its final limits, scales and size.
        curves: by name.
        size: of the text, in points.
    """
    figure: Any = axis.figure
    figure.canvas.draw()
    pixel = figure.dpi / 72
    halo = [withStroke(linewidth=2, foreground="white")]
    texts = {
        name: axis.text(0, 0, name, size=size, color=curve.color, path_effects=halo, weight=curve.weight)
        for name, curve in curves.items()
    }
    sizes = {name: np.array(text.get_window_extent().size) + 2 * pixel for name, text in texts.items()}
    drawn = {name: _pixels_of(axis, curve, 3 * pixel) for name, curve in curves.items()}
    places = {name: _places(axis, curve, sizes[name], pixel) for name, curve in curves.items()}
    for name, (anchors, centres, costs) in places.items():
        foreign = [axis.transData.transform(curve.points) for other, curve in curves.items() if other != name]
        others = np.concatenate([np.empty((0, 2)), *foreign])
        nearest = _distances(others[None], centres[:, None], sizes[name]).min(1, initial=np.inf)
        costs += NEARER_TO_ANOTHER * (nearest < _distances(anchors, centres, sizes[name]))
        costs += CROSSED_BY_LEADER * _touched(np.concatenate([*drawn.values()]), anchors, centres, sizes[name], pixel)
    chosen: dict[str, tuple[Array, Array]] = {}
    for _ in range(PASSES):
        for name in sorted(curves, key=lambda name: -curves[name].points[-1, 1]):
            anchors, centres, costs = places[name]
            low, high = centres - sizes[name] / 2, centres + sizes[name] / 2
            for other, points in drawn.items():
                inside = (points > low[:, None]) & (points < high[:, None])
                costs = costs + inside.all(-1).sum(1) * (COVERED_ITSELF if other == name else COVERED_CURVE)
            for other, (_, centre) in chosen.items():
                if other != name:
                    apart = np.abs(centres - centre) - (sizes[name] + sizes[other]) / 2
                    costs = costs + COVERED_NAME * (apart < 0).all(1)
            best = int(costs.argmin())
            chosen[name] = anchors[best], centres[best]
    to_data = axis.transData.inverted()
    for name, (anchor, centre) in chosen.items():
        texts[name].set(position=to_data.transform(centre), ha="center", va="center", zorder=10)
        nearest = np.clip(anchor, centre - sizes[name] / 2, centre + sizes[name] / 2)
        if np.linalg.norm(nearest - anchor) > 7 * pixel:
            ends = to_data.transform([anchor, nearest])
            axis.plot(*ends.T, color=curves[name].color, linewidth=0.7, scalex=False, scaley=False)


def _distances(points: Array, centres: Array, size: Array) -> Array:
    """Of points, ``(..., 2)``, from boxes of one size."""
    return np.linalg.norm(np.maximum(np.abs(points - centres) - size / 2, 0), axis=-1)


def _touched(drawn: Array, anchors: Array, centres: Array, size: Array, pixel: float) -> Array:
    """How many of the drawn points the lines from anchors to the boxes touch, except near the anchors."""
    lines = np.clip(anchors, centres - size / 2, centres + size / 2) - anchors
    lengths = np.linalg.norm(lines, axis=1)[:, None]
    along = lines / np.maximum(lengths, 1e-9)
    offsets = drawn - anchors[:, None]
    travelled = (offsets * along[:, None]).sum(-1)
    aside = np.abs(offsets[..., 0] * along[:, None, 1] - offsets[..., 1] * along[:, None, 0])
    return ((travelled > 6 * pixel) & (travelled < lengths) & (aside < 2 * pixel)).sum(1)


def _pixels_of(axis: Axes, curve: Curve, step: float) -> Array:
    """Points along the curve and its error bars, ``(num, 2)`` in pixels, at most ``step`` apart."""
    vertices = axis.transData.transform(curve.points)
    lines = [*pairwise(vertices)]
    for (x, _), bar in zip(curve.points, curve.ends, strict=True):
        lines.append(tuple(axis.transData.transform([(x, end) for end in bar])))
    pieces = [np.linspace(start, end, 2 + int(np.linalg.norm(np.subtract(end, start)) / step)) for start, end in lines]
    return np.concatenate([*pieces, vertices])


def _places(axis: Axes, curve: Curve, size: Array, pixel: float) -> tuple[Array, Array, Array]:
    """Where the name could stand: anchors on the curve and centres of the text in pixels, and costs."""
    frame: Bbox = axis.get_window_extent()
    around = np.stack([np.cos(DIRECTIONS), np.sin(DIRECTIONS)], 1)
    anchors, centres, costs = [], [], []
    for anchor in axis.transData.transform(curve.points):
        for distance in DISTANCES:
            anchors.append(np.broadcast_to(anchor, around.shape))
            centres.append(anchor + around * (distance * pixel + size / 2))
            costs.append(np.full(len(around), float(distance)))
    found = np.concatenate(centres)
    inside = (found - size / 2 > frame.min).all(1) & (found + size / 2 < frame.max).all(1)
    return np.concatenate(anchors)[inside], found[inside], np.concatenate(costs)[inside]
