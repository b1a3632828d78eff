"""Outputs of single tokens, of a part of a text, and of texts by their length."""

import re

import numpy as np
import pytest
import torch

from lightning_trak.outputs import CausalLMLogLikelihood, CausalLMMargin, Seq2SeqLMMargin
from lightning_trak.outputs.spans import character_positions, span_labels, span_target
from lightning_trak.running.data.annotated import AnnotatedBatch
from tests.causal_texts import CausalNet, make_texts, margins, pad, pad_left
from tests.outputs.test_language import VOCABULARY, Bigram, Translator

TEXTS = make_texts(6, seed=3)


def in_double():
    return CausalNet().double()


def rows_of(batch, counts, rows):
    """A batch with the texts and tokens of some rows."""
    texts, tokens = zip(*rows, strict=True)
    picked = {name: part[list(texts)] for name, part in batch.items()}
    return AnnotatedBatch(picked, torch.stack([torch.tensor(tokens), torch.tensor(counts)[list(texts)]], dim=1))


@pytest.mark.parametrize("side", [pad, pad_left])
def test_a_row_is_the_output_of_its_token_at_any_padding(side):
    model = in_double()
    expected = [margins(model, text) for text in TEXTS]
    counts = [len(values) for values in expected]
    rows = [(text, token) for text, count in enumerate(counts) for token in range(count)][::-1]
    batch = rows_of(side(TEXTS), counts, rows)
    found = CausalLMMargin(per_token=True).output(model, batch)
    torch.testing.assert_close(found, torch.cat(expected).flip(0))
    logs = CausalLMLogLikelihood(per_token=True, reduction="mean").output(model, batch)
    torch.testing.assert_close(logs, torch.cat(expected).flip(0).sigmoid().log())


@pytest.mark.parametrize("side", [pad, pad_left])
def test_log_likelihoods_by_the_definition(side):
    model = in_double()
    logs = [margins(model, text).sigmoid().log() for text in TEXTS]
    for reduction, power in (("sum", 0), ("mean", 1), ("sqrt", 0.5)):
        output = CausalLMLogLikelihood(reduction=reduction)
        found = output.output(model, side(TEXTS))
        torch.testing.assert_close(found, torch.stack([part.sum() / len(part) ** power for part in logs]))
        torch.testing.assert_close(output.loss(found), -found)
        torch.testing.assert_close(torch.stack(output.derivatives(found)), torch.ones(2, 6, dtype=torch.float64))


def test_seq2seq_rows():
    module, output = Translator(), Seq2SeqLMMargin()
    source, labels = torch.randint(1, VOCABULARY, (1, 4)), torch.tensor([[3, 1, -100, 4]])
    batch = {"input_ids": source.expand(3, -1), "labels": labels.expand(3, -1)}
    rows = AnnotatedBatch(batch, torch.tensor([[0, 3], [1, 3], [2, 3]]))
    found = Seq2SeqLMMargin(per_token=True).output(module, rows)
    torch.testing.assert_close(found.mean(), output.output(module, {"input_ids": source, "labels": labels})[0])
    assert len(set(found.tolist())) == 3


def test_a_text_with_another_number_of_tokens_has_no_rows():
    model, output = in_double(), CausalLMMargin(per_token=True)
    batch = rows_of(pad(TEXTS[:1]), [len(margins(model, TEXTS[0])) + 1], [(0, 0)])
    assert output.output(model, batch).isnan().all()
    assert "another number of tokens" in output.explain_nan(model, batch)


def test_rows_need_their_tokens():
    with pytest.raises(ValueError, match=re.escape("needs a row for each token, but received a dict: give it as outp")):
        CausalLMMargin(per_token=True).output(in_double(), pad(TEXTS))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_few_bits(dtype):
    """Where -100 has no place, 156 is not taken for it."""
    module = Bigram(torch.float64)
    module.table = torch.nn.Embedding(200, 200, dtype=torch.float64)
    ids = torch.tensor([[5, 156, 7], [1, 2, 156]]) if dtype == torch.uint8 else torch.tensor([[5, 100, 7], [1, 2, 9]])
    for output in (CausalLMMargin(), CausalLMLogLikelihood()):
        expected = output.output(module, (ids, ids))
        torch.testing.assert_close(output.output(module, (ids, ids.to(dtype))), expected)
    decoder = {"input_ids": ids, "decoder_input_ids": ids}
    module.forward = lambda input_ids, decoder_input_ids: module.table(decoder_input_ids)
    expected = Seq2SeqLMMargin().output(module, decoder | {"labels": ids})
    torch.testing.assert_close(Seq2SeqLMMargin().output(module, decoder | {"labels": ids.to(dtype)}), expected)


