"""Padded models of Hugging Face go through hooks, their own normalisations and class tokens included."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_trak import GradientDot
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
