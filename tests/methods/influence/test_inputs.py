"""Influence functions on what models and Trainers may be: in all precisions, with odd parameters and habits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_trak.gradients import HookEngine
from lightning_trak.methods import Arnoldi, ConjugateGradient, Explicit, InfluenceFunction, LiSSA
from lightning_trak.outputs import ClassificationMargin, NegativeLoss
from tests.methods.influence.reference import (
    METHODS,
    TARGETS,
    TRAIN,
    N,
    Once,
    ekfac,
    influence,
    reference,
    relative_error,
    seeded,
)


class Closure(Once):
    def __init__(self) -> None:
        super().__init__()
        self.read = lambda inputs: self.head(inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.read(self.hidden(inputs))


class ClosureOverABuffer(Once):
    def __init__(self) -> None:
        super().__init__()
        self.read = lambda inputs: inputs * self.scale

    def forward(self, inputs: Tensor) -> Tensor:
        return self.read(self.head(self.hidden(inputs)))


class Unregistered(Once):
    def __init__(self) -> None:
        super().__init__()
        self.parts = {"bias": nn.Parameter(torch.ones(3))}

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) + self.parts["bias"]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("scores", [*METHODS.values(), ekfac], ids=[*METHODS, "ekfac"])
@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_weights_of_the_original_are_found(scores, frozen, precision):
    """Also where they do not fit those of the copy, here in another precision, and on a GPU on another device."""
    model = seeded(Closure)
    model.head.requires_grad_(not frozen)
    with pytest.raises(ValueError, match=r"reads head.bias, head.weight of the module that was passed"):
        scores(model, precision=precision)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (ClosureOverABuffer, "reads scale of the module that was passed, not of the copy"),
        (Unregistered, r"depends on 1 tensors that require gradients .* of shapes \(3,\)"),
    ],
)
def test_what_is_no_parameter_of_the_copy_is_found(make, message):
    for scores in (METHODS["explicit"], ekfac):
        with pytest.raises(ValueError, match=message):
            scores(seeded(make))


def test_an_output_that_calls_the_original_is_found():
    model = seeded(Once)
    output = NegativeLoss(lambda _, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"))
    for scores in (METHODS["explicit"], ekfac):
        with pytest.raises(ValueError, match=r"reads first.bias, .* of the module that was passed"):
            scores(model, output=output)


class Listed(Once):
    """Reads its head from a list too, where functions that swap a module's attributes do not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = [self.first.weight]

    def hidden(self, inputs: Tensor) -> Tensor:
        return super().hidden(inputs) + F.linear(inputs, self.weights[0])


class TwoNames(Once):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(5))
        self.parts = nn.ModuleDict({"first": self.first})
        self.encoder = self.parts["first"]

    def hidden(self, inputs: Tensor) -> Tensor:
        return torch.tanh(self.encoder(inputs)) * self.gain


@pytest.mark.slow
@pytest.mark.parametrize("make", [Listed, TwoNames])
@pytest.mark.parametrize("name", METHODS)
def test_parameters_under_several_names_are_right(name, make):
    model = seeded(make)
    assert relative_error(METHODS[name](model), reference(model, TRAIN, TARGETS)) < 1e-3


def test_wrong_gradients_of_an_engine_are_found_and_the_next_one_is_used(monkeypatch):
    """Here, hooks get those of one parameter wrong after they have been chosen."""
    exact, model = HookEngine.project, seeded(Once)
    size = sum(parameter.numel() for parameter in model.parameters())

    def wrong(self, batch, projection, features):
        values = exact(self, batch, projection, features)
        if projection.dim == size:
            features[:, -3:] *= 1.5
        return values

    monkeypatch.setattr(HookEngine, "project", wrong)
    for name, scores in METHODS.items():
        assert relative_error(scores(model), reference(model, TRAIN, TARGETS)) < 1e-3, name


class Noisy(Once):
    def __init__(self, rate: float = 0.5) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(F.dropout(inputs, self.rate))


class DrawsInVain(Once):
    """Some models draw whether to drop a layer, and then do so in training alone."""

    def forward(self, inputs: Tensor) -> Tensor:
        dropped = torch.rand([]) < 0.5
        return super().forward(inputs) * (~dropped | (not self.training))


class FixedNoise(Once):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs + torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float32))


@pytest.mark.parametrize("scores", [*METHODS.values(), ekfac], ids=[*METHODS, "ekfac"])
@pytest.mark.parametrize("rate", [0.5, 0.1])
def test_a_random_output_is_refused(scores, rate):
    with pytest.raises(ValueError, match=r"the output of Noisy is random in eval mode.*training=self.training"):
        scores(seeded(Noisy, rate))


