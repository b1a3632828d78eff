"""A callback that attributes at the end of training, and logs how good the attributions are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_trak.methods.base import Method
from lightning_trak.metrics import LinearDatamodelingScore
from lightning_trak.reporting.loggers.records import log_attributions, log_lds
from lightning_trak.retraining import Retrained
from lightning_trak.running.data import Data, single_loader
from lightning_trak.texts.display import Displayed


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
        trainer = L.Trainer(logger=TensorBoardLogger("run"), callbacks=[TRAKCallback("run/snapshots"), evaluation])
        trainer.fit(model, train_loader)
    """

    _shown = ("methods",)

    def __init__(
        self,
        methods: Mapping[str, Callable[[LightningModule], Method]],
        train: Data,
        targets: Data,
        retrained: Retrained | None = None,
        **shown: Any,
    ) -> None:
        self.methods = methods
        self.train = train
        self.targets = targets
        self.retrained = retrained
        self.shown = shown
        self.scores: dict[str, Tensor] = {}
        self.lds: dict[str, LinearDatamodelingScore] = {}

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
            ValueError: if ``retrained`` has a subset whose model is a checkpoint of a method.
        """
        train = single_loader(self.train, "fit", trainer).dataset
        targets = single_loader(self.targets, "predict", trainer).dataset
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

    def _metric(self, method: Method) -> LinearDatamodelingScore | None:
        if self.retrained is None:
            return None
        # Every process has all scores, so there is nothing to gather.
        return LinearDatamodelingScore(self.retrained.masks, used_masks=method.used_masks, sync_on_compute=False)


@contextmanager
def _between_runs(trainer: Trainer) -> Iterator[None]:
    """Allow other runs during the last hooks of this run, and restore the Trainer's state afterwards."""
    state = trainer.state
    before = state.fn, state.status, state.stage
    try:
        yield
    finally:
        state.fn, state.status, state.stage = before
