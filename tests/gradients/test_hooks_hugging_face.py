"""Padded models of Hugging Face go through hooks, their own normalisations and class tokens included."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_trak import GradientDot
from lightning_trak.gradients import HookEngine, LoopEngine, MixedEngine, select_parameters
from lightning_trak.gradients.batch import ExampleBatch
from lightning_trak.outputs import CausalLMMargin, ClassificationMargin
from lightning_trak.projections import IdentityProjection
from tests.lit import make_trainer, open_store

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 32,
}  # fmt: skip
IMAGES = {key: value for key, value in SMALL.items() if key not in ("vocab_size", "max_position_embeddings")}


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=1))


def qwen() -> nn.Module:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, num_key_value_heads=1, head_dim=8))


def gemma() -> nn.Module:  # multiplies by 1 + weight
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SMALL, num_key_value_heads=1, head_dim=8))


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, num_labels=3))


def vit() -> nn.Module:
    config = transformers.ViTConfig(**IMAGES, image_size=8, patch_size=4, num_labels=3)
    return transformers.ViTForImageClassification(config)


def texts(labelled: bool) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 9, (10,), generator=generator).tolist()
    found = [{"input_ids": torch.randint(1, 50, (length,), generator=generator)} for length in lengths]
    return [item | {"labels": torch.tensor(i % 3)} for i, item in enumerate(found)] if labelled else found


def images() -> list[dict[str, Tensor]]:
    pixels = torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    return [{"pixel_values": image, "labels": torch.tensor(i % 3)} for i, image in enumerate(pixels)]


def padded(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    def pad(rows: list[Tensor]) -> Tensor:
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    ids = [item["input_ids"] for item in items]
    batch = {"input_ids": pad(ids), "attention_mask": pad([torch.ones_like(row) for row in ids])}
    return batch | ({"labels": torch.stack([item["labels"] for item in items])} if "labels" in items[0] else {})


@pytest.mark.parametrize("make", [llama, qwen, gemma, bert, vit])
def test_hooks_cover_it_and_agree_with_autograd_one_at_a_time(tmp_path, make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make().double().eval()
    language = make in (llama, qwen, gemma)
    data: Any = images() if make is vit else texts(labelled=not language)
    loader = DataLoader(data, batch_size=4, collate_fn=None if make is vit else padded)
    scores = {}
    for engine in ("auto", "loop"):
        method = GradientDot(
            module, [module.state_dict()], tmp_path / engine, projection=IdentityProjection(), dtype=torch.float64,
            output=CausalLMMargin() if language else ClassificationMargin(), effect_on="output", engine=engine,
        )  # fmt: skip
        scores[engine] = method.attribute(make_trainer(), loader, loader)
        store = open_store(method, make_trainer())
        assert store.settle_engine() == ("hooks" if engine == "auto" else "loop")
    largest = float(scores["loop"].abs().max())
    torch.testing.assert_close(scores["auto"], scores["loop"], rtol=1e-8, atol=1e-9 * largest)


def falcon() -> nn.Module:  # linear layers of a type of its own
    return transformers.FalconForCausalLM(transformers.FalconConfig(**SMALL))


def opt() -> nn.Module:  # embeddings of positions of a type of its own
    return transformers.OPTForCausalLM(transformers.OPTConfig(**SMALL, ffn_dim=24, word_embed_proj_dim=16))


def whisper() -> nn.Module:
    sizes = {f"{part}_{key}": 1 for part in ("encoder", "decoder") for key in ("layers", "attention_heads", "ffn_dim")}
    config = transformers.WhisperConfig(**sizes, d_model=4, vocab_size=50, num_mel_bins=4, pad_token_id=0)
    return transformers.WhisperForConditionalGeneration(config)


def efficientnet() -> nn.Module:  # depthwise convolutions of a type of its own
    config = transformers.EfficientNetConfig(width_coefficient=0.25, depth_coefficient=0.1, hidden_dim=320)
    return transformers.EfficientNetForImageClassification(config)


@pytest.mark.parametrize("make", [falcon, opt, whisper, efficientnet])
def test_hooks_cover_types_of_transformers_itself(make):
    module = make().eval()
    assert not HookEngine.uncovered(module, select_parameters(module))


# ---- Padding of any length, in batches of any size ----


def tied_llama() -> nn.Module:  # the weight of the embedding is that of the head
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=1, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config)


def biased_qwen() -> nn.Module:  # its projections of queries, keys and values have biases
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SMALL, num_key_value_heads=1))


def llama_with_lora() -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(llama(), config)


LANGUAGE = [llama, tied_llama, biased_qwen, qwen, gemma, llama_with_lora, falcon, opt]
LENGTHS = (2, 9, 5, 3, 7)


def encoded(length: int, seed: int, language: bool) -> dict[str, Tensor]:
    """A text without padding. A pair of texts for BERT."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (1, length), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if language:
        return batch
    pair = {"token_type_ids": (torch.arange(length) >= length // 2).long()[None]}
    return batch | pair | {"labels": torch.tensor([seed % 3])}


def padded_to(batches: list[dict[str, Tensor]], length: int, left: bool) -> dict[str, Tensor]:
    """Several texts in one batch. The ids of padding are drawn at random: the mask alone says what counts."""

    def pad(key: str, value: Tensor) -> Tensor:
        missing = length - value.shape[1]
        filling = (
            torch.randint(1, 50, (1, missing)) if key == "input_ids" else torch.zeros(1, missing, dtype=torch.long)
        )
        return torch.cat([filling, value] if left else [value, filling], 1)

    return {
        key: torch.cat([one[key] if key == "labels" else pad(key, one[key]) for one in batches]) for key in batches[0]
    }


def hooks(module: nn.Module, output: Any, names: dict[str, str]) -> HookEngine | MixedEngine:
    """As engine="hooks" does: a few parameters that hooks do not cover are differentiated by vmap."""
    left_out = HookEngine.uncovered(module, names)
    return MixedEngine(module, output, names, left_out) if left_out else HookEngine(module, output, names)


@pytest.mark.parametrize("make", [*LANGUAGE, bert])
def test_gradients_do_not_depend_on_padding_and_batch(make):
    """Beside autograd on each text alone, without padding."""
    torch.manual_seed(0)
    module, language = make().double().eval(), make in LANGUAGE
    output = CausalLMMargin() if language else ClassificationMargin()
    names = select_parameters(module)
    alone = [encoded(length, seed, language) for seed, length in enumerate(LENGTHS)]
    expected: list[Any] = []
    for text in alone:
        value = output.output(module, text)
        grads = torch.autograd.grad(value.sum(), [module.get_parameter(raw) for raw in names.values()])
        expected.append((value, dict(zip(names, grads, strict=True))))
    engine = hooks(module, output, names)
    scale = max(float(gradient.norm()) for _, gradients in expected for gradient in gradients.values())
    turned = make not in (bert, gemma)  # Gemma 2 itself gives NaN in float64 with padding on the left
    for length, left, size in ((9, False, 5), (9, False, 2), (16, False, 5), (31, False, 3), (12, turned, 5)):
        for start in range(0, len(alone), size):
            batch = padded_to(alone[start : start + size], length, left)
            values, rows = engine(ExampleBatch(batch, len(batch["input_ids"])))
            for i, (value, gradients) in enumerate(expected[start : start + size]):
                torch.testing.assert_close(values[i], value[0], rtol=1e-6, atol=1e-6)
                for name, gradient in gradients.items():  # RMSNorm and rotary embeddings compute in float32
                    error = float((rows[name][i] - gradient.flatten()).norm())
                    assert error < 1e-5 * float(gradient.norm()) + 1e-7 * scale, f"{name}: {error}"


def test_gradients_of_images_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    module, data, output = vit().double().eval(), images(), ClassificationMargin()
    names = select_parameters(module)
    assert {"vit.embeddings.cls_token", "vit.embeddings.patch_embeddings.projection.weight"} <= set(names)
    loop, engine = LoopEngine(module, output, names), hooks(module, output, names)
    for size in (1, 3, 10):
        batch = torch.utils.data.default_collate(data[:size])
        for found, expected in zip(engine(ExampleBatch(batch, size)), loop(ExampleBatch(batch, size)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11)


def test_padding_that_moves_positions_is_refused(tmp_path):
    """GPT-2 counts positions from the start of the batch. With padding on the left, it needs position_ids."""
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=50, bos_token_id=0, eos_token_id=0)
    module = transformers.GPT2LMHeadModel(config).eval()
    data: Any = texts(labelled=False)

    def left(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        turned = padded([{"input_ids": item["input_ids"].flip(0)} for item in items])
        return {key: value.flip(1) for key, value in turned.items()}

    loader = DataLoader(data, batch_size=4, collate_fn=left)
    method = GradientDot(module, [module.state_dict()], tmp_path, output=CausalLMMargin())
    with pytest.raises(ValueError, match="padding that is not masked"):
        method.featurize(make_trainer(), loader)

    def with_positions(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = left(items)
        return batch | {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}

    method.featurize(make_trainer(), DataLoader(data, batch_size=4, collate_fn=with_positions))
