"""Which training losses depend on the rest of the batch."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_trak.replay import Recording
from lightning_trak.replay.coupling import coupling
from lightning_trak.replay.player import Player
from lightning_trak.retraining import RecordedFleet
from tests.callback_nets import make_trainer
from tests.methods.metagradients import DATA, NETS, TARGETS, attribute, layers
from tests.replay.runs import NUM_TRAIN, Net, shuffled, train


def plain(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], reduction="none")


def risk_sets(module: nn.Module, batch: Any) -> Tensor:
    """Cox's partial likelihood: most examples are censored."""
    hazards, times = module(batch[0])[:, 0], batch[0][:, 0]
    at_risk = times[None] >= times[:, None]
    events = batch[2] < NUM_TRAIN // 3
    return events * (hazards.masked_fill(~at_risk, -torch.inf).logsumexp(1) - hazards)


def in_batch_negatives(module: nn.Module, batch: Any) -> Tensor:
    embeddings = F.normalize(module(batch[0]), dim=-1)
    similarities = embeddings @ F.normalize(batch[0][:, :3], dim=-1).T
    return F.cross_entropy(similarities, torch.arange(len(embeddings)), reduction="none")


def class_weights(module: nn.Module, batch: Any) -> Tensor:
    weights = torch.tensor([1.0, 2.0, 5.0])[batch[1]]
    return plain(module, batch) * weights / weights.mean()


def hardest(module: nn.Module, batch: Any) -> Tensor:
    embeddings, same = module(batch[0]), batch[1][:, None] == batch[1]
    distances = (embeddings[:, None] - embeddings).square().sum(-1)
    return F.relu(1 + (distances * same).amax(1) - (distances + 100.0 * same).amin(1))


def neighbours(module: nn.Module, batch: Any) -> Tensor:
    """Each two rows are a pair, as in ranking."""
    scores = module(batch[0])[:, 0]
    return F.softplus(scores - scores[torch.arange(len(scores)) ^ 1])


