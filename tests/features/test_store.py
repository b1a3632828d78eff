"""The store on disk: what it refuses, what it survives."""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file

from lightning_trak.features.store import FeatureStore
from lightning_trak.storage.files import tensor_digest, write_atomically
from tests.features.small_store import IDENTITY, contents, rows


def test_what_is_written_is_read(store):
    again = FeatureStore(store.directory, IDENTITY, 10, shard_size=999)
    assert (again.num_shards, again.num_checkpoints, again.shard_size) == (3, 2, 4)
    assert [again.shard(i) for i in range(3)] == [range(4), range(4, 8), range(8, 10)]
    for checkpoint in range(2):
        for shard in range(3):
            for found, expected in zip(
                again.read(checkpoint, shard), rows(len(store.shard(shard)), 10 * checkpoint + shard), strict=True
            ):
                assert torch.equal(found, expected)
    again.require_complete()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"seed": 1}, r"was made with seed 0, this TRAK has seed 1; use another directory or the same seed"),
        ({"dtype": "float16"}, "made with dtype float32, this TRAK has dtype float16"),
        (
            {"projection": {"class": "SparseProjection", "dim": 8}},
            "made with another projection, .* dim was 4 and is 8",
        ),
        ({"output": {"class": "NegativeLoss"}}, "made with another output, .* class was .*ClassificationMargin"),
        (
            {"parameters": [["weight", [2, 3]]]},
            r"2 parameters, this TRAK has 1 \(differing in bias\); .* the same parameters",
        ),
        (
            {"parameters": [["weight", [2, 3]], ["b", [2]]]},
            r"2 parameters, this TRAK has 2 \(differing in b, bias\)",
        ),
        ({"extra": 1}, "made with extra None, this TRAK has extra 1"),
    ],
)
def test_another_identity_is_refused_and_nothing_lost(store, change, match):
    before = contents(store)
    with pytest.raises(ValueError, match=match):
        FeatureStore(store.directory, IDENTITY | change, 10)
    assert contents(store) == before


def test_another_data_size_is_refused(store):
    before = contents(store)
    with pytest.raises(ValueError, match=r"made with 10 training examples that .*, this TRAK has 11"):
        FeatureStore(store.directory, IDENTITY, 11)
    assert contents(store) == before


def test_missing_shards_are_named(store):
    assert store.missing(1) == []
    store._shard_path(1, 2).unlink()
    assert store.missing(0) == []
    assert store.missing(1) == [2]
    with pytest.raises(RuntimeError, match="lacks 1 of 6 shards; call featurize again"):
        store.require_complete()


def test_the_wrong_number_of_rows_is_refused(store):
    with pytest.raises(ValueError, match="shard 2 of checkpoint 0 cannot be written: it holds 3 examples, not 2"):
        store.write(0, 2, rows(3))


def test_reading_what_is_no_store(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a feature store yet; call featurize first"):
        FeatureStore.read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not the manifest of a feature store"):
        FeatureStore.read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="has format 99; this version reads 9"):
        FeatureStore.read_manifest(tmp_path)


def test_shards_without_a_manifest_are_not_adopted(store):
    (store.directory / "manifest.json").unlink()
    with pytest.raises(ValueError, match="holds shards but no manifest"):
        FeatureStore(store.directory, IDENTITY, 10)


def test_extras_are_kept_by_key(store):
    assert store.read_extra(0, "gram", "k1") is None
    store.write_extra(0, "gram", {"gram": torch.eye(3)}, "k1")
    assert torch.equal(store.read_extra(0, "gram", "k1")["gram"], torch.eye(3))
    assert store.read_extra(0, "gram", "k2") is None
    assert store.read_extra(1, "gram", "k1") is None


def test_the_digest_changes_with_any_shard(store):
    before = store.digest(0), store.digest(1)
    store.write(0, 2, rows(2, seed=77))
    assert store.digest(0) != before[0]
    assert store.digest(1) == before[1]


def test_files_are_plain_safetensors(store):
    loaded = load_file(store._shard_path(0, 0))
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == {
        "features": (4, 4), "outputs": (4,), "loss_gradients": (4,), "curvatures": (4,),
    }  # fmt: skip


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda temporary: temporary.write_text("old"))

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_digest_sees_names_dtypes_shapes_and_values():
    base = {"a": torch.arange(6.0), "b": torch.tensor(True)}
    variants = [
        {"c": base["a"], "b": base["b"]},
        base | {"a": base["a"].reshape(2, 3)},
        base | {"a": base["a"].double()},
        base | {"a": -base["a"]},
        base | {"b": torch.tensor(False)},
    ]
    digests = [tensor_digest(variant) for variant in [base, *variants]]
    assert len(set(digests)) == len(digests)
    assert tensor_digest({"b": base["b"], "a": base["a"].expand(2, 6)[1]}) == digests[0]
    assert tensor_digest({"x": torch.ones(3, dtype=torch.bfloat16)}) != tensor_digest({"x": torch.ones(3)})


