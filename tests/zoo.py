"""Small models of many architectures, each with a model output and a batch: what every gradient engine must handle."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_trak.outputs import (
    CausalLMMargin,
    ClassificationMargin,
    ContrastiveMargin,
    ModelOutput,
    NegativeLoss,
    RegressionOutput,
)


class Specimen(NamedTuple):
    module: nn.Module
    output: ModelOutput
    batch: Any
    size: int


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8, padding_idx=0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        attended, _ = self.attention(hidden, hidden, hidden, need_weights=False)
        return self.head((hidden + attended).mean(1))


class _LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, sequence: Tensor) -> Tensor:
        return self.head(self.lstm(sequence)[0][:, -1])


class TinyGPT(nn.Module):
    """GPT-2's shape: tied embedding and head, pre-norm blocks, learned positions."""

    def __init__(self, vocabulary: int = 17, width: int = 8, layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(12, width) * 0.1)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width),
                    "qkv": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "norm2": nn.LayerNorm(width),
                    "mlp": nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)),
                }
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.tokens(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            query, key, value = (
                part.unflatten(-1, (2, -1)).transpose(1, 2)
                for part in block["qkv"](block["norm1"](hidden)).chunk(3, -1)
            )
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            hidden = hidden + block["out"](attended.transpose(1, 2).flatten(2))
            hidden = hidden + block["mlp"](block["norm2"](hidden))
        return self.head(self.norm(hidden))


class _TextClassifier(nn.Module):
    """Takes keyword arguments, as Hugging Face models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, norm_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        hidden = self.encoder(self.embedding(input_ids), src_key_padding_mask=attention_mask == 0)
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return {"logits": self.head((hidden * weights).sum(1) / weights.sum(1))}


class _TwoTower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5))
        self.text = nn.Sequential(nn.EmbeddingBag(15, 8, mode="mean"), nn.Linear(8, 5))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(image), self.text(text)


class _Reuse(nn.Module):
    """Layers called often, by keyword, on ranks 2 to 4, with time folded into the batch, and on shared positions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 6, padding_idx=0)
        self.positions = nn.Embedding(8, 6)
        self.rows = nn.Embedding(8, 6)
        self.mix = nn.Linear(6, 6)
        self.frame = nn.Conv1d(2, 2, 3, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        steps = torch.arange(ids.shape[1], device=ids.device)
        hidden = self.tokens(input=ids) + self.positions(steps) + self.mix(self.rows(steps.unsqueeze(0)))
        hidden = self.mix(hidden) + self.mix(F.relu(self.mix(hidden), inplace=True))
        folded = self.frame(hidden.flatten(0, 1).reshape(-1, 2, 3))  # one row for each step of each example
        hidden = self.mix(folded.reshape(len(ids), -1, 2, 6))
        return self.head(self.mix(hidden.mean((1, 2))))


class _Scaled(nn.Module):
    """A learned scale without dimensions, such as CLIP's temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs) * self.scale.exp()


def _mlp() -> Specimen:
    module = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))
    return Specimen(module, ClassificationMargin(), (torch.randn(5, 6), torch.tensor([0, 1, 2, 3, 0])), 5)


def _conv_batchnorm() -> Specimen:
    module = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(16, 3),
    )  # fmt: skip
    for _ in range(3):
        module(torch.randn(8, 2, 9, 9) * 2 + 1)  # running statistics that differ from the initial ones
    return Specimen(module, ClassificationMargin(), (torch.randn(4, 2, 9, 9), torch.tensor([0, 1, 2, 0])), 4)


def _groupnorm() -> Specimen:
    module = nn.Sequential(
        nn.Conv1d(2, 4, 3, groups=2, dilation=2), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 6, 1)
    )
    return Specimen(module, RegressionOutput(), (torch.randn(4, 2, 10), torch.randn(4)), 4)


def _attention() -> Specimen:
    batch = (torch.randint(0, 20, (4, 7)), torch.tensor([0, 1, 2, 0]))
    return Specimen(_Attention(), ClassificationMargin(), batch, 4)


def _lstm() -> Specimen:
    return Specimen(_LSTM(), ClassificationMargin(), [torch.randn(3, 5, 4), torch.tensor([0, 1, 2])], 3)


def _gpt() -> Specimen:
    return Specimen(TinyGPT(), CausalLMMargin(), torch.randint(0, 17, (3, 9)), 3)


def _text_classifier() -> Specimen:
    batch = {
        "input_ids": torch.randint(0, 20, (4, 6)),
        "attention_mask": torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1] * 6]),
        "labels": torch.tensor([0, 1, 1, 0]),
    }
    return Specimen(_TextClassifier(), ClassificationMargin(), batch, 4)


def _two_tower() -> Specimen:
    module, output = _TwoTower(), ContrastiveMargin()
    bank = (torch.randn(8, 6), torch.randint(0, 15, (8, 3)))
    output.set_context(output.make_context(module, [bank]))
    return Specimen(module, output, (torch.randn(4, 6), torch.randint(0, 15, (4, 3))), 4)


def _own_loss() -> Specimen:
    module = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.PReLU(), nn.Linear(8, 3))

    def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (module(batch[0]) - batch[1]).abs().sum(1)

    return Specimen(module, NegativeLoss(loss), (torch.randn(4, 3), torch.randn(4, 3)), 4)


def _convolutions() -> Specimen:
    module = nn.Sequential(
        nn.Conv1d(2, 4, 3, stride=2, padding=2, dilation=2, groups=2, padding_mode="circular"),
        nn.ReLU(inplace=True),
        nn.Conv1d(4, 3, 3, padding="same", dilation=2, bias=False),
        nn.ConvTranspose1d(3, 2, 3, stride=2, padding=1, output_padding=1),
        nn.Unflatten(2, (3, 4)),
        nn.Conv2d(2, 4, (2, 3), stride=(1, 2), padding=(1, 2), dilation=(2, 1), padding_mode="reflect"),
        nn.ConvTranspose2d(4, 4, 2, groups=2),
        nn.Unflatten(1, (2, 2)),
        nn.Conv3d(2, 4, 2, stride=(1, 2, 1), padding=1, groups=2),
        nn.ConvTranspose3d(4, 2, 2, bias=False),
        nn.Flatten(),
        nn.LazyLinear(3),
    )
    batch = (torch.randn(4, 2, 12), torch.tensor([0, 1, 2, 0]))
    module(batch[0])
    return Specimen(module, ClassificationMargin(), batch, 4)


def _normalizations() -> Specimen:
    module = nn.Sequential(
        nn.BatchNorm1d(6), nn.Linear(6, 8), nn.RMSNorm(8), nn.Unflatten(1, (4, 2)), nn.BatchNorm1d(4), nn.PReLU(4),
        nn.LayerNorm((4, 2)), nn.Unflatten(2, (2, 1)), nn.GroupNorm(2, 4), nn.Unflatten(3, (1, 1)), nn.BatchNorm3d(4),
        nn.Flatten(), nn.RMSNorm(8, eps=0.1), nn.Linear(8, 1),
    )  # fmt: skip
    for part in module:
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm3d, nn.RMSNorm, nn.LayerNorm, nn.GroupNorm)):
            nn.init.normal_(part.weight, 1, 0.3)
    for _ in range(3):
        module(torch.randn(8, 6) * 2 + 1)
    return Specimen(module, RegressionOutput(), (torch.randn(4, 6), torch.randn(4)), 4)


def _reuse() -> Specimen:
    batch = (torch.randint(0, 20, (4, 8)), torch.tensor([0, 1, 2, 0]))
    return Specimen(_Reuse(), ClassificationMargin(), batch, 4)


def _scaled() -> Specimen:
    return Specimen(_Scaled(), ClassificationMargin(), (torch.randn(5, 6), torch.tensor([0, 1, 2, 3, 0])), 5)


ZOO: dict[str, Callable[[], Specimen]] = {
    "mlp": _mlp,
    "conv_batchnorm": _conv_batchnorm,
    "groupnorm": _groupnorm,
    "attention": _attention,
    "lstm": _lstm,
    "gpt_tied": _gpt,
    "text_classifier": _text_classifier,
    "two_tower": _two_tower,
    "own_loss": _own_loss,
    "convolutions": _convolutions,
    "normalizations": _normalizations,
    "reuse": _reuse,
    "scaled": _scaled,
}


def specimen(name: str, dtype: torch.dtype = torch.float32) -> Specimen:
    """A model of the zoo in eval mode, the same at every call."""
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found = ZOO[name]()
    finally:
        torch.set_default_dtype(torch.float32)
    found.module.eval()
    return found
