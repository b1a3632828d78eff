"""The models that are timed, their batches, and their plain forward and backward passes."""

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_trak.outputs import CausalLMMargin, ClassificationMargin, ModelOutput

Precision = Literal["32-true", "bf16-true", "bf16-mixed"]


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
    """A model in eval mode, the output that is attributed, and a batch.

    Attributes:
        first: name of a small parameter next to the model's input.
        unit: what a batch consists of, for rates.
        count: number of these units in the batch.
        autocast: dtype of autocast in the plain pass; None for no autocast.
    """

    model: nn.Module
    output: ModelOutput
    batch: Any
    size: int
    first: str
    unit: str
    count: int
    autocast: torch.dtype | None = None

    def plain(self) -> None:
        """Forward and backward pass of the sum of outputs, with gradients of all parameters: the unit of all ratios."""
        self.model.zero_grad()
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            output = self.output.output(self.model, self.batch).sum()
        output.backward()

    def activations(self) -> None:
        """Forward pass, and backward pass to the first layer through activations alone: every engine does this."""
        output = self.output.output(self.model, self.batch).sum()
        torch.autograd.grad(output, self.model.get_parameter(self.first))

    def train_step(self) -> None:
        """A training step: forward, backward and one step of SGD."""
        optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-6)
        self.plain()
        optimizer.step()

    def to(self, device: torch.device, precision: Precision = "32-true") -> "Workload":
        """A copy on a device or in a precision, as a Trainer would make it."""
        dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
        batch = apply_to_collection(
            self.batch, Tensor, lambda t: t.to(device, dtype if t.is_floating_point() else None)
        )
        autocast = torch.bfloat16 if precision == "bf16-mixed" else None
        return replace(self, model=copy.deepcopy(self.model).to(device, dtype), batch=batch, autocast=autocast)


def resnet9(size: int = 32) -> Workload:
    """ResNet-9 with a batch of CIFAR-shaped noise."""
    torch.manual_seed(0)
    batch = (torch.randn(size, 3, 32, 32), torch.randint(10, (size,)))
    return Workload(ResNet9().eval(), ClassificationMargin(), batch, size, "layers.0.1.bias", "examples", size)


def perceptron(size: int = 64) -> Workload:
    """A perceptron of 4.2M weights in three layers with a batch of CIFAR-shaped noise."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(3072, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )
    batch = (torch.randn(size, 3, 32, 32), torch.randint(10, (size,)))
    return Workload(model.eval(), ClassificationMargin(), batch, size, "1.bias", "examples", size)


def gpt2_6(size: int = 8) -> Workload:
    """GPT-2 small with six of its twelve layers (the size of DistilGPT2, 82M parameters), 128 random tokens a text."""
    return _gpt2(size, layers=6, length=128)


def gpt2_12(size: int = 8) -> Workload:
    """GPT-2 small (124M parameters), 512 random tokens a text."""
    return _gpt2(size, layers=12, length=512)


def _gpt2(size: int, layers: int, length: int) -> Workload:
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=layers, n_positions=length)).eval()
    batch = {"input_ids": torch.randint(model.config.vocab_size, (size, length))}
    return Workload(model, CausalLMMargin(), batch, size, "transformer.wpe.weight", "tokens", size * length)


def resnet18(size: int = 64) -> Workload:
    """ResNet-18 (11.7M parameters) with images of 224 x 224 noise."""
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        layer_type="basic", hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], num_labels=1000
    )
    batch = {"pixel_values": torch.randn(size, 3, 224, 224), "labels": torch.randint(1000, (size,))}
    model = transformers.ResNetForImageClassification(config).eval()
    first = "resnet.embedder.embedder.normalization.bias"
    return Workload(model, ClassificationMargin(), batch, size, first, "examples", size)


WORKLOADS: dict[str, Callable[[int], Workload]] = {
    "resnet9": resnet9,
    "perceptron": perceptron,
    "gpt2, 6 layers": gpt2_6,
    "resnet18": resnet18,
    "gpt2": gpt2_12,
}
