"""Curvature of single predictions, where a loss adds up several of them for an example, against that of the whole.

    python -m benchmarks.predictions --out predictions_output            # 90 minutes on one core, most of it retraining
    python -m benchmarks.predictions --out predictions_output --quick    # one small task, under a minute

Language models of several kinds, on texts of several lengths; sets of labels, maps of labels and bags of digits. TRAK
has no projection here, and all its other defaults. The truth is the outputs of models retrained on random halves.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from benchmarks.command_line import begin, difference, options, save
from benchmarks.tasks import CHARACTERS, LitText, Task, _texts, make_tasks
from benchmarks.truth import MODELS, SUBSETS, Truth, kept, trainer_for
from lightning_trak import TRAK
from lightning_trak.outputs import CausalLMMargin, MultiLabelMargin, SegmentationMargin
from lightning_trak.outputs.predictions import SeveralPredictions
from lightning_trak.projections import IdentityProjection
from lightning_trak.texts.tables import Table

TARGETS = 80
LETTERS = 16  # of the chains
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # of constant dampings: times weights over examples


class NextLetter(L.LightningModule):
    """A perceptron that predicts each letter from the three before it."""

    def __init__(self, vocabulary: int, width: int, hidden: int, learning_rate: float, weight_decay: float) -> None:
        super().__init__()
        self.rates = {"lr": learning_rate, "weight_decay": weight_decay}
        self.letters = nn.Embedding(vocabulary + 1, width)
        self.net = nn.Sequential(nn.Linear(3 * width, hidden), nn.GELU(), nn.Linear(hidden, vocabulary))

    def forward(self, ids: Tensor) -> Tensor:
        letters = self.letters(F.pad(ids, (2, 0), value=self.letters.num_embeddings - 1))
        length = ids.shape[-1]
        return self.net(torch.cat([letters[..., start : start + length, :] for start in range(3)], -1))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        (ids,) = batch
        return F.cross_entropy(self(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), **self.rates)


class Perceptron(L.LightningModule):
    """A perceptron, for each label of a set or each digit of a bag."""

    def __init__(self, inputs: int, outputs: int, hidden: int, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.net = nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.net(inputs)
        return logits.movedim(-1, 1)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        inputs, labels = batch
        loss = F.binary_cross_entropy_with_logits if labels.is_floating_point() else F.cross_entropy
        return loss(self(inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


class PixelNet(L.LightningModule):
    """Three convolutions: is each pixel of a noisy digit ink?"""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Conv2d(1, 12, 3, padding=1), nn.GELU(), nn.Conv2d(12, 12, 3, padding=1), nn.GELU()
        self.net = nn.Sequential(*layers, nn.Conv2d(12, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        return F.binary_cross_entropy_with_logits(self(images)[:, 0], labels.float())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=5e-3, weight_decay=0.01)


@dataclass
class Result:
    """One line of the table.

    Attributes:
        task: name of the task.
        predictions: how many predictions the loss of an example adds up.
        models: number of models averaged.
        whole: LDS with the curvature of the whole output.
        single: LDS with that of single predictions.
        gain: the second minus the first, with a 95% interval.
        best: the best LDS of constant dampings, with the curvature of single predictions.
    """

    task: str
    predictions: int
    models: int
    whole: float
    single: float
    gain: tuple[float, float, float]
    best: float


def text_tasks() -> dict[str, Task]:
    """All tasks by name. Those named by a length have texts of one letter more."""
    margin = CausalLMMargin()

    def letters() -> NextLetter:
        return NextLetter(len(CHARACTERS), 16, 64, 3e-3, 0.01)

    def chain() -> NextLetter:
        return NextLetter(LETTERS, 12, 48, 5e-3, 0.1)

    tasks = [
        make_tasks()["text"],
        *(
            Task(f"text {length}", "the same, shorter", LitText, margin, *_texts(n, TARGETS, length + 1), 12, 50)
            for length, n in ((4, 800), (16, 600))
        ),
        Task("letters 32", "the same texts, perceptron", letters, margin, *_texts(500, TARGETS, 33), 12, 50),
        *(
            Task(f"chains {length}", "Markov chains, perceptron", chain, margin, *chains(500, length, kinds=6), 12, 50)
            for length in (4, 16, 64)
        ),
        Task("chains 32", "fewer of them, longer training", chain, margin, *chains(400, 32, kinds=3), 25, 50),
    ]
    return {task.name: task for task in tasks}


def other_tasks() -> dict[str, Task]:
    """Tasks without texts."""
    adam = partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.01)
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3)
    labels = halved_digits(600)
    count = labels[0].tensors[1].shape[1]
    fitted = partial(adam, weight_decay=0.0)

    def one_layer(inputs: int, outputs: int, hidden: int, optimizer: Callable[..., Any]) -> Callable[[], Perceptron]:
        return lambda: Perceptron(inputs, outputs, hidden, optimizer)

    several, maps = MultiLabelMargin(), SegmentationMargin()
    tasks = [
        Task(
            "labels", "lower halves of digits from the upper", one_layer(32, count, 64, adam), several, *labels, 20, 50
        ),
        Task("questions", "about noisy digits", one_layer(64, 10, 64, adam), several, *questions(600), 20, 50),
        Task("questions, fitted", "the same, longer", one_layer(64, 10, 64, fitted), several, *questions(400), 80, 50),
        Task("pixels", "ink in noisy digits, convolutions", PixelNet, maps, *noisy_digits(500), 15, 50),
        Task("bags 4", "digits, with wrong labels", one_layer(64, 10, 48, sgd), maps, *bags(400, 4), 20, 50),
    ]
    return {task.name: task for task in tasks}


def split(train: int, *columns: Tensor) -> tuple[TensorDataset, TensorDataset]:
    """The first examples, to train on, and the next ones, as targets."""
    targets = slice(train, train + TARGETS)
    return TensorDataset(*(column[:train] for column in columns)), TensorDataset(
        *(column[targets] for column in columns)
    )


def digits(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """All digits in a random order, with pixels from 0 to 1."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=generator)
    return torch.tensor(found.images, dtype=torch.float32)[order] / 16, torch.tensor(found.target)[order]


