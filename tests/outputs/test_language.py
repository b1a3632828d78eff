"""Language-model margins against token probabilities in float64; padding, label masks and kinds of batches."""

import pytest
import torch
from torch import nn

from lightning_trak.outputs import (
    AdvantageLogLikelihood,
    CausalLMLogLikelihood,
    CausalLMMargin,
    PreferenceMargin,
    Seq2SeqLMMargin,
)

VOCABULARY = 11


class Bigram(nn.Module):
    """Logits of the next token from this token alone: what a padded text says cannot depend on its padding."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, VOCABULARY, dtype=dtype)
        with torch.no_grad():
            self.table.weight.mul_(3)

    def forward(self, input_ids, attention_mask=None, wrap=None):
        return {"logits": self.table(input_ids)}


class Translator(nn.Module):
    """Logits from the previous target token; makes the decoder's input of labels as Hugging Face models do."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, VOCABULARY, dtype=torch.float64)

    def forward(self, input_ids, attention_mask=None, decoder_input_ids=None, labels=None):
        if (labels is None) == (decoder_input_ids is None):
            raise AssertionError("one of labels and decoder_input_ids, not both")
        if decoder_input_ids is None:
            decoder_input_ids = shifted(labels)
        return {"logits": self.table(decoder_input_ids) + self.table(input_ids).mean(1, keepdim=True)}


def shifted(labels):
    return torch.cat([torch.zeros_like(labels[:, :1]), labels[:, :-1]], 1).clamp(min=0)


def mean_margin(logits, labels):
    """By the definition: mean over tokens of log p - log(1 - p), from float64 probabilities."""
    p = torch.stack([logits[t].double().softmax(-1)[label] for t, label in enumerate(labels.tolist())])
    return (p.log() - (1 - p).log()).mean()


def causal(module, ids):
    return mean_margin(module.table(ids)[:-1], ids[1:])


def test_causal_margin_and_gradient_equal_the_definition():
    module = Bigram(torch.float64)
    ids = torch.randint(0, VOCABULARY, (4, 7))
    f = CausalLMMargin().output(module, ids)
    expected = torch.stack([causal(module, row) for row in ids])
    torch.testing.assert_close(f, expected)
    (gradient,) = torch.autograd.grad(f[2], module.table.weight)
    (reference,) = torch.autograd.grad(expected[2], module.table.weight)
    torch.testing.assert_close(gradient, reference)


