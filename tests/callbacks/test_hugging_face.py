"""TRAKTrainerCallback: when it saves, what, and for which run; and attribution with what it saved."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_trak import GradientDot, TracIn
from lightning_trak.checkpoints.reading import resolve_checkpoints
from lightning_trak.checkpoints.series import SnapshotSeries
from lightning_trak.methods import KNNShapley, TrainingLoss
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.projections import IdentityProjection
from tests.lit import make_trainer

transformers = pytest.importorskip("transformers")
TRAKTrainerCallback = importlib.import_module("lightning_trak.callbacks.hugging_face").TRAKTrainerCallback

STEPS = 4  # of an epoch


class Net(nn.Module):
    """As Hugging Face's models are called: the loss comes with the logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.norm, self.head = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.norm(self.body(inputs)).relu())
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


DATA = [
    {"inputs": row, "labels": i % 2}
    for i, row in enumerate(torch.randn(4 * STEPS, 3, generator=torch.Generator().manual_seed(1)))
]


class History(transformers.TrainerCallback):
    """The true weights, learning rates and gradients of each step."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.rates: dict[int, float] = {}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.rates[state.global_step + 1] = kwargs["optimizer"].param_groups[0]["lr"]

    def on_step_end(self, args, state, control, **kwargs):
        self.weights[state.global_step] = {k: v.clone() for k, v in kwargs["model"].state_dict().items()}


def fit(directory: Path, *callbacks: Any, model: nn.Module | None = None, resume: Any = None, **options: Any) -> Any:
    arguments: dict[str, Any] = {
        "output_dir": str(directory / "out"), "per_device_train_batch_size": 4, "num_train_epochs": 3, "use_cpu": True,
        "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "learning_rate": 0.1,
    }  # fmt: skip
    trainer = transformers.Trainer(
        model or Net(),
        transformers.TrainingArguments(**arguments | options),
        train_dataset=DATA,
        eval_dataset=DATA[:4],
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def steps(directory: Path) -> list[int]:
    return [snapshot.step for snapshot in SnapshotSeries(directory).read().snapshots]


# --- when ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "arguments", "expected"),
    [
        ({}, {}, [4, 8, 12]),
        ({"every_n_epochs": 2}, {}, [8, 12]),
        ({"every_n_epochs": 2, "save_last": False}, {}, [8]),
        ({"every_n_train_steps": 5}, {}, [5, 10, 12]),
        ({"every_n_train_steps": 5, "save_last": False}, {}, [5, 10]),
        ({"every_n_train_steps": 1}, {"gradient_accumulation_steps": 3, "num_train_epochs": 2}, [1, 2, 3, 4]),
        ({}, {"max_steps": 6}, [4, 6]),
        ({"save_last": False}, {"max_steps": 6}, [4]),
    ],
)
def test_triggers(options: dict[str, Any], arguments: dict[str, Any], expected: list[int], tmp_path: Path) -> None:
    history = History()
    fit(tmp_path, history, TRAKTrainerCallback(tmp_path / "s", **options), **arguments)
    assert steps(tmp_path / "s") == expected
    for checkpoint in resolve_checkpoints(tmp_path / "s"):
        weights, step = checkpoint.load(), checkpoint.record.step
        assert weights.keys() == history.weights[step].keys()
        assert all(torch.equal(weights[name], history.weights[step][name]) for name in weights)
        (first, second) = checkpoint.record.parameter_groups  # with and without weight decay
        assert first.lr == second.lr == history.rates[step]
        assert first.algorithm == "AdamW"
        assert set(first.parameters) | set(second.parameters) == {name for name, _ in Net().named_parameters()}
        assert checkpoint.record.epoch == step // -(-STEPS // arguments.get("gradient_accumulation_steps", 1))


def test_training_is_the_same_with_the_callback(tmp_path: Path) -> None:
    models = [Net(), Net()]
    for model, callbacks in zip(models, ([], [TRAKTrainerCallback(tmp_path / "s", preconditioner=True)]), strict=True):
        fit(tmp_path, *callbacks, model=model)
    for one, other in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(one, other)


class Stop(transformers.TrainerCallback):
    def on_evaluate(self, args, state, control, **kwargs):
        if state.global_step >= 6:
            control.should_training_stop = True
        return control


BEST = {
    "load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True,
    "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2,
}  # fmt: skip


def test_the_last_step_is_not_the_best_model(tmp_path: Path) -> None:
    history = History()
    trainer = fit(tmp_path, history, TRAKTrainerCallback(tmp_path / "s", every_n_train_steps=9), **BEST)
    assert trainer.state.best_global_step < 12  # the loss falls, and the highest is taken for the best
    assert steps(tmp_path / "s") == [9, 12]
    weights = resolve_checkpoints(tmp_path / "s")[-1].load()
    assert torch.equal(weights["head.weight"], history.weights[12]["head.weight"])
    assert not torch.equal(trainer.model.head.weight, weights["head.weight"])


def test_training_that_is_stopped_within_an_epoch(tmp_path: Path) -> None:
    history = History()
    fit(tmp_path, history, Stop(), TRAKTrainerCallback(tmp_path / "s", every_n_epochs=2), **BEST)
    assert steps(tmp_path / "s") == [6]
    weights = resolve_checkpoints(tmp_path / "s")[0].load()
    assert torch.equal(weights["head.weight"], history.weights[6]["head.weight"])


def test_training_that_is_stopped_after_an_epoch(tmp_path: Path) -> None:
    arguments = BEST | {"eval_strategy": "epoch", "save_strategy": "epoch"}
    with pytest.warns(UserWarning, match="snapshot of the last step, 8, was not saved: .* loaded the best weights"):
        fit(tmp_path, Stop(), TRAKTrainerCallback(tmp_path / "s", every_n_train_steps=5), **arguments)
    assert steps(tmp_path / "s") == [5]


# --- which run ----------------------------------------------------------------------------------------------------


def test_another_run_is_refused_before_it_trains(tmp_path: Path) -> None:
    fit(tmp_path, TRAKTrainerCallback(tmp_path / "s"), num_train_epochs=1)
    history = History()
    with pytest.raises(ValueError, match=r"holds 1 snapshots of another run, .*resume_from_checkpoint="):
        fit(tmp_path, history, TRAKTrainerCallback(tmp_path / "s"))
    assert not history.weights
    assert steps(tmp_path / "s") == [4]


def test_the_same_trainer_again_is_another_run(tmp_path: Path) -> None:
    trainer = fit(tmp_path, TRAKTrainerCallback(tmp_path / "s"), num_train_epochs=1)
    with pytest.raises(ValueError, match="snapshots of another run"):
        trainer.train()


def test_two_callbacks_need_two_directories(tmp_path: Path) -> None:
    callbacks = [TRAKTrainerCallback(tmp_path / "s"), TRAKTrainerCallback(tmp_path / "s", every_n_train_steps=2)]
    with pytest.raises(ValueError, match="another run is writing to"):
        fit(tmp_path, *callbacks)
    del callbacks
    both = TRAKTrainerCallback(tmp_path / "a"), TRAKTrainerCallback(tmp_path / "b", every_n_train_steps=6)
    fit(tmp_path, *both)
    assert (steps(tmp_path / "a"), steps(tmp_path / "b")) == ([4, 8, 12], [6, 12])


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_resume_continues_the_series(restored: bool, count: int, tmp_path: Path) -> None:
    """From a checkpoint before the last snapshot; with two callbacks, each goes on in its own directory."""
    directories = [tmp_path / f"s{number}" for number in range(count)]
    saving = {"save_strategy": "steps", "save_steps": 6, "save_only_model": False}
    fit(tmp_path, *map(TRAKTrainerCallback, directories), num_train_epochs=2, **saving)
    first = [SnapshotSeries(directory).read() for directory in directories]
    assert [snapshot.step for snapshot in first[0].snapshots] == [4, 8]
    fit(
        tmp_path,
        *map(TRAKTrainerCallback, directories),
        resume=str(tmp_path / "out" / "checkpoint-6"),
        restore_callback_states_from_checkpoint=restored,
        **saving,
    )
    for before, directory in zip(first, directories, strict=True):
        now = SnapshotSeries(directory).read()
        assert now.run == before.run
        assert [snapshot.step for snapshot in now.snapshots] == [4, 8, 12]
        assert now.snapshots[0] == before.snapshots[0]


def test_resume_of_another_run_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, TRAKTrainerCallback(tmp_path / "s"), num_train_epochs=1)
    saving = {"save_strategy": "steps", "save_steps": 4}
    fit(tmp_path, TRAKTrainerCallback(tmp_path / "other"), num_train_epochs=1, **saving)
    with pytest.raises(ValueError, match="holds 1 snapshots of another run"):
        fit(tmp_path, TRAKTrainerCallback(tmp_path / "s"), resume=str(tmp_path / "out" / "checkpoint-4"))


class Fails(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            raise KeyboardInterrupt


def test_after_an_error_the_directory_is_free_for_the_same_run(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 4}
    callback = TRAKTrainerCallback(tmp_path / "s")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, callback, Fails(), **saving)
    assert steps(tmp_path / "s") == [4]
    fit(tmp_path, callback, resume=str(tmp_path / "out" / "checkpoint-4"))
    assert steps(tmp_path / "s") == [4, 8, 12]
    del callback


def test_the_trainer_can_store_integers_of_numpy(tmp_path: Path) -> None:
    for name in ("every_n_epochs", "every_n_train_steps"):
        callback = TRAKTrainerCallback(tmp_path, **{name: np.int64(2)})
        assert json.loads(json.dumps(callback.state()))["args"][name] == 2


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_epochs": 1, "every_n_train_steps": 2}, "at most one trigger, got every_n_epochs and every_n_train"),
        ({"every_n_epochs": 0}, "Expected `every_n_epochs` to be a positive integer but got 0"),
        ({"every_n_train_steps": -1}, "Expected `every_n_train_steps` to be a positive integer but got -1"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        TRAKTrainerCallback(tmp_path, **options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"optim": "sgd"}, TypeError, r"needs torch\.optim\.Adam or AdamW, got torch\.optim\.sgd\.SGD"),
        ({"learning_rate": float("inf")}, ValueError, "has lr=inf, which cannot train"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_training(arguments, error, message, tmp_path) -> None:
    history = History()
    with pytest.raises(error, match=message):
        fit(tmp_path, history, TRAKTrainerCallback(tmp_path / "s", preconditioner=True), **arguments)
    assert not history.weights
    assert not (tmp_path / "s").exists()


def test_sharded_weights_are_refused(tmp_path: Path) -> None:
    model = Net()
    model.body.weight.ds_id = 0  # as DeepSpeed marks a parameter that it partitions
    with pytest.raises(RuntimeError, match=r"shard, such as body\.weight: train with DDP"):
        fit(tmp_path, TRAKTrainerCallback(tmp_path / "s"), model=model)


# --- adapters -----------------------------------------------------------------------------------------------------


def frozen_body(seed: int = 0) -> Net:
    model = Net()
    torch.manual_seed(seed)
    nn.init.normal_(model.body.weight)
    model.body.requires_grad_(False)
    return model


EXACT: dict[str, Any] = {"output": ClassificationMargin(), "projection": IdentityProjection(), "dtype": torch.float64}


def test_only_what_is_trained_is_saved_and_the_rest_must_be_the_same(tmp_path: Path) -> None:
    trained, whole = frozen_body(), frozen_body()
    fit(tmp_path, TRAKTrainerCallback(tmp_path / "part", trainable_only=True, preconditioner=True), model=trained)
    fit(tmp_path, TRAKTrainerCallback(tmp_path / "whole"), model=whole)
    for part, full in zip(*(resolve_checkpoints(tmp_path / name) for name in ("part", "whole")), strict=True):
        buffers = {f"norm.{name}" for name, _ in Net().norm.named_buffers()}
        names = {"norm.weight", "norm.bias", "head.weight", "head.bias"}
        assert set(part.load()) == names | buffers
        assert set(part.load_preconditioner()) == names
        assert all(torch.equal(tensor, full.load()[name]) for name, tensor in part.load().items())
    scores = [
        TracIn(model, tmp_path / name, tmp_path / f"{name}-features", **EXACT).attribute(make_trainer(), DATA, DATA[:3])
        for model, name in ((trained, "part"), (whole, "whole"))
    ]
    torch.testing.assert_close(*scores)
    for other in (frozen_body(seed=1), copy.deepcopy(trained).double()):
        with pytest.raises(ValueError, match="this Net has other frozen parameters than the model had in training"):
            TracIn(other, tmp_path / "part", tmp_path / "o", **EXACT).featurize(make_trainer(), DATA)


@pytest.mark.parametrize(
    "make",
    [
        lambda *args: TrainingLoss(*args, output=ClassificationMargin()),
        lambda *args: KNNShapley(*args, forward=lambda module, batch: module(**batch)),
    ],
    ids=["loss", "representations"],
)
def test_methods_without_gradients_load_what_is_trained(tmp_path: Path, make: Any) -> None:
    found = []
    for name, only in (("part", True), ("whole", False)):
        model = frozen_body()
        fit(tmp_path, TRAKTrainerCallback(tmp_path / name, trainable_only=only), model=model)
        found.append(make(model, tmp_path / name).label_suspicion(make_trainer(), DATA))
    torch.testing.assert_close(*found)


def test_a_snapshot_of_a_part_after_a_whole_checkpoint(tmp_path: Path) -> None:
    """The frozen weights are those of the model, not those of the checkpoint before."""
    model = frozen_body()
    fit(tmp_path, TRAKTrainerCallback(tmp_path / "s", trainable_only=True), model=model, num_train_epochs=1)
    other = {name: 2 * value for name, value in model.state_dict().items()}
    both, first, second = (
        GradientDot(model, checkpoints, tmp_path / f"{number}", **EXACT).attribute(make_trainer(), DATA, DATA[:3])
        for number, checkpoints in enumerate(([other, tmp_path / "s"], other, tmp_path / "s"))
    )
    torch.testing.assert_close(both, (first + second) / 2)


def test_nothing_to_train_is_refused(tmp_path: Path) -> None:
    callback = TRAKTrainerCallback(tmp_path / "s")
    state = transformers.TrainerState()
    model = Net().requires_grad_(False)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with pytest.raises(ValueError, match="no parameter of the model requires gradients"):
        callback.on_train_begin(None, state, None, model=model, optimizer=optimizer)


def test_state_is_json(tmp_path: Path) -> None:
    callback = TRAKTrainerCallback(tmp_path / "s", every_n_train_steps=2, trainable_only=True)
    fit(tmp_path, callback, num_train_epochs=1)
    state = json.loads(json.dumps(callback.state()))
    again = TRAKTrainerCallback.from_state(state)
    assert again.state() == state
    assert state["attributes"] == {"_run": SnapshotSeries(tmp_path / "s").read().run}


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    spec = importlib.util.find_spec("lightning_trak.callbacks.hugging_face")
    with pytest.raises(ModuleNotFoundError, match=r'needs transformers: pip install "transformers\[torch\]"'):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
