"""Gradients in half precision: features are summed in float32, and scores stay what they were but for rounding."""

import copy
import logging
import re
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import TRAK, AttributionMixin
from lightning_trak.features.precision import precision_of, to_store_dtype
from lightning_trak.features.store import FeatureStore
from lightning_trak.gradients import HookEngine, LoopEngine, MixedEngine, select_parameters
from lightning_trak.gradients.batch import ExampleBatch
from lightning_trak.gradients.precision import explained_precision
from lightning_trak.outputs import ClassificationMargin, ContrastiveMargin
from lightning_trak.projections import IdentityProjection, KroneckerProjection, SparseProjection
from lightning_trak.retraining import RetrainingFleet, tail_patch
from tests.lit import TARGETS, TRAIN, make_checkpoints, make_data, make_model, make_trainer, stored
from tests.zoo import ZOO, specimen


def scores(directory, precision, projection, engine):
    trainer = make_trainer(precision=precision)
    trak = TRAK(make_model(), make_checkpoints(2), directory, projection=projection, engine=engine, damping=1.0)
    trak.featurize(trainer, DataLoader(make_data(60), batch_size=16))
    return trak.score(trainer, DataLoader(make_data(20, seed=1), batch_size=16))


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "engine"), [("true", "hooks"), ("true", "functional"), ("mixed", "hooks")])
@pytest.mark.parametrize("projection", [SparseProjection(64), KroneckerProjection(4, 4)], ids=["sparse", "kronecker"])
def test_scores_in_bfloat16(tmp_path, precision, engine, projection):
    exact = scores(tmp_path / "32", "32-true", projection, engine)
    rough = scores(tmp_path / "16", f"bf16-{precision}", projection, engine)
    assert rough.dtype == torch.float32
    assert float(torch.corrcoef(torch.stack([exact.flatten(), rough.flatten()]))[0, 1]) > 0.995
    features = stored(tmp_path / "16").read(0, 0).features
    assert features.dtype == torch.float32
    assert (features != features.bfloat16()).any(), "sums must not be rounded to bfloat16"


def test_a_store_in_another_precision_is_refused(tmp_path):
    scores(tmp_path, "32-true", SparseProjection(64), "auto")
    with pytest.raises(ValueError, match="was made with precision 32-true, this TRAK has precision bf16-true"):
        scores(tmp_path, "bf16-true", SparseProjection(64), "auto")


def require_bfloat16(module, output, batch):
    """Skip a test of what this CPU has no instructions for: torch knows."""
    try:
        with torch.autocast("cpu", torch.bfloat16), explained_precision(module):
            output.output(module, batch)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", ZOO)
def test_hooks_under_autocast(name):
    """Every layer's gradient, in whatever precision autocast runs the layer, is float32's up to bfloat16's rounding."""
    module, output, batch, size = specimen(name)
    require_bfloat16(module, output, batch)
    names = select_parameters(module)
    left_out = HookEngine.uncovered(module, names)
    exact = LoopEngine(module, output, names)(ExampleBatch(batch, size))[1]
    if left_out:
        engine = MixedEngine(module, output, names, left_out, torch.bfloat16)
    else:
        engine = HookEngine(module, output, names, torch.bfloat16)
    rough = engine(ExampleBatch(batch, size))[1]
    assert engine.check(ExampleBatch(batch, size)) == {}
    for key, gradient in exact.items():
        assert (rough[key] - gradient).norm() <= 0.05 * gradient.norm() + 1e-6, key
    assert any(not torch.equal(rough[key], gradient) for key, gradient in exact.items())


@pytest.mark.parametrize(
    ("precision", "features"),
    [("32-true", "32-true"), ("bf16-mixed", "bf16-mixed"), ("16-mixed", "32-true"), ("bf16-true", "bf16-true")],
)
def test_float16_needs_a_loss_to_scale(precision, features):
    assert precision_of(SimpleNamespace(precision=precision), ClassificationMargin()) == features


