"""Outputs on Hugging Face models: tiny, made from configurations, with nothing downloaded."""

import pytest
import torch
import torch.nn.functional as F

from lightning_trak.gradients import FunctionalEngine, LoopEngine, select_parameters
from lightning_trak.gradients.batch import ExampleBatch
from lightning_trak.outputs import (
    CausalLMMargin,
    ClassificationMargin,
    ContrastiveMargin,
    NegativeLoss,
    RegressionOutput,
    Seq2SeqLMMargin,
)

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def gpt2():
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=32, bos_token_id=48, eos_token_id=49
    )
    return transformers.GPT2LMHeadModel(config).eval()


def bert(**options):
    config = transformers.BertConfig(**SIZES, vocab_size=50, max_position_embeddings=16, **options)
    return transformers.BertForSequenceClassification(config).eval()


@pytest.fixture
def t5():
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=50, decoder_start_token_id=0, pad_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


@pytest.fixture
def clip():
    text = {**SIZES, "vocab_size": 50, "max_position_embeddings": 16, "bos_token_id": 48, "eos_token_id": 49}
    vision = {**SIZES, "image_size": 8, "patch_size": 4}
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    ).eval()


def token_margins(log_probabilities, labels):
    p = log_probabilities.double().exp().gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return p.log() - (1 - p).log()


def test_gpt2_at_any_padding(gpt2):
    texts = [torch.randint(1, 48, (length,)) for length in (3, 5, 8)]
    expected = []
    for text in texts:
        log_p = gpt2(text[None]).logits[0, :-1].double().log_softmax(-1)
        expected.append(token_margins(log_p, text[1:]).mean())
    expected = torch.stack(expected).float()
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    right = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    left = {key: value.flip(1) for key, value in right.items()}
    left["input_ids"] = torch.stack([F.pad(text, (8 - len(text), 0)) for text in texts])
    left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    for batch in (right, left, transformers.BatchEncoding(right)):
        torch.testing.assert_close(CausalLMMargin().output(gpt2, batch), expected, rtol=1e-4, atol=1e-5)
    labels = torch.where(ids == 0, -100, ids)
    torch.testing.assert_close(CausalLMMargin().output(gpt2, (ids, labels)), expected, rtol=1e-4, atol=1e-5)


def test_gpt2_counts_the_tokens_that_its_own_loss_counts(gpt2):
    ids = torch.randint(1, 48, (1, 9))
    labels = ids.clone()
    labels[0, :4] = -100
    f = CausalLMMargin().output(gpt2, {"input_ids": ids, "labels": labels})
    log_p = gpt2(ids).logits[0, 3:-1].double().log_softmax(-1)
    torch.testing.assert_close(f.double(), token_margins(log_p, ids[0, 4:]).mean()[None], rtol=1e-4, atol=1e-5)
    own = -gpt2(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(own.double(), log_p.gather(-1, ids[0, 4:, None]).mean(), rtol=1e-4, atol=1e-5)
    by_loss = NegativeLoss(lambda module, batch: module(**batch).loss)
    torch.testing.assert_close(by_loss.output(gpt2, {"input_ids": ids, "labels": labels}), own[None])


def test_t5_at_any_padding(t5):
    sources = [torch.randint(2, 50, (length,)) for length in (4, 6)]
    targets = [torch.randint(2, 50, (length,)) for length in (2, 5)]
    expected = []
    for source, target in zip(sources, targets, strict=True):
        log_p = t5(input_ids=source[None], labels=target[None]).logits[0].double().log_softmax(-1)
        expected.append(token_margins(log_p, target).mean())
    expected = torch.stack(expected).float()
    ids = torch.nn.utils.rnn.pad_sequence(sources, batch_first=True)
    padded = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True)
    encoder = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    ignored = torch.where(padded == 0, -100, padded)
    for output, labels in ((Seq2SeqLMMargin(), ignored), (Seq2SeqLMMargin(pad_token_id=0), padded)):
        f = output.output(t5, transformers.BatchEncoding({**encoder, "labels": labels}))
        torch.testing.assert_close(f, expected, rtol=1e-4, atol=1e-5)
    decoder = t5._shift_right(ignored)
    f = Seq2SeqLMMargin().output(t5, {**encoder, "decoder_input_ids": decoder, "labels": ignored})
    torch.testing.assert_close(f, expected, rtol=1e-4, atol=1e-5)


def test_bert_classifier():
    module = bert(num_labels=3)
    ids = torch.randint(1, 50, (4, 6))
    labels = torch.tensor([0, 2, 1, 1])
    encoded = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    expected = token_margins(module(**encoded).logits.double().log_softmax(-1), labels).float()
    for key in ("labels", "label"):
        f = ClassificationMargin().output(module, transformers.BatchEncoding({**encoded, key: labels}))
        torch.testing.assert_close(f, expected, rtol=1e-4, atol=1e-5)
    module.config.return_dict = False
    f = ClassificationMargin().output(module, {**encoded, "labels": labels})
    torch.testing.assert_close(f, expected, rtol=1e-4, atol=1e-5)


def test_bert_regressor():
    module = bert(num_labels=1)
    ids, targets = torch.randint(1, 50, (4, 6)), torch.randn(4)
    f = RegressionOutput().output(module, {"input_ids": ids, "labels": targets})
    torch.testing.assert_close(f, module(ids).logits[:, 0] - targets)


def test_clip_with_its_learned_temperature(clip):
    batch = {
        "input_ids": torch.randint(1, 48, (5, 7)),
        "attention_mask": torch.ones(5, 7, dtype=torch.long),
        "pixel_values": torch.randn(5, 3, 8, 8),
    }
    output = ContrastiveMargin(temperature=lambda module: module.logit_scale.exp().reciprocal())
    output.set_context(output.make_context(clip, [transformers.BatchEncoding(batch)]))
    f = output.output(clip, batch)
    # With the batch itself as bank, these are the margins of CLIP's own rows and columns of logits.
    logits = clip(**batch).logits_per_image.double()
    matching = torch.arange(5)
    expected = sum(token_margins(rows.log_softmax(-1), matching) for rows in (logits, logits.T))
    torch.testing.assert_close(f.double(), expected, rtol=1e-4, atol=1e-4)
    gradients = torch.autograd.grad(f.sum(), (clip.visual_projection.weight, clip.text_projection.weight))
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in gradients)


def test_a_mask_of_four_dimensions_keeps_a_model_on_vmap():
    """As the guides say: transformers looks at the values of a mask of two dimensions, which vmap forbids."""

    def forward(module, batch):
        mask = batch["attention_mask"][:, None, None, :].bool()
        length = mask.shape[-1]
        return module(input_ids=batch["input_ids"], attention_mask=mask.expand(-1, 1, length, -1)).logits

    module = bert(num_labels=3)
    batch = {
        "input_ids": torch.randint(1, 50, (4, 6)),
        "attention_mask": torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0]] * 2),
        "labels": torch.tensor([0, 2, 1, 1]),
    }
    output = ClassificationMargin(forward=forward)
    values, gradients = FunctionalEngine(module, output, select_parameters(module))(ExampleBatch(batch, 4))
    torch.testing.assert_close(values, ClassificationMargin().output(module, batch), rtol=1e-4, atol=1e-5)
    _, expected = LoopEngine(module, ClassificationMargin(), select_parameters(module))(ExampleBatch(batch, 4))
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-3, atol=1e-5)
