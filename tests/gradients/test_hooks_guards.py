"""What the hook engine refuses, what it notices, and what it leaves behind: nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_trak.gradients import HookEngine, Layer, LoopEngine, MixedEngine, coverage_report, select_parameters
from lightning_trak.gradients.batch import ExampleBatch
from lightning_trak.gradients.hooks.layers import layer_of
from lightning_trak.outputs import ClassificationMargin
from tests.gradients.no_hooks import assert_no_hooks
from tests.zoo import specimen


class _Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_types_are_matched_exactly():
    replaced = nn.Linear(4, 4)
    replaced.forward = lambda x: x
    module = nn.Sequential(
        nn.Linear(4, 4), _Doubled(4, 4), replaced, nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    )
    names = select_parameters(module)
    left_out = HookEngine.uncovered(module, names)
    assert set(names) - set(left_out) == {"0.weight", "0.bias"}
    assert left_out["1.weight"] == "_Doubled: no layer class covers this type"
    assert left_out["2.bias"] == "Linear: its forward was replaced"
    with pytest.raises(
        ValueError,
        match=r"hooks cover 2 of 9 parameters and leave out .*_Doubled: .*: 1.weight \[[\d.]+%\].* MixedEngine",
    ):
        HookEngine(module, ClassificationMargin(), names)


def test_layers_that_mix_or_change_are_refused():
    module = nn.ModuleDict(
        {
            "mixing": nn.BatchNorm1d(3),
            "untracked": nn.BatchNorm1d(3, track_running_stats=False).eval(),
            "renormalized": nn.Embedding(3, 3, max_norm=1.0),
            "scaled": nn.Embedding(3, 3, scale_grad_by_freq=True),
            "parametrized": nn.utils.spectral_norm(nn.Linear(3, 3)),
        }
    )
    left_out = HookEngine.uncovered(module, select_parameters(module))
    for name, reason in {
        "mixing.weight": "training mode",
        "untracked.bias": "without running statistics",
        "renormalized.weight": "max_norm",
        "scaled.weight": "scale_grad_by_freq",
        "parametrized.weight_orig": "LinearLayer does not know the parameter 'weight_orig'",
    }.items():
        assert reason in left_out[name]
    assert "parametrized.bias" not in left_out


def test_a_parameter_tied_to_an_uncovered_module_is_left_out():
    module = nn.Sequential(nn.Linear(3, 3), _Doubled(3, 3))
    module[1].weight = module[0].weight
    assert list(HookEngine.uncovered(module, select_parameters(module))) == ["0.weight", "1.bias"]


def test_the_report_names_shares_and_what_to_do():
    report = coverage_report({"b": "why"}, {"a": 30, "b": 10})
    assert report.startswith("hooks cover 1 of 2 parameters and leave out 25% of their 40 elements: why: b [25%].")
    assert "parameters=" in report
    assert "Layer" in report
    adapters = [f"{i}.lora" for i in range(100)]
    report = coverage_report(dict.fromkeys(adapters, "why") | {"c": "else"}, dict.fromkeys([*adapters, "c"], 1))
    assert " elements: why: 0.lora [0.99%], 1.lora [0.99%], 2.lora [0.99%] and 97 more; else: c [0.99%]." in report
    assert coverage_report({}, {"a": 30}) == "hooks cover all 1 parameters (30 elements)"


def test_a_layer_of_ones_own():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor([1.5, 2.0, 0.5]))

        def forward(self, x):
            return self.gain * x

    module = nn.Sequential(nn.Linear(4, 3), Scale()).double()
    names = select_parameters(module)
    assert list(HookEngine.uncovered(module, names)) == ["1.gain"]

    class ScaleLayer(Layer, covers=[Scale]):
        parameter_names = ("gain",)

        def gradient(self, parameter, call):
            return (call.inputs * call.output_gradient).reshape(call.size, -1, 3).sum(1)

    assert isinstance(layer_of(module[1]), ScaleLayer)
    batch = (torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 0, 1]))
    expected = LoopEngine(module, ClassificationMargin(), names)(ExampleBatch(batch, 5))[1]
    rows = HookEngine(module, ClassificationMargin(), names)(ExampleBatch(batch, 5))[1]
    torch.testing.assert_close(rows, expected, rtol=1e-10, atol=1e-10)


class _Borrowed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(F.linear(self.a(x), self.b.weight) + self.b(x))


def test_check_finds_weights_used_elsewhere():
    module, batch = _Borrowed(), (torch.randn(3, 4), torch.tensor([0, 1, 2]))
    names = select_parameters(module)
    wrong = HookEngine(module, ClassificationMargin(), names).check(ExampleBatch(batch, 3))
    assert list(wrong) == ["b.weight"]
    assert "used outside its layer's forward" in wrong["b.weight"]
    rows = MixedEngine(module, ClassificationMargin(), names, wrong)(ExampleBatch(batch, 3))[1]
    torch.testing.assert_close(rows, LoopEngine(module, ClassificationMargin(), names)(ExampleBatch(batch, 3))[1])


class _TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.inner(x.transpose(0, 1)).mean(0))


def test_examples_that_are_not_in_the_first_dimension_are_refused():
    module, batch = _TimeFirst(), (torch.randn(3, 5, 4), torch.tensor([0, 1, 2]))
    names = select_parameters(module)
    engine = HookEngine(module, ClassificationMargin(), names)
    with pytest.raises(ValueError, match=r"cannot tell the examples apart in inner \(Linear\).*\(5, 1, 4\) for one ex"):
        engine(ExampleBatch(batch, 3))
    wrong = engine.check(ExampleBatch(batch, 3))
    assert list(wrong) == ["inner.weight", "inner.bias"]
    rows = MixedEngine(module, ClassificationMargin(), names, wrong)(ExampleBatch(batch, 3))[1]
    torch.testing.assert_close(rows, LoopEngine(module, ClassificationMargin(), names)(ExampleBatch(batch, 3))[1])


class _Folded(nn.Module):
    """Folds time into the batch, with time as the slower index: rows that look right and are not."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        folded = self.inner(x.transpose(0, 1).flatten(0, 1))
        return self.head(folded.unflatten(0, (x.shape[1], -1)).mean(0))


