"""Explanations for the terminal, as a picture and as a web page."""

import base64
import html
import struct
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_trak.reporting.explanations import Example, Explanation
from lightning_trak.reporting.plots import Picture, plot_pictures
from lightning_trak.texts import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff; }
h1 { font-size: 1.6rem; margin: 0; }
h2, h3 { font-size: 1.1rem; margin: 0 0 .5rem; }
section { display: flex; gap: 2rem; border-top: 1px solid #ccc; margin-top: 1.5rem; padding-top: 1rem; }
.groups { flex: 1; }
.row { display: flex; flex-wrap: wrap; align-items: flex-start; gap: .75rem; margin-bottom: 1rem; }
figure { margin: 0; padding: .5rem; width: 7rem; border: 2px solid #888; border-radius: 4px; }
.text .target { flex: 0 0 16rem; }
.text .groups { display: flex; gap: 2rem; }
.text .group { flex: 1; }
.text figure { width: 100%; box-sizing: border-box; }
.proponents figure { border-color: #2a7d2a; }
.opponents figure { border-color: #b52a2a; }
img { width: 100%; display: block; }
.small { image-rendering: pixelated; }
figcaption { font-size: .85rem; overflow-wrap: anywhere; }
b { font-variant-numeric: tabular-nums; }
@media (max-width: 45rem) { body { margin: 1rem; } section, .text .groups { display: block; } h3 { margin-top: 1rem; } }
"""
_LEGEND = (
    "Training on an example with a positive score helps the target, on one with a negative score it harms it."
    " Proponents have the highest scores, opponents the lowest. #n is the position in the training set, from 0."
)
_SMALL = 64  # pixels: images that are not wider are enlarged without smoothing


def table(explanations: Sequence[Explanation], width: int = 100) -> str:
    """Explanations as text.

    Args:
        explanations: what to show.
        width: of the lines, in characters; descriptions are cut to fit.
    """
    lines = []
    for explanation in explanations:
        head = f"target {explanation.position}  "
        lines += [head + _cut(explanation.target.text, width - len(head))]
        for name, entries in explanation.groups.items():
            lines += [f"  {name}", "    rank  position       score  example"]
            lines += [
                f"    {rank:4}  {entry.position:8}  {entry.score:+10.3g}  {_cut(entry.example.text, width - 32)}"
                for rank, entry in enumerate(entries, 1)
            ]
        lines += [""]
    return "\n".join(lines)


def picture(explanations: Sequence[Explanation]) -> "Figure":
    """Explanations as a matplotlib figure.

    Raises:
        ValueError: if an item holds no image.
    """
    return plot_pictures(
        [_picture(entry.target, f"#{entry.position} {entry.target.text}") for entry in explanations],
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


def page(explanations: Sequence[Explanation], title: str) -> str:
    """Explanations as an HTML page that needs no other file: images are inside, texts are escaped.

    Args:
        explanations: what to show.
        title: of the page.
    """
    title = html.escape(printable(title))
    sections = "\n".join(_section(explanation) for explanation in explanations)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{title}</h1>\n<p>{_LEGEND}</p>\n{sections}\n</body>\n</html>\n"
    )


def png(image: Tensor) -> bytes:
    """An image as a PNG file (ISO/IEC 15948) of 8 bits per channel.

    Args:
        image: in [0, 1], ``(height, width)`` or ``(3, height, width)``.
    """
    pixels = (image * 255).round().to(torch.uint8)
    colour = pixels.ndim == 3
    rows = (pixels.permute(1, 2, 0) if colour else pixels).contiguous().numpy()
    size = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], 8, 2 if colour else 0, 0, 0, 0)
    unfiltered = b"".join(b"\0" + row.tobytes() for row in rows)  # each row begins with the number of its filter
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", size), (b"IDAT", zlib.compress(unfiltered)), (b"IEND", b""))
    )


def _cut(text: str, width: int) -> str:
    text = printable(text)
    return text if len(text) <= width else text[: width - 3] + "..."


def _picture(example: Example, name: str, *more: str) -> Picture:
    if example.image is None:
        raise ValueError(
            f"{printable(name)} holds no image, so there is no picture to draw; write a .html page, or a table"
        )
    image = example.image
    # in colour, so that grey images are not drawn as ink on paper
    return Picture(image.expand(3, -1, -1) if image.ndim == 2 else image, "\n".join((_cut(name, 15), *more)))


def _section(explanation: Explanation) -> str:
    kind = "text" if explanation.target.image is None else "images"
    target = f'<div class="target">\n<h2>target {explanation.position}</h2>\n{_figure(explanation.target, "")}\n</div>'
    groups = []
    for name, entries in explanation.groups.items():
        figures = "\n".join(
            _figure(entry.example, f"<b>{entry.score:+.3g}</b> #{entry.position}<br>") for entry in entries
        )
        groups.append(f'<div class="group {name}">\n<h3>{name}</h3>\n<div class="row">\n{figures}\n</div>\n</div>')
    return f'<section class="{kind}">\n{target}\n<div class="groups">\n' + "\n".join(groups) + "\n</div>\n</section>"


def _figure(example: Example, caption: str) -> str:
    text, image = html.escape(_cut(example.text, 2000)), ""
    if example.image is not None:
        data = base64.b64encode(png(example.image)).decode()
        kind = ' class="small"' if example.image.shape[-1] <= _SMALL else ""
        image = f'<img{kind} alt="{text}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{caption}{text}</figcaption></figure>"
