"""Explanations, and texts with coloured tokens, as web pages."""

import base64
import html
import io
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_trak.checks import needs_extra
from lightning_trak.reporting.explanations import Example, Explanation, heading
from lightning_trak.reporting.tokens import NO_TEXT, ScoredText, largest_score
from lightning_trak.texts.printable import printable, printable_piece, shortened

# All rules are about one element, so that those of a notebook around it stay as they are.
STYLE = """
.attributions { font: 15px/1.4 system-ui, sans-serif; }
.attributions h1 { font-size: 1.6rem; margin: 0; }
.attributions h2, .attributions h3 { font-size: 1.1rem; margin: 0 0 .5rem; }
.attributions section { display: flex; gap: 2rem; border-top: 1px solid #8884; margin-top: 1.5rem; padding-top: 1rem; }
.attributions .groups { flex: 1; }
.attributions .row { display: flex; flex-wrap: wrap; align-items: flex-start; gap: .75rem; margin-bottom: 1rem; }
.attributions figure { margin: 0; padding: .5rem; width: 7rem; border: 2px solid #888; border-radius: 4px; }
.attributions .text .target { flex: 0 0 16rem; }
.attributions .text .groups { display: flex; gap: 2rem; }
.attributions .text .group { flex: 1; }
.attributions .text figure { width: 100%; box-sizing: border-box; }
.attributions .proponents figure { border-color: #2a7d2a; }
.attributions .opponents figure { border-color: #b52a2a; }
.attributions img { width: 100%; display: block; margin: 0; }
.attributions .small { image-rendering: pixelated; }
.attributions figcaption { font-size: .85rem; overflow-wrap: anywhere; }
.attributions b { font-variant-numeric: tabular-nums; }
@media (max-width: 45rem) {
  .attributions section, .attributions .text .groups { display: block; }
  .attributions h3 { margin-top: 1rem; }
}
"""
_PAGE = """
:root { color-scheme: light dark; }
body { margin: 2rem; color: #222; background: #fff; }
@media (max-width: 45rem) { body { margin: 1rem; } }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #111; } }
"""
_TOKEN_STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; }
h2 { font-size: 1.1rem; margin: 0 0 .5rem; }
section { border-top: 1px solid #ccc; margin-top: 1.5rem; padding-top: 1rem; max-width: 60rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.8; margin: 0; }
.text span { border-radius: 3px; padding: .15rem 0; }
.none { color: #767676; }
.legend span { padding: .15rem .4rem; border-radius: 3px; }
"""
_POSITIVE, _NEGATIVE = "31, 119, 180", "255, 127, 14"  # blue and orange, which all eyes tell apart
_DARKEST = 0.75  # opacity of the largest score; the text stays readable
_LEGEND = (
    "Proponents have the highest scores for a target, opponents the lowest. #n is the position in the training set,"
    " from 0."
)
_PREDICTED = "Below a target is what the trained model predicts for it; of several runs, what they predict on average."
_SMALL = 64  # pixels: images up to this width are enlarged without smoothing


def page(explanations: Sequence[Explanation], title: str, meaning: str = "") -> str:
    """Explanations as an HTML page. It needs no other file: it contains the images as data. Texts are escaped.

    Args:
        explanations: what to show.
        title: of the page.
        meaning: a sentence that says what a positive score means.

    Raises:
        ModuleNotFoundError: if there are images and Pillow is not installed.
    """
    return _document(title, "", part(explanations, title, meaning))


def part(explanations: Sequence[Explanation], title: str, meaning: str = "") -> str:
    """Explanations as a part of a page, such as the output of a notebook's cell. Colours are those around it.

    Args:
        explanations: what to show.
        title: above them.
        meaning: a sentence that says what a positive score means.

    Raises:
        ModuleNotFoundError: if there are images and Pillow is not installed.
    """
    predicted = _PREDICTED if any(each.prediction is not None for each in explanations) else ""
    legend = " ".join(filter(None, (html.escape(printable(meaning)), _LEGEND, predicted)))
    sections = "\n".join(_section(explanation) for explanation in explanations)
    return (
        f'<div class="attributions">\n<style>{STYLE}</style>\n'
        f"<h1>{html.escape(printable(title))}</h1>\n<p>{legend}</p>\n{sections}\n</div>"
    )


def token_page(texts: Sequence[ScoredText], title: str) -> str:
    """Texts with coloured tokens as an HTML page. It needs no other file. Texts are escaped.

    Tokens with positive scores are blue, with negative scores orange, in one scale for all texts. Tokens without scores
    are grey. The pointer on a token shows its number in the text, from 0, and its score.

    Args:
        texts: what to show.
        title: of the page.

    Raises:
        ValueError: if a score is not finite.
    """
    scale = largest_score(texts)
    legend = "".join(
        f'<span style="{_colour(part * scale, scale)}">{part * scale:+.3g}</span> '
        for part in ((-1, -0.5, 0, 0.5, 1) if scale else (0,))
    )
    sections = "\n".join(
        f"<section>\n<h2>{html.escape(printable(text.title))}</h2>\n"
        f'<p class="text">{_tokens(text, scale)}</p>\n</section>'
        for text in texts
    )
    about = "Scores of tokens. Grey tokens have none. Point at a token for its number and score."
    head = f'<h1>{html.escape(printable(title))}</h1>\n<p>{about}</p>\n<p class="legend">{legend}</p>'
    return _document(title, _TOKEN_STYLE, f"{head}\n{sections}")


def _document(title: str, style: str, body: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(printable(title))}</title>\n<style>{_PAGE}{style}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _tokens(text: ScoredText, scale: float) -> str:
    parts = []
    for number, (token, score) in enumerate(zip(text.tokens, text.scores, strict=True)):
        shown = html.escape(printable_piece(token)) or NO_TEXT
        if score is None:
            parts.append(f'<span class="none">{shown}</span>')
        else:
            parts.append(f'<span style="{_colour(score, scale)}" title="token {number}: {score:+.3g}">{shown}</span>')
    return "".join(parts)


def _colour(score: float, scale: float) -> str:
    opacity = _DARKEST * abs(score) / scale if scale else 0.0
    return f"background: rgba({_POSITIVE if score > 0 else _NEGATIVE}, {opacity:.3f})"


def _section(explanation: Explanation) -> str:
    kind = "text" if explanation.target.image is None else "images"
    figure = _figure(explanation.target, prediction=explanation.prediction)
    target = f'<div class="target">\n<h2>target {explanation.position}</h2>\n{figure}\n</div>'
    groups = []
    for name, entries in explanation.groups.items():
        figures = "\n".join(_figure(entry.example, f"<b>{entry.score:+.3g}</b> #{entry.position}") for entry in entries)
        head = f"<h3>{heading(name, entries)}</h3>"
        groups.append(f'<div class="group {name}">\n{head}\n<div class="row">\n{figures}\n</div>\n</div>')
    return f'<section class="{kind}">\n{target}\n<div class="groups">\n' + "\n".join(groups) + "\n</div>\n</section>"


def _figure(example: Example, score: str = "", prediction: str | None = None) -> str:
    text, image = html.escape(shortened(example.text, 2000)), ""
    if example.image is not None:
        data = base64.b64encode(_png(example.image)).decode()
        kind = ' class="small"' if example.image.shape[-1] <= _SMALL else ""
        image = f'<img{kind} alt="{text}" src="data:image/png;base64,{data}">'
    caption = "<br>".join(filter(None, (score, text, html.escape(printable(prediction or "")))))
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _png(image: Tensor) -> bytes:
    """An image as a PNG file with 8 bits per channel."""
    with needs_extra("plots", "pages with images need Pillow"):
        from PIL import Image
    pixels = (image * 255).round().to(torch.uint8)
    rows = pixels.permute(1, 2, 0) if pixels.ndim == 3 else pixels
    file = io.BytesIO()
    Image.fromarray(rows.contiguous().numpy()).save(file, format="PNG")
    return file.getvalue()