@pytest.mark.parametrize("make", [DrawsInVain, FixedNoise])
def test_draws_that_do_not_change_the_output_are_no_matter(make):
    model, before = seeded(make), torch.get_rng_state()
    scores = METHODS["explicit"](model)
    assert torch.equal(torch.get_rng_state(), before)
    assert relative_error(scores, reference(model, TRAIN, TARGETS)) < 1e-4


def by_length(items):
    """Sorts longer batches, as for packed sequences; two examples keep their order."""
    return default_collate(sorted(items, key=lambda item: float(item[0][0])) if len(items) > 2 else items)


@pytest.mark.parametrize("name", ["explicit", "ekfac"])
@pytest.mark.parametrize("which", ["train", "targets"])
def test_a_collate_function_that_changes_the_order_is_refused(name, which):
    scores = {**METHODS, "ekfac": ekfac}[name]
    data = {"train": TRAIN, "targets": TARGETS}
    data[which] = DataLoader(data[which], batch_size=8, collate_fn=by_length)
    with pytest.raises(ValueError, match="alone and another number in a batch with another example"):
        scores(seeded(nn.Linear, 6, 3), **data)


def test_an_output_that_depends_on_the_rest_of_the_batch_is_refused():
    def contrastive(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        embedded = F.normalize(module(batch[0]))
        return F.cross_entropy(embedded @ embedded.T, torch.arange(len(embedded)), reduction="none")

    message = r"example \d+ at checkpoint 0 .*alone and another number in a batch.*ContrastiveMargin"
    with pytest.raises(ValueError, match=message):
        METHODS["conjugate_gradient"](seeded(Once), output=NegativeLoss(contrastive))
    no_statistics = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ValueError, match=r"Sequential has no output for one example alone.*track_running_stats=True"):
        METHODS["explicit"](no_statistics)


