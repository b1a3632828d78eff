"""ContrastiveMargin against the contrastive loss itself, in float64; the bank and who is a negative."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_trak.outputs import ContrastiveMargin


class TwoTower(nn.Module):
    def __init__(self, dtype=torch.float64, wrap=None):
        super().__init__()
        self.image = nn.Linear(6, 4, dtype=dtype)
        self.text = nn.Linear(5, 4, dtype=dtype)
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=dtype))
        self.wrap = wrap

    def forward(self, images, texts):
        pair = self.image(images), self.text(texts)
        return pair if self.wrap is None else self.wrap(*pair)


def pairs(count, dtype=torch.float64):
    return torch.randn(count, 6, dtype=dtype), torch.randn(count, 5, dtype=dtype)


def ready(output, module, *batches):
    output.set_context(output.make_context(module, batches))
    return output


def definition(module, pair, negatives, temperature, normalize):
    """Both directions' log p - log(1 - p), from the probabilities of the pair among itself and the negatives."""
    images, texts = (torch.cat(parts) for parts in zip(pair, negatives, strict=True))
    first, second = module(images, texts)
    if normalize:
        first, second = first / first.norm(dim=1, keepdim=True), second / second.norm(dim=1, keepdim=True)
    # Negatives are constants.
    first, second = (torch.cat([part[:1], part[1:].detach()]) for part in (first, second))
    f = 0
    for logits in (first[0] @ second.T / temperature, second[0] @ first.T / temperature):
        p = logits.softmax(0)[0]
        f = f + p.log() - (1 - p).log()
    return f


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_margin_and_gradient_equal_the_definition(normalize, temperature):
    module = TwoTower()
    bank, targets = pairs(9), pairs(3)
    output = ready(ContrastiveMargin(temperature, normalize=normalize), module, bank)
    f = output.output(module, targets)
    for i in range(3):
        expected = definition(module, [part[i : i + 1] for part in targets], bank, temperature, normalize)
        torch.testing.assert_close(f[i], expected)
        gradients = torch.autograd.grad(f[i], (module.image.weight, module.text.bias), retain_graph=True)
        references = torch.autograd.grad(expected, (module.image.weight, module.text.bias))
        torch.testing.assert_close(gradients, references)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_pair_in_the_bank_is_no_negative_of_itself(dtype):
    module = TwoTower(dtype)
    bank = pairs(8, dtype)
    output = ready(ContrastiveMargin(0.3), module, bank)
    whole = output.output(module, bank)
    for i in range(8):
        rest = [torch.cat([part[:i], part[i + 1 :]]) for part in bank]
        one = [part[i : i + 1] for part in bank]
        expected = definition(module, one, rest, 0.3, True)
        torch.testing.assert_close(whole[i], expected)
        torch.testing.assert_close(output.output(module, one)[0], expected)  # in any batch


def test_copies_are_no_negatives_but_pairs_that_share_one_side_are():
    module = TwoTower()
    images, texts = pairs(6)
    images[3], texts[3] = images[0], texts[0]  # a copy of pair 0
    texts[4] = texts[0]  # the same caption of another image
    images[5] = images[0]  # another caption of the same image
    output = ready(ContrastiveMargin(0.3), module, (images, texts))
    kept = [1, 2, 4, 5]
    expected = definition(module, (images[:1], texts[:1]), (images[kept], texts[kept]), 0.3, True)
    torch.testing.assert_close(output.output(module, (images, texts))[0], expected)


def test_equality_is_relative_and_forgives_rounding():
    module = TwoTower(torch.float32)
    images, texts = pairs(5, torch.float32)
    output = ready(ContrastiveMargin(1.0, normalize=False, tolerance=1e-2), module, (images, texts))
    expected = output.output(module, (images, texts))
    close, far = (output.output(module, (images * scale, texts)) for scale in (1 + 1e-4, 1.3))
    torch.testing.assert_close(close, expected, rtol=1e-2, atol=1e-2)
    # Farther off, the bank's entry is a negative with nearly the pair's own similarity, which bounds each direction.
    assert (far < expected).all()


