"""Scores in a file: in full, or the best few of each target."""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from lightning_trak.retraining import Retrained, read_fleet
from lightning_trak.scoring.topk import TopK, strongest
from lightning_trak.storage.files import (
    DamagedFileError,
    load_tensors,
    open_safetensors,
    remove_leftovers,
    save_tensors,
)
from lightning_trak.storage.paths import local_path
from lightning_trak.storage.schemas import boolean, integer, record, sha256, text

_ABOUT = record(
    {"sha256": sha256, "checksum": sha256, "num_train": integer(1, 1 << 40), "method": text(), "largest": boolean}
)


class SavedScores(NamedTuple):
    """Scores, and what was asked for.

    As a safetensors file: ``scores``, or ``values`` and ``indices``, with ``num_train``, ``largest``, ``method`` and
    checksums in its metadata.

    Attributes:
        scores: ``(num_targets, num_train)``, or the best of each target.
        num_train: number of training examples.
        method: name of the method.
        largest: whether the best are those with the highest scores.
    """

    scores: Tensor | TopK
    num_train: int
    method: str
    largest: bool = True

    @classmethod
    def load(cls, path: str | Path) -> "SavedScores":
        """Read what :meth:`save` wrote, memory-mapped.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is another kind of file, was altered, or holds what no scores can be.
            OSError: if it cannot be read.
        """
        path = _existing(path, "run `lightning-trak score` first")
        try:
            tensors, about = load_tensors(path)
            _ABOUT("its header", about)
            scores = tensors["scores"] if "scores" in tensors else TopK(tensors["values"], tensors["indices"])
        except DamagedFileError as error:
            raise _unreadable(error, "score again") from error
        except (KeyError, ValueError) as error:
            raise ValueError(f'"{path}" is not a file of `lightning-trak score`: {error}') from error
        saved = cls(scores, about["num_train"], about["method"], about["largest"])
        saved._require_scores(f'"{path}"')
        return saved

    def save(self, path: str | Path) -> None:
        """Write them, in place of a file that may be there.

        Raises:
            ValueError: if they are not finite, or do not fit ``num_train``; a file that is there is kept.
        """
        path = local_path(path, "file of scores")
        self._require_scores(f'what "{path}" should hold')
        remove_leftovers(path.parent)
        tensors = {"scores": self.scores} if isinstance(self.scores, Tensor) else self.scores._asdict()
        save_tensors(path, tensors, num_train=self.num_train, method=self.method, largest=self.largest)

    def _require_scores(self, where: str) -> None:
        """Check the numbers, so that nothing is looked up at a wrong place."""
        top, values = (None, self.scores) if isinstance(self.scores, Tensor) else (self.scores, self.scores.values)
        if values.ndim != 2 or not values.is_floating_point():
            reason = f"the scores are {values.dtype} of shape {tuple(values.shape)}, not numbers, a row for each target"
        elif not values.isfinite().all():
            row = int(values.isfinite().logical_not().any(1).nonzero()[0])
            reason = f"scores of target {row} are NaN or infinite"
        elif top is None:
            reason = f"the scores are of {values.shape[1]} training examples, not {self.num_train}"
            if values.shape[1] == self.num_train:
                return
        else:
            found = _fault(top, self.num_train, self.largest)
            if found is None:
                return
            reason = found
        raise ValueError(f"{where} is wrong: {reason}; score again")

    @property
    def num_targets(self) -> int:
        """Number of targets."""
        return len(self.scores if isinstance(self.scores, Tensor) else self.scores.values)

    def best(self, target: int, k: int) -> dict[str, TopK]:
        """The strongest ``"proponents"`` and ``"opponents"`` of a target, of shape ``(k,)``; what there is of them."""
        row = slice(target, target + 1)
        one = self.scores[row] if isinstance(self.scores, Tensor) else TopK(*(part[row] for part in self.scores))
        found = strongest(one, k, self.largest)
        return {name: TopK(*(part[0] for part in best)) for name, best in found.items()}


def load_ground_truth(path: str | Path) -> Retrained:
    """Subsets, and outputs of models retrained on them.

    Args:
        path: directory of a :class:`~lightning_trak.retraining.RetrainingFleet` that has run, or a safetensors file
            with ``masks`` and ``outputs``; outputs may then be without seeds, ``(num_targets, num_subsets)``.

    Raises:
        FileNotFoundError: if there is no such file.
        RuntimeError: if members of the fleet are missing.
        ValueError: if it is another kind of file, or its tensors do not fit each other.
        OSError: if it cannot be read.
    """
    path = _existing(path, "it should hold masks and outputs of retrained models")
    if path.is_dir():
        return read_fleet(path)
    expected = (
        "expected a safetensors file with masks, bool (num_subsets, num_train), and outputs, numbers (num_targets,"
        " num_subsets[, num_seeds])"
    )
    try:
        with open_safetensors(path) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except DamagedFileError as error:
        raise _unreadable(error, expected) from error
    if missing := {"masks", "outputs"} - set(tensors):
        raise ValueError(f'"{path}" lacks {" and ".join(sorted(missing))}: {expected}')
    masks, outputs = tensors["masks"], tensors["outputs"]
    if (
        masks.dtype != torch.bool
        or masks.ndim != 2
        or not outputs.is_floating_point()
        or outputs.ndim not in (2, 3)
        or outputs.shape[1] != len(masks)
    ):
        raise ValueError(
            f'"{path}" holds masks, {masks.dtype} {tuple(masks.shape)}, and outputs, {outputs.dtype}'
            f" {tuple(outputs.shape)}: {expected}"
        )
    if not outputs.isfinite().all():
        raise ValueError(f'"{path}" holds outputs that are NaN or infinite; leave these targets or subsets out')
    return Retrained(masks, outputs)


def _existing(path: str | Path, advice: str) -> Path:
    path = local_path(path, "file")
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f'there is no file "{path}"; {advice}') from error
    return path


def _unreadable(error: DamagedFileError, advice: str) -> ValueError:
    if isinstance(error.__cause__, SafetensorError):
        return ValueError(f'"{error.path}" is truncated or not a safetensors file: {error.__cause__}; {advice}')
    return ValueError(f"{error}; {advice}")


def _fault(top: TopK, num_train: int, largest: bool) -> str | None:
    """What is wrong with the best scores of each target, if anything is."""
    values, indices = top
    if indices.dtype != torch.int64 or indices.shape != values.shape:
        return f"its indices are {indices.dtype} of shape {tuple(indices.shape)}, not int64 {tuple(values.shape)}"
    if not indices.numel():
        return None
    if indices.min() < 0 or indices.max() >= num_train:
        return f"it has indices from {indices.min()} to {indices.max()}, of {num_train} training examples"
    if (indices.sort(1).values.diff(dim=1) == 0).any():
        return "it names a training example twice for one target"
    steps = values.diff(dim=1)
    if (steps > 0 if largest else steps < 0).any():
        return f"its scores do not have the {'highest' if largest else 'lowest'} first"
    return None
