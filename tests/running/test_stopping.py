"""SIGTERM and Ctrl-C end featurizing at the end of a shard, and scoring at once."""

import os
import signal

import pytest
from torch.utils.data import DataLoader, Dataset

from lightning_trak import TRAK
from lightning_trak.projections import SparseProjection
from lightning_trak.running.stopping import Terminated
from tests.launch import run_together
from tests.lit import TARGETS, TRAIN, make_model, make_trainer

FEW = 8  # of these are not the items that send signals
HANDLERS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


@pytest.fixture(autouse=True)
def a_store_compares_few_items(monkeypatch):
    monkeypatch.setattr("lightning_trak.running.data.content.MANY", FEW)


@pytest.fixture(autouse=True)
def handlers_are_as_they_were():
    """Python's own, which a shell sets aside for what runs in its background, are there at first and at the end."""
    before = {number: signal.signal(number, handler) for number, handler in HANDLERS.items()}
    yield
    found = {number: signal.signal(number, handler) for number, handler in before.items()}
    assert found == HANDLERS


class Signalling(Dataset):
    """Sends this process signals when some items are read, which the fingerprint of the data does not read."""

    def __init__(self, data, signals):
        self.data = data
        self.signals = signals
        self.process = os.getpid()
        self.reads = []

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        self.reads.append(index)
        if index in self.signals:
            os.kill(self.process, self.signals[index])
        return self.data[index]


def make_trak(root, checkpoints):
    return TRAK(make_model(), checkpoints, root, projection=SparseProjection(32))


def shards(root):
    return sorted(path.name for path in root.rglob("shard-*"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)], ids=["SIGTERM", "SIGINT"]
)
def test_featurizing_stops_at_the_end_of_a_shard(tmp_path, checkpoints, expected, capfd, number, error, workers):
    trak, trainer = make_trak(tmp_path, checkpoints), make_trainer()
    before = dict(vars(trainer))
    data = Signalling(TRAIN, {11: number})  # in the second of five shards; the fingerprint does not read it
    loader = DataLoader(data, batch_size=5, num_workers=workers, prefetch_factor=1 if workers else None)
    with pytest.raises(
        error, match=rf"stopped by {number.name}: the store has \d of 10 shards; call featurize again"
    ) as caught:
        trak.featurize(trainer, loader, shard_size=10)
    done = len(shards(tmp_path))
    assert f"{done} of 10" in str(caught.value)
    assert done in ([2] if workers == 0 else [1, 2])  # a worker reads ahead
    assert caught.type is KeyboardInterrupt or caught.value.code == 143
    assert (str(caught.value) in capfd.readouterr().err) == (error is Terminated)
    assert vars(trainer) == before
    trak.featurize(trainer, DataLoader(TRAIN, batch_size=32))
    found = trak.score(trainer, TARGETS)
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_a_second_interrupt_ends_at_once(tmp_path, checkpoints):
    data = Signalling(TRAIN, {11: signal.SIGINT, 12: signal.SIGINT, 13: signal.SIGINT})
    with pytest.raises(KeyboardInterrupt):
        make_trak(tmp_path, checkpoints).featurize(make_trainer(), DataLoader(data, batch_size=5), shard_size=10)
    assert data.reads[-1] == 12
    assert shards(tmp_path) == ["shard-00000.safetensors"]


def test_a_second_sigterm_changes_nothing(tmp_path, checkpoints):
    data = Signalling(TRAIN, {11: signal.SIGTERM, 12: signal.SIGTERM})
    with pytest.raises(Terminated, match="2 of 10 shards"):
        make_trak(tmp_path, checkpoints).featurize(make_trainer(), DataLoader(data, batch_size=5), shard_size=10)


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)], ids=["SIGTERM", "SIGINT"]
)
def test_scoring_ends_at_once(tmp_path, checkpoints, expected, number, error):
    trak = make_trak(tmp_path, checkpoints)
    trak.featurize(make_trainer(), TRAIN)
    data, trainer = Signalling(TARGETS, {4: number}), make_trainer()
    with pytest.raises(error):
        trak.score(trainer, data)
    assert data.reads[-1] == 4  # after a few that show how the loader puts examples together
    assert float((trak.score(trainer, TARGETS) - expected).abs().max()) == 0


def test_handlers_of_the_user_are_heeded(tmp_path, checkpoints):
    heard = []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    trak = make_trak(tmp_path, checkpoints)
    try:
        with pytest.raises(Terminated):
            trak.featurize(make_trainer(), Signalling(TRAIN, {11: signal.SIGTERM}), shard_size=32)
        trak.featurize(make_trainer(), TRAIN)
        trak.score(make_trainer(), Signalling(TARGETS, {4: signal.SIGTERM}))  # it has not been ended by the handler
        assert heard == [signal.SIGTERM] * 3  # targets are read at each of two checkpoints
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        trak.score(make_trainer(), Signalling(TARGETS, {4: signal.SIGTERM}))
    finally:
        signal.signal(signal.SIGTERM, HANDLERS[signal.SIGTERM])


@pytest.mark.slow
def test_all_ranks_stop(tmp_path):
    run_together("tests.running.stopping_script", tmp_path)
