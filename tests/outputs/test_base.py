"""ModelOutput's derivatives, context and fingerprint; NegativeLoss, RegressionOutput; the mixin."""

import functools
import json
import threading

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_trak.outputs import (
    CausalLMMargin,
    ClassificationMargin,
    ContrastiveMargin,
    ModelOutput,
    NegativeLoss,
    RegressionOutput,
    Seq2SeqLMMargin,
)
from lightning_trak.outputs.mixin import AttributionMixin, fixed_output
from lightning_trak.outputs.negative_loss import _told


class Custom(ModelOutput):
    """A user's own output, in the two methods that it takes."""

    def __init__(self, loss):
        self._loss = loss

    def output(self, module, batch):
        return module(batch).squeeze(-1)

    def loss(self, output):
        return self._loss(output)


OUTPUTS = [
    ClassificationMargin(),
    ContrastiveMargin(),
    CausalLMMargin(),
    Seq2SeqLMMargin(),
    NegativeLoss(lambda module, batch: module(batch)),
    RegressionOutput(),
]


def name(output):
    return type(output).__name__


def test_derivatives_follow_from_any_loss():
    f = torch.linspace(-3, 3, 13, dtype=torch.float64)
    q, r = Custom(lambda x: x.pow(4) + x.sin()).derivatives(f)
    torch.testing.assert_close(q, -(4 * f**3 + f.cos()))
    torch.testing.assert_close(r, 12 * f**2 - f.sin())


@pytest.mark.parametrize("loss", [lambda x: 3 * x, lambda x: -x, lambda x: x.clone()])
def test_a_linear_loss_has_exactly_zero_curvature(loss):
    q, r = Custom(loss).derivatives(torch.randn(5))
    torch.testing.assert_close(q, -loss(torch.ones(5)))
    assert (r == 0).all()
    assert r.shape == (5,)


def test_curvature_is_zero_where_the_slope_has_a_graph_without_the_output():
    _, r = Custom(lambda x: x * torch.ones(1, requires_grad=True)).derivatives(torch.randn(5))
    assert (r == 0).all()


def test_derivatives_of_an_empty_batch():
    q, r = ClassificationMargin().derivatives(torch.empty(0))
    assert q.shape == r.shape == (0,)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("output", OUTPUTS, ids=name)
def test_derivatives_where_autograd_is_off(output, context):
    expected = output.derivatives(torch.linspace(-2, 2, 7))
    with context():
        found = output.derivatives(torch.linspace(-2, 2, 7))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
        assert not one.requires_grad
        assert not one.is_inference()
        assert one.dtype == torch.float32


def test_derivatives_leave_the_graph_of_the_output_alone():
    weight = torch.ones(3, requires_grad=True)
    output = weight * torch.tensor([1.0, 2.0, 3.0])
    ClassificationMargin().derivatives(output)
    output.sum().backward()
    assert weight.grad.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("given", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_derivatives_are_float32_or_better(given, expected):
    q, r = ClassificationMargin().derivatives(torch.tensor([0.5, -1.0], dtype=given))
    assert q.dtype == r.dtype == expected


@pytest.mark.parametrize("output", [ClassificationMargin(), CausalLMMargin(), Seq2SeqLMMargin()], ids=name)
def test_q_and_r_of_a_margin_are_right_at_any_confidence(output):
    f = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([0.0, -0.0, 16.7, -16.7])])
    exact = f.double()
    q, r = output.derivatives(f)
    miss = 1 / (1 + exact.exp())  # 1 - p, every digit of it: exp(100) is finite in float64
    # atol: float32 has no more than this below its smallest normal number, which exp(-100) is.
    torch.testing.assert_close(q.double(), miss, rtol=1e-6, atol=1e-38)
    torch.testing.assert_close(r.double(), miss / (1 + (-exact).exp()), rtol=1e-6, atol=1e-38)
    loss = torch.where(exact > 0, (-exact).exp().log1p(), -exact + exact.exp().log1p())
    torch.testing.assert_close(output.loss(f).double(), loss, rtol=1e-6, atol=1e-38)


def test_q_and_r_of_the_contrastive_margin():
    f = torch.linspace(-100, 100, 2001)
    output = ContrastiveMargin()
    q, r = output.derivatives(f)
    miss = 1 / (1 + (f.double() / 2).exp())
    torch.testing.assert_close(q.double(), miss, rtol=1e-6, atol=0)
    torch.testing.assert_close(r.double(), miss / (1 + (-f.double() / 2).exp()) / 2, rtol=1e-6, atol=0)
    # Two directions of equal margin f/2 each lose -log p.
    torch.testing.assert_close(output.loss(f), -2 * F.logsigmoid(f / 2), rtol=1e-5, atol=1e-20)


