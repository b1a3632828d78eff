"""Shows explanations where the user is: in a notebook, in a terminal, or in a file."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from lightning_trak.reporting.explanations import Explanation, explanations_table
from lightning_trak.reporting.html import page, part
from lightning_trak.reporting.plots import plot_explanations, require_drawing
from lightning_trak.reporting.terminal import table
from lightning_trak.storage.files import write_atomically
from lightning_trak.storage.paths import local_file
from lightning_trak.storage.user_files import new_file

KINDS = (".png", ".html", ".csv")


def kind_of_file(out: str | os.PathLike[str] | None) -> str | None:
    """The kind of the file that a user wants; None: no file. Call this before the work that the file is for.

    Raises:
        ValueError: if it is another kind than ``.png``, ``.html`` and ``.csv``, or a URL.
        OSError: if there can be no file at the path.
        ModuleNotFoundError: if it is a picture, and matplotlib is not installed.
    """
    kind = None if out is None else Path(out).suffix
    if kind not in (None, *KINDS):
        raise ValueError(f'out must end in .png, .html or .csv, got "{out}"; for a table in the terminal, leave it out')
    if out is not None:
        local_file(out, "file")
    if kind == ".png":
        require_drawing()
    return kind


@rank_zero_only
def show(
    explanations: Sequence[Explanation], title: str, out: str | os.PathLike[str] | None = None, meaning: str = ""
) -> None:
    """Show explanations: as HTML in a notebook, as a table in a terminal, or as a picture, page or table in a file.

    Of several processes, the first one shows them.

    Args:
        explanations: what to show.
        title: of a page.
        out: file to write, ``.png``, ``.html`` or ``.csv``. A file that is there already is replaced.
        meaning: a sentence of a page that says what a positive score means.

    Raises:
        ValueError: if ``out`` is another kind of file, or there is no image for a picture.
        ModuleNotFoundError: if a package for images is not installed.
    """
    kind = kind_of_file(out)
    if out is None:
        text = table(explanations, shutil.get_terminal_size((100, 24)).columns)
        if _in_notebook():
            from IPython.display import display

            display({"text/html": part(explanations, title, meaning), "text/plain": text}, raw=True)
        else:
            print(text)
        return

    def write(path: Path) -> None:
        if kind == ".png":
            plot_explanations(explanations).savefig(path, format="png", dpi=150)
        else:
            text = explanations_table(explanations).csv() if kind == ".csv" else page(explanations, title, meaning)
            path.write_text(text, encoding="utf-8", newline="")

    write_atomically(new_file(out), write)


def _in_notebook() -> bool:
    """Whether this process is the kernel of a notebook. IPython is there then."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None
