"""What TrainingRecorder refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    IterableDataset,
)

from lightning_trak import TrainingRecorder
from lightning_trak.replay import Recording
from tests.replay.runs import Net, make_data, shuffled, train

DATA = make_data()


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class OwnClipping(Net):
    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        super().configure_gradient_clipping(*args, **kwargs)


class Half(Net):
    def __init__(self) -> None:
        super().__init__(lambda: nn.Linear(4, 3).bfloat16())


class Hooked(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].weight.register_hook(lambda gradient: 2 * gradient)


class Stream(IterableDataset[Any]):
    def __iter__(self):
        return iter(DATA)


class Augmented(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        inputs, *rest = DATA[index]
        return (inputs + torch.randn(4), *rest)


class AugmentsOnTheDevice(Net):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + torch.randn_like(batch[0]), *batch[1:]] if self.training else batch


class TransfersByTheTrainer(Net):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [2 * batch[0], *batch[1:]] if self.trainer.training else batch


class ReadsTheTrainer(Net):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (2 if self.trainer.training else 1)


def tensor_rate(module: Net) -> Any:
    return torch.optim.SGD(module.parameters(), lr=torch.tensor(0.1))


def foreign(module: Net) -> Any:
    return torch.optim.SGD([*module.parameters(), nn.Parameter(torch.zeros(1))], lr=0.1)


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (Manual, {}, "uses manual optimization"),
        (OwnClipping, {}, "overrides configure_gradient_clipping"),
        (AugmentsOnTheDevice, {}, "on_after_batch_transfer draws random numbers.*augment in training_step"),
        (TransfersByTheTrainer, {}, r"repeated alone: the module uses self\.trainer\.training"),
        (ReadsTheTrainer, {}, r"repeated alone: the module uses self\.trainer\.training.*store what else it needs"),
        (Half, {"precision": "32-true"}, "got torch.bfloat16"),
        (Hooked, {}, "net.0.weight.* has a gradient hook"),
        (lambda: Net(lambda: nn.LazyLinear(3)), {}, "net.weight.* of a lazy layer has no shape yet"),
        (Net, {"precision": "bf16-mixed"}, "precision 'bf16-mixed' rounds"),
        (Net, {"precision": "bf16-true"}, "precision 'bf16-true' rounds"),
        (Net, {"overfit_batches": 2}, "made a new loader"),
        (lambda: Net(optimizer=lambda module: torch.optim.Rprop(module.parameters())), {}, "Rprop is not known.*AdamW"),
        (lambda: Net(optimizer=tensor_rate), {}, "lr=tensor.*needs plain numbers"),
        (lambda: Net(optimizer=foreign), {}, "trains 1 tensors that are not parameters"),
        (
            Net,
            {"loader": lambda data: DataLoader(Augmented(), batch_size=4)},
            "not the same when they are loaded again",
        ),
        (Net, {"loader": lambda data: DataLoader(data, batch_size=None)}, "makes no batches"),
        (Net, {"loader": lambda data: DataLoader(Stream(), batch_size=4)}, "cannot attribute to a Stream"),
        (Net, {"loader": lambda data: [shuffled(data), shuffled(data)]}, "needs one DataLoader for training"),
    ],
)
def test_runs_that_are_refused_before_training(module: Any, options: Any, message: str, tmp_path: Path) -> None:
    class NoStep(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            raise AssertionError

    with pytest.raises((ValueError, TypeError), match=message):
        train(module(), DATA, tmp_path / "run", callbacks=[NoStep()], **options)
    train(Net(), DATA, tmp_path / "run")  # the directory is free


def test_a_step_that_hooks_prepare_is_recorded(tmp_path: Path) -> None:
    class Prepared(Net):
        def on_train_epoch_start(self) -> None:
            self.factor = 2.0

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * self.factor

    train(Prepared(), DATA, tmp_path)
    assert Recording(tmp_path).num_steps == 6


def test_several_processes_are_refused(tmp_path: Path) -> None:
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp_spawn", logger=False)
    with pytest.raises(ValueError, match="averaged over processes are not repeated"):
        TrainingRecorder(tmp_path).setup(trainer, Net(), "fit")


@pytest.mark.parametrize("spacing", ["cube", 0, -1, 1.5, True])
def test_spacings_that_do_not_exist(spacing: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="spacing"):
        TrainingRecorder(tmp_path, spacing)


def test_two_recorders_in_a_trainer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="several TrainingRecorders"):
        train(Net(), DATA, tmp_path / "one", callbacks=[TrainingRecorder(tmp_path / "two")])


def test_another_run_in_the_directory(tmp_path: Path) -> None:
    train(Net(), DATA, tmp_path)
    with pytest.raises(ValueError, match="holds the recording of another run, of 6 steps"):
        train(Net(), DATA, tmp_path)
    assert Recording(tmp_path).num_steps == 6
