"""Gradients of training examples, multiplied by what Adam multiplies them by: against formulas, and refusals."""

import json
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import AttributionMixin, GradientCosine, GradientDot, TracIn, TRAKCallback
from lightning_trak.checkpoints.optimizers import preconditioner_of
from lightning_trak.checkpoints.reading import resolve_checkpoints
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.projections import IdentityProjection, PrincipalProjection, SparseProjection
from tests.lit import make_data, make_trainer, open_store

EXACT: dict[str, Any] = {"projection": IdentityProjection(), "dtype": torch.float64}


def double(data: TensorDataset) -> TensorDataset:
    inputs, labels = data.tensors
    return TensorDataset(inputs.double(), labels)


TRAIN, TARGETS = double(make_data(23)), double(make_data(7, seed=1))


class Net(AttributionMixin, L.LightningModule):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 3)
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
        self.double()
        self.options = options

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(inputs)) * self.frozen)

    def configure_model_output(self) -> ClassificationMargin:
        return ClassificationMargin()

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05, **self.options)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


class States(L.Callback):
    """What the optimizer did in the last step of each epoch, as it says itself."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.requires_grad}
        self.rate = optimizer.param_groups[0]["lr"]

    def on_train_batch_start(self, trainer, module, *args):
        self.before = {name: p.detach().clone() for name, p in module.named_parameters()}

    def on_train_epoch_end(self, trainer, module):
        moved = {name: module.get_parameter(name).detach() - self.before[name] for name in self.gradients}
        state = {name: dict(trainer.optimizers[0].state[module.get_parameter(name)]) for name in moved}
        moments = {name: (value["exp_avg_sq"].clone(), int(value["step"])) for name, value in state.items()}
        self.found.append({"moved": moved, "gradients": self.gradients, "rate": self.rate, "moments": moments})


def train(directory, **options: Any) -> tuple[Net, States]:
    model, states = Net(**options), States()
    callback = TRAKCallback(directory, preconditioner=True)
    trainer = make_trainer(max_epochs=2, callbacks=[states, callback], precision="64-true")
    trainer.fit(model, DataLoader(TRAIN, batch_size=8))
    return model, states


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    return *train(directory / "snapshots"), directory / "snapshots"


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}])
def test_it_is_the_step_divided_by_rate_and_gradient(tmp_path, options):
    """Without momentum and weight decay, a step is minus rate times preconditioner times gradient."""
    _, states = train(tmp_path / "snapshots", betas=(0.0, 0.9), weight_decay=0.0, **options)
    for checkpoint, seen in zip(resolve_checkpoints(tmp_path / "snapshots"), states.found, strict=True):
        kept = checkpoint.load_preconditioner()
        assert kept.keys() == seen["gradients"].keys()
        for name, factor in kept.items():
            torch.testing.assert_close(-seen["rate"] * factor * seen["gradients"][name], seen["moved"][name])


def per_example(model: Net, data: TensorDataset, scalars: Any) -> list[dict[str, Tensor]]:
    rows = []
    names = ["body.weight", "body.bias", "head.weight", "head.bias"]
    for i in range(len(data)):
        batch = [part[i : i + 1] for part in data.tensors]
        found = torch.autograd.grad(scalars(model, batch), [model.get_parameter(name) for name in names])
        rows.append(dict(zip(names, found, strict=True)))
    return rows


def by_hand(model: Net, states: States, directory, normalized: bool, weights: list[float]) -> Tensor:
    """Formula of LESS: gradients of targets, and gradients over the root of Adam's second moments."""
    total = torch.zeros(len(TARGETS), len(TRAIN), dtype=torch.float64)
    for weight, checkpoint, seen in zip(weights, resolve_checkpoints(directory), states.found, strict=True):
        model.load_state_dict(checkpoint.load())
        train, aims = (per_example(model, data, Net.training_step) for data in (TRAIN, TARGETS))
        for row in train:
            for name, gradient in row.items():
                moment, step = seen["moments"][name]
                row[name] = gradient / ((moment / (1 - 0.999**step)).sqrt() + 1e-8)
        train, aims = (
            torch.stack([torch.cat([g.flatten() for g in row.values()]) for row in part]) for part in (train, aims)
        )
        if normalized:
            train, aims = F.normalize(train), F.normalize(aims)
        total += weight * aims @ train.T
    return total


