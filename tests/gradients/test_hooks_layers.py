"""What a class for a new type of layer must define, and what it gets without defining it."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_trak.gradients import HookEngine, Layer, LayerCall, LoopEngine, select_parameters
from lightning_trak.gradients.base import EngineError
from lightning_trak.gradients.batch import ExampleBatch
from lightning_trak.gradients.hooks import projector
from lightning_trak.gradients.hooks.layers import layer_of
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.projections import IdentityProjection, KroneckerProjection, SparseProjection

EXTENDING = Path(__file__).parents[2] / "docs" / "api" / "extending.md"


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    """Classes of these tests are forgotten."""
    monkeypatch.setattr(Layer, "_by_type", dict(Layer._by_type))


class Bilinear(nn.Module):
    """A parameter of three dimensions, under a name of its own."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.form = nn.Parameter(torch.randn(3, 4, 4, generator=generator))

    def forward(self, x):
        return torch.einsum("...i,oij,...j->...o", x, self.form, x)


def cover(**methods):
    def gradient(self, parameter, call):
        each = torch.einsum("ni,no,nj->noij", call.inputs, call.output_gradient, call.inputs)
        return each.unflatten(0, (call.size, -1)).sum(1)

    attributes = {"parameter_names": ("form",), "gradient": gradient, **methods}
    return type(Layer)("BilinearLayer", (Layer,), attributes, covers=[Bilinear])


def make(size=5):
    module = nn.Sequential(nn.Linear(4, 4), Bilinear()).double()
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(size, 4, generator=generator, dtype=torch.float64)
    return module, ExampleBatch((inputs, torch.arange(size) % 3), size)


def require_as_by_loop(module, batch, projection):
    """Hooks give the same projected gradients as a loop over examples. Returns their engine."""
    names = select_parameters(module)
    engine, loop = (kind(module, ClassificationMargin(), names) for kind in (HookEngine, LoopEngine))
    bound = projection.bind({name: p.shape for name, p in engine.parameters.items()}, 0, 0, torch.device("cpu"))
    found, expected = torch.zeros(2, batch.size, bound.dim, dtype=torch.float64)
    engine.project(batch, bound, found)
    loop.project(batch, bound, expected)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    return engine


@pytest.mark.parametrize(
    "projection", [IdentityProjection(), SparseProjection(32), KroneckerProjection(2, 3), KroneckerProjection(2, 3, 16)]
)
def test_its_gradient_is_enough_for_every_projection(projection, monkeypatch):
    cover()
    monkeypatch.setattr(projector, "_CPU_BYTES", 1)  # one example at a time
    module, batch = make()
    assert require_as_by_loop(module, batch, projection).check(batch) == {}


def test_a_shortcut_that_is_announced_and_not_defined_is_an_error(monkeypatch):
    monkeypatch.setattr(projector, "_CPU_BYTES", 1)
    monkeypatch.setattr(projector, "_CPU_ROWS", 1)
    layer = cover(has_rows=lambda self, parameter: True)
    module, batch = make()
    engine = HookEngine(module, ClassificationMargin(), select_parameters(module))
    shapes = {name: parameter.shape for name, parameter in engine.parameters.items()}
    bound = SparseProjection(32).bind(shapes, 0, 0, torch.device("cpu"))
    with pytest.raises(NotImplementedError, match=r"BilinearLayer must define gradient_rows\(\)"):
        engine.project(batch, bound, torch.zeros(batch.size, 32))
    with pytest.raises(NotImplementedError, match=r"BilinearLayer must define factors\(\)"):
        layer(module[1]).factors(LayerCall(torch.ones(1, 4), torch.ones(1, 3), 1))


class ScaledEmbedding(nn.Embedding):
    """As in Gemma and BART."""

    def forward(self, ids):
        return super().forward(ids) * 3.5


class OtherEmbedding(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids).tanh()


