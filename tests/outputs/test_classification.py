"""ClassificationMargin against probabilities in float64, and every kind of batch."""

import dataclasses
import math
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.func import grad, vmap

from lightning_trak.outputs import ClassificationMargin
from lightning_trak.outputs.margins import log_odds


def naive(logits, labels):
    """log p - log(1 - p) from float64 probabilities, by the definition."""
    p = logits.double().softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return p.log() - (1 - p).log()


def exact(logits, label):
    """The margin of one example by correctly rounded sums, without softmax."""
    values = [float(value) for value in logits]
    own = values.pop(label)
    return -math.log(math.fsum(math.exp(value - own) for value in values))


@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
def test_margin_and_gradients_equal_the_definition(classes):
    logits = torch.randn(8, classes, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, classes, (8,))
    margin = log_odds(logits, labels)
    torch.testing.assert_close(margin, naive(logits, labels))
    (gradient,) = torch.autograd.grad(margin.sum(), logits)
    (expected,) = torch.autograd.grad(naive(logits, labels).sum(), logits)
    torch.testing.assert_close(gradient, expected)
    if classes <= 10:
        assert torch.autograd.gradcheck(lambda z: log_odds(z, labels), logits)


@pytest.mark.parametrize("gap", [0, 5, 16, 17, 18, 30, 80, -16, -30, -80])
def test_float32_margin_near_certainty(gap):
    logits = torch.randn(12)
    logits[4] += gap
    assert log_odds(logits, torch.tensor(4)).item() == pytest.approx(exact(logits, 4), rel=2e-6, abs=2e-6)


def test_gradients_are_finite_and_right_at_certainty_under_vmap():
    logits = torch.tensor([[200.0, 0.0, 1.0], [-200.0, 0.0, 0.0], [0.0, 0.0, 0.0], [3e4, -3e4, 0.0]])
    labels = torch.tensor([0, 0, 0, 1])
    gradients = vmap(grad(log_odds))(logits, labels)
    e = math.e
    expected = [[1, -1 / (1 + e), -e / (1 + e)], [1, -0.5, -0.5], [1, -0.5, -0.5], [-1, 1, 0]]
    torch.testing.assert_close(gradients, torch.tensor(expected))


def test_two_classes_are_the_difference_of_logits():
    logits = torch.randn(6, 2)
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    expected = logits[:, 1] - logits[:, 0]
    torch.testing.assert_close(log_odds(logits, labels), torch.where(labels == 1, expected, -expected))