def test_nan_outputs_have_nan_derivatives():
    q, r = ClassificationMargin().derivatives(torch.tensor([torch.nan, 0.0]))
    assert q.isnan().tolist() == r.isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda x: x.square().mean(),
            r"Custom.loss must return one loss per example: expected shape \(4,\).*received \(\)",
        ),
        (lambda x: x[:, None] ** 2, r"expected shape \(4,\).*received \(4, 1\)"),
        (lambda x: x.tolist(), r"received list"),
        (lambda x: x.detach() ** 2, r"must be differentiable"),
    ],
)
def test_a_loss_that_is_not_one_per_example_is_refused(loss, message):
    with pytest.raises(ValueError, match=message):
        Custom(loss).derivatives(torch.randn(4))


def test_negative_loss_is_the_empirical_fisher():
    output = NegativeLoss(lambda module, batch: module(batch))
    q, r = output.derivatives(torch.tensor([-3.0, 0.0, 5.0]))
    assert q.tolist() == r.tolist() == [1, 1, 1]
    assert output.loss(torch.tensor([-3.0])).item() == 3


def test_negative_loss_of_any_loss():
    module = nn.Linear(4, 3)
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    output = NegativeLoss(lambda module, batch: F.cross_entropy(module(batch[0]), batch[1], reduction="none"))
    expected = module(x).softmax(-1)[torch.arange(6), y].log()
    torch.testing.assert_close(output.output(module, (x, y)), expected)


def test_negative_loss_takes_a_scalar_for_one_example_only():
    output = NegativeLoss(lambda module, batch: F.mse_loss(module(batch["x"]), batch["y"]))
    module = nn.Linear(4, 2)
    batch = {"x": torch.randn(3, 4), "y": torch.randn(3, 2)}
    one = {key: value[:1] for key, value in batch.items()}
    torch.testing.assert_close(output.output(module, one), -(module(one["x"]) - one["y"]).square().mean().reshape(1))
    with pytest.raises(ValueError, match=r"one loss per example, shape \(batch,\), received shape \(\)"):
        output.output(module, batch)


@pytest.mark.parametrize(("weights", "reduction"), [([1.0, 3.0], "mean"), ([1.0, 1.0], "mean"), ([1.0, 3.0], "sum")])
def test_weights_that_cancel_in_a_batch_of_one_are_told(weights, reduction, recwarn):
    torch.manual_seed(0)
    module, batch = nn.Linear(4, 2), (torch.randn(2, 4), torch.tensor([0, 1]))
    output = NegativeLoss(lambda m, b: F.cross_entropy(m(b[0]), b[1], torch.tensor(weights), reduction=reduction))
    singles = [tuple(part[i : i + 1] for part in batch) for i in range(2)]
    alone = torch.cat([output.output(module, single) for single in singles])
    _told.clear()
    assert output.same_in_batch(module, batch, alone, 1e-4)
    said = [str(warning.message) for warning in recwarn if "weighted mean" in str(warning.message)]
    assert bool(said) == (weights == [1.0, 3.0] and reduction == "mean")


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [(lambda m, b: m(b).square(), r"received shape \(3, 2\)"), (lambda m, b: 1.0, "received float")],
)
def test_negative_loss_refuses_other_shapes(loss_fn, message):
    with pytest.raises(ValueError, match=message):
        NegativeLoss(loss_fn).output(nn.Linear(4, 2), torch.randn(3, 4))


@pytest.mark.parametrize("target_shape", [(5,), (5, 1)])
def test_regression_residual(target_shape):
    module = nn.Linear(3, 1)
    x, y = torch.randn(5, 3), torch.randn(target_shape)
    output = RegressionOutput()
    f = output.output(module, (x, y))
    torch.testing.assert_close(f, (x @ module.weight[0] + module.bias) - y.reshape(-1))
    q, r = output.derivatives(f)
    torch.testing.assert_close(q, (y.reshape(-1) - module(x).squeeze(1)).detach())
    assert (r == 1).all()
    for batch in ({"input": x, "labels": y}, {"input": x, "label": y}, [x, y]):
        torch.testing.assert_close(output.output(module, batch), f)
    forward = RegressionOutput(lambda module, batch: {"logits": module(batch["x"])}, labels_key="target")
    torch.testing.assert_close(forward.output(module, {"x": x, "target": y}), f)


def test_regression_takes_integer_targets_and_half_predictions():
    f = RegressionOutput().output(
        nn.Identity(), (torch.tensor([0.5, 1.5], dtype=torch.bfloat16), torch.tensor([300, 1]))
    )
    assert f.dtype == torch.float32
    assert f.tolist() == [-299.5, 0.5]  # 300 is no bfloat16 residual: the difference is taken in float32


