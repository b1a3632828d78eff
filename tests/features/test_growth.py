"""Stores that grow: by checkpoints, and by training examples that are appended."""

import json
import pickle
import signal

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from lightning_trak import TRAK
from lightning_trak.features.extractor import FeatureExtractor
from lightning_trak.features.rows import Features
from lightning_trak.features.store import FeatureStore, feature_store
from lightning_trak.features.store.growth import ShardRanges
from lightning_trak.methods import ExactKernel, GradientDot
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.projections import PrincipalProjection, SparseProjection
from lightning_trak.running.data import content
from lightning_trak.storage.files import tensor_digest
from tests.features.small_net import draw, make_net
from tests.launch import run_script
from tests.lit import TARGETS, make_trainer, open_store

DATA = TensorDataset(draw(30, 6), draw(30, 3, seed=1).argmax(1))
FEW = Subset(DATA, range(21))


WEIGHTS = [make_net(seed).state_dict() for seed in range(3)]


def make(directory, weights=WEIGHTS, method=TRAK, **options):
    settings = {"output": ClassificationMargin()}
    if method is TRAK:
        settings |= {"projection": SparseProjection(16), "damping": 0.1}
    return method(make_net(), weights, directory, **(settings | options))


def featurize(trak, data=DATA):
    trak.featurize(make_trainer(), DataLoader(data, batch_size=4), shard_size=8)