def test_check_finds_examples_folded_the_wrong_way_round():
    module, batch = _Folded(), (torch.randn(3, 5, 4), torch.tensor([0, 1, 2]))
    wrong = HookEngine(module, ClassificationMargin(), select_parameters(module)).check(ExampleBatch(batch, 3))
    assert list(wrong) == ["inner.weight", "inner.bias"]


class _Routed(nn.Module):
    """Sends the rows with a positive first entry through a layer, as a mixture of experts does."""

    def __init__(self):
        super().__init__()
        self.expert, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = x.clone()
        x[x[:, 0] > 0] = self.expert(x[x[:, 0] > 0])
        return self.head(x)


def test_routing_that_changes_from_batch_to_batch_is_an_error():
    module, output = _Routed(), ClassificationMargin()
    engine = HookEngine(module, output, select_parameters(module))
    engine(ExampleBatch((torch.ones(3, 4), torch.tensor([0, 1, 2])), 3))
    mixed = torch.ones(3, 4)
    mixed[1] = -1
    with pytest.raises(
        ValueError, match=r"expert \(Linear\) gave an output of shape \(2, 4\) in a batch of 3 examples"
    ):
        engine(ExampleBatch((mixed, torch.tensor([0, 1, 2])), 3))
    assert_no_hooks(module)


def test_an_output_that_is_not_one_scalar_per_example_is_refused():
    class Wrong(ClassificationMargin):
        def output(self, module, batch):
            return module(batch[0])

    module, _, batch, size = specimen("mlp")
    with pytest.raises(ValueError, match=r"Wrong.output returned shape \(5, 4\) for a batch of 5 examples"):
        HookEngine(module, Wrong(), select_parameters(module))(ExampleBatch(batch, size))


class _OwnRMSNorm(nn.Module):
    """As Llama has it, or Gemma, which adds one to the weight."""

    def __init__(self, added: float):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 4))
        self.added = added

    def forward(self, hidden_states):
        return (self.added + self.weight) * hidden_states * hidden_states.square().mean(-1, keepdim=True).rsqrt()


@pytest.mark.parametrize("added", [0.0, 1.0])
def test_a_normalization_of_ones_own_is_covered_by_what_it_computes(added):
    module = nn.Sequential(nn.Linear(4, 4), _OwnRMSNorm(added), nn.Linear(4, 3)).double()
    names, batch = select_parameters(module), (torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 0, 1]))
    assert HookEngine.uncovered(module, names) == {}
    expected = LoopEngine(module, ClassificationMargin(), names)(ExampleBatch(batch, 5))[1]
    rows = HookEngine(module, ClassificationMargin(), names)(ExampleBatch(batch, 5))[1]
    torch.testing.assert_close(rows, expected, rtol=1e-10, atol=1e-10)


class _Exponential(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.weight.exp() * x


def test_a_module_that_only_looks_like_a_normalization_is_refused():
    module = nn.Sequential(nn.Linear(4, 4), _Exponential(), nn.Linear(4, 3))
    batch = ExampleBatch((torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])), 5)
    with pytest.raises(ValueError, match="_Exponential is not affine in its weight"):
        HookEngine(module, ClassificationMargin(), select_parameters(module))(batch)


class _OnlySome(nn.Module):
    """Uses a layer's weight outside its forward for examples that begin with a negative number."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.inner(x) + F.linear(x, self.inner.weight) * (x[:, :1] < -0.5))


def test_weights_that_only_some_examples_use_elsewhere_are_found():
    module = _OnlySome()
    engine = HookEngine(module, ClassificationMargin(), select_parameters(module))
    inputs, labels = torch.rand(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    engine(ExampleBatch((inputs, labels), 6))
    inputs[4, 0] = -1
    with pytest.raises(ValueError, match=r"inner.weight is also used outside its layer's forward"):
        engine(ExampleBatch((inputs, labels), 6))


class _Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.places, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(x + self.places(torch.arange(x.shape[1]))).mean(1))


@pytest.mark.parametrize("length", [1, 2, 3])
def test_shared_positions_as_many_as_examples_or_one(length):
    module = _Positions().double()
    names, labels = select_parameters(module), torch.tensor([0, 1, 2])
    engine = HookEngine(module, ClassificationMargin(), names)
    inputs = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)).double()
    for part in (inputs[:, :2], inputs[:, :length]):  # the second one has another layout
        batch = ExampleBatch((part, labels), 3)
        expected = LoopEngine(module, ClassificationMargin(), names)(batch)[1]
        torch.testing.assert_close(engine(batch)[1], expected, rtol=1e-10, atol=1e-10)