@pytest.mark.parametrize("projection", [IdentityProjection(), SparseProjection(32), KroneckerProjection(2, 3)])
def test_embeddings_that_scale_their_rows(projection):
    module = nn.Sequential(ScaledEmbedding(9, 4, padding_idx=0), nn.Flatten(), nn.Linear(12, 3)).double()
    batch = ExampleBatch((torch.tensor([[0, 3, 8], [3, 3, 1]]), torch.tensor([0, 2])), 2)
    assert not HookEngine.uncovered(module, select_parameters(module))
    require_as_by_loop(module, batch, projection)


def test_other_types_derived_from_embeddings_are_refused():
    module = nn.Sequential(OtherEmbedding(9, 4), nn.Flatten(), nn.Linear(12, 3))
    batch = ExampleBatch((torch.tensor([[0, 3, 8], [3, 3, 1]]), torch.tensor([0, 2])), 2)
    wrong = HookEngine(module, ClassificationMargin(), select_parameters(module)).check(batch)
    assert "OtherEmbedding does not multiply the rows of its weight" in wrong["0.weight"]


class Positions(nn.Embedding):
    """As in BART and OPT: positions from a mask or from a number, with an offset."""

    def forward(self, mask, start=0):
        return super().forward(((mask.cumsum(1) * mask + start) % self.num_embeddings).long())


class FirstRows(nn.Embedding):
    """As in Whisper: all examples share the rows."""

    def forward(self, mask, start=0):
        return self.weight[start : start + mask.shape[1]]


class Halved(nn.Embedding):
    def forward(self, mask, start=0):
        return self.weight[start : start + mask.shape[1]] / 2


class WithIds(nn.Embedding):
    def forward(self, mask, start=0):
        return super().forward(mask.long()), start


class Placed(nn.Module):
    """Adds the embeddings of positions to those of words."""

    def __init__(self, kind):
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(9, 4), kind(6, 4, padding_idx=None), nn.Linear(12, 3)

    def forward(self, ids):
        return self.head((self.words(ids) + self.places((ids != 0).long(), start=2)).tanh().flatten(1))


def placed(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Placed(kind).double()
    return module, ExampleBatch((torch.tensor([[0, 3, 8], [3, 3, 1], [1, 0, 0]]), torch.tensor([0, 2, 1])), 3)


@pytest.mark.parametrize("projection", [IdentityProjection(), SparseProjection(32), KroneckerProjection(2, 3)])
@pytest.mark.parametrize("kind", [Positions, FirstRows])
def test_embeddings_that_find_their_rows_themselves(kind, projection):
    module, batch = placed(kind)
    assert not HookEngine.uncovered(module, select_parameters(module))
    require_as_by_loop(module, batch, projection)


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Halved, "Halved changes the rows of its weight"), (WithIds, "WithIds returns more than rows of its weight")],
)
def test_embeddings_that_give_anything_else_are_refused(kind, message):
    module, _ = placed(kind)
    with pytest.raises(EngineError, match=message):
        layer_of(module.places).inputs_of((torch.ones(2, 3),), {"start": 1})


def test_a_class_without_gradient_cannot_be_used():
    class Empty(Layer, covers=[Bilinear]):
        parameter_names = ("form",)

    module, _ = make()
    with pytest.raises(TypeError, match=r"Empty.* gradient"):
        HookEngine(module, ClassificationMargin(), select_parameters(module))


def test_some_examples_of_a_call_keep_their_rows():
    call = LayerCall(torch.arange(12).view(6, 2), torch.arange(3).view(3, 1), 3)
    some = call.take(1, 3)
    assert some.inputs.tolist() == [[4, 5], [6, 7], [8, 9], [10, 11]]
    assert (some.output_gradient.tolist(), some.size) == ([[1], [2]], 2)


def test_the_example_in_the_documentation_runs():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        code = EXTENDING.read_text().split("```python\n")[1].split("```")[0]
        exec(compile(code, str(EXTENDING), "exec"), {"__name__": "extending"})