def contents(directory):
    return {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.fixture
def computed(monkeypatch):
    """The examples that are featurized, with their checkpoints' names."""
    found, call = [], FeatureExtractor.__call__

    def counting(self, batch, positions, audited=None):
        found.extend((self.model.place, int(position)) for position in positions)
        return call(self, batch, positions, audited or {})

    monkeypatch.setattr(FeatureExtractor, "__call__", counting)
    return found


def test_ranges_of_data_that_have_grown():
    ranges = ShardRanges([10, 11, 19], 4)
    assert [ranges[i] for i in range(ranges.count)] == [
        range(4), range(4, 8), range(8, 10), range(10, 11), range(11, 15), range(15, 19)
    ]  # fmt: skip
    assert [ranges.part(i) for i in range(6)] == [0, 0, 0, 1, 2, 2]


def test_checkpoints_are_added_and_nothing_is_computed_twice(tmp_path, computed):
    featurize(make(tmp_path, WEIGHTS[:2]))
    before, count = contents(tmp_path), len(computed)
    computed.clear()
    trak = make(tmp_path)
    with pytest.raises(RuntimeError, match=r"at 1 checkpoint: 2, whose weights .* \(it has 2 other"):
        trak.score(make_trainer(), TARGETS)
    featurize(trak)
    assert {place for place, _ in computed} == {"at checkpoint 2 (state dict 2)"}
    assert 2 * len(computed) == count
    assert before.items() <= contents(tmp_path).items()
    alone = make(tmp_path / "alone")
    featurize(alone)
    assert torch.equal(trak.score(make_trainer(), TARGETS), alone.score(make_trainer(), TARGETS))


@pytest.mark.parametrize(
    ("method", "chosen"), [(TRAK, [0, 1]), (TRAK, [2, 0]), (GradientDot, [2]), (TRAK, [1, 1, 0])], ids=str
)
def test_a_choice_of_checkpoints_is_scored_as_in_a_store_of_its_own(tmp_path, method, chosen):
    some = [{name: tensor.clone() for name, tensor in WEIGHTS[number].items()} for number in chosen]
    featurize(make(tmp_path / "all", method=method))
    own = make(tmp_path / "own", some, method)
    featurize(own)
    trak = make(tmp_path / "all", some, method)
    before = contents(tmp_path / "all")
    featurize(trak)
    assert contents(tmp_path / "all") == before
    assert torch.equal(trak.score(make_trainer(), TARGETS), own.score(make_trainer(), TARGETS))
    assert torch.equal(trak.self_influence(make_trainer()), own.self_influence(make_trainer()))


def test_a_checkpoint_that_is_listed_twice_is_made_once(tmp_path, computed):
    featurize(make(tmp_path / "once", WEIGHTS[:1]))
    count = len(computed)
    twice = make(tmp_path / "twice", [WEIGHTS[0], {name: tensor.clone() for name, tensor in WEIGHTS[0].items()}])
    featurize(twice)
    assert len(computed) == 2 * count
    assert len(list((tmp_path / "twice").glob("checkpoint-*"))) == 1


def test_a_finished_store_is_looked_through_once(tmp_path, monkeypatch):
    featurize(make(tmp_path))
    read, load = [], feature_store.load_metadata

    def counting(path):
        read.append(path)
        return load(path)

    monkeypatch.setattr(feature_store, "load_metadata", counting)
    featurize(make(tmp_path))
    assert len(read) == len(set(read)) == 3 * 4


def test_weights_under_the_names_of_a_wrapper_are_the_same_checkpoint(tmp_path):
    featurize(make(tmp_path))
    renamed = [{f"_orig_mod.{name}": tensor for name, tensor in weights.items()} for weights in WEIGHTS]
    assert torch.equal(
        make(tmp_path, renamed).score(make_trainer(), TARGETS), make(tmp_path).score(make_trainer(), TARGETS)
    )


@pytest.mark.parametrize("method", [TRAK, GradientDot, ExactKernel])
def test_appended_examples(tmp_path, computed, method):
    """The scores are those of a store that was made of all examples, and only the new ones are computed."""
    trak = make(tmp_path / "grown", WEIGHTS[:2], method)
    featurize(trak, FEW)
    assert trak.score(make_trainer(), TARGETS).shape == (len(TARGETS), 21)
    shards = {path: path.read_bytes() for path in tmp_path.rglob("shard-*")}
    computed.clear()
    featurize(trak)
    again = {0, 1, 8, 9}  # examples of an old shard are compared with what is stored
    assert {position for _, position in computed} - again == set(range(21, 30))
    assert {path: path.read_bytes() for path in shards} == shards
    alone = make(tmp_path / "alone", WEIGHTS[:2], method)
    featurize(alone)
    expected = alone.score(make_trainer(), TARGETS)
    torch.testing.assert_close(trak.score(make_trainer(), TARGETS), expected, rtol=1e-4, atol=1e-5)
    top = trak.score(make_trainer(), TARGETS, top_k=3, largest=True)
    torch.testing.assert_close(top.values, expected.topk(3).values, rtol=1e-4, atol=1e-5)
    chosen = trak.score(make_trainer(), TARGETS, train=[29, 2])
    torch.testing.assert_close(chosen, expected[:, [29, 2]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        trak.self_influence(make_trainer()), alone.self_influence(make_trainer()), rtol=1e-4, atol=1e-5
    )


def test_data_and_checkpoints_may_grow_in_any_order(tmp_path):
    """Also where projections are fitted: to the examples that the store began with."""
    options = {"projection": PrincipalProjection(4, landmarks=8, sample=12, sketch=16)}
    orders = [[(1, FEW), (1, DATA), (3, DATA)], [(1, FEW), (3, FEW), (3, DATA)]]
    stores = []
    for number, order in enumerate(orders):
        for count, data in order:
            featurize(make(tmp_path / str(number), WEIGHTS[:count], **options), data)
        stores.append({path.relative_to(tmp_path / str(number)): path.read_bytes() for path in
                       (tmp_path / str(number)).rglob("*.safetensors")})  # fmt: skip
    assert stores[0] == stores[1]


def test_a_lost_fit_is_made_again_after_growth(tmp_path):
    trak = make(tmp_path, projection=PrincipalProjection(4, landmarks=8, sample=12, sketch=16))
    featurize(trak, FEW)
    featurize(trak)
    before = contents(tmp_path)
    open_store(trak, make_trainer())._path(1, "projection").unlink()
    featurize(trak)
    assert contents(tmp_path) == before


def changed(position):
    inputs, labels = (tensor.clone() for tensor in DATA.tensors)
    inputs[position] += 1
    return TensorDataset(inputs, labels)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (changed(0), "made with 21 training examples, this TRAK has 30, and some of the first 21 are others"),
        (changed(20), "some of the first 21 are others"),
        (changed(7), "some of the first 21 are others"),
        (ConcatDataset([Subset(DATA, [29]), DATA]), "this TRAK has 31, and some of the first 21 are others"),
        (Subset(DATA, range(20)), "made with 21 training examples, this TRAK has 20"),
        (Subset(DATA, range(9, 30)), "other training data of this size"),
        (Subset(DATA, range(29, -1, -1)), "some of the first 21 are others"),
    ],
    ids=["first changed", "last changed", "another changed", "put before", "shrunk", "others", "reversed"],
)
def test_data_whose_old_part_is_another_are_refused(tmp_path, data, match):
    trak = make(tmp_path, WEIGHTS[:1])
    featurize(trak, FEW)
    before, expected = contents(tmp_path), trak.score(make_trainer(), TARGETS)
    with pytest.raises(ValueError, match=match):
        featurize(trak, data)
    assert {path: contents(tmp_path)[path] for path in before} == before
    assert torch.equal(trak.score(make_trainer(), TARGETS), expected)
    featurize(trak)
    assert trak.score(make_trainer(), TARGETS).shape == (len(TARGETS), 30)


