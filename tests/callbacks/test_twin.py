"""SmoothTwin: every learning rate is a factor times that of the original, whatever decides it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler

from lightning_trak import TrainingRecorder, TRAKCallback
from lightning_trak.callbacks import SmoothTwin
from lightning_trak.checkpoints.series import SnapshotSeries
from lightning_trak.replay import Recording, replay
from tests.callback_nets import TwoOptimizers, loader, make_trainer
from tests.replay.runs import Net, make_data, shuffled

FACTOR, STEPS = 0.3, 9


class Rates(Callback):
    """The learning rates of each step, as the optimizers use them."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Optimizer) -> None:
        self.seen.append([float(group["lr"]) for group in optimizer.param_groups])


class Own:
    """A scheduler that is not torch's. It sets rates, whatever they were."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.count = optimizer, 0

    def step(self, epoch: int | None = None) -> None:
        self.count += 1
        for number, group in enumerate(self.optimizer.param_groups):
            group["lr"] = (number + 1) / (self.count + 1)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def several(module: Net, kind: Any = SGD) -> Optimizer:
    first, *others = module.parameters()
    return kind([{"params": [first], "lr": 0.5}, {"params": others}], lr=0.1)


def scheduled(make: Callable[[Any], Any], **config: Any) -> Callable[[Net], Any]:
    def configure(module: Net) -> Any:
        optimizer = several(module)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), "interval": "step"} | config}

    return configure


def warm(optimizer: Optimizer) -> lr_scheduler.SequentialLR:
    phases = [lr_scheduler.LinearLR(optimizer, 0.1, 1, 3), lr_scheduler.CosineAnnealingLR(optimizer, 6, 0.01)]
    return lr_scheduler.SequentialLR(optimizer, phases, [3])


def chained(optimizer: Optimizer) -> lr_scheduler.ChainedScheduler:
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(optimizer, 0.9), lr_scheduler.ConstantLR(optimizer, 0.5, 4)]
    )


class Scheduled(Net):
    """Steps any scheduler, and its metric never improves."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.log("metric", 1.0)
        return super().training_step(batch, batch_idx)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step(*([] if metric is None else [metric]))


OPTIMIZERS: dict[str, Callable[[Net], Any]] = {
    "SGD": several,
    "AdamW": lambda module: several(module, AdamW),
    "tensor": lambda module: AdamW(module.parameters(), lr=torch.tensor(0.1), foreach=False),
    "StepLR": lambda module: (lambda own: ([own], [lr_scheduler.StepLR(own, 1)]))(several(module)),
    "LambdaLR": scheduled(lambda own: lr_scheduler.LambdaLR(own, lambda step: min(1, step / 4))),
    "OneCycleLR": scheduled(lambda own: lr_scheduler.OneCycleLR(own, [0.7, 0.3], STEPS, cycle_momentum=False)),
    "CyclicLR": scheduled(lambda own: lr_scheduler.CyclicLR(own, 0.01, 0.2, 2, cycle_momentum=False)),
    "restarts": scheduled(lambda own: lr_scheduler.CosineAnnealingWarmRestarts(own, 4, eta_min=0.02)),
    "warm-up": scheduled(warm),
    "chained": scheduled(chained),
    "plateau": scheduled(
        lambda own: lr_scheduler.ReduceLROnPlateau(own, factor=0.5, patience=0, min_lr=0.2),
        monitor="metric",
        interval="epoch",
    ),
    "own": scheduled(Own),
}


def rates_of(configure: Callable[[Net], Any], *callbacks: Callback, **options: Any) -> list[list[float]]:
    rates = Rates()
    trainer = make_trainer(*callbacks, rates, **options)
    torch.manual_seed(0)
    trainer.fit(Scheduled(optimizer=configure), shuffled(make_data()))
    return rates.seen


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rates_are_those_of_the_original_times_the_factor(name: str) -> None:
    original, twin = (rates_of(OPTIMIZERS[name], *callbacks) for callbacks in ((), (SmoothTwin(FACTOR),)))
    assert len(original) == STEPS
    torch.testing.assert_close(torch.tensor(twin), FACTOR * torch.tensor(original), rtol=1e-6, atol=0)
    if name in list(OPTIMIZERS)[3:]:
        assert len({rate for rates in original for rate in rates}) > 2  # the schedule does something


def test_factor_one_trains_the_original() -> None:
    modules = [Net(optimizer=OPTIMIZERS["warm-up"]) for _ in range(2)]
    for module, callbacks in zip(modules, ([], [SmoothTwin(1)]), strict=True):
        torch.manual_seed(1)
        make_trainer(*callbacks).fit(module, shuffled(make_data()))
    assert all(map(torch.equal, modules[0].parameters(), modules[1].parameters()))


@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_training_is_that_of_a_module_with_smaller_rates(kind: Any) -> None:
    modules = [Net(optimizer=lambda own, rate=rate: kind(own.parameters(), lr=rate)) for rate in (0.1, 0.05)]
    for module, callbacks in zip(modules, ([SmoothTwin(0.5)], []), strict=True):
        torch.manual_seed(1)
        make_trainer(*callbacks).fit(module, shuffled(make_data()))
    assert all(map(torch.equal, modules[0].parameters(), modules[1].parameters()))


def test_several_optimizers_that_the_module_steps_itself() -> None:
    class Manual(TwoOptimizers):
        def configure_optimizers(self) -> Any:
            optimizers = [SGD(self.encode.parameters(), lr=0.1), AdamW(self.head.parameters(), lr=0.2)]
            return optimizers, [lr_scheduler.ExponentialLR(optimizers[1], 0.5)]

        def on_train_epoch_end(self) -> None:
            self.lr_schedulers().step()

    trainer = make_trainer(SmoothTwin(FACTOR), max_epochs=2)
    trainer.fit(Manual(), loader())
    rates = [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers]
    assert rates == pytest.approx([0.1 * FACTOR, 0.2 * FACTOR / 4])


