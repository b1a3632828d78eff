"""Metagradients for an average order, against finite differences of trainings and against recorded orders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import Metagradient
from lightning_trak.replay import average_order
from tests.methods.metagradients import DATA, DIRECTION, STEP, TARGETS, attribute, layers, outputs, sgd
from tests.replay.runs import NUM_TRAIN, Net, shuffled, train


class Spread(Net):
    """Each step also minimizes the losses of all examples, with given weights."""

    extra: Tensor | None = None

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.extra is not None:
            inputs, labels = DATA.tensors[0].double(), DATA.tensors[1]
            loss = loss + (self.extra * F.cross_entropy(self(inputs), labels, reduction="none")).sum()
        return loss


def optimizers() -> Iterator[Any]:
    yield pytest.param(lambda: sgd(lr=0.2, momentum=0.9, weight_decay=0.01), {}, id="sgd")
    yield pytest.param(lambda: sgd(lr=0.2), {"accumulate_grad_batches": 2, "gradient_clip_val": 0.4}, id="accumulation")
    adamw: Callable[[Net], Any] = lambda module: torch.optim.AdamW(module.parameters(), lr=0.01)  # noqa: E731
    yield pytest.param(lambda: adamw, {}, id="adamw")


@pytest.mark.parametrize(("optimizer", "options"), optimizers())
@pytest.mark.parametrize("last_steps", [None, 2])
def test_is_the_derivative_by_the_weights_of_all_examples_in_each_step(
    optimizer: Any, options: dict[str, Any], last_steps: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(average_order, "WINDOWS", 1000)  # each step is a window

    def make() -> Spread:
        return Spread(lambda: layers(), optimizer())

    module = make()
    trainer = train(module, DATA, tmp_path, **options)
    scores = attribute(module, tmp_path, trainer, order="average", last_steps=last_steps)
    first = 0 if last_steps is None else trainer.global_step - last_steps

    def at(distance: float) -> Tensor:
        module = make()
        extra = distance * STEP * DIRECTION / NUM_TRAIN

        class Late(Spread):
            def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
                self.extra = extra if self.trainer.global_step >= first else None

        module.__class__ = Late
        train(module, DATA, **options)
        return outputs(module)

    expected = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * STEP)
    assert expected.norm() > 1e-3
    assert (scores @ DIRECTION - expected).norm() < 1e-7 * expected.norm()