class Encoder(nn.Module):
    """PyTorch has a fused path for it where nothing is differentiated, with other outputs for padded rows."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=True).requires_grad_(False)
        self.head = nn.Linear(4, 3)

    def forward(self, inputs: Tensor, keep: Tensor) -> Tensor:
        return self.head(self.encoder(inputs, src_key_padding_mask=~keep).mean(1))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*nested tensors.*", "ignore:.*norm_first.*")
@pytest.mark.parametrize("name", METHODS)
def test_padded_rows_of_a_transformer_count_alike_in_gradients_and_curvature(name):
    generator = torch.Generator().manual_seed(0)
    keep = torch.arange(5) < torch.randint(1, 6, (N, 1), generator=generator)
    keep[0] = True
    data = TensorDataset(torch.randn(N, 5, 4, generator=generator), keep, TRAIN.tensors[1])
    model = seeded(Encoder)
    scores = METHODS[name](model, data, data, precision="64-true")
    assert relative_error(scores, reference(model, data, data)) < 1e-3
    assert torch.backends.mha.get_fastpath_enabled()


class Words(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.words, self.head = layer, nn.Linear(5, 3)

    def forward(self, words: Tensor) -> Tensor:
        hidden = self.words(words)
        return self.head(torch.tanh(hidden if hidden.ndim == 2 else hidden.mean(1)))


WORDS = TensorDataset(torch.randint(9, (N, 3), generator=torch.Generator().manual_seed(0)), TRAIN.tensors[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_sparse_embeddings_have_the_scores_of_dense_ones(name):
    model = seeded(lambda: Words(nn.Embedding(9, 5, sparse=True)))
    scores = METHODS[name](model, WORDS, WORDS, precision="64-true")
    assert relative_error(scores, reference(model, WORDS, WORDS)) < 1e-4
    assert model.words.sparse


@pytest.mark.parametrize("sparse", [False, True])
def test_bags_of_embeddings_have_first_derivatives_alone(sparse):
    model = seeded(lambda: Words(nn.EmbeddingBag(9, 5, sparse=sparse)))
    scores = METHODS["explicit"](model, WORDS, WORDS, precision="64-true")
    assert relative_error(scores, reference(model, WORDS, WORDS)) < 1e-6
    with pytest.raises(ValueError, match=r"differentiates the model twice.*_embedding_bag_backward.*EKFACInfluence"):
        METHODS["conjugate_gradient"](model, WORDS, WORDS)
    head = METHODS["conjugate_gradient"](model, WORDS, WORDS, parameters="head.*")
    model.words.requires_grad_(False)
    assert relative_error(head, reference(model, WORDS, WORDS)) < 1e-4


class _OnceTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs: Tensor) -> Tensor:
        result = inputs.tanh()
        ctx.save_for_backward(result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * (1 - ctx.saved_tensors[0] ** 2)


class OnceDifferentiable(Once):
    def hidden(self, inputs: Tensor) -> Tensor:
        return _OnceTanh.apply(self.first(inputs))


def test_second_derivatives_that_autograd_lacks_are_noticed():
    model = seeded(OnceDifferentiable)
    scores = METHODS["explicit"](model, precision="64-true")
    assert relative_error(scores, reference(model, TRAIN, TARGETS)) < 1e-6
    for solver in (ConjugateGradient(), LiSSA(depth=10), Arnoldi(10, 5)):
        with pytest.raises(ValueError, match=r"checkpoint 0 .*with the Gauss-Newton matrix would be wrong.*EKFAC"):
            influence(solver)(model)
    with pytest.raises(ValueError, match="products with the Hessian would be wrong"):
        influence(Explicit(), "exact")(model)


class Complex(Once):
    def __init__(self) -> None:
        super().__init__()
        self.phases = nn.Parameter(torch.randn(5, dtype=torch.complex64))

    def hidden(self, inputs: Tensor) -> Tensor:
        return (super().hidden(inputs) * self.phases).real


def test_complex_parameters_are_named():
    model = seeded(Complex)
    with pytest.raises(ValueError, match=r"phases is of torch.complex64, but .* leave it out with parameters="):
        METHODS["explicit"](model)
    scores = METHODS["conjugate_gradient"](model, parameters=["first.*", "head.*"])
    model.phases.requires_grad_(False)
    model.phases.data = model.phases.data.to(torch.complex128)
    assert relative_error(scores, reference(model, TRAIN, TARGETS)) < 1e-4


class Empty(Once):
    def __init__(self) -> None:
        super().__init__()
        self.nothing, self.narrow, self.wide = nn.Parameter(torch.zeros(0)), nn.Linear(5, 0), nn.Linear(0, 5)

    def hidden(self, inputs: Tensor) -> Tensor:
        hidden = super().hidden(inputs)
        return hidden + self.wide(self.narrow(hidden)) + self.nothing.sum()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", METHODS)
def test_parameters_without_elements_are_no_matter(name):
    model = seeded(Empty)
    assert relative_error(METHODS[name](model), reference(model, TRAIN, TARGETS)) < 1e-3


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_ekfac_leaves_out_layers_without_inputs():
    model = seeded(Empty)
    with pytest.warns(UserWarning, match="wide.bias: wide .Linear.: a bias without its weight"):
        scores = ekfac(model)
    torch.testing.assert_close(scores, ekfac(model, parameters=["first.*", "head.*"]))


class Changing(Once):
    """Changes its batch."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs.mul_(0.5))


def test_code_that_changes_its_batch_changes_no_scores():
    model = seeded(Changing)
    expected = reference(model, TRAIN, TARGETS)
    for name, scores in METHODS.items():
        train, targets = (TensorDataset(*(part.clone() for part in data.tensors)) for data in (TRAIN, TARGETS))
        assert relative_error(scores(model, train, targets), expected) < 1e-3, name


@pytest.mark.parametrize("name", ["explicit", "ekfac"])
def test_examples_that_are_not_finite_are_named(name):
    inputs, labels = TRAIN.tensors
    broken = inputs.clone()
    broken[7, 2] = torch.nan
    with pytest.raises(ValueError, match=r"the feature of example 7 at checkpoint 0 .* is not finite"):
        {**METHODS, "ekfac": ekfac}[name](seeded(nn.Linear, 6, 3), train=TensorDataset(broken, labels))


def test_solvers_that_are_none():
    model = nn.Linear(6, 3)
    for solver in ("cg", Explicit):
        with pytest.raises(TypeError, match=r"expected solver as an object such as ConjugateGradient\(\), got"):
            InfluenceFunction(model, [model.state_dict()], output=ClassificationMargin(), solver=solver)
    for options in ({"depth": 0}, {"repeats": 1.5}, {"batch_size": True}):
        with pytest.raises(ValueError, match="to be a positive integer"):
            LiSSA(**options)
    with pytest.raises(ValueError, match="scale must be above 0 and finite"):
        LiSSA(scale=0.0)
