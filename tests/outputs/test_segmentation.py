"""SegmentationMargin against the mean cross-entropy of pixels in float64; kinds of maps, and bad labels."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_trak.outputs import ClassificationMargin, SegmentationMargin


@pytest.mark.parametrize("positions", [(7,), (3, 5), (2, 3, 2)])
def test_margin_loss_and_gradients(positions):
    logits = torch.randn(4, 3, *positions, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 3, (4, *positions))
    labels[0, 0] = labels[2, 1] = 255
    counts = (labels != 255).flatten(1).sum(1)
    expected = F.cross_entropy(logits, labels, reduction="none", ignore_index=255).flatten(1).sum(1) / counts
    output = SegmentationMargin(ignore_index=255)
    margin = output.output(nn.Identity(), (logits, labels))
    torch.testing.assert_close(margin, -torch.log(torch.exp(expected) - 1))
    torch.testing.assert_close(output.loss(margin), expected)
    slope, _ = output.derivatives(margin)
    (mine,) = torch.autograd.grad(margin, logits, -slope)
    (trained,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(mine, trained)


def test_one_pixel_is_a_classifier():
    logits, labels = torch.randn(5, 3, dtype=torch.float64) * 20, torch.randint(0, 3, (5,))
    found = SegmentationMargin().output(nn.Identity(), (logits[..., None], labels[:, None]))
    torch.testing.assert_close(found, ClassificationMargin().output(nn.Identity(), (logits, labels)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_one_channel_is_a_mask(dtype):
    logits, labels = torch.randn(4, 1, 3, 3, dtype=torch.float64), torch.randint(0, 2, (4, 3, 3))
    two = torch.cat([torch.zeros_like(logits), logits], 1)
    found = SegmentationMargin().output(nn.Identity(), (logits, labels.to(dtype)))
    torch.testing.assert_close(found, SegmentationMargin().output(nn.Identity(), (two, labels)))


def test_pixels_that_are_certain():
    """In float32 their losses are below the smallest number."""
    labels = torch.randint(0, 3, (2, 4, 4))
    logits = (F.one_hot(labels, 3).movedim(-1, 1) * 200.0).requires_grad_()
    margin = SegmentationMargin().output(nn.Identity(), (logits, labels))
    torch.testing.assert_close(margin, torch.full((2,), 200.0 - float(torch.tensor(2.0).log())))
    (gradient,) = torch.autograd.grad(margin.sum(), logits)
    own = gradient.gather(1, labels[:, None])
    torch.testing.assert_close(own, torch.full_like(own, 1 / 16))


@pytest.mark.parametrize(
    ("label", "channels", "reason"),
    [
        (3, 3, "one of its labels is 3, and the model has 3 classes, 0 to 2; name .* by ignore_index="),
        (-1, 3, "one of its labels is -1"),
        (2, 1, "one of its labels is 2, and the model has 2 classes"),
    ],
)
def test_a_label_outside_the_classes_has_no_margin(label, channels, reason):
    logits, labels = torch.randn(2, channels, 2, 2), torch.zeros(2, 2, 2, dtype=torch.long)
    labels[0, 1, 1] = label
    output = SegmentationMargin()
    assert output.output(nn.Identity(), (logits, labels)).isnan().tolist() == [True, False]
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(output.explain_nan(nn.Identity(), (logits[:1], labels[:1])))
    assert output.explain_nan(nn.Identity(), (logits[1:], labels[1:])) is None


def test_a_map_without_labels_has_no_margin():
    logits, labels = torch.randn(2, 3, 2, 2, requires_grad=True), torch.zeros(2, 2, 2, dtype=torch.long)
    labels[1] = -100
    output = SegmentationMargin()
    margin = output.output(nn.Identity(), (logits, labels))
    assert margin.isnan().tolist() == [False, True]
    (gradient,) = torch.autograd.grad(margin.sum(), logits)
    assert gradient.flatten(1).isnan().any(1).tolist() == [False, True]
    assert "all of its labels are -100" in output.explain_nan(nn.Identity(), (logits[1:], labels[1:]))


@pytest.mark.parametrize(
    ("logits", "labels"),
    [((2, 3, 4, 4), (2, 4)), ((2, 3, 4, 4), (2, 4, 5)), ((2, 3), (2,)), ((2, 4, 4, 3), (2, 4, 4)), ((2, 3, 4), (1, 4))],
)
def test_maps_that_do_not_fit_are_refused(logits, labels):
    with pytest.raises(ValueError, match=r"expected logits of shape \(batch, classes, \*positions\).*received"):
        SegmentationMargin().output(nn.Identity(), (torch.randn(logits), torch.zeros(labels, dtype=torch.long)))


def test_soft_labels_are_refused():
    with pytest.raises(ValueError, match="integer class indices, received"):
        SegmentationMargin().output(nn.Identity(), (torch.randn(2, 3, 4, 4), torch.rand(2, 4, 4)))