def test_kinds_of_causal_batches():
    module = Bigram()
    ids = torch.randint(0, VOCABULARY, (3, 6))
    labels = ids.clone()
    labels[:, :3] = -100
    output = CausalLMMargin()
    whole, answer = output.output(module, ids), output.output(module, (ids, labels))
    for i in range(3):
        torch.testing.assert_close(whole[i].double(), causal(module, ids[i]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(answer[i].double(), causal(module, ids[i, 2:]), rtol=1e-5, atol=1e-5)
    mask = torch.ones_like(ids)
    for batch in ((ids,), [ids], {"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}, (ids, ids)):
        torch.testing.assert_close(output.output(module, batch), whole)
    for batch in ({"input_ids": ids, "labels": labels}, {"input_ids": ids, "label": labels, "attention_mask": mask}):
        torch.testing.assert_close(output.output(module, batch), answer)
    renamed = CausalLMMargin(
        labels_key="targets", forward=lambda module, batch: (module(batch["input_ids"])["logits"],)
    )
    torch.testing.assert_close(renamed.output(module, {"input_ids": ids, "targets": labels}), answer)


@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.bool, torch.float32])
@pytest.mark.parametrize("side", ["left", "right"])
def test_causal_margin_does_not_depend_on_padding(side, mask_dtype):
    module = Bigram(torch.float64)
    texts = [torch.randint(0, VOCABULARY, (length,)) for length in (2, 5, 9)]
    alone = torch.cat([CausalLMMargin().output(module, text[None]) for text in texts])
    for length in (9, 14):
        ids, mask = torch.zeros(3, length, dtype=torch.long), torch.zeros(3, length, dtype=mask_dtype)
        for i, text in enumerate(texts):
            place = slice(0, len(text)) if side == "right" else slice(length - len(text), length)
            ids[i, place], mask[i, place] = text, 1
        padded = CausalLMMargin().output(module, {"input_ids": ids, "attention_mask": mask})
        torch.testing.assert_close(padded, alone)
        # The mask holds when labels are given too.
        padded = CausalLMMargin().output(module, {"input_ids": ids, "attention_mask": mask, "labels": ids})
        torch.testing.assert_close(padded, alone)


@pytest.mark.parametrize("mark", ["ignored", "pad_token_id"])
def test_causal_padding_without_a_mask(mark):
    module = Bigram(torch.float64)
    texts = [torch.randint(1, VOCABULARY, (length,)) for length in (2, 6)]
    ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)
    alone = torch.cat([CausalLMMargin().output(module, text[None]) for text in texts])
    if mark == "ignored":
        padded = CausalLMMargin().output(module, (ids, torch.where(ids == 0, -100, ids)))
    else:
        padded = CausalLMMargin(pad_token_id=0).output(module, ids)
    torch.testing.assert_close(padded, alone)


def test_seq2seq_margin_equals_the_definition_at_any_padding():
    module = Translator()
    source = torch.randint(1, VOCABULARY, (3, 4))
    texts = [torch.randint(1, VOCABULARY, (length,)) for length in (1, 4, 6)]
    expected = torch.stack(
        [mean_margin(module(source[i : i + 1], labels=text[None])["logits"][0], text) for i, text in enumerate(texts)]
    )
    padded = nn.utils.rnn.pad_sequence(texts, batch_first=True)
    ignored = torch.where(padded == 0, -100, padded)
    output = Seq2SeqLMMargin()
    for batch in (
        {"input_ids": source, "labels": ignored},
        {"input_ids": source, "decoder_input_ids": shifted(padded), "labels": ignored},
        (source, None, shifted(padded), ignored),
    ):
        torch.testing.assert_close(output.output(module, batch), expected)
    by_pad = Seq2SeqLMMargin(pad_token_id=0).output(module, {"input_ids": source, "labels": padded})
    torch.testing.assert_close(by_pad, expected)
    # The encoder's mask says nothing about the labels.
    mask = torch.tensor([[1, 1, 0, 0]] * 3)
    torch.testing.assert_close(
        output.output(module, {"input_ids": source, "attention_mask": mask, "labels": ignored}), expected
    )


@pytest.mark.parametrize("confidence", [17.0, 40.0, 90.0])
def test_float32_margins_of_certain_tokens(confidence):
    """At p within 1e-7 of 1, and far beyond, where p is 1 in float32 and log(1 - p) has no digits."""
    others = torch.randn(VOCABULARY)
    logits = others.clone()
    logits[3] = confidence
    f = CausalLMMargin(forward=lambda module, batch: logits.expand(1, 2, -1)).output(
        nn.Identity(), torch.tensor([[3, 3]])
    )
    rest = torch.cat([others[:3], others[4:]]).double()
    assert f.item() == pytest.approx(confidence - rest.exp().sum().log().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("output", "batch"),
    [
        (CausalLMMargin(), {"input_ids": [[1, 2, 3], [4, 0, 0]], "attention_mask": [[1, 1, 1], [1, 0, 0]]}),
        (CausalLMMargin(), {"input_ids": [[1, 2, 3], [4, 5, 6]], "labels": [[1, 2, 3], [6, -100, -100]]}),
        (Seq2SeqLMMargin(), {"input_ids": [[1], [1]], "decoder_input_ids": [[1], [2]], "labels": [[3], [-100]]}),
        (Seq2SeqLMMargin(), {"input_ids": [[1], [1]], "decoder_input_ids": [[1], [2]], "labels": [[3], [99]]}),
    ],
    ids=["nothing but padding", "no label", "no target", "no such token"],
)
def test_an_example_without_a_margin_is_nan_and_touches_no_other(output, batch):
    logits = torch.randn(2, len(batch["input_ids"][0]), VOCABULARY, requires_grad=True)
    output.forward = lambda module, batch: logits
    f = output.output(nn.Identity(), {key: torch.tensor(value) for key, value in batch.items()})
    assert f.isnan().tolist() == [False, True]
    (gradient,) = torch.autograd.grad(f.sum(), logits)
    assert gradient.flatten(1).isnan().any(1).tolist() == [False, True]


def test_tokens_left_out_may_have_infinite_margins():
    logits = torch.randn(1, 3, VOCABULARY)
    logits[..., 0] = -torch.inf  # the padding token is never generated
    logits.requires_grad_()
    ids = torch.tensor([[4, 5, 0]])
    f = CausalLMMargin(pad_token_id=0, forward=lambda module, batch: logits).output(nn.Identity(), ids)
    torch.testing.assert_close(f[0].double(), mean_margin(logits[0, :1], ids[0, 1:2]), rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(f.sum(), logits)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(2, 0).long(), "at least two tokens"),
        (torch.zeros(5).long(), r"token ids of shape \(batch, length\), received torch.int64 of shape \(5,\)"),
        (
            (torch.zeros(2, 3).long(), torch.zeros(2, 4).long()),
            r"logits of shape \(2, 4, vocabulary\).*received \(2, 3, 11\)",
        ),
        ((torch.zeros(2, 3).long(), torch.ones(2, 3)), r"token ids .*received torch.float32"),
        ((torch.zeros(2, 3).long(),) * 3, r"received a tuple of 3.*attention_mask"),
        (
            {"input_ids": torch.zeros(2, 3).long(), "attention_mask": torch.ones(2, 1, 3, 3)},
            r"attention_mask of the labels' shape \(2, 3\), received \(2, 1, 3, 3\)",
        ),
        ({"embeddings": torch.randn(2, 3, 4)}, r"under 'labels' or 'label' in the batch, received the keys embeddings"),
    ],
)
def test_causal_batches_that_are_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        CausalLMMargin().output(Bigram(), batch)


