"""Whether a step by the examples' losses is the step of training, at any scale of weights and moments."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_trak.replay import Recording
from lightning_trak.replay.losses import require_step, training_losses
from lightning_trak.replay.player import Player, ReplayError
from lightning_trak.replay.recording.states import TrainingState
from tests.replay.runs import Net, make_data, shuffled, train


def check(name: str, before: torch.Tensor, after: torch.Tensor, new: torch.Tensor) -> None:
    states = [TrainingState.from_tensors({"parameter/a": before, name: tensor}) for tensor in (before, after)]
    states[1].parameters["a"] = states[1].parameters["a"].clone()
    played: Any = SimpleNamespace(record=SimpleNamespace(step=3), before=states[0])
    require_step(played, states[1], {"parameter/a": states[1].parameters["a"], name: new}, torch.float32, 0.0)


@pytest.mark.parametrize("name", ["parameter/a", "moment/a/exp_avg_sq"])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_another_step_is_noticed_at_any_scale(scale: float, name: str) -> None:
    # Squares of some of these numbers are zero or infinite in float32.
    after = scale * (1 + torch.rand(50, generator=torch.Generator().manual_seed(0)))
    check(name, 0.9 * after, after, after * (1 + 2 * torch.finfo(torch.float32).eps))
    check(name, 0.9 * after, after, after + 1e-4 * after)
    with pytest.raises(ReplayError, match=r"step 3 moved the .* a step that differs"):
        check(name, 0.9 * after, after, after + 1e-2 * after)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_noticed(value: float) -> None:
    after = torch.ones(3)
    with pytest.raises(ReplayError, match=r"step 3 moved the weights"):
        check("parameter/a", 0.9 * after, after, torch.tensor([1.0, value, 1.0]))


@pytest.mark.parametrize("moment", [1e-9, 1e-3])
def test_a_step_of_adam_that_is_made_of_rounding_may_differ(moment: float) -> None:
    # The gradient of a bias before batch normalization is rounding, of either sign; Adam makes a whole step of it.
    names = ["parameter/a", "moment/a/exp_avg", "moment/a/exp_avg_sq"]
    before = TrainingState.from_tensors({"parameter/a": torch.ones(3)})
    tensors = [torch.tensor([0.9, 1.1, 0.9]), torch.tensor([1.0, -1.0, moment]), torch.tensor([1.0, 1.0, moment**2])]
    after = TrainingState.from_tensors(dict(zip(names, tensors, strict=True)))
    new = dict(after.tensors()) | {names[0]: torch.tensor([0.9, 1.1, 1.1])}
    played: Any = SimpleNamespace(record=SimpleNamespace(step=3), before=before)
    with nullcontext() if moment < 1e-6 else pytest.raises(ReplayError, match="moved the weights"):
        require_step(played, after, new, torch.float32, 0.0)


def test_comparing_losses_leaves_nothing_on_the_module(tmp_path: Path) -> None:
    class Keeps(Net):
        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            self.kept = super().training_step(batch, batch_idx)
            return self.kept

    module, data = Keeps(), make_data()
    train(module, data, tmp_path)
    player = Player(module, Recording(tmp_path), shuffled(data), None, torch.device("cpu"))
    del player.module.kept  # of training
    training_losses(player, module.configure_model_output(), None)
    assert not hasattr(player.module, "kept")