@pytest.mark.parametrize("engine", ["hooks", "loop"])
@pytest.mark.parametrize(
    ("method", "options", "weights"),
    [
        (GradientCosine, {"learning_rates": "snapshots"}, [0.05, 0.025]),  # LESS
        (TracIn, {}, [0.05, 0.025]),
        (GradientDot, {}, [0.5, 0.5]),
    ],
)
def test_scores_are_the_formula(run, tmp_path, method, options, weights, engine):
    model, states, directory = run
    expected = by_hand(model, states, directory, method is GradientCosine, weights)
    found = method(model, directory, tmp_path, preconditioned=True, engine=engine, **options, **EXACT)
    scores = found.attribute(make_trainer(), DataLoader(TRAIN, batch_size=4), TARGETS)
    torch.testing.assert_close(scores, expected, rtol=1e-8, atol=1e-10)
    plain = method(model, directory, tmp_path / "plain", engine=engine, **options, **EXACT)
    assert not torch.allclose(plain.attribute(make_trainer(), TRAIN, TARGETS), expected, rtol=0.1)


def test_projected_features_do_not_depend_on_engine_and_batch_size(run, tmp_path):
    model, _, directory = run
    scores = []
    for engine, size in (("hooks", 5), ("functional", 23), ("loop", 1)):
        method = GradientCosine(
            model, directory, tmp_path / engine, preconditioned=True, projection=SparseProjection(64), dtype="float64",
            engine=engine,
        )  # fmt: skip
        scores.append(method.attribute(make_trainer(), DataLoader(TRAIN, batch_size=size), TARGETS))
        assert open_store(method, make_trainer()).settle_engine() == engine
    torch.testing.assert_close(scores[0], scores[1])
    torch.testing.assert_close(scores[0], scores[2])


def test_part_of_a_gradient_at_a_time(run):
    """As hooks form large gradients: some rows of a parameter."""
    from lightning_trak.projections.preconditioned import PreconditionedProjection

    shapes, factors = {"w": (4, 3, 2)}, {"w": torch.rand(4, 3, 2) + 0.1}
    gradients = torch.randn(2, 24)
    inner = SparseProjection(8).bind(shapes, 0, 0, torch.device("cpu"))
    bound = PreconditionedProjection(inner, shapes, factors, "at checkpoint 0")
    whole, parts, expected = torch.zeros(3, 2, 8)
    inner.add_(expected, "w", gradients * factors["w"].flatten())
    bound.add_(whole, "w", gradients)
    bound.add_(parts, "w", gradients[:, :6], range(1))
    bound.add_(parts, "w", gradients[:, 6:], range(1, 4))
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(parts, expected)


def test_a_store_is_of_one_kind_of_gradients(run, tmp_path):
    model, _, directory = run
    method = GradientDot(model, directory, tmp_path, preconditioned=True, **EXACT)
    method.featurize(make_trainer(), TRAIN)
    with pytest.raises(ValueError, match="gradients multiplied by the optimizer's preconditioner"):
        GradientDot(model, directory, tmp_path, **EXACT).score(make_trainer(), TARGETS)
    with pytest.raises(ValueError, match="self-influence also needs them as they are"):
        method.self_influence(make_trainer())
    with pytest.raises(ValueError, match="self-influence also needs them as they are"):
        GradientDot(model, directory, tmp_path / "no", preconditioned=True, **EXACT).label_suspicion(None, TRAIN)
    assert not (tmp_path / "no").exists()