def test_a_class_that_is_ruled_out_does_not_disturb_the_others():
    logits = torch.tensor([[1.0, 2.0, -torch.inf]], requires_grad=True)
    margin = log_odds(logits, torch.tensor([0]))
    margin.sum().backward()
    assert margin.item() == pytest.approx(-1)
    assert logits.grad.tolist() == [[1, -1, 0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_reduced_in_float32(dtype):
    logits = torch.randn(5, 9).to(dtype)
    labels = torch.randint(0, 9, (5,))
    margin = log_odds(logits, labels)
    assert margin.dtype == torch.float32
    torch.testing.assert_close(margin.double(), naive(logits, labels), rtol=1e-5, atol=1e-5)
    binary = ClassificationMargin().output(nn.Identity(), (logits[:, 0], torch.ones(5)))
    assert binary.dtype == torch.float32
    assert torch.equal(binary, logits[:, 0].float())


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool, torch.uint8])
def test_one_logit_is_a_binary_classifier(shape, dtype):
    logits = torch.randn(shape, dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    margin = ClassificationMargin().output(nn.Identity(), (logits, labels.to(dtype).reshape(shape)))
    p = torch.where(labels == 1, logits.reshape(-1).sigmoid(), 1 - logits.reshape(-1).sigmoid())
    torch.testing.assert_close(margin, p.log() - (1 - p).log())


class Named(nn.Module):
    """Takes keywords, and gives back whatever ``wrap`` makes of its logits."""

    def __init__(self, wrap=lambda logits: logits):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.wrap = wrap

    def forward(self, x, scale=None):
        return self.wrap(self.linear(x if scale is None else x * scale))


Result = namedtuple("Result", ["logits", "hidden"])
Batch = namedtuple("Batch", ["x", "y"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: {"logits": logits, "hidden": None},
        lambda logits: Result(logits, None),
        lambda logits: (logits, None),
        lambda logits: [logits],
    ],
)
def test_kinds_of_results(wrap):
    module = Named(wrap)
    x, y = torch.randn(5, 4), torch.randint(0, 3, (5,))
    torch.testing.assert_close(
        ClassificationMargin().output(module, (x, y)).double(), naive(module.linear(x), y), rtol=1e-5, atol=1e-5
    )


def test_kinds_of_batches():
    module = Named()
    x, y, scale = torch.randn(5, 4), torch.randint(0, 3, (5,)), torch.rand(5, 1)
    output = ClassificationMargin()
    plain, scaled = (output.output(module, batch) for batch in ((x, y), (x, scale, y)))
    torch.testing.assert_close(plain.double(), naive(module(x), y), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scaled.double(), naive(module(x * scale), y), rtol=1e-5, atol=1e-5)
    for batch in ([x, y], Batch(x, y), (x, y[:, None]), (x, y.int()), {"x": x, "labels": y}, {"x": x, "label": y}):
        torch.testing.assert_close(output.output(module, batch), plain)
    torch.testing.assert_close(output.output(module, {"x": x, "scale": scale, "labels": y}), scaled)
    torch.testing.assert_close(ClassificationMargin(labels_key="y").output(module, {"x": x, "y": y}), plain)


def test_forward_calls_the_model_in_any_way():
    @dataclasses.dataclass
    class Graph:
        nodes: torch.Tensor
        y: torch.Tensor

    module = Named()
    x, y = torch.randn(5, 4), torch.randint(0, 3, (5,))
    output = ClassificationMargin(forward=lambda module, batch: {"logits": module(batch.nodes)}, labels_key="y")
    torch.testing.assert_close(output.output(module, Graph(x, y)), ClassificationMargin().output(module, (x, y)))
    with pytest.raises(TypeError, match=r"cannot tell how to call Named on a Graph.*pass forward="):
        ClassificationMargin(labels_key="y").output(module, Graph(x, y))
    with pytest.raises(TypeError, match=r"other things than Named takes; .* lambda module, batch: module\(batch\)"):
        ClassificationMargin().output(module, {"ids": x, "labels": y})


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (torch.randn(4, 3), torch.tensor([0, -100, 2, 3])),
        (torch.randn(4, 1), torch.tensor([0, -1, 1, 2])),
        (torch.randn(4), torch.tensor([0.0, 0.9, 1.0, -1.0])),
    ],
)
def test_a_label_outside_the_classes_is_nan_and_touches_no_other_example(logits, labels):
    logits.requires_grad_()
    margin = ClassificationMargin().output(nn.Identity(), (logits, labels))
    assert margin.isnan().tolist() == [False, True, False, True]
    (gradient,) = torch.autograd.grad(margin.sum(), logits)
    assert gradient.reshape(4, -1).isnan().any(1).tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ((4, 3), torch.rand(4), r"integer class indices for 3 classes, received torch.float32"),
        ((4, 3), torch.zeros(4, 3).long(), r"labels of shape \(batch,\) or \(batch, 1\), received \(4, 3\)"),
        ((4, 3, 2), torch.zeros(4).long(), r"for 4 labels, received \(4, 3, 2\)"),
        ((3, 2), torch.zeros(4).long(), r"for 4 labels, received \(3, 2\)"),
    ],
)
def test_other_tasks_are_refused(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        ClassificationMargin().output(nn.Identity(), (torch.randn(logits), labels))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_probabilities_in_place_of_logits_are_suspicious(dtype):
    output, labels = ClassificationMargin(), torch.tensor([2])
    for _ in range(20):
        logits = torch.randn(1, 5, dtype=dtype)
        assert "returns probabilities" in output.suspicion(nn.Softmax(1), (logits, labels))
        for right in (nn.Identity(), nn.LogSoftmax(1), nn.ReLU()):
            assert output.suspicion(right, (logits, labels)) is None


@pytest.mark.parametrize("last", [nn.Sigmoid(), nn.Sequential(nn.Sigmoid(), nn.Flatten(0))])
def test_one_probability_in_place_of_a_logit_is_suspicious(last):
    output, batch, layer = ClassificationMargin(), (torch.randn(1, 3), torch.tensor([1])), nn.Linear(3, 1)
    assert "torch.logit" in output.suspicion(nn.Sequential(layer, last), batch)
    assert output.suspicion(layer, batch) is None
    assert output.suspicion(nn.Sequential(nn.Linear(3, 3), nn.Sigmoid(), layer), batch) is None


@pytest.mark.parametrize(
    ("batch", "kind", "message"),
    [
        (torch.randn(3, 4), TypeError, r"expected a batch \(inputs, ..., labels\).*received a Tensor"),
        ((torch.randn(3, 4),), ValueError, r"a tuple of 1; for targets .* labels, .*\"predicted\".* regression any"),
        ({"x": torch.randn(3, 4), "y": 1}, ValueError, r"under 'labels' or 'label'.*keys x, y; .*labels_key="),
        ((torch.randn(3, 4), ["cat", "dog", "cat"]), TypeError, r"labels as a Tensor, received a list"),
        ("text", TypeError, r"received a str"),
    ],
)
def test_batches_without_labels_are_refused(batch, kind, message):
    with pytest.raises(kind, match=message):
        ClassificationMargin().output(nn.Linear(4, 3), batch)


@pytest.mark.parametrize(
    "wrap", [lambda logits: {"prediction": logits}, lambda logits: (), lambda logits: (None, logits)]
)
def test_results_without_logits_are_refused(wrap):
    with pytest.raises(TypeError, match=r"Named returned a (dict|tuple) without logits.*forward="):
        ClassificationMargin().output(Named(wrap), (torch.randn(3, 4), torch.zeros(3).long()))


def test_a_fraction_is_no_class_to_compare():
    output = ClassificationMargin(lambda module, batch: batch[0], against=2)
    found = output.output(nn.Identity(), (torch.randn(2, 3), torch.tensor([0.5, 1.0])))
    assert found.isnan().tolist() == [True, False]
