"""What ``lightning-trak clean`` does."""

import shutil
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L

from lightning_trak.checks import needs_extra, positive
from lightning_trak.cleaning import Ranking, duplicates, harmful, useful, wrong_labels
from lightning_trak.methods import LabelStatistic, Method
from lightning_trak.reporting.explanations import Describe
from lightning_trak.reporting.items import item_label
from lightning_trak.reporting.plots import plot_mislabel_curves, require_drawing
from lightning_trak.running.data.sources import single_loader
from lightning_trak.scoring.groups import Label
from lightning_trak.storage.files import write_atomically
from lightning_trak.storage.paths import local_file
from lightning_trak.storage.user_files import new_file
from lightning_trak.texts.printable import counted, printable

Find = Literal["wrong_labels", "harmful", "useful", "duplicates"]

_SHOWN = 20  # examples in the terminal
_EARLY = 0.1  # of all examples: how many wrong ones are found among them


def require_options(
    find: Find, k: int | None, out: str | None, balanced: bool, wrong: str | None, plot: str | None
) -> None:
    """Refuse options that do not fit together, before any work.

    Raises:
        ValueError: if some do not.
        ModuleNotFoundError: if the file that is asked for needs a package that is not installed.
    """
    if k is not None:
        positive("k", k)
    if out is not None and Path(out).suffix not in (".csv", ".parquet"):
        raise ValueError(f'out must end in .csv or .parquet, got "{out}"; for a table in the terminal, leave it out')
    if plot is not None and Path(plot).suffix != ".png":
        raise ValueError(f'plot must end in .png, got "{plot}"')
    if plot is not None and wrong is None:
        raise ValueError("plot needs wrong: a CSV file with a column `position` of the examples that are wrong")
    if wrong is not None and find not in ("wrong_labels", "harmful"):
        raise ValueError(f"wrong counts the wrong examples that wrong_labels or harmful finds, not {find}")
    if balanced and find != "useful":
        raise ValueError(f"balanced selects useful examples of each label; find is {find}")
    for path in (out, plot):
        if path is not None:
            local_file(path, "file")
    if out is not None and Path(out).suffix == ".parquet":
        with needs_extra("parquet", ".parquet needs pyarrow"):
            import_module("pyarrow")
    if plot is not None:
        require_drawing()


def find_examples(
    trainer: L.Trainer,
    method: LabelStatistic,
    datamodule: L.LightningDataModule,
    find: Find,
    balanced: bool,
    threshold: float,
) -> Ranking:
    """Call the function of :mod:`lightning_trak.cleaning` that is asked for."""
    if find == "wrong_labels":
        return wrong_labels(method, trainer, datamodule)
    if find == "duplicates":
        return duplicates(cast(Any, method), trainer, datamodule, threshold)
    if not isinstance(method, Method):
        raise ValueError(f"{type(method).__name__} has no scores for a validation set: use TRAK or another method")
    if find == "harmful":
        return harmful(method, trainer, datamodule, datamodule)
    groups = _labels(single_loader(datamodule, "fit", trainer).dataset) if balanced else None
    return useful(method, trainer, datamodule, datamodule, groups)


def write_ranking(
    ranking: Ranking,
    name: str,
    describe: Describe | None,
    k: int | None,
    out: str | None,
    known: Sequence[int] | None,
    plot: str | None,
) -> None:
    """Write a ranking to the terminal or to a file, and how many wrong examples it finds.

    Args:
        ranking: the examples.
        name: of the method.
        describe: makes a text of an item.
        k: how many to list; None: all in a file, some in the terminal.
        out: the file; None: the terminal.
        known: positions of the examples that are wrong, if that is known.
        plot: the picture.
    """
    total = counted(len(ranking.dataset), "training example")
    heading = f"{printable(name)}: {ranking.what}, by {ranking.measure}: {len(ranking)} of {total}"
    listed = ranking[: k or (_SHOWN if out is None else None)]
    if out is None:
        print(heading)
        if len(listed):
            print(listed.table(describe).plain(shutil.get_terminal_size((100, 24)).columns))
    else:
        write = listed.to_csv if out.endswith(".csv") else listed.to_parquet
        write(out, describe)
        print(f"{heading}; {counted(len(listed), 'row')} in {printable(out)}")
    if known is None:
        return
    curve = ranking.curve(known)
    area, best = float(curve.area), 1 - float(curve.share) / 2
    print(
        f"{curve.found_within(_EARLY):.0%} of {counted(len(set(known)), 'wrong example')} are among the first"
        f" {_EARLY:.0%}; area under the detection curve {area:.3f}, at best {best:.3f}"
    )
    if plot is not None:
        figure = plot_mislabel_curves({name: curve})
        write_atomically(new_file(plot), lambda path: figure.savefig(path, format="png", dpi=150))
        print(f"the detection curve is drawn in {printable(plot)}")


def _labels(dataset: Any) -> list[Label]:
    """The label of each item.

    Raises:
        ValueError: if an item has no label that names a class.
    """
    labels = []
    for position in range(len(dataset)):
        label = item_label(dataset[position])
        if not isinstance(label, (int, str)) or isinstance(label, bool):
            raise ValueError(
                f"balanced needs a label of each training example, an integer or a text, and that of example {position}"
                f" is {label!r:.80}: let items be tuples (..., label), or mappings with a `label`"
            )
        labels.append(label)
    return labels
