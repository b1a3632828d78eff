"""Scores in a file: all of them, or the best few of each target."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_trak.scoring.topk import BothEnds, Scores, TopK, rows_of, strongest
from lightning_trak.storage.files import DamagedFileError, load_tensors, save_tensors
from lightning_trak.storage.schemas import boolean, integer, record, sha256, text
from lightning_trak.storage.user_files import existing_path, new_file, unreadable

_ABOUT = record(
    {"sha256": sha256, "checksum": sha256, "num_train": integer(1, 1 << 40), "method": text(), "largest": boolean},
    {"meaning": text(), "data": sha256},
)


class SavedScores(NamedTuple):
    """Scores with the method that made them.

    The safetensors file holds ``scores``, or ``values`` and ``indices`` of the best, of both ends with
    ``opponent_values`` and ``opponent_indices`` of the lowest; and ``used_masks`` if there are any. Its metadata hold
    ``num_train``, ``largest``, ``method``, ``meaning``, ``data`` and checksums.

    Attributes:
        scores: ``(num_targets, num_train)``, or the best few of each target.
        num_train: number of training examples.
        method: name of the method.
        largest: of one end, whether it is the highest scores (true) or the lowest.
        used_masks: bool ``(num_used, num_train)``, subsets whose models the scores were made with; None if there are
            none.
        meaning: a sentence that says what a positive score means; empty if that is not known.
        data: the digest of a few items of the training data; None if it is not known.
    """

    scores: Scores
    num_train: int
    method: str
    largest: bool = True
    used_masks: Tensor | None = None
    meaning: str = ""
    data: str | None = None

    @classmethod
    def load(cls, path: str | Path) -> "SavedScores":
        """Read what :meth:`save` wrote, memory-mapped.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is another kind of file, was altered, or its tensors cannot be scores.
            OSError: if it cannot be read.
        """
        path = existing_path(path, "run `lightning-trak score` first")
        try:
            tensors, about = load_tensors(path)
            _ABOUT("its header", about)
            scores = _scores_of(tensors)
        except DamagedFileError as error:
            raise unreadable(error, "give a file of `lightning-trak score`, or score again") from error
        except (KeyError, ValueError) as error:
            raise ValueError(f'"{path}" is not a file of `lightning-trak score`: {error}') from error
        used, meaning, data = tensors.get("used_masks"), about.get("meaning", ""), about.get("data")
        saved = cls(scores, about["num_train"], about["method"], about["largest"], used, meaning, data)
        saved.require_scores(f'"{path}" is wrong')
        return saved

    def save(self, path: str | Path) -> None:
        """Write the scores to a file. A file that is there already is replaced.

        Raises:
            ValueError: if scores are not finite or do not fit ``num_train``. Nothing is written, and a file that is
                there stays as it is.
        """
        self.require_scores(f'cannot write "{path}"')
        tensors = _tensors_of(self.scores)
        if self.used_masks is not None:
            tensors["used_masks"] = self.used_masks
        about: dict[str, Any] = {name: getattr(self, name) for name in ("num_train", "method", "largest", "meaning")}
        if self.data is not None:
            about["data"] = self.data
        save_tensors(new_file(path, "file of scores"), tensors, **about)

    def require_scores(self, problem: str) -> None:
        """Check the scores, so that every position in them is one of a training example.

        Args:
            problem: the beginning of the error.

        Raises:
            TypeError: if they are not scores of one set of targets.
            ValueError: if they cannot be scores of ``num_train`` training examples.
        """
        if not isinstance(self.scores, (Tensor, TopK, BothEnds)):
            raise TypeError(
                "expected the scores of one set of targets, as score or attribute returns them, got a"
                f" {type(self.scores).__name__}"
            )
        if fault := _fault(self):
            raise ValueError(f"{problem}: {fault}; score again")

    @property
    def num_targets(self) -> int:
        """Number of targets."""
        return len(self.scores if isinstance(self.scores, Tensor) else self.scores.values)

    def best(self, target: int, k: int) -> dict[str, TopK]:
        """The strongest proponents and opponents of a target.

        Args:
            target: position of the target.
            k: how many of each.

        Returns:
            ``"proponents"`` and ``"opponents"``, of shape ``(k,)``, strongest first; fewer if there are not as many.
            If only one of the two was kept, the other is missing.
        """
        found = strongest(rows_of(self.scores, slice(target, target + 1)), k, self.largest)
        return {name: TopK(*(part[0] for part in best)) for name, best in found.items()}


def _tensors_of(scores: Scores) -> dict[str, Tensor]:
    """The tensors of a file that holds scores."""
    if isinstance(scores, Tensor):
        return {"scores": scores}
    if isinstance(scores, BothEnds):
        opponents = {f"opponent_{name}": tensor for name, tensor in scores.opponents._asdict().items()}
        return scores.proponents._asdict() | opponents
    return scores._asdict()


def _scores_of(tensors: dict[str, Tensor]) -> Scores:
    """The scores in the tensors of a file."""
    if "scores" in tensors:
        return tensors["scores"]
    best = TopK(tensors["values"], tensors["indices"])
    if "opponent_values" not in tensors:
        return best
    return BothEnds(best, TopK(tensors["opponent_values"], tensors["opponent_indices"]))


def _fault(saved: SavedScores) -> str | None:
    """What is wrong with scores; None if nothing is."""
    if isinstance(saved.scores, BothEnds):
        if len({len(end.values) for end in saved.scores}) > 1:
            return "it has proponents and opponents of other numbers of targets"
        highest, lowest = saved.scores
        first = _fault(saved._replace(scores=highest, largest=True))
        return first or _fault(saved._replace(scores=lowest, largest=False))
    values = saved.scores if isinstance(saved.scores, Tensor) else saved.scores.values
    used = saved.used_masks
    if used is not None and (used.dtype != torch.bool or used.ndim != 2 or used.shape[1] != saved.num_train):
        return f"its used_masks are {used.dtype} of shape {tuple(used.shape)}, not bool of {saved.num_train} examples"
    if values.ndim != 2 or not values.is_floating_point():
        return f"the scores are {values.dtype} of shape {tuple(values.shape)}, not floats with a row for each target"
    if not values.isfinite().all():
        row = int(values.isfinite().logical_not().any(1).nonzero()[0])
        return f"scores of target {row} are NaN or infinite"
    if not isinstance(saved.scores, Tensor):
        return _top_k_fault(saved.scores, saved.num_train, saved.largest)
    if values.shape[1] != saved.num_train:
        return f"the scores are of {values.shape[1]} training examples, not {saved.num_train}"
    return None


def _top_k_fault(top: TopK, num_train: int, largest: bool) -> str | None:
    """What is wrong with the best scores of each target; None if nothing is."""
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
        return f"its scores do not have the {'highest' if largest else 'lowest'} first, as largest={largest} says"
    return None
