"""A callback that says how good the attributions of a model are, as soon as it is trained."""

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


class AttributionEvaluation(Callback):
    """Attributes when ``fit`` has ended, and logs the results to the Trainer's loggers.

    For each method it logs proponents and opponents as a table, and as images if it is told how to make some, under
    ``attributions/{method}``; and given outputs of retrained models, the linear datamodeling score under
    ``lds/{method}``. It is of use after a training too: call :meth:`evaluate`.

    Args:
        methods: by name, functions that make a :class:`~lightning_trak.methods.Method` of the trained module. They are
            called when training has ended, since snapshots do not exist before. A fit that is continued has other
            snapshots, whose features need a store of their own, such as ``f"run/features-{model.global_step}"``.
        train: the training data.
        targets: the targets.
        retrained: subsets, and the outputs at these targets of models retrained on them: what
            :func:`~lightning_trak.retraining.read_fleet` returns.
        **shown: ``k``, ``shown``, ``describe`` and ``image``, see
            :func:`~lightning_trak.reporting.loggers.log_attributions`.

    Attributes:
        scores: of each method, ``(num_targets, num_train)``, when it has run.
        lds: of each method, if there is ``retrained``.

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
        """Evaluate, unless the fit was a ``fast_dev_run``."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            with _between_runs(trainer):
                self.evaluate(trainer, pl_module)

    def evaluate(self, trainer: Trainer, module: LightningModule) -> None:
        """Attribute and log, at the Trainer's step.

        Args:
            trainer: whose loggers are written to, and which attributes.
            module: the trained module, for ``methods``.
        """
        train = single_loader(self.train, "fit", trainer).dataset
        targets = single_loader(self.targets, "predict", trainer).dataset
        for name, make_method in self.methods.items():
            scores = make_method(module).attribute(trainer, self.train, self.targets)
            self.scores[name], step = scores, trainer.global_step
            log_attributions(
                trainer.loggers, scores, train, targets, name=f"attributions/{name}", step=step, **self.shown
            )
            if self.retrained is not None:
                # Every process has all scores: there is nothing to gather.
                lds = LinearDatamodelingScore(self.retrained.masks, sync_on_compute=False)
                lds.update(scores.cpu(), self.retrained.outputs)
                self.lds[name] = lds
                log_lds(trainer.loggers, lds, f"lds/{name}", step)


@contextmanager
def _between_runs(trainer: Trainer) -> Iterator[None]:
    """The Trainer's run is over but for its last hooks: another one may take place, and leaves no trace."""
    state = trainer.state
    before = state.fn, state.status, state.stage
    try:
        yield
    finally:
        state.fn, state.status, state.stage = before
