"""The tasks that faithfulness is measured on: real data, and models that train in seconds.

All data come with scikit-learn or with Python itself. The first tasks are small. The models of the wide tasks have over
100,000 weights, many more than a projection keeps, and 2,000 training examples or more.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pydoc_data.topics import topics as pages

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_sample_images
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from examples.counterfactuals import DigitsMLP
from examples.digits import LitDigits, make_data
from lightning_trak.outputs import CausalLMMargin, ClassificationMargin, ModelOutput, RegressionOutput

CHARACTERS = " etaoinsrhldcumpfgywbvkxjqz0123456789.,()_'\"`*:-=/\n"
LENGTH = 48


class UndecayedMLP(DigitsMLP):
    """The perceptron for digits, trained without weight decay."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class WideMLP(DigitsMLP):
    """A perceptron with more than 100,000 weights.

    Args:
        inputs: number of pixels.
        classes: number of classes.
        learning_rate: of SGD with momentum.
    """

    def __init__(self, inputs: int, classes: int, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        layers = nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, classes)
        self.net = nn.Sequential(nn.Flatten(), *layers)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)


class WideConvNet(LitDigits):
    """Two convolutions and two linear layers for 3 x 16 x 16 images of two classes: 117,986 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(1024, 96),
            nn.ReLU(),
            nn.Linear(96, 2),
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


class TabularMLP(L.LightningModule):
    """A perceptron with one output, for tables of standardised numbers."""

    def __init__(self, features: int, regression: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(features, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1), nn.Flatten(0)
        )
        self.loss = F.mse_loss if regression else F.binary_cross_entropy_with_logits

    def forward(self, rows: Tensor) -> Tensor:
        return self.net(rows)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        rows, labels = batch
        return self.loss(self(rows), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=0.01)


class Block(nn.Module):
    """A transformer layer with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.merged = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: Tensor) -> Tensor:
        split = self.attention(self.before_attention(hidden)).unflatten(-1, (3, self.heads, -1))
        query, key, value = (part.transpose(-2, -3) for part in split.unbind(-3))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.merged(attended.transpose(-2, -3).flatten(-2))
        return hidden + self.mlp(self.before_mlp(hidden))


