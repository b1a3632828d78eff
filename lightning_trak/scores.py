"""Scores in a file: in full, or the best few of each target."""

from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_trak.files import write_atomically
from lightning_trak.retraining import Retrained, read_fleet
from lightning_trak.scorers.topk import TopK, strongest


class SavedScores(NamedTuple):
    """Scores, and what was asked for.

    As a safetensors file: ``scores``, or ``values`` and ``indices``, with ``num_train``, ``largest`` and ``method`` in
    its metadata.

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
            ValueError: if it is another kind of file.
        """
        tensors, about = read_tensors(path, "run `lightning-trak score` first")
        try:
            scores = tensors["scores"] if "scores" in tensors else TopK(tensors["values"], tensors["indices"])
            return cls(scores, int(about["num_train"]), about["method"], about["largest"] == "True")
        except KeyError as error:
            raise ValueError(f'"{path}" lacks {error}: it is not a file of `lightning-trak score`') from error

    def save(self, path: str | Path) -> None:
        """Write them, in place of a file that may be there."""
        tensors = {"scores": self.scores} if isinstance(self.scores, Tensor) else self.scores._asdict()
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        about = {"num_train": str(self.num_train), "method": self.method, "largest": str(self.largest)}
        write_atomically(Path(path).expanduser(), lambda temporary: save_file(tensors, temporary, about))

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
        ValueError: if it is another kind of file.
    """
    if Path(path).expanduser().is_dir():
        return read_fleet(path)
    tensors, _ = read_tensors(path, "it should hold masks and outputs of retrained models")
    if missing := {"masks", "outputs"} - set(tensors):
        raise ValueError(
            f'"{path}" lacks {" and ".join(sorted(missing))}: expected a safetensors file with masks, bool'
            " (num_subsets, num_train), and outputs, (num_targets, num_subsets[, num_seeds])"
        )
    return Retrained(tensors["masks"], tensors["outputs"])


def read_tensors(path: str | Path, advice: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, memory-mapped.

    Raises:
        FileNotFoundError: with the advice, if there is none.
        ValueError: if it is another kind of file.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f'there is no file "{path}"; {advice}')
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f'"{path}" is truncated or not a safetensors file: {error}') from error
