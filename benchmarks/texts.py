"""Which output of training texts serves scores better: the mean margin or the mean log-likelihood.

    python -m benchmarks.texts --out texts_output            # an hour on one core, most of it retraining
    python -m benchmarks.texts --out texts_output --quick    # one small task, under a minute

Language models of several kinds, on texts of several lengths. Exact Gauss-Newton scores have all their defaults, and
the output of the targets is always their margin. The truth is the outputs of models retrained on random halves.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from benchmarks.tasks import CHARACTERS, LitText, Task, _texts, make_tasks
from benchmarks.truth import MODELS, SUBSETS, Truth, kept, quiet, trainer_for
from lightning_trak.methods import ExactKernel
from lightning_trak.outputs import CausalLMLogLikelihood, CausalLMMargin, ModelOutput
from lightning_trak.texts.tables import Table

TARGETS = 80
LETTERS = 16  # of the chains


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


@dataclass
class Result:
    """One line of the table.

    Attributes:
        task: name of the task.
        predictions: how many predictions the loss of a text is the mean of.
        models: number of models averaged.
        margin: LDS with the mean margin of the training texts.
        log_likelihood: LDS with their mean log-likelihood.
        gain: the second minus the first, with a 95% interval.
    """

    task: str
    predictions: int
    models: int
    margin: float
    log_likelihood: float
    gain: tuple[float, float, float]


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


def scores_of(task: Task, states: list[dict[str, Tensor]], output: ModelOutput) -> Tensor:
    """Exact scores of the margins of the targets, with another output of the training texts."""
    trainer = trainer_for(task)
    with tempfile.TemporaryDirectory() as directory:
        method = ExactKernel(task.make_module().eval(), states, directory, output=output)
        method.featurize(trainer, DataLoader(task.train, batch_size=100))
        return method.score(trainer, DataLoader(task.targets, batch_size=100), output=task.output)


def results_of(task: Task, truth: Truth) -> Iterator[Result]:
    """At the first model, and at all together."""
    for models in (1, len(truth.states)):
        outputs = task.output, CausalLMLogLikelihood(reduction="mean")
        margin, likelihood = (scores_of(task, truth.states[:models], output) for output in outputs)
        lds = [float(truth.measure(scores).compute()) for scores in (margin, likelihood)]
        predictions = task.train.tensors[0].shape[1] - 1
        yield Result(task.name, predictions, models, *lds, truth.difference(likelihood, margin))


def table(results: list[Result]) -> str:
    """Markdown."""
    rows = []
    for r in results:
        gain = "{:+.3f} ({:+.3f} to {:+.3f})".format(*r.gain)
        rows.append((r.task, r.predictions, r.models, f"{r.margin:.3f}", f"{r.log_likelihood:.3f}", gain))
    return Table(("task", "T", "M", "mean margin", "mean log-likelihood", "gain"), rows).markdown() + "\n"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    tasks = text_tasks()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("texts_output"), help="where everything is written")
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=list(tasks), help="default: all")
    parser.add_argument("--quick", action="store_true", help="one task, two epochs, 20 halves, 2 models")
    args = parser.parse_args(arguments)
    quiet()
    torch.set_num_threads(1)  # the nets are too small for more threads
    args.out.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    for name in tqdm(["chains 4"] if args.quick else args.tasks):
        wide = (SUBSETS, 3, MODELS) if name == "text" else (60, 2, MODELS)
        task = replace(tasks[name], max_epochs=2) if args.quick else tasks[name]
        truth = kept(args.out, task, *((20, 1, 2) if args.quick else wide))
        for result in results_of(task, truth):
            results.append(result)
            print(table([result]).splitlines()[-1], flush=True)
            (args.out / "texts.json").write_text(json.dumps([asdict(line) for line in results], indent=1))
            (args.out / "texts.md").write_text(table(results))


if __name__ == "__main__":
    main()