class BothWays(Bigram):
    """Also looks at the next token, as a masked language model does."""

    def forward(self, input_ids):
        logits = super().forward(input_ids)["logits"]
        return logits + 0.1 * logits.roll(-1, 1)


@pytest.mark.parametrize("wrap", [lambda ids: ids, lambda ids: (ids,), lambda ids: {"input_ids": ids}])
def test_a_model_that_looks_ahead_is_suspicious(wrap):
    batch = wrap(torch.tensor([[1, 4, 2, 3]]))
    assert "BothWays predicts tokens from later ones" in CausalLMMargin().suspicion(BothWays(), batch)
    assert CausalLMMargin().suspicion(Bigram(), batch) is None
    assert CausalLMMargin().suspicion(BothWays(), wrap(torch.tensor([[1, 4]]))) is None  # too short to tell


@pytest.mark.parametrize("wrap", [lambda *pair: pair, lambda ids, labels: {"input_ids": ids, "labels": labels}])
def test_labels_of_the_next_tokens_are_suspicious(wrap):
    text = torch.tensor([[1, 4, 2, 3, 3, 5]])
    ids, following = text[:, :-1], text[:, 1:]
    masked = following.where(torch.tensor([False, False, True, True, True]), -100)
    for output in (CausalLMMargin(), CausalLMLogLikelihood()):
        for labels in (following, masked):
            assert "the label at t is the token at t + 1" in output.suspicion(Bigram(), wrap(ids, labels))
        assert output.suspicion(Bigram(), wrap(ids, ids)) is None
        assert output.suspicion(Bigram(), wrap(ids, ids.where(masked != -100, -100))) is None
    rewards, pairs = AdvantageLogLikelihood(), PreferenceMargin(Bigram())
    for labels, said in ((following, True), (ids, False)):
        texts = {"input_ids": ids, "labels": labels}
        found = [rewards.suspicion(Bigram(), texts | {"advantages": torch.ones(1)})]
        found.append(pairs.suspicion(Bigram(), ({"input_ids": ids}, texts)))
        assert [reason is not None for reason in found] == [said, said]
    same = torch.full((1, 4), 3)  # next tokens and aligned ones alike
    assert CausalLMMargin().suspicion(Bigram(), wrap(same, same)) is None


def test_seq2seq_needs_labels():
    with pytest.raises(ValueError, match="under 'labels' or 'label'"):
        Seq2SeqLMMargin().output(Translator(), {"input_ids": torch.zeros(1, 2).long()})