def test_recorders_see_the_rates_of_the_twin(tmp_path: Path) -> None:
    configure = OPTIMIZERS["warm-up"]
    original = rates_of(configure)
    callbacks = SmoothTwin(FACTOR), TrainingRecorder(tmp_path / "recording"), TRAKCallback(tmp_path / "snapshots")
    module, data = Net(optimizer=configure), make_data()
    trainer = make_trainer(*callbacks)
    trainer.fit(module, shuffled(data))
    recording = Recording(tmp_path / "recording")
    rates = [[group["lr"] for group in recording.record(step).settings.groups] for step in range(STEPS)]
    torch.testing.assert_close(torch.tensor(rates), FACTOR * torch.tensor(original), rtol=1e-6, atol=0)
    assert replay(module, tmp_path / "recording", trainer, data, progress_bar=False).identical
    snapshot = SnapshotSeries(tmp_path / "snapshots").read().snapshots[-1]
    assert [group.lr for group in snapshot.parameter_groups] == rates[-1]


@pytest.mark.parametrize("name", ["SGD", "OneCycleLR", "plateau", "own"])
def test_a_twin_continues(name: str, tmp_path: Path) -> None:
    seen, paths = [], []
    for number, callbacks in enumerate([(), (SmoothTwin(FACTOR),)]):
        keep, rates = ModelCheckpoint(tmp_path / str(number), save_last=True), Rates()
        rates_of(OPTIMIZERS[name], *callbacks, keep, max_epochs=1, enable_checkpointing=True)
        paths.append(keep.last_model_path)
        trainer = make_trainer(*callbacks, rates)
        trainer.fit(Scheduled(optimizer=OPTIMIZERS[name]), shuffled(make_data()), ckpt_path=paths[-1])
        seen.append(rates.seen)
    assert len(seen[0]) == STEPS - 3
    torch.testing.assert_close(torch.tensor(seen[1]), FACTOR * torch.tensor(seen[0]), rtol=1e-6, atol=0)
    for path, before, factor in ((paths[1], 0.3, 0.5), (paths[1], 0.3, 1), (paths[0], 1, 0.3)):
        with pytest.raises(ValueError, match=f"multiplied by {before}, and SmoothTwin would continue it with {factor}"):
            make_trainer(SmoothTwin(factor)).fit(Net(), shuffled(make_data()), ckpt_path=path)


class WarmsUp(Net):
    """Sets a rate by hand."""

    def on_train_batch_end(self, *args: Any) -> None:
        if self.global_step == 2:
            self.trainer.optimizers[0].param_groups[1]["lr"] = 0.1


class Unfreezes(Callback):
    def on_train_epoch_start(self, trainer: L.Trainer, module: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.optimizers[0].add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.1})


def test_rates_of_others_are_refused() -> None:
    cases: list[tuple[L.LightningModule, list[Callback]]] = [
        (WarmsUp(optimizer=several), []),
        (Net(optimizer=several), [Unfreezes()]),
        (Net(optimizer=several), [StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1)]),
    ]
    for module, callbacks in cases:
        with pytest.raises(ValueError, match=r"SGD has the learning rates .* but SmoothTwin had set"):
            make_trainer(SmoothTwin(), *callbacks).fit(module, shuffled(make_data()))


class Unrated(SGD):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        del self.param_groups[0]["lr"]

    def step(self, closure: Any = None) -> Any:
        return closure()


@pytest.mark.parametrize(
    ("configure", "reason"),
    [
        (lambda own: Unrated(own.parameters()), "group 0 of Unrated has lr=None; SmoothTwin needs a number"),
        (lambda own: torch.optim.Rprop(own.parameters()), "the steps of Rprop are not proportional to its learning"),
        (lambda own: torch.optim.LBFGS(own.parameters()), "the steps of LBFGS are not proportional"),
        (lambda own: SGD(own.parameters(), lr=float("nan")), "lr=nan; SmoothTwin needs a number"),
    ],
)
def test_what_cannot_be_scaled_is_refused_before_training(configure: Any, reason: str) -> None:
    module = Scheduled(optimizer=configure)
    before = [parameter.clone() for parameter in module.parameters()]
    with pytest.raises(ValueError, match=reason):
        make_trainer(SmoothTwin()).fit(module, shuffled(make_data()))
    assert all(map(torch.equal, before, module.parameters()))


def test_rates_are_not_multiplied_twice() -> None:
    with pytest.raises(ValueError, match="SGD were multiplied before; list one SmoothTwin"):
        make_trainer(SmoothTwin(0.5), Named(0.5)).fit(Net(optimizer=several), shuffled(make_data()))
    module = Net()
    optimizer = SGD(module.parameters(), lr=0.1)
    module.make_optimizer = lambda _: optimizer
    make_trainer(SmoothTwin()).fit(module, shuffled(make_data()))
    with pytest.raises(ValueError, match="let configure_optimizers make a new optimizer each time"):
        make_trainer(SmoothTwin()).fit(module, shuffled(make_data()))


class Named(SmoothTwin):
    @property
    def state_key(self) -> str:
        return "another"


@pytest.mark.parametrize("factor", [0, -0.1, 1.5, float("nan"), float("inf"), True, "0.1", None])
def test_factor_is_checked(factor: Any) -> None:
    with pytest.raises(ValueError, match="factor must be a number more than 0 and at most 1"):
        SmoothTwin(factor)
