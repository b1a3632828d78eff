"""Processes that know nothing of each other fill one store."""

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_trak import TRAK
from lightning_trak.features.store import FeatureStore
from lightning_trak.methods import ExactKernel
from lightning_trak.projections import PrincipalProjection, SparseProjection
from lightning_trak.running.parts import share
from tests.lit import TARGETS, TRAIN, make_checkpoints, make_model, make_trainer

CHECKPOINTS = make_checkpoints(2)


def featurize(directory, method=TRAK, **options):
    settings = {} if method is ExactKernel else {"projection": options.pop("projection", SparseProjection(16))}
    trak = method(make_model(), CHECKPOINTS, directory, **settings)
    trak.featurize(make_trainer(), DataLoader(TRAIN, batch_size=5), shard_size=10, **options)
    return trak


def files(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "projection", [SparseProjection(16), PrincipalProjection(4, landmarks=8, sample=20, sketch=16)]
)
def test_parts_in_any_order_are_the_whole_bit_for_bit(tmp_path, projection):
    alone = featurize(tmp_path / "alone", projection=projection)
    for number, part in enumerate([(3, 4), "1/4", "4/4", (3, 4), "2/4"]):
        trak = featurize(tmp_path / "parts", projection=projection, part=part)
        if number < 4:
            with pytest.raises(RuntimeError, match=r"lacks \d of 10 shards; call featurize"):
                trak.score(make_trainer(), TARGETS)
    assert files(tmp_path / "parts") == files(tmp_path / "alone")
    assert torch.equal(trak.score(make_trainer(), TARGETS), alone.score(make_trainer(), TARGETS))


def test_a_part_is_continued_and_computes_nothing_of_others(tmp_path, monkeypatch):
    write, written = FeatureStore.save, []

    def stopped(self, checkpoint, shard, *args):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append((checkpoint, shard))
        write(self, checkpoint, shard, *args)

    with monkeypatch.context() as patched:
        patched.setattr(FeatureStore, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            featurize(tmp_path, part=(2, 3))
    featurize(tmp_path, part=(2, 3))
    mine = share([(checkpoint, shard) for checkpoint in range(2) for shard in range(5)], "2/3")
    assert len(list(tmp_path.rglob("shard-*"))) == len(mine) == 3
    assert written == mine[:2]
    featurize(tmp_path)
    featurize(tmp_path, part=(1, 3))


def test_the_last_part_makes_the_kernels(tmp_path):
    featurize(tmp_path, ExactKernel, part="2/2")
    assert not list(tmp_path.rglob("kernel-*"))
    featurize(tmp_path, ExactKernel, part="1/2")
    assert len(list(tmp_path.rglob("kernel-*"))) == 2


@pytest.mark.parametrize("part", ["0/3", "4/3", (0, 1), "3", "a/b", 3, "1/0", (True, 3), (1.5, 3)])
def test_a_part_that_does_not_exist_is_refused_before_the_work(tmp_path, part):
    with pytest.raises(ValueError, match="part must be"):
        featurize(tmp_path / "store", part=part)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("count", [1, 3, 7, 20])
def test_parts_share_the_work(count):
    parts = [share(range(10), (number, count)) for number in range(1, count + 1)]
    assert sorted(item for part in parts for item in part) == list(range(10))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