def test_what_few_items_do_not_show_is_noticed_by_the_features_and_the_old_store_stays(tmp_path, monkeypatch):
    """Example 1 is none of the eight, and it is the second one of the first shard."""
    monkeypatch.setattr(content, "MANY", 8)
    trak = make(tmp_path, WEIGHTS[:1])
    featurize(trak, FEW)
    expected = trak.score(make_trainer(), TARGETS)
    with pytest.raises(ValueError, match=r"examples 0 to 1 now have other (outputs|features)"):
        featurize(trak, changed(1))
    assert torch.equal(trak.score(make_trainer(), TARGETS), expected)
    featurize(trak, FEW)
    assert torch.equal(trak.score(make_trainer(), TARGETS), expected)
    featurize(trak)
    assert trak.score(make_trainer(), TARGETS).shape == (len(TARGETS), 30)


class Augmented(TensorDataset):
    def __getitem__(self, index):
        inputs, label = super().__getitem__(index)
        return inputs + torch.rand(()), label


@pytest.mark.filterwarnings("ignore:items of the training data are not the same twice")
def test_random_data_cannot_grow(tmp_path):
    trak = make(tmp_path, WEIGHTS[:1])
    featurize(trak, Augmented(*(tensor[:21] for tensor in DATA.tensors)))
    with pytest.raises(ValueError, match="21 training examples that are not the same twice, this TRAK has 30"):
        featurize(trak, Augmented(*DATA.tensors))


@pytest.mark.parametrize("options", [{"seed": 1}, {"projection": SparseProjection(8)}, {"dtype": "int8"}], ids=str)
def test_growing_with_other_settings_is_refused(tmp_path, options):
    featurize(make(tmp_path, WEIGHTS[:1]), FEW)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=next(iter(options))):
        featurize(make(tmp_path, **options))
    assert contents(tmp_path) == before


def test_a_run_that_is_stopped_while_the_store_grows_loses_nothing(tmp_path, monkeypatch):
    trak = make(tmp_path, WEIGHTS[:2])
    featurize(trak, FEW)
    expected = trak.score(make_trainer(), TARGETS)
    before, write, written = contents(tmp_path), FeatureStore.save, []

    def killed(self, *args):
        if len(written) == killed.after:
            raise KeyboardInterrupt
        written.append(args)
        write(self, *args)

    for killed.after in (0, 1):
        with monkeypatch.context() as patched:
            patched.setattr(FeatureStore, "save", killed)
            with pytest.raises(KeyboardInterrupt):
                featurize(trak)
        if killed.after == 0:  # nothing of the new part is there, so it does not count
            assert torch.equal(trak.score(make_trainer(), TARGETS), expected)
    with pytest.raises(RuntimeError, match="lacks 3 of 10 shards"):
        trak.score(make_trainer(), TARGETS)
    assert {path for path, content in before.items() if path.read_bytes() != content} <= {tmp_path / "manifest.json"}
    featurize(trak)
    alone = make(tmp_path / "alone", WEIGHTS[:2])
    featurize(alone)
    torch.testing.assert_close(trak.score(make_trainer(), TARGETS), alone.score(make_trainer(), TARGETS))


IDENTITY = {"seed": 0, "dtype": "float32", "checkpoints": ["aa", "bb"]}


