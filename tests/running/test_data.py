"""Data in every form, and forms that are refused."""

import itertools
import multiprocessing
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_trak import TRAK
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.projections import SparseProjection
from lightning_trak.running.data.ranges import Range, share_out
from tests.lit import TARGETS, TRAIN, LitNet, attribute, make_data, make_model, make_trainer

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def with_batch_sampler(data):
    return DataLoader(data, batch_sampler=BatchSampler(WeightedRandomSampler([1.0] * len(data), len(data)), 9, True))


class Data(L.LightningDataModule):
    def setup(self, stage):
        self.stage = stage

    def train_dataloader(self):
        assert self.stage == "fit"
        return DataLoader(TRAIN, batch_size=11, shuffle=True)

    def predict_dataloader(self):
        assert self.stage == "predict"
        return DataLoader(TARGETS, batch_size=4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "train",
    [
        DataLoader(TRAIN, batch_size=1),
        DataLoader(TRAIN, batch_size=7),
        DataLoader(TRAIN, batch_size=500),
        DataLoader(TRAIN, batch_size=16, shuffle=True, drop_last=True),
        DataLoader(TRAIN, batch_size=16, num_workers=2, persistent_workers=True),
        DataLoader(TRAIN, batch_size=8, sampler=torch.utils.data.DistributedSampler(TRAIN, 3, 1)),
        with_batch_sampler(TRAIN),
        DataLoader(Subset(TRAIN, range(50)), batch_size=8),
        Data(),
    ],
    ids=["one", "seven", "all", "shuffled", "workers", "distributed", "batch_sampler", "subset", "datamodule"],
)
def test_scores_do_not_depend_on_how_the_data_comes(tmp_path, checkpoints, expected, train):
    targets = train if isinstance(train, Data) else DataLoader(TARGETS, batch_size=5, shuffle=True)
    scores = attribute(tmp_path, checkpoints, train, targets)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_columns_follow_a_subset(tmp_path, checkpoints, expected):
    chosen = [40, 3, 17, 29, 8]
    rows = attribute(tmp_path, checkpoints, TRAIN, Subset(TARGETS, [12, 0, 5]))
    torch.testing.assert_close(rows, expected[[12, 0, 5]])
    # Damping this large leaves phi(x) phi(i) Q(i), times a factor for each checkpoint.
    scores = attribute(tmp_path, checkpoints[:1], Subset(TRAIN, chosen), name="subset", damping=1e6)
    whole = attribute(tmp_path, checkpoints[:1], TRAIN, name="whole", damping=1e6)
    torch.testing.assert_close(scores / scores.norm(), whole[:, chosen] / whole[:, chosen].norm(), rtol=1e-3, atol=1e-5)


def test_other_data_of_the_same_size_is_refused(tmp_path, checkpoints):
    attribute(tmp_path, checkpoints)
    with pytest.raises(ValueError, match="made with other training data of this size"):
        attribute(tmp_path, checkpoints, make_data(50, seed=5))


def test_random_augmentation_is_noticed(tmp_path, checkpoints):
    class Augmented(Dataset):
        def __len__(self):
            return 50

        def __getitem__(self, index):
            inputs, label = TRAIN[index]
            return inputs + 0.01 * torch.randn(6), label

    with pytest.warns(UserWarning, match="not the same twice, perhaps because of random augmentation"):
        attribute(tmp_path, checkpoints, Augmented())


def test_several_loaders(tmp_path, checkpoints, expected):
    loaders = [DataLoader(TARGETS, batch_size=4), DataLoader(Subset(TARGETS, [3, 1]), batch_size=4)]
    scores = attribute(tmp_path, checkpoints, targets=loaders)
    assert [tuple(part.shape) for part in scores] == [(13, 50), (2, 50)]
    torch.testing.assert_close(scores[0], expected)
    torch.testing.assert_close(scores[1], expected[[3, 1]])


class Columns:
    """Like a Hugging Face dataset: no Dataset of torch, reads several items at once."""

    def __init__(self, data):
        self.inputs, self.labels = data.tensors

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, key):
        if isinstance(key, str):
            return {"inputs": self.inputs, "labels": self.labels}[key]
        return {"inputs": self.inputs[key], "labels": self.labels[key]}

    def __getitems__(self, keys):
        many = self[keys]
        return [{name: column[i] for name, column in many.items()} for i in range(len(keys))]