def halved_digits(num_train: int) -> tuple[TensorDataset, TensorDataset]:
    """The upper half of each digit, and which pixels of the lower half are ink."""
    pixels = digits(torch.Generator().manual_seed(0))[0].flatten(1)
    ink = (pixels[:, 32:] > 0.4).float()
    known = (ink.mean(0) > 0.03) & (ink.mean(0) < 0.97)
    return split(num_train, pixels[:, :32], ink[:, known])


def questions(num_train: int) -> tuple[TensorDataset, TensorDataset]:
    """Noisy digits, and answers to random questions that depend on the class."""
    generator = torch.Generator().manual_seed(11)
    images, classes = digits(generator)
    answers = (torch.rand(10, 10, generator=generator) < 0.5).float()
    pixels = images.flatten(1)
    return split(num_train, pixels + 0.3 * torch.randn(pixels.shape, generator=generator), answers[classes])


def noisy_digits(num_train: int) -> tuple[TensorDataset, TensorDataset]:
    """Noisy digits, and where the ink is."""
    generator = torch.Generator().manual_seed(0)
    images, _ = digits(generator)
    noisy = images.unsqueeze(1) + 0.4 * torch.randn(len(images), 1, 8, 8, generator=generator)
    return split(num_train, noisy, (images > 0.4).long())


def bags(num_train: int, size: int) -> tuple[TensorDataset, TensorDataset]:
    """Several digits for each example, with their classes, a tenth of them wrong."""
    generator = torch.Generator().manual_seed(3)
    images, classes = digits(generator)
    chosen = torch.randint(len(images), (num_train + TARGETS, size), generator=generator)
    wrong = torch.rand(chosen.shape, generator=generator) < 0.1
    labels = torch.where(wrong, torch.randint(10, chosen.shape, generator=generator), classes[chosen])
    return split(num_train, images.flatten(1)[chosen], labels)


def chains(num_train: int, length: int, kinds: int) -> tuple[TensorDataset, TensorDataset]:
    """Texts of letters, each from one of a few Markov chains."""
    generator = torch.Generator().manual_seed(4)
    following = torch.softmax(2 * torch.randn(kinds, LETTERS, LETTERS, generator=generator), -1)
    kind = torch.randint(kinds, (num_train + TARGETS,), generator=generator)
    letters = [torch.randint(LETTERS, kind.shape, generator=generator)]
    for _ in range(length):
        letters.append(torch.multinomial(following[kind, letters[-1]], 1, generator=generator)[:, 0])
    texts = torch.stack(letters, dim=1)
    return TensorDataset(texts[:num_train]), TensorDataset(texts[num_train:])


def results_of(task: Task, truth: Truth) -> Iterator[Result]:
    """At the first model, and at all together."""
    trainer, targets = trainer_for(task), DataLoader(task.targets, batch_size=100)
    with tempfile.TemporaryDirectory() as store:
        for models in (1, len(truth.states)):
            settings: dict[str, Any] = {"output": task.output, "projection": IdentityProjection()}
            states, module = truth.states[:models], task.make_module().eval()
            single = TRAK(module, states, store, **settings)
            single.featurize(trainer, DataLoader(task.train, batch_size=100))
            whole = TRAK(module, states, store, curvature="gauss_newton", **settings)
            scores = {method: method.score(trainer, targets) for method in (whole, single)}
            lds = [float(truth.measure(found).compute()) for found in scores.values()]
            size = sum(parameter.numel() for parameter in module.parameters())
            constants = [share * size / len(task.train) for share in SHARES]
            swept = single.score_dampings(trainer, targets, constants)
            best = max(float(truth.measure(found).compute()) for found in swept.values())
            gain = truth.difference(scores[single], scores[whole])
            first = tuple(column[:1] for column in task.train.tensors)
            weights = cast(SeveralPredictions, task.output).predictions(module, first).weights
            yield Result(task.name, int((weights != 0).sum()), models, *lds, gain, best)


def table(results: list[Result]) -> str:
    """Markdown."""
    rows = []
    for r in results:
        gain = difference(*r.gain)
        best = f"{r.single / r.best:.2f}"
        rows.append((r.task, r.predictions, r.models, f"{r.whole:.3f}", f"{r.single:.3f}", gain, best))
    heads = ("task", "T", "M", "of the whole", "of single predictions", "gain", "of the best damping")
    return Table(heads, rows).markdown() + "\n"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    tasks = text_tasks() | other_tasks()
    parser = options(__doc__, "predictions_output", quick="one task, two epochs, 20 halves, 2 models")
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=list(tasks), help="default: all")
    args = begin(parser, arguments)
    results: list[Result] = []
    for name in tqdm(["chains 4"] if args.quick else args.tasks):
        wide = (SUBSETS, 3, MODELS) if name == "text" else (60, 2, MODELS)
        task = replace(tasks[name], max_epochs=2) if args.quick else tasks[name]
        truth = kept(args.out, task, *((20, 1, 2) if args.quick else wide))
        for result in results_of(task, truth):
            results.append(result)
            save(results, args.out / "predictions", table)


if __name__ == "__main__":
    main()
