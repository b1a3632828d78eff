"""Linear layers apart from autograd: gradients and products are the same, or autograd does all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_trak.replay.reverse.linear_layers import LinearCalls
from lightning_trak.replay.reverse.step import Reverse
from tests.methods.metagradients import DATA, attribute
from tests.replay.runs import Net, train


class Tied(nn.Module):
    """A weight of two linear layers, which another operation also uses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(self.layer(inputs).tanh()).tanh() @ self.layer.weight


class Unused(nn.Module):
    """A layer whose results are dropped, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.dropped, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        self.dropped(inputs)
        return self.frozen(self.first(inputs).tanh()).tanh()


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "one layer": (lambda: nn.Linear(4, 3), (5, 4)),
    "no bias": (
        lambda: nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False)),
        (5, 4),
    ),
    "in place": (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)), (5, 4)),
    "sequences": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3)), (5, 2, 4)),
    "one vector": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), (4,)),
    "tied": (Tied, (5, 4)),
    "unused": (Unused, (5, 4)),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("without", ["", "first", "bias"])
def test_gradients_and_products_are_those_of_autograd(name: str, without: str) -> None:
    made, shape = NETS[name]
    net, inputs, count = made().double(), torch.randn(shape, dtype=torch.float64), 3
    parameters = {name: part for name, part in net.named_parameters() if part.requires_grad}
    along = {
        name: torch.randn(count, *part.shape, dtype=torch.float64)
        for name, part in parameters.items()
        if not (without == "first" and name == next(iter(parameters))) and not (without == "bias" and "bias" in name)
    }

    total = net(inputs).square().sum()
    right = torch.autograd.grad(total, list(parameters.values()), create_graph=True, materialize_grads=True)
    rows = [
        torch.autograd.grad(
            [gradient for name, gradient in zip(parameters, right, strict=True) if name in along],
            list(parameters.values()),
            [vectors[row] for vectors in along.values()],
            retain_graph=True,
            materialize_grads=True,
        )
        for row in range(count)
    ]

    calls = LinearCalls(parameters)
    with calls:
        total = net(inputs).square().sum()
    own, layers = calls.differentiate(total, list(parameters.values()))
    gradients = {name: torch.zeros_like(part) for name, part in parameters.items()}
    gradients |= {name: part for name, part in zip(parameters, own, strict=True) if part is not None}
    for name, part in (found for layer in layers for found in layer.gradients()):
        gradients[name] = gradients[name] + part
    for gradient, expected in zip(gradients.values(), right, strict=True):
        torch.testing.assert_close(gradient, expected)

    pairs = [(part, along.get(name)) for name, part in zip(parameters, own, strict=True) if part is not None]
    pairs += [pair for layer in layers for pair in layer.cotangents(along, count)]
    leaves = [leaf for layer in layers for leaf in layer.leaves]
    outputs, vectors = zip(*[pair for pair in pairs if pair[1] is not None], strict=True)
    products = {name: torch.zeros(count, *part.shape, dtype=torch.float64) for name, part in parameters.items()}
    wanted = [*parameters.values(), *leaves]
    parts = iter(torch.autograd.grad(outputs, wanted, vectors, is_grads_batched=True, allow_unused=True))
    for product, part in zip(products.values(), parts, strict=False):
        product += 0 if part is None else part
    for layer in layers:
        layer.add([next(parts) for _ in layer.leaves], products)
    for number, product in enumerate(products.values()):
        torch.testing.assert_close(product, torch.stack([row[number] for row in rows]))


class Checkpointed(nn.Module):
    """A part of its forward pass is repeated in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, inputs, use_reentrant=False))


def hidden() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


class Penalized(Net):
    """Its loss has the gradient by the hidden layer."""

    def losses(self, batch: list[Tensor]) -> Tensor:
        inner = self.net[0](batch[0])
        losses = F.cross_entropy(self.net[1:](inner), batch[1], reduction="none")
        (slopes,) = torch.autograd.grad(losses.sum(), inner, create_graph=True)
        return losses + slopes.square().sum(1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.losses(batch).mean()


@pytest.mark.parametrize("name", ["usual", "penalty", "checkpoint"])
def test_scores_are_those_of_one_target_after_the_other(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, net = {"usual": (Net, hidden), "penalty": (Penalized, hidden), "checkpoint": (Net, Checkpointed)}[name]
    module = kind(net)
    trainer = train(module, DATA, tmp_path)
    options: dict[str, Any] = {"losses": Penalized.losses} if name == "penalty" else {}
    kinds: list[bool] = []

    def noted(self: Reverse, *args: Any) -> None:
        usual(self, *args)
        kinds.extend(self._apart.values())

    usual = Reverse._try_apart
    monkeypatch.setattr(Reverse, "_try_apart", noted)
    found = attribute(module, tmp_path, trainer, **options)
    assert set(kinds) == {name == "usual"}
    monkeypatch.setattr("lightning_trak.replay.reverse.run.COTANGENT_BYTES", 1)  # a reverse pass for each target
    torch.testing.assert_close(found, attribute(module, tmp_path, trainer, **options), rtol=1e-10, atol=1e-13)