def halves(module: nn.Module, batch: Any) -> Tensor:
    """Each row belongs to one in the other half, as two views do."""
    scores = module(batch[0])[:, 0]
    return (scores - scores.roll(len(scores) // 2)).square()


def mixed(module: nn.Module, batch: Any) -> Tensor:
    return plain(module, [0.7 * batch[0] + 0.3 * batch[0][torch.randperm(len(batch[0]))], batch[1]])


def mean(module: nn.Module, batch: Any) -> Tensor:
    return plain(module, batch).mean().expand(len(batch[0]))


def total(module: nn.Module, batch: Any) -> Tensor:
    return len(batch[0]) * plain(module, batch)


def noisy(module: nn.Module, batch: Any) -> Tensor:
    return plain(module, [batch[0] + torch.randn_like(batch[0]), batch[1]])


def penalty(module: nn.Module, batch: Any) -> Tensor:
    inputs = batch[0].clone().requires_grad_()
    losses = plain(module, [inputs, batch[1]])
    (slopes,) = torch.autograd.grad(losses.sum(), inputs, create_graph=True)
    return losses + slopes.square().sum(1)


def in_train_mode(module: nn.Module, batch: Any) -> Tensor:
    if not module.training:
        raise RuntimeError("predictions, no losses")
    return mean(module, batch)


def mixed_in_train_mode(module: nn.Module, batch: Any) -> Tensor:
    return mixed(module, batch) if module.training else plain(module, batch)


def distinct(module: nn.Module, batch: Any) -> Tensor:
    if len(batch[0].unique(dim=0)) < len(batch[0]):
        raise ValueError("examples are repeated")
    return mean(module, batch)


class Drawing(Net):
    """Its step draws a number, so that the random states before each step are recorded."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        torch.rand(())
        return super().training_step(batch, batch_idx)


def found(net: Net, directory: Path, losses: Any, loader: DataLoader[Any] | None = None) -> str | None:
    player = Player(net, Recording(directory), loader or shuffled(DATA), None, torch.device("cpu"))
    torch.manual_seed(0)
    return coupling(player, losses)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("recording")
    train(Drawing(), DATA, directory)
    return directory


COUPLED = [
    risk_sets,
    in_batch_negatives,
    class_weights,
    hardest,
    neighbours,
    halves,
    mixed,
    mean,
    in_train_mode,
    mixed_in_train_mode,
]


@pytest.mark.parametrize("losses", COUPLED)
def test_losses_that_depend_on_the_batch_are_noticed(recorded: Path, losses: Any) -> None:
    assert "depends on the rest of its batch" in str(found(Drawing(), recorded, losses))


@pytest.mark.parametrize("losses", [plain, total, noisy, penalty, distinct])
def test_other_losses_are_not(recorded: Path, losses: Any) -> None:
    assert found(Drawing(), recorded, losses) is None


@pytest.mark.parametrize("net", ["batch norm", "dropout", "attention"])
def test_layers_are_no_coupling(tmp_path: Path, net: str) -> None:
    train(Net(NETS[net]), DATA, tmp_path)
    assert found(Net(NETS[net]), tmp_path, plain) is None


class Counting(nn.Module):
    """A layer whose passes in train mode change what the next one gives."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.passes += 1
        return inputs * (1 + self.passes)


def test_buffers_that_change_are_no_coupling(tmp_path: Path) -> None:
    train(Net(lambda: layers(Counting())), DATA, tmp_path)
    assert found(Net(lambda: layers(Counting())), tmp_path, plain) is None


def padded(items: list[Any]) -> list[Tensor]:
    texts, labels = zip(*items, strict=True)
    return [nn.utils.rnn.pad_sequence(list(texts), batch_first=True), torch.stack(labels)]


class Texts(nn.Module):
    """Drops embeddings of tokens, perhaps of those alone that are no padding."""

    def __init__(self, unpads: bool) -> None:
        super().__init__()
        self.unpads = unpads
        self.embedding, self.dropout, self.head = nn.Embedding(20, 4), nn.Dropout(0.3), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        hidden, kept = self.embedding(ids), ids > 0
        dropped = torch.zeros_like(hidden)
        dropped[kept] = self.dropout(hidden[kept]) if self.unpads else self.dropout(hidden)[kept]
        return self.head(dropped.sum(1))


@pytest.mark.parametrize("unpads", [False, True])
def test_dropout_of_padded_texts_is_no_coupling(tmp_path: Path, unpads: bool) -> None:
    """The copies change the number of tokens, so that other ones are dropped."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, 20, (length,), generator=generator) for length in range(2, 2 + NUM_TRAIN)]
    data = list(zip(texts, DATA.tensors[1], strict=True))
    train(Net(lambda: Texts(unpads)), data, tmp_path, loader=lambda data: shuffled(data, collate_fn=padded))
    net, loader = Net(lambda: Texts(unpads)), shuffled(data, collate_fn=padded)
    assert found(net, tmp_path, plain, loader) is None
    assert "depends on the rest of its batch" in str(found(net, tmp_path, mean, loader))


def test_a_batch_of_one_example(tmp_path: Path) -> None:
    train(Net(), DATA, tmp_path, loader=lambda data: DataLoader(data, batch_size=1))
    assert found(Net(), tmp_path, mean) is None


class Weighted(Net):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return class_weights(self, batch).mean()


def test_scores_and_members_say_what_they_are_about(tmp_path: Path) -> None:
    module = Weighted()
    trainer = train(module, DATA, tmp_path / "recording")
    with pytest.warns(UserWarning, match="still part of the losses of others, so scores say what its own loss did"):
        attribute(module, tmp_path / "recording", trainer, losses=class_weights)
    masks = torch.arange(NUM_TRAIN) != torch.arange(2)[:, None]
    fleet = RecordedFleet(
        tmp_path / "fleet",
        module,
        tmp_path / "recording",
        make_trainer(),
        DATA,
        TARGETS,
        masks,
        losses=class_weights,
    )
    with pytest.warns(UserWarning, match="still part of the losses of others, so members show what its own loss did"):
        fleet.run(progress_bar=False)


def test_losses_of_single_examples_give_no_warning(tmp_path: Path) -> None:
    module = Net()
    trainer = train(module, DATA, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*the rest of its batch.*")
        attribute(module, tmp_path, trainer)
