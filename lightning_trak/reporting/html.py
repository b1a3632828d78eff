"""Explanations as a web page."""

import base64
import html
import io
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_trak.reporting.explanations import Example, Explanation
from lightning_trak.texts.printable import printable, shortened

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
_SMALL = 64  # pixels: images up to this width are enlarged without smoothing


def page(explanations: Sequence[Explanation], title: str) -> str:
    """Explanations as an HTML page. It needs no other file: it contains the images as data. Texts are escaped.

    Args:
        explanations: what to show.
        title: of the page.

    Raises:
        ModuleNotFoundError: if there are images and Pillow is not installed.
    """
    title = html.escape(printable(title))
    sections = "\n".join(_section(explanation) for explanation in explanations)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{title}</h1>\n<p>{_LEGEND}</p>\n{sections}\n</body>\n</html>\n"
    )


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
    text, image = html.escape(shortened(example.text, 2000)), ""
    if example.image is not None:
        data = base64.b64encode(_png(example.image)).decode()
        kind = ' class="small"' if example.image.shape[-1] <= _SMALL else ""
        image = f'<img{kind} alt="{text}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{caption}{text}</figcaption></figure>"


def _png(image: Tensor) -> bytes:
    """An image as a PNG file with 8 bits per channel."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('pages with images need Pillow: pip install "lightning-trak[plots]"') from error
    pixels = (image * 255).round().to(torch.uint8)
    rows = pixels.permute(1, 2, 0) if pixels.ndim == 3 else pixels
    file = io.BytesIO()
    Image.fromarray(rows.contiguous().numpy()).save(file, format="PNG")
    return file.getvalue()