@pytest.mark.parametrize(
    "form",
    [list, lambda data: list(map(list, data)), lambda data: [(x, int(y)) for x, y in data], DataLoader],
    ids=["list of tuples", "list of lists", "labels as numbers", "loader"],
)
def test_lists_of_examples(tmp_path, checkpoints, expected, form):
    torch.testing.assert_close(attribute(tmp_path, checkpoints, form(TRAIN), form(TARGETS)), expected, **CLOSE)


@pytest.mark.parametrize("form", [Columns, lambda data: [Columns(data)[i] for i in range(len(data))]])
def test_mappings_as_examples(tmp_path, checkpoints, expected, form):
    class OfMappings(LitNet):
        def forward(self, batch):
            return super().forward(batch["inputs"])

    output = ClassificationMargin(lambda module, batch: (module(batch), batch["labels"]))
    trak = TRAK(OfMappings(), checkpoints, tmp_path, output=output, projection=SparseProjection(32))
    scores = trak.attribute(make_trainer(), form(TRAIN), form(TARGETS))
    torch.testing.assert_close(scores, expected, **CLOSE)


def test_several_datasets_are_several_sets_of_targets(tmp_path, checkpoints, expected):
    scores = attribute(tmp_path, checkpoints, targets=[TARGETS, Columns(TARGETS)][:1])
    assert isinstance(scores, list)
    torch.testing.assert_close(scores[0], expected)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(TRAIN)


class Unsized(Dataset):
    def __getitem__(self, index):
        return TRAIN[index]


class Frame(Columns):
    iloc = None


@pytest.fixture(scope="module")
def featurized(checkpoints, tmp_path_factory):
    trak = TRAK(make_model(), checkpoints, tmp_path_factory.mktemp("store"), projection=SparseProjection(32))
    trak.featurize(make_trainer(), TRAIN)
    return trak


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        (DataLoader(Stream()), TypeError, "cannot attribute to a Stream.*map-style"),
        ({"train": Columns(TRAIN), "test": TRAIN}, TypeError, "several datasets; pass one of them: 'train', 'test'"),
        (Stream(), TypeError, "cannot attribute to a Stream"),
        (DataLoader(Unsized(), sampler=[0, 1]), TypeError, "cannot attribute to a Unsized: expected .* map-style"),
        (Unsized(), TypeError, "cannot attribute to a Unsized"),
        (Frame(TRAIN), TypeError, "cannot attribute to a Frame"),
        (None, TypeError, "cannot attribute to a NoneType: there are no data; pass a DataLoader"),
        (Columns, TypeError, "cannot attribute to a type: Columns is a class; pass an instance of it"),
        ("data/train", TypeError, 'cannot attribute to a str: "data/train" is a text, not data'),
        (Path("train"), TypeError, 'cannot attribute to a Posix.*: "train" is a text'),
        (iter(TRAIN), TypeError, "map-style"),
        (zip([1], [2], strict=True), TypeError, "cannot attribute to a zip: expected a DataLoader"),
        (3, TypeError, "cannot attribute to a int: expected"),
        (make_trainer(), TypeError, "cannot attribute to a Trainer: expected"),
        (LitNet(), TypeError, "cannot attribute to a LitNet: expected"),
        (TRAIN.tensors[0], TypeError, "a Tensor: it may be a batch or a dataset.*TensorDataset"),
        (TRAIN.tensors[0].numpy(), TypeError, "a ndarray: it may be a batch or a dataset"),
        (TRAIN.tensors, TypeError, r"a tuple: .*For a batch .*TensorDataset\(inputs, labels\)"),
        (next(iter(DataLoader(TRAIN))), TypeError, "a list: .*For a batch"),
        ([list(TRAIN.tensors)] * 2, TypeError, "a list: .*For a batch"),
        ([{"a": TRAIN.tensors[0]}, TRAIN.tensors[1]], TypeError, "a list: .*For a batch"),
        ({"inputs": TRAIN.tensors[0]}, TypeError, r"a dict: it may be a single batch.*StackDataset\(\*\*columns"),
        ({"a": DataLoader(TRAIN)}, TypeError, "a dict: it holds several loaders; pass them one by one"),
        (CombinedLoader([DataLoader(TRAIN)]), TypeError, "a CombinedLoader: it holds several loaders"),
        ([1, 2], TypeError, "cannot attribute to a list"),
        ([Stream()], TypeError, "cannot attribute to a list"),
        ([LitNet(), LitNet()], TypeError, "cannot attribute to a list"),
        (["a", "b"], TypeError, "cannot attribute to a list"),
        ([(1, 2), (1, 2, 3)], TypeError, "cannot attribute to a list"),
        ([], TypeError, "cannot attribute to a list: it is empty"),
        ([DataLoader(TRAIN), None], TypeError, "cannot attribute to a NoneType"),
        (DataLoader(TRAIN, batch_size=None), ValueError, r"makes no batches \(batch_size=None\)"),
        (DataLoader(Subset(TRAIN, []), batch_size=2), ValueError, "dataset is empty"),
        ([{"ids": [1, 2], "label": 0}] * 4, ValueError, "'ids' of an example is a list of 2 ints, and the default"),
        ([{"file": Path("a.png"), "label": 0}] * 4, ValueError, "'file' of an example is a .*Path, and .* not take"),
        ([DataLoader(TRAIN), DataLoader(TRAIN)], ValueError, "one training set, got 2 loaders"),
    ],
)
def test_data_that_cannot_be_attributed_to(tmp_path, checkpoints, featurized, data, error, match):
    with pytest.raises(error, match=match):
        attribute(tmp_path, checkpoints, train=data)
    assert not (tmp_path / "store").exists()
    if error is TypeError:
        with pytest.raises(error, match=match):
            featurized.score(make_trainer(), data)


