"""Is a recorded run smooth enough to be differentiated?

A metagradient describes small changes of the weights of examples. It predicts the removal of 1% of the examples only if
training answers to changes of that size about in proportion.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW
from tqdm import tqdm

from lightning_trak.checks import integer, positive
from lightning_trak.compatibility import original_module
from lightning_trak.outputs import ModelOutput
from lightning_trak.outputs.mixin import fixed_output, require_alone
from lightning_trak.replay.losses import training_losses
from lightning_trak.replay.optimizers.base import optimizer_name
from lightning_trak.replay.optimizers.smooth import SmoothAdamW
from lightning_trak.replay.player import Player
from lightning_trak.replay.recording.reading import Recording
from lightning_trak.replay.recording.states import TrainingState
from lightning_trak.replay.reweighted import Reweighted
from lightning_trak.running.data.sources import Data, datamodule_of, single_loader
from lightning_trak.running.random_states import isolated_random_states
from lightning_trak.running.strategies import require_whole_parameters
from lightning_trak.running.trainers import trainer_of

# On handwritten digits, the value was within 0.1 of the LDS at 1% removed, for learning rates from 0.01 to 0.1.
SMOOTH_VALUE = 0.8
SMOOTH_CEILING = 0.9

# The change 0.1 v of all weights, for normal v, has the size of removing 1% of the examples: 0.1 sqrt(n).
STEP = 0.1
REMOVED = 0.01


@dataclass(frozen=True)
class Smoothness:
    """How smooth a recorded run is.

    Attributes:
        value: empirical metasmoothness, from -1 to 1; 1 if training answers to changes of the weights of examples in
            proportion. NaN if a training with other weights diverged.
        ceiling: the highest LDS at 1% removed that scores could have against this run's own retrainings, from 0 to 1.
            NaN if one of them diverged.
        moved: how far outputs move when 1% of the examples are removed, root mean square, in the unit of the output.
        rounding: the same when only the last bit of the first weights changes.
        smooth: whether metagradients of the run can be expected to predict removals.
        verdict: what the numbers mean, and what to change.
    """

    value: float
    ceiling: float
    moved: float
    rounding: float
    smooth: bool
    verdict: str


def metasmoothness(
    model: nn.Module,
    recording: str | os.PathLike[str],
    trainer: L.Trainer | None,
    train: Data,
    targets: Data,
    *,
    output: ModelOutput | None = None,
    losses: Callable[[nn.Module, Any], Tensor] | None = None,
    repeats: int = 2,
    seed: int = 0,
    progress_bar: bool = True,
) -> Smoothness:
    """Train a recorded run again with other weights of its examples, and say whether it is smooth.

    **The value** is Definition 2 of Engstrom et al. 2025 (arXiv 2503.13751). Three trainings, with weights 1, 1 + h v
    and 1 + 2 h v for a normal direction v, end at the parameters a, b and c. The value is
    ``sum_j d_j sign(b_j - a_j) sign(c_j - b_j) / sum_j d_j`` with ``d_j = |c_j - a_j|``.
    Here h = 0.1, since h v is then as long as the removal of 1% of the examples.

    **The ceiling** compares how far outputs move, over targets and trainings, when 1% of the examples are removed (m)
    and when each first weight moves to a neighbouring floating-point number (r). Rounding moves the recorded run too,
    so r^2 is twice the variance of the noise, and m^2 is that of the signal plus r^2. Scores that know the signal
    exactly have the correlation sqrt((m^2 - r^2) / (m^2 - r^2 / 2)) with the truth.

    It takes 4 ``repeats`` + 3 trainings.

    Args:
        model: the LightningModule that was trained, or one of the same class and options. Its weights do not matter.
        recording: the directory of a :class:`~lightning_trak.TrainingRecorder`.
        trainer: any Trainer. Its device is used, and it is left as it was. None: a GPU if there is one.
        train: the training data, as they were recorded.
        targets: the targets, for the ceiling. A few are enough.
        output: the scalar output; default: the model's ``configure_model_output()``.
        losses: as for :class:`~lightning_trak.methods.Metagradient`.
        repeats: how many directions, removals and changes of rounding are averaged over.
        seed: of the directions, removals and changes of rounding.
        progress_bar: whether to show a progress bar.

    Returns:
        The numbers and the verdict.

    Raises:
        FileNotFoundError: if there is no recording.
        TypeError: if the model declares no output.
        ValueError: if the recording is not finished or was altered, if data or model are not those of the recording, if
            the losses are not those of training, or if an output is not finite.

    Example::

        found = metasmoothness(
            model, "run/recording", trainer, train_loader, targets
        )
        print(found.verdict)
    """
    repeats = positive("repeats", repeats)
    trainer = trainer_of(trainer)
    require_whole_parameters(trainer)
    own = original_module(model)
    output = copy.deepcopy(fixed_output(own, output))
    require_alone(output)
    recorded = Recording(recording)
    recorded.require_finished()
    with isolated_random_states(), torch.inference_mode(False):
        train_loader, target_loader = single_loader(train, "fit", trainer), single_loader(targets, "predict", trainer)
        train_module, target_module = (datamodule_of(data) for data in (train, targets))
        device = trainer.strategy.root_device
        player = Player(own, recorded, train_loader, train_module, device)
        run = Reweighted(player, training_losses(player, output, losses))
        run.skipped()
        base = run.player.state
        before = run.outputs(output, target_loader, target_module)
        generator = torch.Generator().manual_seed(integer("seed", seed))
        values, moved, rounded = [], [], []

        def movement(weights: Tensor, start: TrainingState | None = None) -> Tensor:
            if not _finite(run.train(weights, start)):
                return torch.tensor(torch.nan)
            return (run.outputs(output, target_loader, target_module) - before).square().mean()

        for _ in tqdm(range(repeats), "Smoothness", disable=not progress_bar):
            values.append(_value(run, base, generator))
            weights = torch.ones(run.num_train)
            weights[torch.randperm(run.num_train, generator=generator)[: max(1, round(REMOVED * run.num_train))]] = 0.0
            moved.append(movement(weights))
            rounded.append(movement(torch.ones(run.num_train), _neighbour(run.start, run.player.dtype, generator)))
    value = sum(values) / repeats
    signal, noise = (float(torch.stack(squares).mean()) for squares in (moved, rounded))
    ceiling = rounding_ceiling(signal, noise)
    smooth = value >= SMOOTH_VALUE and ceiling >= SMOOTH_CEILING
    words = f"metasmoothness {value:.2f} (smooth from {SMOOTH_VALUE}), noise ceiling {ceiling:.2f} ({SMOOTH_CEILING})."
    if smooth:
        verdict = f"This run is smooth: {words} Its metagradients can be expected to predict removals."
    elif signal == 0:
        verdict = (
            "No output moves when examples are removed, so there is nothing to attribute: did the run train the"
            " parameters that the output depends on, with learning rates above 0?"
        )
    else:
        verdict = f"This run is not smooth: {words} {advice(recorded)}"
    return Smoothness(value, ceiling, signal**0.5, noise**0.5, smooth, verdict)


def quick_value(run: Reweighted, seed: int = 0) -> float:
    """The value of :func:`metasmoothness` along one direction, which takes three trainings.

    Args:
        run: the run. Only the steps whose examples it weights are judged.
        seed: of the direction.
    """
    run.skipped()
    return _value(run, run.player.state, torch.Generator().manual_seed(integer("seed", seed)))


def agreement(base: TrainingState, once: TrainingState, twice: TrainingState) -> float:
    """Agreement of the signs of two steps that parameters make, weighted by how far they move in both together.

    Args:
        base: the state at weights 1.
        once: the state at weights 1 + h v.
        twice: the state at weights 1 + 2 h v.

    Returns:
        From -1 to 1; 1 if no parameter moves, NaN if one is not finite.
    """
    if not all(map(_finite, (base, once, twice))):
        return float("nan")
    agreeing = total = 0.0
    for name, start in base.parameters.items():
        first, last = once.parameters[name].double(), twice.parameters[name].double()
        moved = (last - start.double()).abs()
        agreeing += float((moved * (first - start.double()).sign() * (last - first).sign()).sum())
        total += float(moved.sum())
    return agreeing / total if total else 1.0


def rounding_ceiling(moved: float, rounding: float) -> float:
    """The highest correlation that scores can have with outputs of retrained models.

    Args:
        moved: mean square movement of outputs when examples are removed.
        rounding: mean square movement when nothing but rounding changes.

    Returns:
        From 0 to 1; 0 if removal moves outputs no more than rounding does.
    """
    if moved <= rounding:
        return 0.0
    return float(((moved - rounding) / (moved - rounding / 2)) ** 0.5)


def advice(recording: Recording) -> str:
    """What makes a run like the recorded one smoother."""
    records = [recording.record(step) for step in range(recording.num_steps)]
    rates = [max(float(group["lr"]) for group in record.settings.groups) for record in records]
    size = max(sum(len(micro.positions) for micro in record.micro_batches) for record in records)
    changes = [f"a smaller learning rate (it was {max(rates):g}; SmoothTwin trains with a fraction of it)"]
    if rates[0] > max(rates) / 2:
        changes.append("warm-up (the first step had more than half of the largest rate)")
    kind = recording.run["optimizer"]
    if kind in map(optimizer_name, (Adam, AdamW)):
        changes.append("SmoothAdamW with eps_root more than 0 in place of Adam")
    elif kind == optimizer_name(SmoothAdamW):
        changes.append(f"a larger eps_root (it was {records[0].settings.groups[0]['eps_root']:g})")
    changes.append(f"larger batches (a step had {size} examples)")
    return f"Small changes are amplified, and metagradients may predict little. Train with {'; '.join(changes)}."


def _value(run: Reweighted, base: TrainingState, generator: torch.Generator) -> float:
    direction = torch.randn(run.num_train, generator=generator)
    once, twice = (run.train(1 + factor * STEP * direction) for factor in (1, 2))
    return agreement(base, once, twice)


def _neighbour(state: TrainingState, dtype: torch.dtype, generator: torch.Generator) -> TrainingState:
    """The state with each parameter of a dtype moved to the next floating-point number above or below."""
    parameters = dict(state.parameters)
    for name, value in state.parameters.items():
        if value.dtype != dtype:
            continue  # a frozen part of fewer bits, where a neighbour is far away
        up = torch.rand(value.shape, generator=generator) < 0.5
        ends = (torch.full_like(value, end) for end in (torch.inf, -torch.inf))
        above, below = (torch.nextafter(value, end) for end in ends)
        parameters[name] = torch.where(up, above, below)
    return TrainingState(parameters, state.buffers, state.moments)


def _finite(state: TrainingState) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in state.parameters.values())
