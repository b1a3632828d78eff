"""Choose among scores by what retrained models say, and measure the choice on models that it did not see."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from lightning_trak.checks import integer, is_integer, require_tensor
from lightning_trak.metrics import LinearDatamodelingScore
from lightning_trak.metrics.functional.bootstrap import crossed_bootstrap_interval
from lightning_trak.metrics.functional.lds import _linear_datamodeling_score_table as _table
from lightning_trak.texts.tables import Cell, Table

Name = TypeVar("Name", bound=Hashable)

_LEAST = 3  # subsets of a fold: a rank correlation of fewer says nothing


class Measured(NamedTuple):
    """A linear datamodeling score.

    Attributes:
        lds: mean over targets.
        low: lower end of its interval, over new targets and new subsets.
        high: upper end.
    """

    lds: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.lds:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Tuning(Generic[Name]):
    """What :func:`tune` found.

    Attributes:
        best: the name of the candidate with the highest LDS on all subsets.
        candidates: the LDS of each candidate on all subsets, by name. That of the best is too high, because it was
            chosen for it.
        held_out: the LDS of the choice, measured on subsets that it was not chosen on. Report this one.
        choices: the name that was chosen without each fold. If they differ, the best are alike.
    """

    best: Name
    candidates: dict[Name, Measured]
    held_out: Measured
    choices: tuple[Name, ...]

    def __str__(self) -> str:
        rows: list[tuple[Cell, ...]] = [
            (f"{name}{' (best)' * (name == self.best)}", *measured)
            for name, measured in [*self.candidates.items(), ("chosen, held out", self.held_out)]
        ]
        return Table(("candidate", "LDS", "low", "high"), rows).markdown()


def tune(
    candidates: Mapping[Name, Tensor | Callable[[], Tensor]],
    masks: Tensor,
    outputs: Tensor,
    *,
    folds: int = 5,
    seed: int = 0,
    confidence: float = 0.95,
    used_masks: Tensor | None = None,
) -> Tuning[Name]:
    """Choose among scores by their linear datamodeling score (LDS) on retrained models, and say how good the choice is.

    The best of many scores looks better than it is on the models that it was chosen by. So the subsets are cut into
    folds at random. For each fold, the scores with the highest LDS on all other folds are chosen, and measured on this
    one; ``held_out`` is the mean over folds. The final choice uses all subsets. A rank correlation over the few subsets
    of a fold would be too low, so that of all subsets is taken, plus the mean influence of the fold's subsets on it:
    where the choice is always the same, ``held_out`` is its LDS.

    Candidates may differ in anything: damping (:meth:`TRAK.score_dampings <lightning_trak.TRAK.score_dampings>` makes
    these cheaply), number of features, checkpoints or method. All must score the same targets and training examples, in
    the order of ``outputs`` and ``masks``. Scores that have learned from retrained models must not be measured on them:
    pass ``used_masks``.

    Args:
        candidates: scores ``(num_targets, num_train)`` by name, or functions that make them. A function is called once,
            and its scores are not kept.
        masks: bool ``(num_subsets, num_train)``, different subsets, true where the subset holds the example.
        outputs: ``(num_targets, num_subsets)``, outputs of the models that were trained on the subsets; or
            ``(num_targets, num_subsets, num_seeds)``, which are averaged over seeds.
        folds: number of folds, at least 2. Each needs at least 3 subsets.
        seed: of the folds and of the intervals' bootstrap.
        confidence: of the intervals.
        used_masks: bool ``(num_used, num_train)``, subsets whose models any of the candidates was made with, such as a
            method's ``used_masks``. They may not be among ``masks``.

    Raises:
        ValueError: if there is no candidate, there are fewer than 2 targets or too few subsets, subsets are equal or
            used, a shape or device does not fit, or a number is NaN or infinite. The error names the candidate.
        TypeError: if candidates are not a mapping, or one is neither a Tensor nor a function that returns one.

    Example::

        fleet = read_fleet("run/fleet")
        dampings = trak.score_dampings(trainer, targets, ["auto", 0.1, 1, 10])
        tuning = tune(dampings, fleet.masks, fleet.outputs)
        print(tuning)
        trak = TRAK(model, "run/snapshots", "run/features", damping=tuning.best)
    """
    metric = LinearDatamodelingScore(masks, used_masks=used_masks).to(masks.device)  # checks the masks
    _require_enough(candidates, len(masks), outputs, folds)
    predictions: dict[Name, Tensor] = {}
    for name, candidate in candidates.items():
        metric.reset()
        scores = candidate() if callable(candidate) else candidate
        if not isinstance(scores, Tensor):
            raise TypeError(
                f"expected a Tensor of scores (num_targets, num_train) for candidate {name!r}, or a function that"
                f" returns one, got {type(scores).__name__}"
            )
        try:
            metric.update(scores, outputs)
        except ValueError as error:
            raise ValueError(f"candidate {name!r} cannot be measured: {error}") from error
        predictions[name], truth = metric.predictions[0], metric.outputs[0]
    generator = torch.Generator().manual_seed(integer("seed", seed))
    fold_of = torch.randperm(len(masks), generator=generator).to(masks.device) % folds
    tables = {name: _table(rows, truth, "zero") for name, rows in predictions.items()}
    choices, held_out = [], []
    for fold in range(folds):
        left_out = fold_of == fold
        others = {name: _table(rows[:, ~left_out], truth[:, ~left_out], "zero") for name, rows in predictions.items()}
        choices.append(_best(others))
        held_out.append(tables[choices[-1]][:, left_out])
    measured = {name: _measured(table, confidence, seed) for name, table in tables.items()}
    return Tuning(_best(tables), measured, _measured(torch.cat(held_out, dim=1), confidence, seed), tuple(choices))


def _require_enough(candidates: object, num_subsets: int, outputs: Tensor, folds: int) -> None:
    if not isinstance(candidates, Mapping):
        raise TypeError(f"expected candidates as a mapping from names to scores, got a {type(candidates).__name__}")
    if not candidates:
        raise ValueError("expected at least one candidate, got none")
    if not is_integer(folds) or folds < 2:
        raise ValueError(f"folds must be a whole number from 2 on, got {folds}")
    if num_subsets < _LEAST * folds:
        raise ValueError(
            f"expected at least {_LEAST} subsets in each of {folds} folds, which is {_LEAST * folds}, got"
            f" {num_subsets}: retrain on more subsets, or take fewer folds"
        )
    require_tensor("outputs", outputs)
    if outputs.ndim and len(outputs) < 2:
        raise ValueError(f"expected outputs of at least 2 targets, got shape {tuple(outputs.shape)}")


def _best(tables: Mapping[Name, Tensor]) -> Name:
    """The name with the highest LDS; the first of several."""
    return max(tables, key=lambda name: float(tables[name].mean()))


def _measured(table: Tensor, confidence: float, seed: int) -> Measured:
    low, high = crossed_bootstrap_interval(table, confidence, seed=seed).clamp(-1, 1).tolist()
    return Measured(float(table.mean()), low, high)
