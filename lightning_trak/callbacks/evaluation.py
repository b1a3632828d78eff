"""A callback that attributes at the end of training, and logs how good the attributions are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import Unpack, override

from lightning_trak.checks import positive, require_factory, require_options
from lightning_trak.methods.base import Method
from lightning_trak.metrics import LinearDatamodelingScore
from lightning_trak.outputs import ModelOutput
from lightning_trak.outputs.base import better_when_higher
from lightning_trak.reporting.explanations import Describe, require_positions
from lightning_trak.reporting.loggers.records import log_attributions, log_lds, require_logging
from lightning_trak.retraining import Retrained
from lightning_trak.running.data.sources import Data, datamodule_of, single_loader
from lightning_trak.texts.display import Displayed


class Shown(TypedDict, total=False):
    """What :class:`AttributionEvaluation` passes on to :func:`~lightning_trak.reporting.loggers.log_attributions`."""

    k: int
    shown: Sequence[int] | None
    describe: Describe | None
    image: Callable[[Any], Tensor] | None


class AttributionEvaluation(Displayed, Callback):
    """Attributes at the end of ``fit``, and logs the results to the Trainer's loggers.

    For each method it logs proponents and opponents under ``attributions/{method}``: as a table, and as images if
    ``image`` is given. If ``retrained`` is given, it logs the linear datamodeling score under ``lds/{method}``. To
    evaluate a model that is already trained, call :meth:`evaluate`.

    Args:
        methods: by name, functions that get the trained module and make a :class:`~lightning_trak.methods.Method`.
            They are called at the end of training, because the snapshots do not exist before. If a fit is continued,
            its snapshots change. Their features need another store, such as
            ``f"run/features-{model.global_step}"``.
        train: the training data.
        targets: the targets.
        retrained: subsets, and the outputs at these targets of models that were trained on the subsets. It comes from
            :func:`~lightning_trak.retraining.read_fleet`, or from :func:`~lightning_trak.retraining.split_fleet` if
            members of the fleet are checkpoints of a method.
        **shown: ``k``, ``shown``, ``describe`` and ``image`` of
            :func:`~lightning_trak.reporting.loggers.log_attributions`.

    Raises:
        TypeError: if an argument has a wrong type or name, before training.
        ValueError: if ``k`` is not positive, or if ``retrained`` has fewer than 3 subsets, or equal ones. Before
            training, or after it with a data module: if ``retrained`` is of other data, or of one target alone.
        IndexError: then, too, if ``shown`` has a position that no target has.
        ModuleNotFoundError: before training, if a logger needs pictures and matplotlib is not installed.

    Attributes:
        scores: by name of the method, for those that have run: a Tensor ``(num_targets, num_train)``.
        lds: by name of the method, for those that have run, if ``retrained`` is given.

    Example::

        evaluation = AttributionEvaluation(
            {"TRAK": lambda model: TRAK(model, "run/snapshots", "run/features")},
            train_loader,
            targets,
            read_fleet("run/fleet"),
            image=lambda item: item[0],
        )
        callbacks = [TRAKCallback("run/snapshots"), evaluation]
        trainer = L.Trainer(logger=TensorBoardLogger("run"), callbacks=callbacks)
        trainer.fit(model, train_loader)
    """

    _shown = ("methods",)

    def __init__(
        self,
        methods: Mapping[str, Callable[[LightningModule], Method]],
        train: Data,
        targets: Data,
        retrained: Retrained | None = None,
        **shown: Unpack[Shown],
    ) -> None:
        _require_methods(methods)
        require_options(type(self), shown, Shown)
        positive("k", shown.get("k", 1))
        if retrained is not None and not isinstance(getattr(retrained, "masks", None), Tensor):
            raise TypeError(
                "retrained must be the result of read_fleet or split_fleet, with masks and outputs; got a"
                f" {type(retrained).__name__}"
            )
        if retrained is not None:
            LinearDatamodelingScore(retrained.masks)  # raises now, not after the training
        self.methods = methods
        self.train = train
        self.targets = targets
        self.retrained = retrained
        self.shown = shown
        self.scores: dict[str, Tensor] = {}
        self.lds: dict[str, LinearDatamodelingScore] = {}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse before the training what cannot be logged, and data that do not fit.

        A data module may not be ready yet.
        """
        self._require_logging(trainer)
        if datamodule_of(self.train) is None and datamodule_of(self.targets) is None:
            self._datasets(trainer)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate, except after a ``fast_dev_run``."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            with _between_runs(trainer):
                self.evaluate(trainer, pl_module)

    def evaluate(self, trainer: Trainer, module: LightningModule) -> None:
        """Attribute, and log the results at the Trainer's step.

        Args:
            trainer: runs the methods. Its loggers get the results.
            module: the trained module. The functions in ``methods`` get it.

        Raises:
            ValueError: if ``retrained`` has a subset whose model is a checkpoint of a method, or a method is about the
                loss where that is not better when the output is higher.
        """
        self._require_logging(trainer)
        train, targets = self._datasets(trainer)
        for name, make_method in self.methods.items():
            method = make_method(module)
            lds = self._metric(method)  # raises before the work
            scores = method.attribute(trainer, self.train, self.targets)
            self.scores[name], step = scores, trainer.global_step
            log_attributions(
                trainer.loggers, scores, train, targets, name=f"attributions/{name}", step=step, **self.shown
            )
            if self.retrained is not None and lds is not None:
                lds.update(scores.cpu(), self.retrained.outputs)
                self.lds[name] = lds
                log_lds(trainer.loggers, lds, f"lds/{name}", step)

    def _require_logging(self, trainer: Trainer) -> None:
        """Raise if results cannot be written to the Trainer's loggers."""
        require_logging(trainer.loggers, self.shown.get("image") is not None, self.retrained is not None)

    def _datasets(self, trainer: Trainer) -> tuple[Any, Any]:
        """The training set and the targets, which must be those of the ground truth."""
        train: Any = single_loader(self.train, "fit", trainer).dataset
        targets: Any = single_loader(self.targets, "predict", trainer).dataset
        shown = self.shown.get("shown")
        if shown is not None:
            require_positions(shown, len(targets))
        if self.retrained is not None:
            truth = len(self.retrained.outputs), self.retrained.masks.shape[-1]
            if truth != (len(targets), len(train)):
                raise ValueError(
                    f"retrained has the outputs at {truth[0]} targets of models of {truth[1]} training examples, but"
                    f" there are {len(targets)} targets and {len(train)} training examples; pass the data of the fleet"
                )
            if len(targets) < 2:
                raise ValueError(
                    "the interval of a linear datamodeling score needs at least 2 targets, got 1; give more targets, or"
                    " leave retrained out"
                )
        return train, targets

    def _metric(self, method: Method) -> LinearDatamodelingScore | None:
        if self.retrained is None:
            return None
        output = getattr(method, "output", None)
        about_loss = getattr(method, "effect_on", "output") == "loss"
        if about_loss and isinstance(output, ModelOutput) and not better_when_higher(output):
            raise ValueError(
                f"scores of {type(method).__name__} are about the loss, which can rise with {type(output).__name__},"
                ' and retrained has outputs: give the method effect_on="output"'
            )
        # Every process has all scores, so there is nothing to gather.
        return LinearDatamodelingScore(self.retrained.masks, used_masks=method.used_masks, sync_on_compute=False)


def _require_methods(methods: object) -> None:
    if not isinstance(methods, Mapping):
        raise TypeError(
            "methods must be a dict of functions that get the trained model and make a method, such as"
            f' {{"TRAK": lambda model: TRAK(model, ...)}}; got a {type(methods).__name__}'
        )
    for name, make_method in methods.items():
        require_factory(f"methods[{name!r}]", make_method)


@contextmanager
def _between_runs(trainer: Trainer) -> Iterator[None]:
    """Allow other runs during the last hooks of this run, and restore the Trainer's state afterwards."""
    state = trainer.state
    before = state.fn, state.status, state.stage
    try:
        yield
    finally:
        state.fn, state.status, state.stage = before
