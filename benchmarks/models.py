"""The models that are timed, their batches, and what a plain step of them costs."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_trak.outputs import CausalLMMargin, ClassificationMargin, ModelOutput


class ResNet9(nn.Module):
    """The ResNet-9 of TRAK's CIFAR-10 experiments: 2.27M parameters, 3 x 32 x 32 images, 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _convolution(3, 64),
            _convolution(64, 128, kernel=5, stride=2),
            _Residual(128),
            _convolution(128, 256),
            nn.MaxPool2d(2),
            _Residual(256),
            _convolution(256, 128, padding=0),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Linear(128, 10, bias=False),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits, shape ``(batch, 10)``."""
        return self.layers(images)


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(_convolution(channels, channels), _convolution(channels, channels))

    def forward(self, images: Tensor) -> Tensor:
        return images + self.inner(images)


def _convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, padding: int | None = None) -> nn.Module:
    padding = kernel // 2 if padding is None else padding
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


@dataclass
class Workload:
    """A model in eval mode, the output that is attributed, and a batch of it."""

    model: nn.Module
    output: ModelOutput
    batch: Any
    size: int

    def plain(self) -> None:
        """Forward and backward of the outputs' sum with all parameters' gradients: the unit of all ratios."""
        self.model.zero_grad()
        self.output.output(self.model, self.batch).sum().backward()

    def train_step(self) -> None:
        """What training costs: forward, backward and one step of SGD."""
        optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-6)
        self.plain()
        optimizer.step()


def resnet9(size: int = 32) -> Workload:
    """ResNet-9 with a batch of CIFAR-shaped noise."""
    torch.manual_seed(0)
    batch = (torch.randn(size, 3, 32, 32), torch.randint(10, (size,)))
    return Workload(ResNet9().eval(), ClassificationMargin(), batch, size)


def gpt2(size: int = 8) -> Workload:
    """A GPT-2 of six layers and width 256 (5.3M parameters) with a batch of 128 random tokens each."""
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=2048, n_positions=128, n_embd=256, n_layer=6, n_head=8, bos_token_id=0, eos_token_id=0
    )
    batch = {"input_ids": torch.randint(2048, (size, 128))}
    return Workload(transformers.GPT2LMHeadModel(config).eval(), CausalLMMargin(), batch, size)


WORKLOADS: dict[str, Callable[[int], Workload]] = {"resnet9": resnet9, "gpt2": gpt2}
