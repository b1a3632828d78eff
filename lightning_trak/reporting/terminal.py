"""Explanations as text for a terminal."""

from collections.abc import Sequence

from lightning_trak.reporting.explanations import Explanation
from lightning_trak.texts.printable import shortened


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
            lines += [f"  {name}", "    rank  position       score  example"]
            lines += [
                f"    {rank:4}  {entry.position:8}  {entry.score:+10.3g}  {shortened(entry.example.text, width - 32)}"
                for rank, entry in enumerate(entries, 1)
            ]
        lines += [""]
    return "\n".join(lines)