MASK = [False, False, True, True, False]


@pytest.mark.parametrize(
    "positions",
    [range(2, 4), slice(2, 4), [3, 2], torch.tensor([2, 3]), slice(-3, -1), MASK, torch.tensor(MASK), np.array(MASK)],
)
def test_a_span_is_a_target_of_its_tokens(positions):
    ids, model = torch.tensor([5, 6, 7, 8, 1]), in_double()
    labels = span_labels(ids, positions)
    assert labels.tolist() == [-100, -100, 7, 8, -100]
    found = CausalLMMargin().output(model, {"input_ids": ids[None], "labels": labels[None]})
    torch.testing.assert_close(found[0], margins(model, {"input_ids": ids, "labels": ids})[1:3].mean())


@pytest.mark.parametrize(
    ("positions", "error"),
    [
        ([5], "positions name token 5, and the text has 5, from 0 to 4"),
        ([-1], "positions name token -1"),
        ([0], "the first token alone, which is never predicted"),
        ([], "positions name no token"),
        (MASK[1:], "a mask of positions needs a bool for each of 5 tokens, got 4"),
        ([False] * 5, "positions name no token"),
        (slice(7, 9), "positions name no token"),
    ],
)
def test_spans_that_are_refused(positions, error):
    with pytest.raises(ValueError, match=error):
        span_labels([5, 6, 7, 8, 1], positions)
    with pytest.raises(ValueError, match="token ids"):
        span_labels(torch.rand(5), [1])


def test_spans_of_characters_by_a_tokenizer():
    pytest.importorskip("transformers")
    from examples.texts import learn_tokenizer

    prompt, answer = "Where was Ada born?", " In London, née Byron."
    tokenizer = learn_tokenizer([prompt + answer], vocab_size=300)
    target = span_target(tokenizer, prompt + answer, len(prompt), len(prompt + answer))
    kept = target["labels"][target["labels"] >= 0]
    assert tokenizer.decode(kept) == answer
    assert torch.equal(kept, target["input_ids"][target["labels"] >= 0])
    start = (prompt + answer).index("née")
    word = span_target(tokenizer, prompt + answer, start + 1, start + 2)  # é is two bytes
    assert "é" in tokenizer.decode(word["labels"][word["labels"] >= 0])
    with pytest.raises(ValueError, match="characters from 0 to 41, got 40 to 99"):
        span_target(tokenizer, prompt + answer, 40, 99)
    with pytest.raises(ValueError, match="no token has a character from 90 to 95; the last ends at 4"):
        character_positions([(0, 0), (0, 4)], 90, 95)
    with pytest.raises(ValueError, match="got 3 to 3"):
        character_positions([(0, 4)], 3, 3)
    for offsets, shape in (([], r"\(0,\)"), ([[(0, 4), (4, 6)]], r"\(1, 2, 2\)")):
        with pytest.raises(ValueError, match=rf"offsets of one text, of shape \(length, 2\), got {shape}"):
            character_positions(offsets, 1, 2)


@pytest.mark.parametrize("wrong", ["[PAD]", "0", [0, 1], 1.0, True])
def test_what_is_no_id_of_padding_is_refused(wrong):
    for output in (CausalLMMargin, CausalLMLogLikelihood, Seq2SeqLMMargin):
        with pytest.raises(TypeError, match="pad_token_id must be the id of one token"):
            output(pad_token_id=wrong)
    assert CausalLMMargin(np.int64(3)).fingerprint() == CausalLMMargin(3).fingerprint()
