"""Runs that are not repeated as they were: what notices them, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelPruning, StochasticWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from lightning_trak.replay import Recording, replay
from tests.methods.metagradients import attribute, sgd
from tests.replay.runs import Net, make_data, train

DATA = make_data()

# --- the first step -----------------------------------------------------------------------------------------------


class Clips(Net):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 0.3)


class Noisy(Net):
    """Draws from a random generator of its own."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if not hasattr(self, "generator"):
            self.generator = torch.Generator().manual_seed(0)
        noise = torch.randn(batch[0].shape, generator=self.generator, dtype=torch.float32)
        return super().training_step([batch[0] + noise, *batch[1:]], batch_idx)


class Regularizes(Callback):
    def on_after_backward(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for parameter in module.parameters():
            parameter.grad.add_(parameter.detach(), alpha=0.1)


def bounded(module: Net) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.2)
    optimizer.register_step_post_hook(
        lambda *_: [parameter.data.clamp_(-0.3, 0.3) for parameter in module.parameters()]
    )
    return optimizer


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (Clips, {}),
        (Noisy, {}),
        (Net, {"callbacks": [Regularizes()]}),
        (Net, {"callbacks": [Regularizes()], "precision": "32-true", "accumulate_grad_batches": 2}),
        (lambda: Clips(optimizer=sgd(lr=1e-5)), {"precision": "32-true"}),
        (lambda: Net(optimizer=bounded), {}),
    ],
)
def test_another_first_step_is_refused_at_once(make: Any, options: Any, tmp_path: Path) -> None:
    module = make()
    with pytest.raises(ValueError, match=r"a copy of the module takes another step 0: the .*gradient_clip_val"):
        train(module, DATA, tmp_path, **options)
    assert module.global_step == 1


def test_steps_that_are_left_out_are_refused(tmp_path: Path) -> None:
    class Skips(Net):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            if batch_idx == 1:
                optimizer_closure()
            else:
                optimizer.step(closure=optimizer_closure)

    with pytest.raises(ValueError, match=r"optimizer_step of Skips takes no step for some batches.* return None"):
        train(Skips(), DATA, tmp_path)


# --- between epochs -----------------------------------------------------------------------------------------------


class Resets(Net):
    """Changes a weight when some epochs have ended."""

    def __init__(self, *epochs: int) -> None:
        super().__init__()
        self.epochs = epochs

    def on_train_epoch_end(self) -> None:
        if self.current_epoch in self.epochs:
            nn.init.zeros_(self.net[2].bias)


def test_weights_that_change_between_epochs_are_noticed(tmp_path: Path) -> None:
    pruning = ModelPruning("l1_unstructured", amount=0.3)
    for name, make, callbacks in (("resets", lambda: Resets(0), []), ("prunes", Net, [pruning])):
        module = make()
        with pytest.raises(ValueError, match=r'"net.*" has changed between two steps.*prunes it'):
            train(module, DATA, tmp_path / name, callbacks=callbacks, precision="32-true")
        assert module.global_step == 3


@pytest.mark.parametrize("epochs", [2, 3])  # a full state is recorded after the last step of 9, and not of 6
def test_weights_that_change_after_the_last_epoch(epochs: int, tmp_path: Path) -> None:
    module = Resets(epochs - 1)
    with pytest.warns(UserWarning, match='"net.2.bias" were changed after the last recorded step'):
        trainer = train(module, DATA, tmp_path / "resets", max_epochs=epochs)
    plain = Net()
    train(plain, DATA, tmp_path / "plain", max_epochs=epochs)
    expected = attribute(plain, tmp_path / "plain", trainer)
    torch.testing.assert_close(attribute(module, tmp_path / "resets", trainer), expected, rtol=1e-12, atol=1e-14)


def test_an_epoch_for_the_statistics_of_averaged_weights_is_refused(tmp_path: Path) -> None:
    module = Net(lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)))
    with pytest.raises(ValueError, match="StochasticWeightAveraging ends with an epoch"):
        train(module, DATA, tmp_path, callbacks=[StochasticWeightAveraging(0.1, swa_epoch_start=1)])
    assert module.global_step == 0


def test_other_data_in_a_later_epoch_are_refused(tmp_path: Path) -> None:
    class Grows(Net):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(Subset(DATA, range(4 * (1 + self.current_epoch))), batch_size=4)

    module = Grows()
    with pytest.raises(ValueError, match="from epoch 1 on, the loader has other data"):
        train(
            module,
            DATA,
            tmp_path,
            loader=lambda data: None,
            reload_dataloaders_every_n_epochs=1,
        )
    assert module.global_step == 1


# --- later steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "lr"), [("32-true", 1e-5), ("64-true", 1e-8)])
def test_small_steps_that_a_hook_changes_are_noticed(precision: Any, lr: float, tmp_path: Path) -> None:
    """The weights hardly move, so they are close to the recorded ones in any case."""

    class Halved(Net):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if self.global_step > 2:
                for parameter in self.parameters():
                    parameter.grad.mul_(0.5)

    for name, kind in (("plain", Net), ("halved", Halved)):
        module = kind(optimizer=sgd(lr=lr))
        trainer = train(module, DATA, tmp_path / name, precision=precision)
        if kind is Net:
            attribute(module, tmp_path / name, trainer)
    with pytest.raises(ValueError, match=r"before step 6, the weights should have moved by .* and are off by"):
        attribute(module, tmp_path / "halved", trainer)


# --- tensors that training makes ----------------------------------------------------------------------------------


class Grown(nn.Linear):
    """Has a table that grows with the batch."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.register_buffer("table", torch.ones(1))

    def forward(self, inputs: Tensor) -> Tensor:
        if len(self.table) < len(inputs):
            self.table = torch.linspace(1, 2, len(inputs)).to(inputs)
        return super().forward(inputs) * self.table[: len(inputs), None]


class Lazy(nn.Linear):
    """Makes a buffer when it is first called."""

    def __init__(self) -> None:
        super().__init__(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        if not hasattr(self, "scale"):
            self.register_buffer("scale", torch.full((3,), 0.5).to(inputs))
        return super().forward(inputs) * self.scale


def test_a_buffer_that_grows(tmp_path: Path) -> None:
    module = Net(Grown)
    trainer = train(module, DATA, tmp_path)
    assert Recording(tmp_path).state(0).buffers["net.table"].shape == (1,)
    for model in (module, Net(Grown)):
        assert replay(model, tmp_path, trainer, DATA, progress_bar=False).identical


def test_a_buffer_that_is_made_by_training(tmp_path: Path) -> None:
    module = Net(Lazy)
    trainer = train(module, DATA, tmp_path)
    assert attribute(module, tmp_path, trainer).isfinite().all()
    with pytest.raises(ValueError, match=r'Net lacks the tensor "net\.scale" .* call the module with a batch first'):
        attribute(Net(Lazy), tmp_path, trainer)
