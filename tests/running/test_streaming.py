"""Data of litdata: positions are those of the optimized data, whatever order streaming has."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Subset

from lightning_trak import TrainingRecorder
from lightning_trak.running.data.loaders import as_loader
from lightning_trak.running.data.loading import load
from lightning_trak.running.data.streaming import StreamingItems
from tests.lit import TARGETS, TRAIN, attribute, make_model, make_trainer

litdata = pytest.importorskip("litdata", reason="litdata is not installed")
streaming = pytest.importorskip("litdata.streaming", reason="litdata is not installed")

CHUNK = 7  # 50 examples are 7 chunks of 7, and one more


def write(directory: Any, dataset: Any, **options: Any) -> str:
    cache = streaming.Cache(str(directory), chunk_size=CHUNK, **options)
    for position in range(len(dataset)):
        cache[position] = dataset[position]
    cache.done()
    cache.merge()
    return str(directory)


@pytest.fixture(scope="module")
def optimized(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("optimized"), TRAIN)


def items(loader: DataLoader[Any]) -> list[Any]:
    return [loader.dataset[position] for position in range(len(loader.dataset))]  # type: ignore[arg-type]


def assert_same(found: list[Any], expected: Any) -> None:
    assert len(found) == len(expected)
    for position, (inputs, label) in enumerate(found):
        assert torch.equal(inputs, expected[position][0])
        assert label == expected[position][1]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("bare", [False, True])
def test_items_are_those_at_positions(shuffle: bool, bare: bool, optimized: str) -> None:
    dataset = litdata.StreamingDataset(optimized, shuffle=shuffle, drop_last=True)
    loader = as_loader(dataset if bare else litdata.StreamingDataLoader(dataset, batch_size=8))
    assert loader.batch_size == (32 if bare else 8)
    assert_same(items(loader), TRAIN)
    assert dataset.cache is None  # the user's dataset is as it was
    assert dataset.shuffler is None


def test_a_dataset_that_has_been_iterated(optimized: str) -> None:
    dataset = litdata.StreamingDataset(optimized, shuffle=True)
    iterator = iter(dataset)
    drawn = [next(iterator) for _ in range(10)]
    assert_same(items(as_loader(dataset)), TRAIN)
    drawn += [next(iterator) for _ in range(40)]  # its iteration goes on
    assert len({tuple(inputs.tolist()) for inputs, _ in drawn}) == 50


def test_the_share_of_a_rank_does_not_matter(optimized: str) -> None:
    dataset = litdata.StreamingDataset(optimized, drop_last=True)
    dataset.distributed_env = copy.copy(dataset.distributed_env)
    dataset.distributed_env.world_size, dataset.distributed_env.global_rank = 2, 1
    assert len(dataset) < 30
    assert_same(items(as_loader(dataset)), TRAIN)


def test_a_subsample_counts_from_zero(optimized: str) -> None:
    for shuffle in (False, True):
        dataset = litdata.StreamingDataset(optimized, subsample=0.4, shuffle=shuffle)
        found = items(as_loader(dataset))
        assert len(found) == 20
        assert len({tuple(inputs.tolist()) for inputs, _ in found}) == 20
        assert_same(found, [dataset[position] for position in range(20)])


def test_a_transform_is_applied(optimized: str) -> None:
    dataset = litdata.StreamingDataset(optimized, transform=lambda item: (item[0] * 2, item[1]))
    assert torch.equal(items(as_loader(dataset))[3][0], TRAIN[3][0] * 2)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_scores_are_those_of_a_map_style_dataset(
    workers: int, optimized: str, tmp_path: Any, checkpoints: Any, expected: Any
) -> None:
    train = litdata.StreamingDataLoader(
        litdata.StreamingDataset(optimized, shuffle=True), batch_size=32, num_workers=workers
    )
    targets = litdata.StreamingDataset(write(tmp_path / "targets", TARGETS))
    assert torch.equal(attribute(tmp_path, checkpoints, train, targets), expected)
    assert torch.equal(attribute(tmp_path, checkpoints, TRAIN, targets), expected)  # it is the same store


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_chunks_that_must_be_fetched(workers: int, optimized: str, tmp_path: Any) -> None:
    dataset = litdata.StreamingDataset(f"local:{optimized}", cache_dir=str(tmp_path))
    loader = as_loader(litdata.StreamingDataLoader(dataset, batch_size=8, num_workers=workers))
    positions = torch.randint(50, (20, 4)).tolist()  # back and forth
    found = torch.cat([inputs for inputs, _ in load(loader, positions)])
    assert torch.equal(found, TRAIN.tensors[0][torch.tensor(positions).flatten()])


def test_compressed_chunks(tmp_path: Any) -> None:
    pytest.importorskip("zstd", reason="zstd is not installed")
    directory = write(tmp_path, TRAIN, compression="zstd")
    assert_same(items(as_loader(litdata.StreamingDataset(directory))), TRAIN)


def test_subsets_and_workers_that_are_spawned(optimized: str) -> None:
    view = StreamingItems(litdata.StreamingDataset(optimized))
    assert_same([Subset(view, [40, 3])[0]], [TRAIN[40]])
    again = pickle.loads(pickle.dumps(view))
    assert_same([again[place] for place in range(50)], TRAIN)


def test_what_has_no_positions_is_refused(optimized: str) -> None:
    def make() -> Any:
        return litdata.StreamingDataset(optimized)

    combined = litdata.CombinedStreamingDataset([make(), make()], seed=0)
    for data in (combined, litdata.StreamingDataLoader(combined, batch_size=4)):
        with pytest.raises(TypeError, match="cannot attribute to a CombinedStreamingDataset: it mixes streams"):
            as_loader(data)
    with pytest.raises(ValueError, match="makes no batches"):
        as_loader(DataLoader(make(), batch_size=None))


def test_a_recorder_cannot_follow_it(optimized: str, tmp_path: Any) -> None:
    trainer = make_trainer(max_epochs=1, callbacks=[TrainingRecorder(tmp_path)])
    with pytest.raises(TypeError, match="cannot follow the order in which a StreamingDataset gives its examples"):
        trainer.fit(make_model(), litdata.StreamingDataLoader(litdata.StreamingDataset(optimized), batch_size=8))
