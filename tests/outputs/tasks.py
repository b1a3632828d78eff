"""A tiny float64 model, an output and a dataset for each task."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from lightning_trak.outputs import (
    AdvantageLogLikelihood,
    DiffusionLoss,
    DiffusionMean,
    DiffusionSquare,
    DirectionOutput,
    ModelOutput,
    MultiLabelMargin,
    PreferenceMargin,
    SegmentationMargin,
)

ALPHAS = torch.linspace(0.99, 0.05, 10)
SIZE = 9


class Task(NamedTuple):
    module: nn.Module
    output: ModelOutput
    items: list[Any]

    def batch(self, *numbers: int) -> Any:
        """Some examples, default all, as a DataLoader collates them."""
        return default_collate([self.items[number] for number in numbers or range(len(self.items))])


class Texts(nn.Module):
    """A causal language model of 9 tokens, to which masked tokens are nothing."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, width)
        self.block = nn.Linear(width, width)
        self.head = nn.Linear(width, 9)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.embedding(input_ids)
        if attention_mask is not None:
            hidden = hidden * attention_mask.unsqueeze(-1)
        return {"logits": self.head(torch.tanh(self.block(hidden.cumsum(1))))}


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Embedding(10, 3)
        self.inner, self.outer = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 1)

    def forward(self, noisy: Tensor, times: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(noisy) + self.time(times)[:, :, None, None]))


def ids_and_mask(length: int = 5) -> tuple[Tensor, Tensor]:
    """Texts of two or more tokens, padded on the right."""
    lengths = torch.randint(2, length + 1, (SIZE, 1))
    return torch.randint(0, 9, (SIZE, length)), (torch.arange(length) < lengths).long()


def pairs() -> list[dict[str, Tensor]]:
    columns = {}
    for side, length in (("chosen", 5), ("rejected", 4)):
        ids, mask = ids_and_mask(length)
        columns |= {f"{side}_input_ids": ids, f"{side}_attention_mask": mask}
    return rows(**columns)


def rows(*columns: Tensor, **named: Tensor) -> list[Any]:
    """Items of a dataset: tuples, or dictionaries for named columns."""
    if named:
        return [dict(zip(named, row, strict=True)) for row in zip(*named.values(), strict=True)]
    return list(zip(*columns, strict=True))


def multi_label() -> Task:
    labels = torch.randint(0, 2, (SIZE, 3))
    labels[1, 2] = labels[4, 0] = -100
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return Task(module, MultiLabelMargin(), rows(torch.randn(SIZE, 4), labels))


def segmentation() -> Task:
    labels = torch.randint(0, 3, (SIZE, 4, 4))
    labels[2, :2] = labels[5, 3] = 255
    module = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 3, 1))
    return Task(module, SegmentationMargin(ignore_index=255), rows(torch.randn(SIZE, 2, 4, 4), labels))


def preference() -> Task:
    return Task(Texts(), PreferenceMargin(Texts(), beta=0.5), pairs())


def policy() -> Task:
    ids, mask = ids_and_mask()
    labels = torch.where(mask == 1, ids, -100)
    columns = {"input_ids": ids, "attention_mask": mask, "labels": labels, "advantages": torch.randn(SIZE)}
    return Task(Texts(), AdvantageLogLikelihood(), rows(**columns))


def one_action() -> Task:
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    columns = torch.randn(SIZE, 4), torch.randint(0, 3, (SIZE,)), torch.randn(SIZE)
    return Task(module, AdvantageLogLikelihood(actions="one"), rows(*columns))


def direction() -> Task:
    ids, mask = ids_and_mask()
    return Task(Texts(), DirectionOutput("block", torch.randn(4)), rows(input_ids=ids, attention_mask=mask))


def last_direction() -> Task:
    ids, mask = ids_and_mask()
    return Task(Texts(), DirectionOutput("block", torch.randn(4), "last"), rows(input_ids=ids, attention_mask=mask))


def diffusion(kind: type[Any]) -> Callable[[], Task]:
    return lambda: Task(Denoiser(), kind(ALPHAS, [1, 5, 9], draws=2), list(torch.randn(SIZE, 2, 3, 3)))


TASKS: dict[str, Callable[[], Task]] = {
    "multi-label": multi_label,
    "segmentation": segmentation,
    "preference": preference,
    "policy": policy,
    "one action": one_action,
    "direction": direction,
    "last direction": last_direction,
    "diffusion loss": diffusion(DiffusionLoss),
    "diffusion square": diffusion(DiffusionSquare),
    "diffusion mean": diffusion(DiffusionMean),
}


def task(name: str, dtype: torch.dtype = torch.float64) -> Task:
    """A task, the same at every call, with its model in eval mode."""
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found = TASKS[name]()
    finally:
        torch.set_default_dtype(torch.float32)
    found.module.eval()
    return found
