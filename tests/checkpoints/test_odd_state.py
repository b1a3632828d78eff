"""State that safetensors has no place for: right, left out with a word, or refused before training begins."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_trak import TRAK, AttributionMixin, TRAKCallback
from lightning_trak.checkpoints.reading import resolve_checkpoints
from lightning_trak.checkpoints.series import SnapshotSeries
from lightning_trak.outputs import ClassificationMargin, ModelOutput
from lightning_trak.projections import IdentityProjection
from tests.lit import TARGETS, TRAIN, make_trainer
from tests.snapshot_data import assert_equal


class Scale(nn.Module):
    """Has a number that no parameter or buffer holds, and that the output depends on."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.value


class Remembered(Scale):
    def get_extra_state(self) -> dict[str, float]:
        return {"value": self.value}

    def set_extra_state(self, state: dict[str, float]) -> None:
        self.value = state["value"]


class RememberedTensor(Scale):
    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.value)

    def set_extra_state(self, state: Tensor) -> None:
        self.value = float(state)


class LitOdd(AttributionMixin, L.LightningModule):
    def __init__(self, part: nn.Module | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.head = nn.Linear(6, 3)
        self.part = part or nn.Identity()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.part(inputs))

    def configure_model_output(self) -> ModelOutput:
        return ClassificationMargin()

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(model: LitOdd, directory: Path, *callbacks: Callback) -> L.Trainer:
    trainer = make_trainer(max_epochs=2, callbacks=[TRAKCallback(directory), *callbacks])
    trainer.fit(model, DataLoader(TRAIN, batch_size=16))
    return trainer


def scores(model: LitOdd, checkpoints: Any, store: Path) -> Tensor:
    trak = TRAK(model, checkpoints, store, projection=IdentityProjection(), damping=1e-3)
    trak.featurize(make_trainer(), TRAIN)
    return trak.score(make_trainer(), TARGETS)


# --- extra state --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Remembered, RememberedTensor])
def test_extra_state_stays_that_of_the_model(kind: type[Scale], tmp_path: Path) -> None:
    plain = LitOdd(Scale(2.0))
    train(plain, tmp_path / "plain")
    model = LitOdd(kind(2.0))
    with pytest.warns(UserWarning, match=r"leave out the extra state of modules: part\._extra_state"):
        trainer = train(model, tmp_path / "run")
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert resolve_checkpoints(tmp_path / "run")[-1].load().keys() == {"head.weight", "head.bias"}

    expected = scores(plain, tmp_path / "plain", tmp_path / "0")
    assert torch.equal(scores(model, tmp_path / "run", tmp_path / "1"), expected)
    last = scores(plain, [tmp_path / "plain/snapshot-00000008.safetensors"], tmp_path / "2")
    for number, checkpoint in enumerate((tmp_path / "last.ckpt", copy.deepcopy(model.state_dict()))):
        assert torch.equal(scores(model, checkpoint, tmp_path / f"full-{number}"), last)
    # Whatever a checkpoint holds, a snapshot of it could not.
    model.part.value = plain.part.value = 3.0
    other = dict(model.state_dict()) | {"part._extra_state": {"value": 2.0}}
    assert torch.equal(scores(model, other, tmp_path / "3"), scores(plain, dict(plain.state_dict()), tmp_path / "4"))


def test_extra_state_of_a_checkpoint_is_named(tmp_path: Path) -> None:
    torch.save({"state_dict": LitOdd(Remembered(1.0)).state_dict()}, tmp_path / "last.ckpt")
    checkpoint = resolve_checkpoints(tmp_path / "last.ckpt")[0]
    with pytest.warns(UserWarning, match=rf'extra state .* in "{tmp_path}/last\.ckpt" .* its own: part\._extra_state'):
        checkpoint.load()


def test_extra_state_is_said_once(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(LitOdd(nn.Sequential(Remembered(1.0), Remembered(1.0))), tmp_path)
    told = [str(warning.message) for warning in caught if "extra state" in str(warning.message)]
    assert len(told) == 1
    assert "part.0._extra_state, part.1._extra_state" in told[0]


# --- buffers and parameters of other kinds ------------------------------------------------------------------------


class Holds(nn.Module):
    """Multiplies by a matrix of some kind."""

    def __init__(self, matrix: Tensor | None, persistent: bool = True) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix, persistent=persistent)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs if self.matrix is None else (self.matrix @ inputs.T).T