class LitText(L.LightningModule):
    """A language model of characters: two causal transformer layers."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(len(CHARACTERS), width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(Block(width, 2), Block(width, 2))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(CHARACTERS)))

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[-1], device=ids.device)
        return self.head(self.blocks(self.tokens(ids) + self.places(places)))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        (ids,) = batch
        return F.cross_entropy(self(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.1)


@dataclass(frozen=True)
class Task:
    """A model to train, its data, and the output to attribute.

    Attributes:
        name: name of the task.
        about: data and model in a few words.
        make_module: makes a newly initialised module.
        output: the attributed output.
        train: training set.
        targets: examples whose outputs are attributed.
        max_epochs: number of epochs of each training.
        batch_size: batch size of training.
    """

    name: str
    about: str
    make_module: Callable[[], L.LightningModule]
    output: ModelOutput
    train: TensorDataset
    targets: TensorDataset
    max_epochs: int
    batch_size: int


@cache
def make_tasks() -> dict[str, Task]:
    """All tasks by name."""
    margin = ClassificationMargin()
    digits = make_data()
    cancer = _table(load_breast_cancer(return_X_y=True), 420)
    patches = _patches(3000)
    diabetes = _table(load_diabetes(return_X_y=True), 342, standardise_labels=True)
    tasks = [
        Task("digits MLP", "digits, 64-64-64-10 perceptron, SGD", DigitsMLP, margin, *digits, 16, 100),
        Task("digits conv", "digits, two convolutions, SGD", LitDigits, margin, *digits, 16, 100),
        Task("digits no decay", "the first without weight decay, 30 epochs", UndecayedMLP, margin, *digits, 30, 100),
        Task("cancer", "tumours, perceptron, AdamW", lambda: TabularMLP(30, False), margin, *cancer, 20, 32),
        Task(
            "diabetes",
            "regression, perceptron, AdamW",
            lambda: TabularMLP(10, True),
            RegressionOutput(),
            *diabetes,
            20,
            32,
        ),
        Task("text", "characters of Python's manual, transformer, AdamW", LitText, CausalLMMargin(), *_texts(), 12, 50),
        Task(
            "written digits",
            "distorted digits, 784-128-64-10 perceptron, SGD",
            lambda: WideMLP(784, 10, 0.03),
            margin,
            *_written_digits(),
            15,
            100,
        ),
        Task(
            "photographs conv", "patches of two photographs, convolutions, SGD", WideConvNet, margin, *patches, 12, 100
        ),
        Task(
            "photographs MLP",
            "more of these patches, 768-128-64-2 perceptron, SGD",
            lambda: WideMLP(768, 2, 0.02),
            margin,
            *_patches(5000),
            8,
            100,
        ),
    ]
    return {task.name: task for task in tasks}


def _table(
    data: tuple[Tensor, Tensor], num_train: int, standardise_labels: bool = False
) -> tuple[TensorDataset, TensorDataset]:
    rows, labels = (torch.tensor(column, dtype=torch.float32) for column in data)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    rows, labels = rows[order], labels[order]
    rows = (rows - rows[:num_train].mean(0)) / rows[:num_train].std(0)
    if standardise_labels:
        labels = (labels - labels[:num_train].mean()) / labels[:num_train].std()
    return TensorDataset(rows[:num_train], labels[:num_train]), TensorDataset(rows[num_train:], labels[num_train:])


def _texts(num_train: int = 1000, num_targets: int = 150, length: int = LENGTH) -> tuple[TensorDataset, TensorDataset]:
    """Random passages of the manual that comes with Python (`help("assert")` prints a page of it)."""
    text = "".join(pages[name] for name in sorted(pages)).lower()
    ids = torch.tensor([place for place in map(CHARACTERS.find, text) if place >= 0])
    passages = ids[: len(ids) // length * length].view(-1, length)
    chosen = passages[torch.randperm(len(passages), generator=torch.Generator().manual_seed(0))]
    return TensorDataset(chosen[:num_train]), TensorDataset(chosen[num_train : num_train + num_targets])


def _written_digits(num_train: int = 2000, num_targets: int = 150) -> tuple[TensorDataset, TensorDataset]:
    """28 x 28 images of digits, each turned, scaled, sheared and moved a little. Targets are of other digits."""
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=generator)

    def distorted(chosen: Tensor, count: int) -> TensorDataset:
        def draw(limit: float) -> Tensor:
            return (2 * torch.rand(count, generator=generator) - 1) * limit

        chosen = chosen[torch.randint(len(chosen), (count,), generator=generator)]
        angle, scale, shear = draw(0.2), 1 + draw(0.15), draw(0.15)
        cosine, sine = angle.cos() * scale, angle.sin() * scale
        affine = torch.stack([cosine, shear - sine, draw(0.15), sine, cosine, draw(0.15)], 1).view(-1, 2, 3)
        grid = F.affine_grid(affine, [count, 1, 28, 28], align_corners=False)
        return TensorDataset(F.grid_sample(images[chosen], grid, align_corners=False), labels[chosen])

    return distorted(order[:1600], num_train), distorted(order[1600:], num_targets)


def _patches(num_train: int, num_targets: int = 200, size: int = 16) -> tuple[TensorDataset, TensorDataset]:
    """Standardised, noisy patches; labels say of which photograph. Training patches lie left of all targets."""
    photographs = [
        torch.tensor(photo / 255, dtype=torch.float32).movedim(2, 0) for photo in load_sample_images().images
    ]
    generator = torch.Generator().manual_seed(0)

    def drawn(count: int, left: int, right: int) -> TensorDataset:
        labels, rows, columns = (
            torch.randint(low, high, (count,), generator=generator)
            for low, high in ((0, 2), (0, photographs[0].shape[1] - size), (left, right - size))
        )
        patches = torch.stack(
            [
                photographs[label][:, row : row + size, column : column + size]
                for label, row, column in zip(labels.tolist(), rows.tolist(), columns.tolist(), strict=True)
            ]
        )
        patches = (patches - patches.mean((2, 3), keepdim=True)) / (patches.std((1, 2, 3), keepdim=True) + 0.02)
        return TensorDataset(patches + 0.5 * torch.randn(patches.shape, generator=generator), labels)

    return drawn(num_train, 0, 448), drawn(num_targets, 448, 640)
