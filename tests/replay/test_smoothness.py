"""Metasmoothness: by its definition, on runs that are smooth and runs that are not, and bad input."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import TensorDataset

from examples.counterfactuals import DigitsMLP
from examples.digits import make_data as make_digits
from lightning_trak import Metagradient
from lightning_trak.replay import Recording, SmoothAdamW, Smoothness, metasmoothness, smoothness
from lightning_trak.replay.losses import declared_losses
from lightning_trak.replay.player import Player
from lightning_trak.replay.recording.states import TrainingState
from lightning_trak.replay.reweighted import Reweighted
from lightning_trak.replay.smoothness import advice, agreement, quick_value, rounding_ceiling
from tests.methods.metagradients import Linear
from tests.replay.runs import NUM_TRAIN, Net, make_data, shuffled, train

DATA, TARGETS = make_data(), make_data(3, seed=5)
CPU = torch.device("cpu")


def state(*numbers: float) -> TrainingState:
    return TrainingState({"a": torch.tensor(numbers[:1]), "b": torch.tensor(numbers[1:])}, {})


def test_agreement_by_hand() -> None:
    start = state(0.0, 0.0, 0.0)
    assert agreement(start, state(1.0, -2.0, 3.0), state(2.0, -4.0, 6.0)) == 1
    assert agreement(start, state(2.0, -2.0, 3.0), state(1.0, -1.0, 2.0)) == -1
    # the first two agree and move by 2 and 4, the third goes back and has moved by 1
    assert agreement(start, state(1.0, -2.0, 3.0), state(2.0, -4.0, 1.0)) == pytest.approx(5 / 7)
    assert agreement(start, start, start) == 1
    assert agreement(start, start, state(0.0, 0.0, torch.nan)) != agreement(start, start, start)


def test_ceiling_is_the_correlation_of_the_signal_with_noisy_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    signal = 2 * torch.randn(20_000, generator=generator)
    noise = torch.randn(20_000, generator=generator), torch.randn(20_000, generator=generator)
    other = torch.randn(20_000, generator=generator)  # of the recorded run, drawn again each time
    moved, rounding = signal + noise[0] - other, noise[1] - other
    expected = torch.corrcoef(torch.stack([signal, signal + noise[0]]))[0, 1]
    found = rounding_ceiling(float(moved.square().mean()), float(rounding.square().mean()))
    assert found == pytest.approx(float(expected), abs=0.01)
    assert rounding_ceiling(1.0, 0.0) == 1
    assert rounding_ceiling(1.0, 1.0) == rounding_ceiling(1.0, 3.0) == rounding_ceiling(0.0, 0.0) == 0


def measured(module: L.LightningModule, directory: Path, trainer: L.Trainer, **options: Any) -> Smoothness:
    data, targets = options.pop("data", DATA), options.pop("targets", TARGETS)
    return metasmoothness(module, directory, trainer, data, targets, progress_bar=False, **options)


def test_value_is_that_of_trainings_by_hand(tmp_path: Path) -> None:
    trainer = train(Net(), DATA, tmp_path)
    direction = torch.randn(NUM_TRAIN, generator=torch.Generator().manual_seed(7))
    states = []
    for factor in (0, 0.1, 0.2):
        module = Net()
        module.weights = (1 + factor * direction).double()
        train(module, DATA)
        states.append(TrainingState({name: part.detach() for name, part in module.named_parameters()}, {}))
    module = Net()
    losses = declared_losses(module.configure_model_output(), None)
    run = Reweighted(Player(module, Recording(tmp_path), shuffled(DATA), None, CPU), losses)
    assert quick_value(run, seed=7) == pytest.approx(agreement(*states), abs=1e-9)
    assert measured(module, tmp_path, trainer, repeats=1, seed=7).value == pytest.approx(agreement(*states), abs=1e-9)


def recorded_regression(directory: Path) -> tuple[Linear, L.Trainer, TensorDataset]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 3, generator=generator)
    data = TensorDataset(inputs, inputs.sum(1) + torch.randn(40, generator=generator))
    module = Linear()
    return module, train(module, data, directory, max_epochs=4), data


def test_linear_regression_answers_in_proportion(tmp_path: Path) -> None:
    module, trainer, data = recorded_regression(tmp_path)
    found = measured(module, tmp_path, trainer, data=data, targets=data)
    assert found.smooth
    assert found.value > 0.9
    assert found.ceiling > 0.999999
    assert found.rounding < 1e-12 < found.moved
    assert found.verdict.startswith("This run is smooth")


def test_a_run_that_learned_nothing_is_not_called_rough(tmp_path: Path) -> None:
    module = Net(optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=0.0))
    found = measured(module, tmp_path, train(module, DATA, tmp_path), repeats=1)
    assert not found.smooth
    assert found.moved == 0
    assert found.verdict.startswith("No output moves when examples are removed")


def make_mlp(rate: float) -> DigitsMLP:
    torch.manual_seed(0)
    module = DigitsMLP()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=rate, momentum=0.9)  # type: ignore[method-assign]
    return module


def recorded_digits(rate: float, directory: Path, epochs: int = 8) -> tuple[DigitsMLP, L.Trainer, Any, Any]:
    data, targets = make_digits()
    targets = TensorDataset(*(part[:20] for part in targets.tensors))
    module = make_mlp(rate)
    loader = lambda data: shuffled(data, 100)  # noqa: E731
    trainer = train(module, data, directory, loader=loader, precision="32-true", max_epochs=epochs)
    return module, trainer, data, targets


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.01, 0.1])
def test_digits_are_told_apart(rate: float, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    module, trainer, data, targets = recorded_digits(rate, tmp_path)
    found = measured(module, tmp_path, trainer, data=data, targets=targets, repeats=1)
    assert 0 < found.rounding < found.moved / 100
    assert found.ceiling > 0.99
    smooth = rate == 0.01
    assert found.smooth == smooth
    assert found.value >= 0.8 if smooth else found.value < 0.7
    assert ("a smaller learning rate (it was 0.1;" in found.verdict) == (not smooth)
    few = TensorDataset(*(part[:1] for part in targets.tensors))
    recwarn.clear()
    Metagradient(module, tmp_path, progress_bar=False).attribute(trainer, data, few)
    said = [str(warning.message) for warning in recwarn if "not smooth" in str(warning.message)]
    assert len(said) == (not smooth)
    for text in said:
        assert f"metasmoothness {found.value:.2f}" in text  # the same direction
        assert "a smaller learning rate (it was 0.1;" in text
        assert "check_smooth=False" in text


def test_the_check_changes_no_score(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    trainer = train(Net(), DATA, tmp_path)
    options: list[dict[str, Any]] = [{"check_smooth": check, "progress_bar": False} for check in (True, False)]
    scores = [Metagradient(Net(), tmp_path, **each).attribute(trainer, DATA, TARGETS) for each in options]
    assert torch.equal(*scores)
    assert not [warning for warning in recwarn if "smooth" in str(warning.message)]


def test_noise_makes_a_run_rough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = train(Net(), DATA, tmp_path)
    assert measured(Net(), tmp_path, trainer).smooth

    def far(state: TrainingState, *_: Any) -> TrainingState:
        return TrainingState({name: 1.5 * part for name, part in state.parameters.items()}, state.buffers)

    monkeypatch.setattr(smoothness, "_neighbour", far)
    found = measured(Net(), tmp_path, trainer)
    assert found.value > 0.8 > found.ceiling
    assert not found.smooth


@pytest.mark.parametrize("last", [1, 3, 6])
def test_the_steps_that_are_differentiated_are_judged(last: int, tmp_path: Path) -> None:
    trainer = train(Net(), DATA, tmp_path)
    module, recording = Net(), Recording(tmp_path)
    losses = declared_losses(module.configure_model_output(), None)
    run, quick = (
        Reweighted(Player(module, recording, shuffled(DATA), None, CPU), losses, first=6 - last, check_losses=checks)
        for checks in (True, False)
    )
    direction = torch.randn(NUM_TRAIN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    outputs = []
    for sign in (1, -1):
        run.train(1 + sign * 1e-5 * direction)
        outputs.append(run.outputs(module.configure_model_output(), shuffled(TARGETS), None))
    method = Metagradient(module, tmp_path, last_steps=last, check_smooth=False, progress_bar=False)
    expected = method.attribute(trainer, DATA, TARGETS) @ direction
    torch.testing.assert_close((outputs[0] - outputs[1]) / 2e-5, expected, rtol=1e-6, atol=1e-9)
    # the check without that of the losses starts from the same base
    quick.skipped()
    end = recording.state(6).parameters
    assert all(torch.equal(part, end[name]) for name, part in quick.player.state.parameters.items())


def test_diverged_trainings_are_not_smooth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, trainer, data = recorded_regression(tmp_path)
    monkeypatch.setattr(smoothness, "STEP", 1e20)
    found = measured(module, tmp_path, trainer, data=data, targets=data)
    assert found.value != found.value
    assert not found.smooth
    assert "metasmoothness nan" in found.verdict
    with pytest.warns(UserWarning, match="not smooth: metasmoothness nan"):
        Metagradient(module, tmp_path, progress_bar=False).attribute(trainer, data, data)


class Late(Net):
    """Its rate is small in the first steps."""

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.LinearLR(optimizer, 0.1), "interval": "step"}]


@pytest.mark.parametrize(
    ("make", "kind", "options", "eps_root"),
    [
        (Net, torch.optim.SGD, {}, ""),
        (Net, torch.optim.AdamW, {}, "SmoothAdamW with eps_root more than 0"),
        (Late, torch.optim.Adam, {}, "SmoothAdamW with eps_root more than 0"),
        (Late, SmoothAdamW, {"eps_root": 1e-6}, "a larger eps_root (it was 1e-06)"),
    ],
)
def test_advice_fits_the_run(make: Any, kind: Any, options: Any, eps_root: str, tmp_path: Path) -> None:
    train(make(optimizer=lambda module: kind(module.parameters(), lr=0.02, **options)), DATA, tmp_path)
    words = advice(Recording(tmp_path))
    assert ("eps_root" in words) == bool(eps_root)
    assert eps_root in words
    assert ("warm-up" in words) == (make is Net)
    assert "larger batches (a step had 4 examples)" in words


def test_nothing_of_the_user_is_touched(tmp_path: Path) -> None:
    module = Net()
    trainer = train(module, DATA, tmp_path)
    module.eval()
    tensors, held, attributes = copy.deepcopy(module.state_dict()), dict(vars(trainer)), dict(vars(module))
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    random = torch.get_rng_state()
    first, again = measured(module, tmp_path, trainer), measured(module, tmp_path, trainer)
    assert first == again
    assert measured(module, tmp_path, trainer, seed=1) != first
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in module.state_dict().items())
    assert dict(vars(trainer)) == held
    assert dict(vars(module)) == attributes
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_bad_input_is_refused(tmp_path: Path) -> None:
    module = Net()
    trainer = train(module, DATA, tmp_path / "run")
    bad: list[tuple[dict[str, Any], str]] = [
        ({"repeats": 0}, "`repeats` to be a positive integer"),
        ({"data": make_data(5)}, "have 5 examples, but those of the recording had 12"),
        ({"data": make_data(seed=1)}, "not those of the recording"),
        ({"targets": TensorDataset(*(part[:0] for part in TARGETS.tensors))}, "the dataset is empty"),
        ({"losses": lambda module, batch: torch.zeros(len(batch[0]), requires_grad=True)}, "the mean of the examples'"),
    ]
    for options, reason in bad:
        with pytest.raises(ValueError, match=reason):
            measured(module, tmp_path / "run", trainer, **options)
    with pytest.raises(FileNotFoundError, match="TrainingRecorder"):
        measured(module, tmp_path / "none", trainer)