def test_learned_temperature_is_read_from_the_module_and_differentiated():
    module = TwoTower()
    bank, target = pairs(7), pairs(1)
    output = ready(ContrastiveMargin(lambda module: module.scale.exp().reciprocal()), module, bank)
    f = output.output(module, target)
    torch.testing.assert_close(f[0], definition(module, target, bank, (-module.scale).exp(), True))
    (gradient,) = torch.autograd.grad(f.sum(), module.scale)
    (reference,) = torch.autograd.grad(definition(module, target, bank, (-module.scale).exp(), True), module.scale)
    torch.testing.assert_close(gradient, reference)


class Embeddings:
    def __init__(self, first, second):
        self.image_embeds, self.text_embeds = first, second


@pytest.mark.parametrize(
    "wrap", [None, lambda a, b: [a, b], lambda a, b: {"image_embeds": a, "text_embeds": b, "loss": 0.0}, Embeddings]
)
def test_kinds_of_results_and_batches(wrap):
    plain, module = TwoTower(), TwoTower(wrap=wrap)
    module.load_state_dict(plain.state_dict())
    bank, (images, texts) = pairs(7), pairs(3)
    expected = ready(ContrastiveMargin(), plain, bank).output(plain, (images, texts))
    output = ready(ContrastiveMargin(), module, bank)
    for batch in ((images, texts), [images, texts], {"images": images, "texts": texts}):
        torch.testing.assert_close(output.output(module, batch), expected)
    embed = ContrastiveMargin(embed=lambda module, batch: (module.image(batch["i"]), module.text(batch["t"])))
    ready(embed, module, {"i": bank[0], "t": bank[1]})
    torch.testing.assert_close(embed.output(module, {"i": images, "t": texts}), expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_context_holds_every_pair_in_order_and_no_graph(context):
    module = TwoTower()
    with context():
        batches = [pairs(4), pairs(1)]
        made = ContrastiveMargin(normalize=False).make_context(module, iter(batches))
    with torch.no_grad():
        torch.testing.assert_close(made["first"], torch.cat([module.image(images) for images, _ in batches]))
        torch.testing.assert_close(made["second"], torch.cat([module.text(texts) for _, texts in batches]))
    for bank in made.values():
        assert not bank.requires_grad
        assert not bank.is_inference()


def test_a_bank_of_batches_that_pass_through_the_model_unchanged_can_be_differentiated_against():
    """Embeddings that are views of inference tensors would poison the backward pass."""
    output = ContrastiveMargin(embed=lambda module, batch: (batch, module(batch)), normalize=False)
    module = nn.Linear(3, 3)
    with torch.inference_mode():
        output.set_context(output.make_context(module, [torch.randn(5, 3)]))
    output.output(module, torch.randn(2, 3)).sum().backward()
    assert module.weight.grad.isfinite().all()


def test_a_new_context_replaces_the_old_one():
    module = TwoTower()
    first, second, target = pairs(5), pairs(5), pairs(2)
    output = ready(ContrastiveMargin(), module, first)
    ready(output, module, second)
    expected = ready(ContrastiveMargin(), module, second).output(module, target)
    torch.testing.assert_close(output.output(module, target), expected)


def test_autocast_does_not_round_the_similarities():
    module = TwoTower(torch.float32)
    embed = ContrastiveMargin(0.01, embed=lambda module, batch: batch)
    bank, target = [(torch.randn(count, 16), torch.randn(count, 16)) for count in (20, 4)]
    ready(embed, module, bank)
    expected = embed.output(module, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(embed.output(module, target), expected)


def test_a_pair_without_negatives_is_nan_and_touches_no_other():
    pair = torch.eye(2)[:1].expand(3, -1)
    output = ContrastiveMargin(embed=lambda module, batch: batch)
    output.set_context({"first": pair, "second": pair})
    first = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    f = output.output(nn.Identity(), (first, torch.eye(2)))
    assert f.isnan().tolist() == [True, False]
    (gradient,) = torch.autograd.grad(f.sum(), first)
    assert gradient.isnan().any(1).tolist() == [True, False]


def test_output_without_context_says_what_to_do():
    with pytest.raises(
        RuntimeError, match=r"no bank of negatives; call set_context\(make_context\(.*300 training pairs"
    ):
        ContrastiveMargin().output(TwoTower(), pairs(2))


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ({}, r"'first' and 'second', received \[\]"),
        ({"first": torch.ones(3, 2), "image": torch.ones(3, 2)}, r"received \['first', 'image'\]"),
        ({"first": torch.ones(3, 2), "second": torch.ones(3, 4)}, r"received \(3, 2\) and \(3, 4\)"),
        ({"first": torch.ones(1, 2), "second": torch.ones(1, 2)}, r"two or more pairs.*received \(1, 2\)"),
    ],
)
def test_contexts_that_are_refused(context, message):
    with pytest.raises(ValueError, match=message):
        ContrastiveMargin().set_context(context)


