"""The ground truth of the benchmarks: outputs of retrained models, and how well scores agree with them."""

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from benchmarks.tasks import Task
from lightning_trak import LinearDatamodelingScore
from lightning_trak.metrics.functional.bootstrap import crossed_bootstrap_interval
from lightning_trak.metrics.functional.ranking import spearman_corrcoef, spearman_influence
from lightning_trak.retraining import random_subsets, train_together

MODELS, SUBSETS = 10, 100
TOGETHER = 25  # number of models that are trained at once


@dataclass
class Truth:
    """Outputs of retrained models.

    Attributes:
        masks: bool (num_subsets, num_train).
        outputs: (num_targets, num_subsets, num_seeds).
        states: state dicts of models trained on all data.
    """

    masks: Tensor
    outputs: Tensor
    states: list[dict[str, Tensor]]

    def measure(self, scores: Tensor) -> LinearDatamodelingScore:
        """The LDS of attributions (num_targets, num_train)."""
        lds = LinearDatamodelingScore(self.masks)
        lds.update(scores, self.outputs)
        return lds

    def difference(self, scores: Tensor, others: Tensor) -> tuple[float, float, float]:
        """LDS of the first scores minus that of the second, with a 95% interval. Targets and subsets are paired."""
        tables = [self.table(rows) for rows in (scores, others)]
        table = tables[0] - tables[1]
        low, high = crossed_bootstrap_interval(table)
        return float(table.mean()), float(low), float(high)

    def table(self, scores: Tensor) -> Tensor:
        """Rank correlation of each target (the row means) plus the influence of each subset on it."""
        predictions, outputs = scores.double() @ self.masks.double().T, self.outputs.double().mean(2)
        values, influence = spearman_corrcoef(predictions, outputs), spearman_influence(predictions, outputs)
        return (values[:, None] + influence).nan_to_num(nan=0.0)  # constant predictions count as 0, as in the metric


def train_all(task: Task, models: int, max_epochs: int | None = None) -> list[dict[str, Tensor]]:
    """State dicts of models trained on all data, with the seeds 0, 1, ..."""
    states: list[dict[str, Tensor]] = []
    for start in range(0, models, TOGETHER):
        seeds = range(start, min(start + TOGETHER, models))
        everything = torch.ones(len(seeds), len(task.train), dtype=torch.bool)
        stack = train_together(
            task.make_module,
            task.train,
            everything,
            seeds,
            max_epochs=max_epochs or task.max_epochs,
            batch_size=task.batch_size,
        )
        states += stack.state_dicts()
    return states


def outputs_of(task: Task, masks: Tensor, first_seed: int) -> Tensor:
    """Outputs at the targets of a model trained on each subset, (num_targets, num_subsets)."""
    outputs = torch.empty(len(task.targets), len(masks))
    for start in range(0, len(masks), TOGETHER):
        part = masks[start : start + TOGETHER]
        seeds = range(first_seed + start, first_seed + start + len(part))
        stack = train_together(
            task.make_module, task.train, part, seeds, max_epochs=task.max_epochs, batch_size=task.batch_size
        )
        outputs[:, start : start + TOGETHER] = stack.outputs(task.output, list(task.targets.tensors)).T
    return outputs


def retrain(task: Task, subsets: int, seeds: int, models: int = MODELS) -> Truth:
    """Train on all data, and on random halves with several seeds each."""
    masks = random_subsets(len(task.train), subsets, seed=1)
    outputs = [outputs_of(task, masks, models + seed * subsets) for seed in range(seeds)]
    return Truth(masks, torch.stack(outputs, dim=2), train_all(task, models))


def kept(directory: Path, task: Task, subsets: int, seeds: int, models: int) -> Truth:
    """:func:`retrain`, once for each directory."""
    path = directory / f"truth-{task.name.replace(' ', '-')}-{subsets}-{seeds}-{models}.pt"
    if not path.exists():
        truth = retrain(task, subsets, seeds, models)
        torch.save((truth.masks, truth.outputs, truth.states), path)
    return Truth(*torch.load(path))


def trainer_for(task: Task, **options: Any) -> L.Trainer:
    """A quiet Trainer of the task's length."""
    options = {"logger": False, "enable_checkpointing": False} | options
    return L.Trainer(
        accelerator="cpu",
        max_epochs=task.max_epochs,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def quiet() -> None:
    """Silence the log lines of Lightning, and the known warnings of the measured settings."""
    for known in ("LeafSpec", "does not have many workers", "ill-conditioned", "batch normalization"):
        warnings.filterwarnings("ignore", f".*{known}.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
