"""Metagradients: what each example did in one training run."""

import copy
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import lightning as L
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_trak.checks import positive, require_one_of
from lightning_trak.compatibility import original_module
from lightning_trak.methods.base import DataMethod
from lightning_trak.methods.examples import Examples
from lightning_trak.methods.questions import Asked
from lightning_trak.methods.showing import RAISES_OUTPUT
from lightning_trak.outputs import ModelOutput
from lightning_trak.outputs.mixin import declared_output, require_alone, target_output, trained_output
from lightning_trak.replay.coupling import warn_of_coupling
from lightning_trak.replay.losses import Losses, training_losses
from lightning_trak.replay.player import Player
from lightning_trak.replay.recording.reading import Recording
from lightning_trak.replay.reverse.run import Differentiated
from lightning_trak.replay.reweighted import Reweighted
from lightning_trak.replay.smoothness import SMOOTH_VALUE, advice, quick_value
from lightning_trak.running.data.annotated import annotated
from lightning_trak.running.data.content import fingerprint
from lightning_trak.running.data.sources import Data
from lightning_trak.running.random_states import isolated_random_states
from lightning_trak.running.ranks import Ranks
from lightning_trak.running.strategies import require_whole_parameters
from lightning_trak.running.trainers import trainer_of

Order = Literal["recorded", "average"]