def test_make_context_of_nothing_is_refused():
    with pytest.raises(ValueError, match="batches of 300 training pairs for the bank, received none"):
        ContrastiveMargin().make_context(TwoTower(), [])


def test_a_bank_of_another_dimension_is_refused():
    output = ContrastiveMargin()
    output.set_context({"first": torch.randn(5, 7), "second": torch.randn(5, 7)})
    with pytest.raises(ValueError, match=r"dimension 7, as in the bank, received 4"):
        output.output(TwoTower(), pairs(2))


@pytest.mark.parametrize(
    ("wrap", "kind", "message"),
    [
        (lambda a, b: a, TypeError, r"from TwoTower, received a Tensor; pass embed="),
        (lambda a, b: (a, b, 0), TypeError, r"received a tuple"),
        (lambda a, b: {"image_embeds": a}, TypeError, r"received a dict"),
        (lambda a, b: (a, b[:, :2]), ValueError, r"of one shape \(batch, dim\), received \(2, 4\) and \(2, 2\)"),
        (lambda a, b: (a[:, None], b[:, None]), ValueError, r"received \(2, 1, 4\)"),
    ],
)
def test_results_that_are_refused(wrap, kind, message):
    with pytest.raises(kind, match=message):
        ContrastiveMargin().make_context(TwoTower(wrap=wrap), [pairs(2)])


def test_arguments_are_checked():
    for wrong in ("0.1", float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"positive temperature, received {wrong!r}"):
            ContrastiveMargin(temperature=wrong)
    with pytest.raises(TypeError, match=r"context_size must be an integer, got 2\.5"):
        ContrastiveMargin(context_size=2.5)
    with pytest.raises(TypeError, match="normalize must be True or False; got 'no'"):
        ContrastiveMargin(normalize="no")
    with pytest.raises(ValueError, match="positive temperature, received 0"):
        ContrastiveMargin(temperature=0)
    with pytest.raises(ValueError, match="context_size of at least 2"):
        ContrastiveMargin(context_size=1)


def test_the_loss_is_clips_where_both_directions_agree():
    """For a symmetric batch, l(f) is the sum of the two cross-entropies of CLIP's own loss."""
    embeddings = F.normalize(torch.randn(6, 4, dtype=torch.float64), dim=1)
    output = ContrastiveMargin(0.5, embed=lambda module, batch: (batch, batch))
    output.set_context({"first": embeddings, "second": embeddings})
    loss = output.loss(output.output(nn.Identity(), embeddings))
    logits = embeddings @ embeddings.T / 0.5
    torch.testing.assert_close(loss, 2 * F.cross_entropy(logits, torch.arange(6), reduction="none"))
