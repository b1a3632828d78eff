"""Graphs in the style of PyTorch Geometric, in several kinds of batches, and a model of them."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_trak.outputs import ModelOutput

FEATURES, CLASSES = 4, 2


class Data:
    """A graph, or several graphs joined into one, as an object with attributes. Like PyTorch Geometric's."""

    def __init__(self, **tensors: Tensor) -> None:
        vars(self).update(tensors)

    def to(self, device: torch.device, **_: Any) -> "Data":
        moved = copy.copy(self)
        vars(moved).update({name: tensor.to(device) for name, tensor in vars(self).items()})
        return moved


@dataclass
class Fields:
    x: Tensor
    edge_index: Tensor
    batch: Tensor
    y: Tensor


class Named(NamedTuple):
    x: Tensor
    edge_index: Tensor
    batch: Tensor
    y: Tensor


KINDS: dict[str, Callable[..., Any]] = {"object": Data, "dict": dict, "dataclass": Fields, "namedtuple": Named}


class Graphs(Dataset[dict[str, Tensor]]):
    """Random graphs of one to seven nodes."""

    def __init__(self, count: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def whole(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=generator)

        sizes = [1, *whole(2, 8, count - 1).tolist()]
        self.graphs = [
            {
                "x": torch.randn(size, FEATURES, generator=generator),
                "edge_index": whole(0, size, 2, 2 * size),
                "y": whole(0, CLASSES, 1),
            }
            for size in sizes
        ]

    def __len__(self) -> int:
        return len(self.graphs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.graphs[index]


@dataclass
class Join:
    """A collate function that joins graphs into one."""

    kind: str

    def __call__(self, graphs: Sequence[dict[str, Tensor]]) -> Any:
        starts = torch.tensor([0, *(len(graph["x"]) for graph in graphs)]).cumsum(0)
        edges = [graph["edge_index"] + start for graph, start in zip(graphs, starts[:-1], strict=True)]
        return KINDS[self.kind](
            x=torch.cat([graph["x"] for graph in graphs]),
            edge_index=torch.cat(edges, 1),
            batch=torch.arange(len(graphs)).repeat_interleave(starts.diff()),
            y=torch.cat([graph["y"] for graph in graphs]),
        )


def part(batch: Any, name: str) -> Tensor:
    return batch[name] if isinstance(batch, dict) else getattr(batch, name)


class GraphNet(L.LightningModule):
    """Two rounds of messages, the mean over the nodes of a graph, and a linear layer."""

    def __init__(self, normalizes: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES)
        self.normalizes = normalizes

    def forward(self, batch: Any) -> Tensor:
        nodes, (source, to), graphs = part(batch, "x"), part(batch, "edge_index"), part(batch, "batch")
        for layer in (self.first, self.second):
            nodes = torch.tanh(layer(nodes))
            nodes = nodes + torch.zeros_like(nodes).index_add_(0, to, nodes[source])
        if self.normalizes:
            nodes = nodes - nodes.mean(0)
        count = len(part(batch, "y"))
        sums = nodes.new_zeros(count, nodes.shape[1]).index_add_(0, graphs, nodes)
        return self.head(sums / graphs.bincount(minlength=count).unsqueeze(1))

    def training_step(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch), part(batch, "y"))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class GraphMargin(ModelOutput):
    """The margin of the label: the difference of the two logits."""

    def output(self, module: nn.Module, batch: Any) -> Tensor:
        logits = module(batch)
        signs = 1 - 2 * part(batch, "y")
        return signs * (logits[:, 0] - logits[:, 1])

    def loss(self, output: Tensor) -> Tensor:
        return F.softplus(-output)