def test_two_first_runs_agree_on_one_manifest(tmp_path, monkeypatch):
    """The slower one, which has already looked for a manifest, takes that of the faster."""
    link, seen = os.link, []

    def raced(*paths):
        if not seen:
            seen.append(paths)
            FeatureStore(tmp_path / "store", IDENTITY, 10, shard_size=4)
        link(*paths)

    monkeypatch.setattr(os, "link", raced)
    assert FeatureStore(tmp_path / "store", IDENTITY, 10, shard_size=8).shard_size == 4


def test_a_store_can_be_pickled(store):
    """So that a scorer can be, and goes to another process."""
    again = pickle.loads(pickle.dumps(store))
    assert torch.equal(again.read(0, 1).features, store.read(0, 1).features)
    again.write(0, 1, rows(4, 1))


def test_a_new_store_needs_examples_and_shards(tmp_path):
    for sizes in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="num_examples and shard_size must be at least 1"):
            FeatureStore(tmp_path / "store", IDENTITY, *sizes)
    assert not (tmp_path / "store").exists()


def test_identity_is_compared_as_json_keeps_it(tmp_path):
    identity = IDENTITY | {"output": {"sizes": (1, 2)}}
    FeatureStore(tmp_path, identity, 10)
    FeatureStore(tmp_path, identity, 10)


def test_a_home_directory_is_meant(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert FeatureStore("~/store", IDENTITY, 10).directory == tmp_path / "store"
    assert FeatureStore.read_manifest("~/store")["data"] == [{"num_examples": 10, "sample": None}]


def test_a_remote_store_is_refused():
    with pytest.raises(ValueError, match=r'must be on a disk.*"s3://bucket/features"'):
        FeatureStore("s3://bucket/features", IDENTITY, 10)


def test_a_run_that_failed_before_its_first_shard_leaves_no_claim(tmp_path):
    failed = FeatureStore(tmp_path, IDENTITY | {"output": {"class": "Wrong"}}, 10)
    store = FeatureStore(tmp_path, IDENTITY, 10, shard_size=5)
    store.write(0, 0, rows(5))
    with pytest.raises(RuntimeError, match="another run has taken store"):
        failed.write(0, 0, rows(10))
    assert len(store.read(0, 0).features) == 5


def test_a_reader_leaves_the_claim_of_another_alone(tmp_path):
    FeatureStore(tmp_path, IDENTITY, 10)
    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match="made with seed 0, this TRAK has seed 1"):
        FeatureStore(tmp_path, IDENTITY | {"seed": 1}, 10, read_only=True)
    assert (tmp_path / "manifest.json").read_bytes() == before
    with pytest.raises(FileNotFoundError, match="call featurize first"):
        FeatureStore(tmp_path / "none", IDENTITY, 10, read_only=True)


def test_what_a_failed_run_remembered_is_not_taken_over(tmp_path):
    failed = FeatureStore(tmp_path, IDENTITY | {"seed": 1}, 10)
    failed.write_extra(0, "context", {"bank": torch.ones(2)}, failed.key)
    store = FeatureStore(tmp_path, IDENTITY, 10)
    assert store.read_extra(0, "context", store.key) is None
    assert FeatureStore(tmp_path, IDENTITY, 10).key == store.key


def test_a_shard_is_refused_where_it_was_not_written(store):
    """Copies have the right checksum, but are other numbers."""
    other = FeatureStore(store.directory.parent / "other", IDENTITY | {"seed": 1}, 10, shard_size=4)
    other.write(0, 0, rows(4))
    path = store._shard_path(0, 0)
    for source, said in [
        (store._shard_path(0, 1), "holds shard-00001 of checkpoint aa of this store"),
        (store._shard_path(1, 0), "holds shard-00000 of checkpoint bb of this store"),
        (other._shard_path(0, 0), "holds shard-00000 of checkpoint aa of another store"),
    ]:
        shutil.copy(source, path)
        for read in (store.read, store.engine_of):
            with pytest.raises(ValueError, match=rf'shard-00000.safetensors" {said}; delete it and call featurize'):
                read(0, 0)


def test_a_shard_knows_its_engine(store):
    store.write(0, 0, rows(4), "loop")
    store.write(0, 1, rows(4), engine="hooks")
    assert [store.engine_of(0, shard) for shard in range(3)] == ["loop", "hooks", ""]


def test_opening_a_store_to_write_removes_what_dead_processes_left(store):
    names = []
    write_atomically(store.directory / "x", lambda path: (names.append(path.parent.name), path.write_text("")))
    long_ago = f".shard-00001.safetensors.{'0' * 12}-1-00000000.tmp"
    for folder in (store.directory, store.directory / "checkpoint-bb"):
        for name in (names[0], long_ago):
            (folder / name).mkdir()
            os.utime(folder / name, (0, 0))
    before = set(store.directory.rglob("*"))
    FeatureStore(store.directory, IDENTITY, 10, read_only=True)
    assert set(store.directory.rglob("*")) == before
    FeatureStore(store.directory, IDENTITY, 10)
    assert before - set(store.directory.rglob("*")) == {
        store.directory / long_ago,
        store.directory / "checkpoint-bb" / long_ago,
    }