@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        ((4, 2), (4,), r"predictions of shape \(batch,\) or \(batch, 1\), received \(4, 2\); .*NegativeLoss"),
        ((4,), (4, 2), r"targets of shape .*received \(4, 2\)"),
        ((4, 1), (3,), r"received 4 predictions and 3 targets"),
    ],
)
def test_regression_refuses_more_than_one_number_per_example(prediction, target, message):
    with pytest.raises(ValueError, match=message):
        RegressionOutput().output(nn.Identity(), (torch.randn(prediction), torch.randn(target)))


def test_fingerprints_are_json_and_tell_configurations_apart():
    outputs = [
        *OUTPUTS,
        NegativeLoss(lambda module, batch: F.cross_entropy(module(batch[0]), batch[1], reduction="none")),
        ClassificationMargin(forward=F.linear),
        ClassificationMargin(labels_key="target"),
        CausalLMMargin(pad_token_id=0),
        Seq2SeqLMMargin(pad_token_id=0),
        ContrastiveMargin(temperature=0.1),
        ContrastiveMargin(context_size=100),
        ContrastiveMargin(normalize=False),
    ]
    texts = [json.dumps(output.fingerprint(), sort_keys=True) for output in outputs]
    assert len(set(texts)) == len(texts)
    assert json.dumps(ClassificationMargin().fingerprint(), sort_keys=True) == texts[0]
    assert json.loads(texts[0])["class"] == "lightning_trak.outputs.classification.single_label.ClassificationMargin"


def test_fingerprint_of_a_users_output():
    class Weighted(Custom):
        def __init__(self):
            super().__init__(torch.square)
            self.weights = {"a": (1.0, 2.0)}
            self.reduce = functools.partial(torch.sum, dim=1)
            self.kind = nn.Linear

    found = Weighted().fingerprint()
    assert found["class"] == "test_fingerprint_of_a_users_output.<locals>.Weighted"
    assert found["attributes"] == {
        "context_size": 0,
        "for_targets": False,
        "predicts_labels": False,
        "numbered": False,
        "averages": False,
        "_loss": "torch._VariableFunctionsClass.square",  # since loss() reads it
        "weights": {"a": [1.0, 2.0]},
        "reduce": ["partial", "torch._VariableFunctionsClass.sum", [], {"dim": 1}],
        "kind": "torch.nn.modules.linear.Linear",
    }
    assert {"Custom.output", "Custom.loss"} < found["code"].keys()


def test_fingerprint_refuses_what_it_cannot_describe():
    output = Custom(torch.square)
    output.weights = threading.Lock()
    with pytest.raises(TypeError, match=r"Custom\.weights is or holds a lock, .*override fingerprint\(\)"):
        output.fingerprint()


def test_the_bank_is_no_part_of_the_fingerprint():
    output = ContrastiveMargin()
    before = output.fingerprint()
    output.set_context({"first": torch.randn(3, 2), "second": torch.randn(3, 2)})
    assert output.fingerprint() == before


def test_outputs_without_context():
    output = ClassificationMargin()
    assert output.context_size == 0
    assert output.make_context(nn.Linear(1, 1), []) == {}
    output.set_context({})
    with pytest.raises(ValueError, match="ClassificationMargin takes no context, received first"):
        output.set_context({"first": torch.ones(1)})


def test_the_mixin_hands_out_the_declared_output():
    class LitNet(AttributionMixin, L.LightningModule):
        def configure_model_output(self):
            return ClassificationMargin()

    assert isinstance(LitNet().configure_model_output(), ClassificationMargin)


def test_outputs_of_several_models_are_about_one_class():
    named = ClassificationMargin(labels=2)
    assert fixed_output(nn.Linear(1, 1), named) is named
    with pytest.raises(TypeError, match="may be about another class at each of them: name the class"):
        fixed_output(nn.Linear(1, 1), ClassificationMargin(labels="predicted"))


def test_the_mixin_says_what_to_do_when_nothing_is_declared():
    class LitNet(AttributionMixin, L.LightningModule):
        pass

    with pytest.raises(RuntimeError, match=r"override LitNet.configure_model_output\(self\)"):
        LitNet().configure_model_output()


def test_fingerprints_tell_functions_of_one_name_apart():
    def make(scale):
        return [NegativeLoss(lambda module, batch: module(batch).sum(1)), NegativeLoss(lambda module, batch: scale)]

    first, second = make(1)
    assert first.fingerprint() != second.fingerprint()
    assert first.fingerprint() == make(1)[0].fingerprint()
    losses = [nn.CrossEntropyLoss(label_smoothing=value) for value in (0.1, 0.0)]
    smooth, plain = (NegativeLoss(lambda module, batch, loss=loss: loss(module(batch[0]), batch[1])) for loss in losses)
    assert smooth.fingerprint() != plain.fingerprint()
    powers = [NegativeLoss(functools.partial(torch.pow, exponent=value)) for value in (2, 3)]
    assert powers[0].fingerprint() != powers[1].fingerprint()
