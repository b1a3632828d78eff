"""MultiLabelMargin against binary cross-entropy in float64, at certainty, and bad labels."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, vmap

from lightning_trak.outputs import ClassificationMargin, MultiLabelMargin, SegmentationMargin


def losses(logits, labels, reduction="mean"):
    each = F.binary_cross_entropy_with_logits(logits.double(), labels.double(), reduction="none")
    return each.mean(1) if reduction == "mean" else each.sum(1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool, torch.uint8])
def test_margin_loss_and_derivatives(reduction, dtype):
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 2, (6, 4)).to(dtype)
    output = MultiLabelMargin(reduction)
    margin, expected = output.output(nn.Identity(), (logits, labels)), losses(logits, labels, reduction)
    p = torch.exp(-expected)
    torch.testing.assert_close(margin, p.log() - (1 - p).log())
    torch.testing.assert_close(output.loss(margin), expected)
    slope, curvature = output.derivatives(margin)
    torch.testing.assert_close(slope, (1 - p).detach())
    torch.testing.assert_close(curvature, (p * (1 - p)).detach())
    # The loss gradient is that of training.
    (mine,) = torch.autograd.grad(margin, logits, -slope, retain_graph=True)
    (trained,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(mine, trained)
    assert torch.autograd.gradcheck(lambda z: output.output(nn.Identity(), (z, labels)), logits)
    assert torch.autograd.gradgradcheck(lambda z: output.output(nn.Identity(), (z, labels)), logits)


def test_one_label_is_a_binary_classifier():
    batch = torch.randn(5, 1, dtype=torch.float64) * 10, torch.tensor([[0], [1], [1], [0], [1]])
    expected = ClassificationMargin().output(nn.Identity(), batch)
    torch.testing.assert_close(MultiLabelMargin().output(nn.Identity(), batch), expected)


def test_unknown_labels_do_not_count():
    logits, labels = torch.randn(3, 4), torch.randint(0, 2, (3, 4))
    output = MultiLabelMargin()
    expected = output.output(nn.Identity(), (logits[:, 1:], labels[:, 1:]))
    labels[:, 0], logits[1, 0] = -100, torch.inf
    logits.requires_grad_()
    found = output.output(nn.Identity(), (logits, labels))
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert not gradient[:, 0].any()
    assert gradient.isfinite().all()
    sums = MultiLabelMargin("sum", ignore_index=-1).output(nn.Identity(), (logits, labels.clamp(min=-1)))
    torch.testing.assert_close(sums, MultiLabelMargin("sum").output(nn.Identity(), (logits[:, 1:], labels[:, 1:])))


@pytest.mark.parametrize("scale", [20.0, 90.0, 300.0, -300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_certainty_values_and_gradients_are_right(scale, dtype):
    """All labels have one margin, so that the margin of all together is this margin, and each has a third of it."""
    logits, labels = torch.tensor([[scale, -scale, scale]], dtype=dtype), torch.tensor([[1, 0, 1]])
    output = MultiLabelMargin()
    margin = output.output(nn.Identity(), (logits, labels))
    torch.testing.assert_close(margin, torch.tensor([scale], dtype=dtype))
    gradients = vmap(grad(lambda z, y: output.output(nn.Identity(), (z[None], y[None]))[0]))(logits, labels)
    torch.testing.assert_close(gradients, torch.tensor([[1.0, -1.0, 1.0]], dtype=dtype) / 3)


def test_half_precision_logits_are_reduced_in_float32():
    logits, labels = torch.randn(5, 3).bfloat16(), torch.randint(0, 2, (5, 3))
    margin = MultiLabelMargin().output(nn.Identity(), (logits, labels))
    assert margin.dtype == torch.float32
    torch.testing.assert_close(MultiLabelMargin().loss(margin).double(), losses(logits, labels))


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (torch.tensor([[1, 2, 0]]), "one of its labels is 2; expected 1, 0, or -100"),
        (torch.tensor([[0.3, 1, 0]]), "one of its labels is 0.3"),
        (torch.tensor([[torch.nan, 1, 0]]), "one of its labels is nan"),
        (torch.tensor([[-100, -100, -100]]), "all of its labels are -100"),
        (torch.tensor([[156, 1, 0]], dtype=torch.uint8), "one of its labels is 156"),
    ],
)
def test_bad_labels_have_no_margin_and_touch_no_other_example(labels, reason):
    logits = torch.randn(2, 3, requires_grad=True)
    good = torch.tensor([[1, 0, 1]]).to(labels.dtype)
    output = MultiLabelMargin()
    margin = output.output(nn.Identity(), (logits, torch.cat([labels, good])))
    assert margin.isnan().tolist() == [True, False]
    (gradient,) = torch.autograd.grad(margin.sum(), logits)
    assert gradient.isnan().any(1).tolist() == [True, False]
    assert reason in output.explain_nan(nn.Identity(), (logits[:1], labels))
    assert output.explain_nan(nn.Identity(), (logits[:1], good)) is None


def test_other_shapes_and_arguments_are_refused():
    for logits, labels in (((4, 3), (4,)), ((4,), (4,)), ((4, 3), (4, 2)), ((4, 3, 2), (4, 3, 2))):
        with pytest.raises(ValueError, match=r"one shape \(batch, labels\), received .*ClassificationMargin"):
            MultiLabelMargin().output(nn.Identity(), (torch.randn(logits), torch.ones(labels)))
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum'"):
        MultiLabelMargin("none")
    for kind in (MultiLabelMargin, SegmentationMargin):
        for wrong in (None, "255", True, 255.0):
            with pytest.raises(TypeError, match=f"ignore_index must be an integer, got {wrong!r}"):
                kind(ignore_index=wrong)
    with pytest.raises(ValueError, match="ignore_index other than 0 and 1"):
        MultiLabelMargin(ignore_index=0)


def test_probabilities_in_place_of_logits_are_suspicious():
    batch, layer = (torch.randn(1, 3), torch.tensor([[0, 1, 1, 0]])), nn.Linear(3, 4)
    assert "MultiLabelMargin(forward=)" in MultiLabelMargin().suspicion(nn.Sequential(layer, nn.Sigmoid()), batch)
    assert MultiLabelMargin().suspicion(layer, batch) is None