@pytest.mark.slow
def test_a_process_that_is_killed_while_the_store_grows_loses_nothing(tmp_path):
    trak = make(tmp_path, WEIGHTS[:2])
    featurize(trak, FEW)
    before = contents(tmp_path)
    script = tmp_path / "killed.py"
    script.write_text(
        "import os; from pathlib import Path; from lightning_trak.features.store import FeatureStore\n"
        "from tests.features.test_growth import featurize, make\n"
        "write, left = FeatureStore.save, [3]\n"
        "def kill(*args):\n"
        "    left[0] -= 1\n"
        "    write(*args) if left[0] else os.kill(os.getpid(), 9)\n"
        f"FeatureStore.save = kill; featurize(make(Path({str(tmp_path)!r})))"
    )
    assert run_script(script) == -signal.SIGKILL
    assert {path for path in before if path.read_bytes() != before[path]} == {tmp_path / "manifest.json"}
    with pytest.raises(RuntimeError, match="lacks 2 of 10 shards"):
        trak.score(make_trainer(), TARGETS)
    featurize(make(tmp_path))
    alone = make(tmp_path / "alone")
    featurize(alone)
    torch.testing.assert_close(make(tmp_path).score(make_trainer(), TARGETS), alone.score(make_trainer(), TARGETS))


def sample(count, mark=""):
    return [tensor_digest({f"the first {count}{mark}": torch.zeros(1)})]


def rows(count, seed=0):
    return Features(draw(count, 4, seed=seed), *torch.rand(3, count))


def fill(store, checkpoints=(0, 1)):
    for checkpoint in checkpoints:
        for shard in store.missing(checkpoint):
            store.write(checkpoint, shard, rows(len(store.shard(shard)), shard))


def test_a_reader_keeps_the_store_that_it_opened(tmp_path):
    fill(FeatureStore(tmp_path, IDENTITY, 10, 4, sample=sample))
    reader = FeatureStore(tmp_path, IDENTITY, None, read_only=True)
    grown = FeatureStore(tmp_path, IDENTITY, 13, sample=sample)
    assert FeatureStore(tmp_path, IDENTITY, None, read_only=True).num_examples == 10
    digest = reader.digest(0)
    fill(grown, [0])
    with pytest.raises(RuntimeError, match="lacks 1 of 8 shards"):
        FeatureStore(tmp_path, IDENTITY, None, read_only=True).require_complete()
    fill(grown)
    reader.require_complete()
    assert (reader.num_examples, reader.digest(0)) == (10, digest)
    later = pickle.loads(pickle.dumps(FeatureStore(tmp_path, IDENTITY, None, read_only=True)))
    later.require_complete()
    assert later.num_examples == 13
    assert torch.equal(later.read(0, 3).features, rows(3, 3).features)


def test_a_store_grows_several_times_and_a_part_without_shards_is_replaced(tmp_path):
    fill(FeatureStore(tmp_path, IDENTITY, 10, 4, sample=sample))
    FeatureStore(tmp_path, IDENTITY, 99, sample=sample)  # a run that failed at once
    for size in (12, 17, 17):
        fill(FeatureStore(tmp_path, IDENTITY, size, sample=sample))
    assert [part["num_examples"] for part in json.loads((tmp_path / "manifest.json").read_text())["data"]] == [
        10, 12, 17
    ]  # fmt: skip
    FeatureStore(tmp_path, IDENTITY, 17, sample=sample).require_complete()
    with pytest.raises(ValueError, match="made with 17 training examples, this TRAK has 12"):
        FeatureStore(tmp_path, IDENTITY, 12, sample=sample)


def test_a_shard_of_other_data_is_found(tmp_path):
    """Two machines whose file system has no locks may add different data at the same time."""
    for name, mark in (("one", "x"), ("two", "y")):
        fill(FeatureStore(tmp_path / name, IDENTITY, 10, 4, sample=sample))
        fill(FeatureStore(tmp_path / name, IDENTITY, 12, sample=lambda n, m=mark: sample(n, "" if n == 10 else m)))
    one, two = (FeatureStore(tmp_path / name, IDENTITY, None, read_only=True) for name in ("one", "two"))
    one._shard_path(0, 3).write_bytes(two._shard_path(0, 3).read_bytes())
    one._shard_path(0, 2).write_bytes(two._shard_path(0, 2).read_bytes())
    one.read(0, 2)
    with pytest.raises(ValueError, match="holds shard-00003 of checkpoint aa of another store"):
        one.read(0, 3)