class Metagradient(DataMethod):
    """How much did each example's loss count in *this* training run, exactly to first order?

    A score is d output / d w_i, the derivative of the trained model's output by the weight w_i of example i in the
    training loss, at w = 1. A positive score says that more weight raises the output. The unit is that of the output:
    removing examples S from the same run (same seed, order and batches, with the batch's size as denominator) changes
    it by about minus the sum of their scores. An example that several epochs use has the sum over its steps.

    The derivative goes back through all optimizer steps of the recording (MAGIC, Ilyas and Engstrom 2025,
    arXiv 2504.16430), which are computed again. It is that of one run: another seed is another run. It predicts
    removals only if training is smooth; a large learning rate, Adam without ``eps_root`` (see
    :class:`~lightning_trak.replay.SmoothAdamW`) or half precision make it large and useless. The mean of several runs
    says more of yet other runs.

    If the loss of an example depends on the rest of its batch, as with in-batch negatives, w_i multiplies the example's
    own loss, and its part in the losses of others is left out. A warning says so.

    Each step is checked against the recorded run: the loss that ``training_step`` returned must be the mean of the
    examples' losses, and the optimizer's step must be the one that is differentiated.

    Args:
        model: the LightningModule that was trained, or one of the same class and options. Its weights do not matter.
        recording: the directory of a :class:`~lightning_trak.TrainingRecorder`, or a sequence of them: scores are then
            the mean over these runs of the same model on the same data.
        output: the scalar output to attribute; default: the model's ``configure_model_output()``.
        losses: ``(module, batch) -> losses`` of shape ``(batch,)``, whose mean ``training_step`` returns; default: the
            loss of the output. The weight of an example multiplies all of its loss, also a penalty of the parameters
            that is added to it; the weight decay of an optimizer is not weighted.
        order: ``"recorded"``: what an example did in the steps whose batches held it. ``"average"``: what it would do
            if its weight were spread over all steps. This says more of runs with other seeds, and less of this one. It
            takes one more pass over the training data for each epoch, and is exact up to the change of the weights
            within an epoch; see :mod:`lightning_trak.replay.reverse.average_order`.
        first_steps: differentiate only this many steps of a run, the first ones, as if training had ended there;
            default: all. For models that are trained on half of the data for as many epochs, take half of the steps:
            these models take no more (docs/one_run.md has the evidence).
        last_steps: differentiate only this many of these steps, the last ones; default: all.
        block_size: how many targets go through the graph of a step at once; default: as many as fit in half a gigabyte.
        micro_batch_size: how many examples are differentiated at once; default: those of a batch of training. A smaller
            number takes less memory. Scores are the same up to rounding.
        check_smooth: whether to measure first, by three trainings, whether the run is smooth, and to warn if it is not;
            see :func:`~lightning_trak.replay.metasmoothness`.
        progress_bar: whether to show a progress bar.

    Raises:
        FileNotFoundError: if there is no recording.
        TypeError: if the model declares no output.
        ValueError: if the recording is not finished or was altered, or an argument is out of range.

    Example::

        recorder = TrainingRecorder("run/recording")
        trainer = L.Trainer(max_epochs=15, callbacks=[recorder])
        trainer.fit(model, train_loader)
        method = Metagradient(model, "run/recording")
        scores = method.attribute(trainer, train_loader, targets)
    """

    _shown = ("model", "recordings", "output", "order", "first_steps", "last_steps")
    _without_candidates = (
        "it differentiates by the weights of examples in the recorded run, and others have none. TRAK, TracIn,"
        " GradientDot, GradientCosine and influence functions score examples that are not in the training set"
    )

    def __init__(
        self,
        model: nn.Module,
        recording: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        output: ModelOutput | None = None,
        losses: Callable[[nn.Module, Any], Tensor] | None = None,
        order: Order = "recorded",
        first_steps: int | None = None,
        last_steps: int | None = None,
        block_size: int | None = None,
        micro_batch_size: int | None = None,
        check_smooth: bool = True,
        progress_bar: bool = True,
    ) -> None:
        self.model = original_module(model)
        self.output = (trained_output if losses is None else declared_output)(self.model, output)
        require_alone(self.output)
        if losses is None:
            self.output.loss(torch.zeros(1))  # refuses before long work if the output does not determine the loss
        if losses is not None and not callable(losses):
            raise TypeError(f"losses must be a function of a module and a batch, got {losses!r:.80}")
        self.losses = losses
        if not isinstance(recording, (str, os.PathLike, Sequence)):
            raise TypeError(f"expected the directory of a recording, or several, got a {type(recording).__name__}")
        directories = [recording] if isinstance(recording, (str, os.PathLike)) else list(recording)
        self.first_steps = None if first_steps is None else positive("first_steps", first_steps)
        self.recordings = [Recording(directory, self.first_steps) for directory in directories]
        if not self.recordings:
            raise ValueError("recording is empty; pass the directory of a TrainingRecorder, or several")
        if len({run.path.resolve() for run in self.recordings}) < len(self.recordings):
            raise ValueError(f"recording names a directory twice: {[str(run.path) for run in self.recordings]}")
        require_one_of("order", order, get_args(Order))
        self.order: Order = order
        self.last_steps = None if last_steps is None else positive("last_steps", last_steps)
        for run in self.recordings:
            run.require_finished()
            for name, steps, most in (
                ("first_steps", self.first_steps, run.recorded_steps),
                ("last_steps", self.last_steps, run.num_steps),
            ):
                if steps is not None and steps > most:
                    raise ValueError(
                        f'{name} is {steps}, but the run in "{run.path}" has {most} steps; take a smaller number, or'
                        " None for all"
                    )
        self.block_size = None if block_size is None else positive("block_size", block_size)
        self.micro_batch_size = None if micro_batch_size is None else positive("micro_batch_size", micro_batch_size)
        self.check_smooth = check_smooth
        self.progress_bar = progress_bar

    @property
    @override
    def meaning(self) -> str:
        return RAISES_OUTPUT

    def _target_output(self, output: ModelOutput | None) -> ModelOutput | None:
        return target_output(output, self.output)

    def _scores(self, trainer: L.Trainer, train: Examples, targets: Examples, asked: Asked) -> Tensor:
        """Derivatives by the weights of training examples.

        The outputs of a group of targets are added up before the way back through the run, which is then as long as for
        one target.

        Args:
            trainer: any Trainer whose strategy keeps the model whole; None: one on a single device. Its device is used,
                and each process computes all scores. All must call, because they compare their recordings first. The
                precision is that of the recorded run.
            train: the training data, as they were recorded: the same dataset and collate function.
            targets: the targets. Each is computed alone, in eval mode, at the weights at the end of training.
            asked: the question.

        Returns:
            In the run's precision. Examples that the run did not use have zeros.

        Raises:
            ValueError: if the data or the model are not those of the recording, if ranks have recordings of other
                runs, if a step cannot be repeated, if the losses are not those of training, or if an output is not
                finite.
        """
        require_whole_parameters(trainer)
        with isolated_random_states(), torch.inference_mode(False):
            fingerprint(targets.loader, "the targets")  # warns if they are not the same twice
            runs = self._runs(trainer, train)
            output, loader = asked.output or self.output, targets.loader
            if output.predicts_labels and len(runs) > 1:  # all explain the class with the highest mean probability
                found = [run.probabilities(copy.deepcopy(output), loader, targets.datamodule) for run in runs]
                loader = annotated(loader, torch.stack(found).double().mean(0).argmax(1).unsqueeze(1))
            sums = asked.rows, asked.columns
            parts = [run.scores(copy.deepcopy(output), loader, targets.datamodule, *sums) for run in runs]
            return torch.stack(parts).mean(0)

    @override
    def label_suspicion(self, trainer: L.Trainer | None = None, train: Data | None = None) -> Tensor:
        """The size of each example's score at itself; see :class:`~lightning_trak.methods.base.LabelStatistic`.

        Every training example is a target, so this takes as long as :meth:`attribute` with as many targets.
        """
        trainer = trainer_of(trainer)
        require_whole_parameters(trainer)
        with isolated_random_states(), torch.inference_mode(False):
            examples = Examples(train, "fit", trainer)
            runs = self._runs(trainer, examples)
            parts = [run.own_scores(copy.deepcopy(self.output), examples.loader, examples.datamodule) for run in runs]
            return torch.stack(parts).mean(0).abs()

    def _losses(self, player: Player) -> Losses:
        return training_losses(player, copy.deepcopy(self.output), self.losses)

    def _first(self, recording: Recording) -> int:
        return 0 if self.last_steps is None else recording.num_steps - self.last_steps

    def _runs(self, trainer: L.Trainer, train: Examples) -> list[Differentiated]:
        # All weights come from the recordings, so ranks with the same recordings have the same weights.
        Ranks.of(trainer).require_same(
            [recording.manifest["parts"] for recording in self.recordings],
            "the recording is of another run",
            "Each process reads the recording itself: give all of them the directory of the same run",
        )

        def player(recording: Recording) -> Player:
            return Player(self.model, recording, train.loader, train.datamodule, trainer.strategy.root_device)

        runs = [self._differentiated(player(recording)) for recording in self.recordings]
        if self.check_smooth:
            for recording in self.recordings:
                self._warn_if_not_smooth(player(recording))
        return runs

    def _differentiated(self, player: Player) -> Differentiated:
        losses, first = self._losses(player), self._first(player.recording)
        warn_of_coupling(player, losses, "scores say", 7, first)
        run = Differentiated(
            player,
            losses,
            first=first,
            block=self.block_size,
            micro_batch=self.micro_batch_size,
            progress_bar=self.progress_bar,
            average_order=self.order == "average",
        )
        if run.rounds_steps:
            warnings.warn(
                "the optimizer rounds its steps (torch's Muon orthogonalizes in bfloat16), so scores are those of the"
                " same steps without rounding",
                stacklevel=7,
            )
        return run

    def _warn_if_not_smooth(self, player: Player) -> None:
        recording = player.recording
        value = quick_value(Reweighted(player, self._losses(player), first=self._first(recording), check_losses=False))
        if not value >= SMOOTH_VALUE:
            warnings.warn(
                f'the run in "{recording.path}" is not smooth: metasmoothness {value:.2f}, smooth from {SMOOTH_VALUE}.'
                f" {advice(recording)} metasmoothness() says more, and check_smooth=False leaves this check out",
                stacklevel=6,
            )