@pytest.mark.parametrize(("name", "said"), [("mlp", "in bfloat16 mixed precision"), ("lstm", "of the weights")])
def test_the_log_says_where_mixed_precision_is_used(tmp_path, caplog, name, said):
    module, output, batch, size = specimen(name)
    trak = TRAK(module, [module.state_dict()], tmp_path, output=output, projection=SparseProjection(8))
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        trak.featurize(make_trainer(precision="bf16-mixed"), DataLoader(TensorDataset(*batch), batch_size=size))
    assert said in next(line for line in caplog.messages if "chosen by engine='auto'" in line)


@pytest.mark.slow
def test_an_output_with_a_context_is_not_rounded(tmp_path):
    """A pair must find itself in the bank."""

    class Towers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(6, 4), torch.nn.Linear(5, 4)

        def forward(self, first, second):
            return self.first(first), self.second(second)

    torch.manual_seed(0)
    model, pairs = Towers(), TensorDataset(torch.randn(20, 6), torch.randn(20, 5))
    scores = []
    for precision in ("32-true", "bf16-mixed"):
        trak = TRAK(model, [model.state_dict()], tmp_path / precision, output=ContrastiveMargin(context_size=8))
        scores.append(trak.attribute(make_trainer(precision=precision), DataLoader(pairs, batch_size=5), pairs))
        assert FeatureStore.read_manifest(tmp_path / precision)["identity"]["precision"] == "32-true"
    assert torch.equal(*scores)


