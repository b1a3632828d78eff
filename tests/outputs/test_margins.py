"""The blockwise margin: the same values and derivatives as the plain formula."""

import pytest
import torch

from lightning_trak.outputs import margins


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(margins, "_CPU_BLOCK", 12)  # two rows of five classes


def make(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 5, generator=generator, dtype=torch.float64).to(dtype)
    return logits, torch.randint(5, (3, 5), generator=generator)


def plain(logits, labels):
    probabilities = logits.softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return (probabilities / (1 - probabilities)).log()


def test_values_and_gradients():
    logits, labels = make()
    torch.testing.assert_close(margins.log_odds(logits, labels), plain(logits, labels))
    mine = torch.func.grad(lambda x: margins.log_odds(x, labels).square().sum())(logits)
    expected = torch.func.grad(lambda x: plain(x, labels).square().sum())(logits)
    torch.testing.assert_close(mine, expected)


def test_first_and_second_derivatives():
    logits, labels = make()
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: margins.log_odds(x, labels), logits)
    assert torch.autograd.gradgradcheck(lambda x: margins.log_odds(x, labels), logits)


def test_forward_mode():
    logits, labels = make()
    changes = torch.randn(4, *logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def along(function):
        return torch.func.vmap(
            lambda change: torch.func.jvp(lambda x: function(x, labels), (logits,), (change,)), out_dims=(None, 0)
        )(changes)

    for mine, expected in zip(along(margins.log_odds), along(plain), strict=True):
        torch.testing.assert_close(mine, expected)


def test_logits_that_are_not_contiguous():
    logits, labels = make()
    torch.testing.assert_close(margins.log_odds(logits.mT, labels), plain(logits.mT, labels))
    gradient = torch.func.grad(lambda x: margins.log_odds(x.mT, labels).sum())(logits)
    expected = torch.func.grad(lambda x: plain(x.mT, labels).sum())(logits)
    torch.testing.assert_close(gradient, expected)


def test_half_precision_is_summed_in_float32():
    logits, labels = make(torch.bfloat16)
    result = margins.log_odds(logits, labels)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, plain(logits.double(), labels).float(), atol=1e-5, rtol=1e-5)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(margins.log_odds(logits, labels).sum(), logits)
    assert gradient.dtype == torch.bfloat16


@pytest.mark.parametrize(("dtype", "label"), [(torch.int8, 100), (torch.uint8, 240)])
def test_labels_of_few_bits_may_stand_for_more_classes_than_their_dtype_can_count(dtype, label):
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([label, 7])
    assert torch.equal(margins.log_odds(logits, labels.to(dtype)), margins.log_odds(logits, labels))
