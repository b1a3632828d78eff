"""Runs that are not repeated as they were: what notices them, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.methods.metagradients import attribute, sgd
from tests.replay.runs import Net, make_data, train

DATA = make_data()


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
