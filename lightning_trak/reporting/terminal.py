"""Explanations, and texts with coloured tokens, for a terminal."""

from collections.abc import Sequence

from lightning_trak.reporting.explanations import Explanation, heading
from lightning_trak.reporting.tokens import NO_TEXT, ScoredText, largest_score
from lightning_trak.texts.printable import printable, printable_piece, shortened

# Backgrounds of terminals with 256 colours, from the smallest scores to the largest: blue and orange.
_POSITIVE, _NEGATIVE = (189, 153, 117, 75, 33), (230, 223, 222, 215, 208)
_BLACK, _GREY = 16, 244
_MARKS = 3  # of the largest score, without colours


def table(explanations: Sequence[Explanation], width: int = 100) -> str:
    """Explanations as lines of text, a row for each proponent and opponent.

    Args:
        explanations: what to show.
        width: of the lines, in characters. Longer descriptions are shortened.
    """
    lines = []
    for explanation in explanations:
        head = f"target {explanation.position}  "
        lines += [head + shortened(explanation.target.text, width - len(head))]
        if explanation.prediction is not None:
            lines += [" " * len(head) + shortened(explanation.prediction, width - len(head))]
        for name, entries in explanation.groups.items():
            lines += [f"  {heading(name, entries)}", "    rank  position       score  example"]
            lines += [
                f"    {rank:4}  {entry.position:8}  {entry.score:+10.3g}  {shortened(entry.example.text, width - 32)}"
                for rank, entry in enumerate(entries, 1)
            ]
        lines += [""]
    return "\n".join(lines)


def token_lines(texts: Sequence[ScoredText], colour: bool = True) -> str:
    """Texts with coloured tokens for a terminal.

    Tokens with positive scores are blue, with negative scores orange, in one scale for all texts. Tokens without scores
    are grey. Control characters of the texts are shown, not obeyed.

    Args:
        texts: what to show.
        colour: whether to colour, in a terminal of 256 colours. If not, marks stand behind tokens, such as ``{++}``.

    Raises:
        ValueError: if a score is not finite.
    """
    scale = largest_score(texts)
    ends = (-scale, scale) if scale else (0.0,)
    legend = " to ".join(_token(f"{score:+.3g}", score, scale, colour) for score in ends)
    lines = [f"scores from {legend}" if scale else "all scores are 0"]
    for text in texts:
        tokens = (
            _token(printable_piece(token) or NO_TEXT, score, scale, colour)
            for token, score in zip(text.tokens, text.scores, strict=True)
        )
        lines += ["", printable(text.title), "".join(tokens)]
    return "\n".join(lines) + "\n"


def _token(shown: str, score: float | None, scale: float, colour: bool) -> str:
    share = abs(score or 0.0) / scale if scale else 0.0
    if not colour:
        marks = round(_MARKS * share) * ("+" if (score or 0) > 0 else "-")
        text = shown.rstrip("\n")
        return f"{text}{{{marks}}}{shown[len(text) :]}" if marks else shown
    shades = _POSITIVE if (score or 0) > 0 else _NEGATIVE
    level = round(len(shades) * share)
    if score is not None and not level:
        return shown
    codes = f"38;5;{_GREY}" if score is None else f"38;5;{_BLACK};48;5;{shades[level - 1]}"
    # Each line has its own colour, since a terminal would fill the rest of a line with it.
    return "\n".join(f"\x1b[{codes}m{part}\x1b[0m" if part else "" for part in shown.split("\n"))