class Scaled(torch.nn.Module):
    """Its gradients are as large as is wanted."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.lower, self.upper = torch.nn.Linear(6, 5), torch.nn.Linear(5, 3)
        self.scale = scale

    def forward(self, inputs):
        return self.upper(torch.tanh(self.lower(inputs))) * self.scale


@pytest.mark.parametrize("engine", ["auto", "hooks"])
def test_a_cpu_without_bfloat16_instructions_is_named(tmp_path, caplog, engine):
    """What oneDNN says of an LSTM where a CPU has no AVX-512; engine="auto" goes on without hooks, and says why."""

    def fail(*_):
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError(
                "could not create a primitive descriptor for the LSTM forward propagation primitive. Run"
            )

    model, trainer = Scaled(), make_trainer(precision="bf16-mixed")
    model.register_forward_pre_hook(fail)
    options = {"output": ClassificationMargin(), "projection": SparseProjection(8), "engine": engine}
    trak = TRAK(model, [model.state_dict()], tmp_path, **options)
    said = "this CPU cannot run Scaled in bfloat16 (could not create a primitive descriptor for the LSTM"
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        if engine == "auto":
            trak.featurize(trainer, make_data(20))
            assert said in next(line for line in caplog.messages if "chosen by engine='auto'" in line)
        else:
            with pytest.raises(ValueError, match=re.escape(said) + '.*use Trainer.precision="32-true"'):
                trak.featurize(trainer, make_data(20))


def small_trak(directory, scale, dtype):
    torch.manual_seed(0)
    model = Scaled(scale)
    options = {"output": ClassificationMargin(), "projection": IdentityProjection(), "dtype": dtype}
    return TRAK(model, [model.state_dict()], directory, **options)


@pytest.mark.parametrize(
    ("scale", "dtype", "precision", "wider"),
    [
        (1e-7, torch.float16, "32-true", "torch.bfloat16 or torch.float32"),
        (1e6, torch.float16, "32-true", "torch.bfloat16 or torch.float32"),
        (1e-7, torch.float16, "bf16-mixed", "torch.bfloat16 or torch.float32"),
        (1e-50, torch.float32, "64-true", "torch.float64"),
        (1e-50, torch.bfloat16, "64-true", "torch.float64"),
    ],
)
def test_a_store_that_would_lose_features_is_refused(tmp_path, scale, dtype, precision, wider):
    trak = small_trak(tmp_path, scale, dtype)
    message = rf"example 0 at checkpoint 0 .* does not fit into {dtype}: .*; use dtype={wider}"
    with pytest.raises(ValueError, match=message):
        trak.featurize(make_trainer(precision=precision), make_data(20))
    assert not list(tmp_path.rglob("shard*"))


@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e4])
def test_a_bfloat16_store_has_the_range_of_float32(tmp_path, scale):
    stores = {}
    for dtype in (torch.float32, torch.bfloat16):
        small_trak(tmp_path / str(dtype), scale, dtype).featurize(make_trainer(), make_data(20))
        stores[dtype] = stored(tmp_path / str(dtype)).read(0, 0).features
    assert stores[torch.float32].any()
    torch.testing.assert_close(stores[torch.bfloat16].float(), stores[torch.float32], rtol=2**-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("exponent", range(-60, 61, 4))
def test_a_row_is_kept_to_the_rounding_of_bfloat16_or_refused(dtype, exponent):
    generator = torch.Generator().manual_seed(exponent)
    rows = torch.randn(1, 50, generator=generator, dtype=torch.float64) * 10.0**exponent
    rows[0, ::3] *= 1e-3
    rows[0, 1::7] = 0
    naive = (rows.to(dtype).double() - rows).norm() / rows.norm()
    if naive > 2**-7:
        with pytest.raises(ValueError, match="example 3 at checkpoint 0 does not fit"):
            to_store_dtype(rows, dtype, torch.tensor([3]), "at checkpoint 0")
    else:
        assert torch.equal(to_store_dtype(rows, dtype, torch.tensor([3]), "at checkpoint 0"), rows.to(dtype))


def test_zeros_and_what_is_not_finite_pass_the_check_of_range():
    """Zero is zero in any dtype; of NaN and infinity the error says more that follows."""
    rows = torch.tensor([[0.0, 0.0], [torch.nan, 1e-9], [torch.inf, 1e-9]])
    stored = to_store_dtype(rows, torch.float16, torch.arange(3), "")
    torch.testing.assert_close(stored, rows.half(), equal_nan=True)


class Trainable(Scaled, AttributionMixin, L.LightningModule):
    """Makes a tensor without saying in which dtype."""

    def forward(self, inputs):
        return super().forward(inputs) + self.upper(torch.ones(1, 5))

    def configure_model_output(self):
        return ClassificationMargin()

    def training_step(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


TRUE = ["32-true", "bf16-mixed", "bf16-true", "16-true", "64-true"]


def trained(precision, data):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, trainer = Trainable(), make_trainer(precision=precision, max_epochs=1)
        trainer.fit(model, DataLoader(data, batch_size=10))
    return model, trainer


@pytest.mark.parametrize("precision", TRUE)
def test_a_fleets_outputs_are_in_float32_after_training_in_any_precision(tmp_path, precision):
    """The inputs are in float64, which a Trainer of true precision converts."""
    data = make_data(20)
    if precision in ("bf16-true", "64-true"):
        data = TensorDataset(data.tensors[0].double(), data.tensors[1])
    made = []

    def make_module():
        made.append(Trainable())
        return made[-1]

    def make_own_trainer():
        return make_trainer(precision=precision, max_epochs=1)

    loader = DataLoader(data, batch_size=10)
    fleet = RetrainingFleet(tmp_path, make_module, make_own_trainer, loader, data, torch.ones(1, 20).bool())
    fleet.run(progress_bar=False)
    assert fleet.outputs.dtype == torch.float32
    weights = {name: tensor.double() for name, tensor in made[-1].state_dict().items()}
    inputs = data.tensors[0].double()
    logits = torch.tanh(F.linear(inputs, weights["lower.weight"], weights["lower.bias"]))
    logits = F.linear(logits, weights["upper.weight"], weights["upper.bias"])
    logits = logits + F.linear(torch.ones(5).double(), weights["upper.weight"], weights["upper.bias"])
    expected = ClassificationMargin().output(lambda _: logits, (inputs, data.tensors[1]))
    torch.testing.assert_close(fleet.outputs.flatten(), expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", TRUE)
def test_a_tail_patch_is_taken_in_float32_after_training_in_any_precision(precision):
    """A step this small is less than what bfloat16 tells apart."""
    data = make_data(20)
    model, trainer = trained(precision, data)
    optimizer, before = trainer.optimizers[0], copy.deepcopy(model.state_dict())
    scores = {"own": torch.eye(20)}
    rises = tail_patch(model, optimizer, data, data, scores, 1, progress_bar=False).rises[0]
    exact = copy.deepcopy(model).double()
    again = torch.optim.SGD(exact.parameters(), lr=1e-3, momentum=0.9)
    state = copy.deepcopy(optimizer.state_dict())
    expected = []
    torch.set_default_dtype(torch.float64)
    try:
        for i in range(20):
            exact.load_state_dict(before)
            again.load_state_dict(copy.deepcopy(state))
            batch = [data.tensors[0][i : i + 1].double(), data.tensors[1][i : i + 1]]
            first = ClassificationMargin().output(exact, batch).item()
            again.zero_grad()
            exact.training_step(batch).backward()
            again.step()
            expected.append(ClassificationMargin().output(exact, batch).item() - first)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(rises, torch.tensor(expected).double(), rtol=1e-3, atol=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class NoisyStep(Trainable):
    def forward(self, inputs):
        return super().forward(F.dropout(inputs))


class ClosureStep(Trainable):
    def __init__(self):
        super().__init__()
        self.read = lambda inputs: self.upper(torch.tanh(self.lower(inputs)))

    def forward(self, inputs):
        return self.read(inputs)


class ChangingStep(Trainable):
    """Changes its batch."""

    def forward(self, inputs):
        return super().forward(inputs.mul_(0.5))


def test_a_tail_patch_that_would_step_on_the_original_is_refused():
    data, scores = make_data(6), {"own": torch.eye(6)}
    for make, message in (
        (NoisyStep, "the output of NoisyStep is random in eval mode"),
        (ClosureStep, r"reads lower.bias, lower.weight, upper.bias and 1 more of the module that was passed"),
    ):
        model = make()
        with pytest.raises(ValueError, match=message):
            tail_patch(model, model.configure_optimizers(), data, data, scores, 1, progress_bar=False)
        assert all(parameter.grad is None for parameter in model.parameters())


def test_a_tail_patch_asks_with_the_same_batch_each_time():
    data, model = make_data(6), ChangingStep()
    plain = Trainable()
    plain.load_state_dict(model.state_dict())
    halved = TensorDataset(data.tensors[0] * 0.5, data.tensors[1])
    found, expected = (
        tail_patch(part, part.configure_optimizers(), seen, seen, {"own": torch.eye(6)}, 2, progress_bar=False).rises
        for part, seen in ((model, data), (plain, halved))
    )
    torch.testing.assert_close(found, expected)


def pairs(size: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(size)
    images = torch.randn(size, 6, generator=generator)
    return TensorDataset(images, images + 0.1 * torch.randn(size, 6, generator=generator))


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, images, texts):
        return self.first(images), self.second(texts)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
@pytest.mark.parametrize("what", ["context", "principal axes"])
def test_what_is_learned_from_samples_follows_the_precision(tmp_path, what, precision):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Towers()
    if what == "context":
        output, projection, data, targets = ContrastiveMargin(context_size=8), SparseProjection(16), pairs(20), pairs(5)
    else:
        module, output, data, targets = module.first, ClassificationMargin(), TRAIN, TARGETS
        projection = KroneckerProjection(2, 2, axes="principal")
    scores = {}
    for name in (precision, "32-true"):
        trak = TRAK(module, [module.state_dict()], tmp_path / name, output=output, projection=projection)
        trak.featurize(make_trainer(precision=name), data)
        scores[name] = trak.score(make_trainer(precision=name), targets)
    error = float((scores[precision] - scores["32-true"]).norm() / scores["32-true"].norm())
    assert error < (0.2 if precision == "bf16-true" else 1e-3)