def test_transfer_hooks_of_the_user_are_called(tmp_path, checkpoints, expected):
    class Scaling(LitNet):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return (batch[0] / 10, batch[1])

    times_ten = TensorDataset(TRAIN.tensors[0] * 10, TRAIN.tensors[1])
    targets = TensorDataset(TARGETS.tensors[0] * 10, TARGETS.tensors[1])
    trak = TRAK(Scaling(), checkpoints, tmp_path, projection=SparseProjection(32))
    trak.featurize(make_trainer(), times_ten)
    torch.testing.assert_close(trak.score(make_trainer(), targets), expected, rtol=1e-3, atol=1e-6)
    parts = make_trainer().predict(trak.scorer(), DataLoader(targets, batch_size=13))
    torch.testing.assert_close(parts[0], expected, rtol=1e-3, atol=1e-6)


class Rank:
    def __init__(self, number, world_size):
        self.global_rank, self.world_size = number, world_size


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("even", [False, True])
def test_loaders_stop_between_ranges(even, workers):
    jobs = [[Range(number, range(start, min(start + 7, 23))) for number, start in enumerate(range(0, 23, 7))]] * 2
    loaders = share_out(DataLoader(make_data(23), batch_size=3, num_workers=workers), jobs, Rank(0, 1), even)
    assert len({id(loader.stop) for loader in loaders}) == 1
    seen = []
    for loader in loaders:
        for batch in loader:
            seen += batch.positions.tolist()
            loader.stop.requested = loader.stop.requested or 8 in seen
    assert seen == [*range(14)]  # example 8 is in the second range, which ends before 14
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_that_keep_up_stop_before_the_same_round(world_size, monkeypatch):
    parts = [range(start, min(start + 7, 23)) for start in range(0, 23, 7)]
    jobs = [[Range(number, part) for number, part in enumerate(parts)]] * 2
    ranks = [
        share_out(DataLoader(make_data(23), batch_size=3), jobs, Rank(number, world_size), True)
        for number in range(world_size)
    ]
    stops = [loaders[0].stop for loaders in ranks]
    monkeypatch.setattr(
        "lightning_trak.running.ranks.Ranks.all_true", lambda _, __: not any(stop.requested for stop in stops)
    )
    together = [itertools.chain(*loaders) for loaders in ranks]
    steps = 0
    for _ in zip(*together, strict=True):  # strict: all ranks end at the same step
        steps += 1
        stops[-1].requested = steps >= 4  # in the second round
    assert steps == {2: 6, 3: 4}[world_size]