def test_what_is_not_kept_is_refused(run, tmp_path):
    model, _, directory = run
    with pytest.raises(ValueError, match=r"state dict 0 comes without the preconditioner .* preconditioner=True"):
        GradientDot(model, [model.state_dict()], tmp_path, preconditioned=True)
    with pytest.raises(ValueError, match=r"1 of 5 selected parameters, which .* before: frozen; select"):
        GradientDot(model, directory, tmp_path, preconditioned=True, parameters="*", **EXACT).featurize(
            make_trainer(), TRAIN
        )
    with pytest.raises(ValueError, match="PrincipalProjection is fitted to gradients"):
        GradientDot(model, directory, tmp_path, preconditioned=True, projection=PrincipalProjection(4))
    file = next(directory.glob("preconditioner-*"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.rename(directory / "away")
    try:
        with pytest.raises(FileNotFoundError, match=f'lacks 1 of the 4 files .* "{file.name}"'):
            GradientDot(model, directory, tmp_path, preconditioned=True)
        file.write_bytes(content)
        with pytest.raises(ValueError, match="was altered or replaced"):
            GradientDot(model, directory, tmp_path / "other", preconditioned=True).featurize(make_trainer(), TRAIN)
    finally:
        (directory / "away").replace(file)
    assert len(resolve_checkpoints(directory)[0].load_preconditioner()) == 4


def test_elements_that_have_never_had_a_gradient_are_not_guessed():
    """A word that no training text has: Adam's second moment is zero."""
    embedding = nn.Embedding(3, 2)
    optimizer = torch.optim.Adam(embedding.parameters())
    embedding(torch.tensor([0, 1])).sum().backward()
    optimizer.step()
    (factor,) = preconditioner_of([optimizer], embedding).values()
    assert (factor[:2] > 0).all()
    assert (factor[2] == 0).all()


def test_such_an_element_in_an_example_is_refused(tmp_path):
    class Words(Net):
        def __init__(self):
            super().__init__()
            self.body = nn.EmbeddingBag(4, 5).double()

    model, words = Words(), torch.tensor([[0, 1], [2, 2], [1, 2]])
    labels = torch.tensor([0, 1, 2])
    trainer = make_trainer(max_epochs=2, callbacks=[TRAKCallback(tmp_path / "s", preconditioner=True)])
    trainer.fit(model, DataLoader(TensorDataset(words, labels), batch_size=3))
    method = GradientDot(model, tmp_path / "s", tmp_path / "known", preconditioned=True, **EXACT)
    unseen = TensorDataset(torch.tensor([[3, 3], [0, 1]]), labels[:2])
    scores = method.attribute(make_trainer(), TensorDataset(words, labels), unseen)
    assert scores.isfinite().all()
    other = GradientDot(model, tmp_path / "s", tmp_path / "unknown", preconditioned=True, **EXACT)
    with pytest.raises(ValueError, match=r"body\.weight are not zero in elements of which the optimizer has seen no"):
        other.featurize(make_trainer(), unseen)


class WithSGD(Net):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_other_optimizers_are_refused_before_training(tmp_path):
    model, seen = WithSGD(), []
    model.training_step = lambda batch: seen.append(batch)  # type: ignore[method-assign]
    trainer = make_trainer(max_epochs=1, callbacks=[TRAKCallback(tmp_path, preconditioner=True)])
    with pytest.raises(TypeError, match=r"needs torch\.optim\.Adam or AdamW, got torch\.optim\.sgd\.SGD"):
        trainer.fit(model, DataLoader(TRAIN))
    assert not seen


def test_without_it_nothing_is_kept(tmp_path):
    trainer = make_trainer(max_epochs=1, callbacks=[TRAKCallback(tmp_path)], precision="64-true")
    trainer.fit(Net(), DataLoader(TRAIN))
    assert not list(tmp_path.glob("preconditioner*"))
    assert "preconditioner" not in json.loads((tmp_path / "manifest.json").read_text())["snapshots"][0]