def quantized(matrix: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(matrix, 0.1, 0, torch.qint8)


MATRIX = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
SPARSE: list[Callable[[Tensor], Tensor]] = [Tensor.to_sparse, Tensor.to_sparse_csr]


class NoSteps(Callback):
    def on_train_batch_start(self, *args: Any) -> None:
        raise AssertionError("training has begun")


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (Holds(MATRIX.to_sparse()), r"'part\.matrix' is a torch\.sparse_coo tensor; register it with persistent=False"),
        (Holds(MATRIX.to_sparse_csr()), r"'part\.matrix' is a torch\.sparse_csr tensor; register it"),
        (Holds(quantized(MATRIX)), r"'part\.matrix' is a quantized tensor; register it"),
        (Holds(torch.nested.nested_tensor([MATRIX, MATRIX])), r"'part\.matrix' is a nested tensor; register it"),
        (nn.LazyLinear(6), r"'part\.weight' is not initialized yet; run a batch through the model before training"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_training(part: nn.Module, reason: str, tmp_path: Path) -> None:
    model = LitOdd(part)
    with pytest.raises(TypeError, match=reason):
        train(model, tmp_path / "run", NoSteps())
    assert not (tmp_path / "run").exists()


def test_state_dicts_with_other_entries_are_refused_before_training(tmp_path: Path) -> None:
    class Versioned(LitOdd):
        def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return super().state_dict(*args, **kwargs) | {"version": 3}

    with pytest.raises(TypeError, match="'version' is int"):
        train(Versioned(), tmp_path / "run", NoSteps())


@pytest.mark.parametrize("make", SPARSE)
def test_sparse_buffers_that_are_not_persistent(make: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    dense, sparse = LitOdd(Holds(MATRIX, False)), LitOdd(Holds(make(MATRIX), False))
    for name, model in (("dense", dense), ("sparse", sparse)):
        train(model, tmp_path / name)
    found = scores(sparse, tmp_path / "sparse", tmp_path / "1")
    torch.testing.assert_close(found, scores(dense, tmp_path / "dense", tmp_path / "0"), rtol=1e-3, atol=1e-4)
    with pytest.raises(
        TypeError, match=r"state dict 0 must .*, but 'part\.matrix' is a torch\.sparse_\w+ tensor; register"
    ):
        scores(sparse, dict(sparse.state_dict()) | {"part.matrix": make(MATRIX)}, tmp_path / "2")


def test_buffers_that_are_none(tmp_path: Path) -> None:
    plain, model = LitOdd(), LitOdd(Holds(None))
    train(plain, tmp_path / "plain")
    train(model, tmp_path / "run")
    assert torch.equal(
        scores(model, tmp_path / "run", tmp_path / "1"), scores(plain, tmp_path / "plain", tmp_path / "0")
    )


def test_lazy_layers_once_they_are_initialized(tmp_path: Path) -> None:
    model = LitOdd(nn.LazyLinear(6))
    model(TRAIN.tensors[0])
    train(model, tmp_path / "run")
    assert scores(model, tmp_path / "run", tmp_path / "store").shape == (13, 50)
    with pytest.raises(ValueError, match=r"LitOdd has parameters that are not initialized yet: part\.weight"):
        scores(LitOdd(nn.LazyLinear(6)), tmp_path / "run", tmp_path / "other")


def test_models_without_content_are_refused(tmp_path: Path) -> None:
    train(LitOdd(), tmp_path / "run")
    with torch.device("meta"):
        model = LitOdd()
    with pytest.raises(ValueError, match=r"LitOdd has tensors on the meta device, without content: head\.weight"):
        scores(model, tmp_path / "run", tmp_path / "store")


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32,
    torch.int64, torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3)])
def test_every_dtype_comes_back(dtype: torch.dtype, shape: tuple[int, ...], directory: str) -> None:
    numbers = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0))
    tensor = numbers.to(dtype)
    state_dict = {"a": tensor, "b": tensor, "c": numbers}
    series = SnapshotSeries(directory)
    series.open()
    series.save(state_dict, 1, 1, [])
    checkpoint = resolve_checkpoints(directory)[0]
    assert checkpoint.load().keys() == state_dict.keys()
    for name, found in checkpoint.load().items():
        assert (found.dtype, found.shape) == (state_dict[name].dtype, shape)
        assert found.tolist() == state_dict[name].tolist()
    assert checkpoint.fingerprint() == resolve_checkpoints(state_dict)[0].fingerprint()


def test_lazy_signs_and_views_are_told_apart(tmp_path: Path) -> None:
    tensor = torch.randn(3, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    state_dict = {
        "a": tensor,
        "b": tensor.conj(),
        "c": tensor.imag,
        "d": tensor.conj().imag,  # has a lazy minus
        "e": torch.ones(1).expand(4),
    }
    series = SnapshotSeries(tmp_path)
    series.open()
    series.save(state_dict, 1, 1, [])
    checkpoint = resolve_checkpoints(tmp_path)[0]
    assert_equal(checkpoint.load(), state_dict)
    assert checkpoint.fingerprint() == resolve_checkpoints(state_dict)[0].fingerprint()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_learning_rates_that_are_no_numbers_are_refused_before_training(value: float, tmp_path: Path) -> None:
    class Diverged(LitOdd):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([{"params": self.parameters(), "lr": torch.tensor(value)}], lr=0.1)

    with pytest.raises(ValueError, match=f"optimizer 0 \\(SGD\\) has lr={value}"):
        train(Diverged(), tmp_path / "run", NoSteps())
