"""The store on disk: what it refuses, what it survives."""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file

from lightning_trak.features.rows import Features
from lightning_trak.features.store import FeatureStore
from lightning_trak.storage.files import save_tensors, tensor_digest, write_atomically

IDENTITY = {
    "seed": 0,
    "dtype": "float32",
    "projection": {"class": "SparseProjection", "dim": 4},
    "output": {"class": "ClassificationMargin"},
    "parameters": [["weight", [2, 3]], ["bias", [2]]],
    "checkpoints": ["aa", "bb"],
}


def rows(count: int, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    return Features(torch.randn(count, 4, generator=generator), *torch.rand(3, count, generator=generator))


@pytest.fixture
def store(tmp_path):
    store = FeatureStore(tmp_path / "store", IDENTITY, num_examples=10, shard_size=4)
    for checkpoint in range(2):
        for shard in range(3):
            store.write(checkpoint, shard, rows(len(store.shard(shard)), 10 * checkpoint + shard))
    return store


def header(store, k=4):
    """The header of shard 0 of checkpoint 1."""
    place = {"checkpoint": "bb", "name": "shard-00000", "key": store.key, "engine": ""}
    return place | {"dtype": "float32", "k": k, "rounding_error": 0.0, "skipped": []}


def contents(store):
    return {path: path.read_bytes() for path in sorted(store.directory.rglob("*")) if path.is_file()}


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


@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 0.9, 0.999])
def test_an_altered_byte_is_found_anywhere(store, where):
    path = store._shard_path(0, 1)
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-00001.safetensors\" is truncated or altered .*delete it"):
        FeatureStore(store.directory, IDENTITY, 10).read(0, 1)
    store.read(0, 0)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_shard_is_found(store, kept):
    path = store._shard_path(1, 0)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="truncated or altered"):
        FeatureStore(store.directory, IDENTITY, 10).read(1, 0)


def test_an_alteration_after_the_first_read_is_found(store):
    store.read(0, 0)
    path = store._shard_path(0, 0)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        store.read(0, 0)


def test_the_wrong_number_of_rows_is_refused(store):
    with pytest.raises(ValueError, match="shard 2 holds 2 examples, got 3 rows"):
        store.write(0, 2, rows(3))


def test_reading_what_is_no_store(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a feature store yet; call featurize first"):
        FeatureStore.read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not the manifest of a feature store"):
        FeatureStore.read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="has format 99; this version reads 5"):
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


def test_a_shard_of_another_size_is_found(store):
    other = FeatureStore(store.directory.parent / "other", IDENTITY, 10, shard_size=5)
    other.write(0, 0, rows(5))
    other._shard_path(0, 0).replace(store._shard_path(0, 0))
    with pytest.raises(ValueError, match="it holds 5 examples, not 4"):
        store.read(0, 0)


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


WRONG_ROWS = [
    ({"features": torch.zeros(4)}, r"its features have shape \(4,\), not \(examples, k\)"),
    ({"features": torch.zeros(4, 0)}, r"its features have shape \(4, 0\)"),
    ({"features": torch.zeros(4, 4, dtype=torch.float64)}, "its features are float64, not float32"),
    ({"features": torch.zeros(4, 4, dtype=torch.int32)}, "its features are int32, not float32"),
    ({"features": torch.zeros(4, 5)}, "it has 5 features per example, but other shards have 4"),
    ({"outputs": torch.zeros(4, 1)}, r"its outputs are torch.float32 of shape \(4, 1\), not numbers of shape \(4,\)"),
    ({"loss_gradients": torch.zeros(3)}, r"its loss_gradients are .* of shape \(3,\)"),
    ({"curvatures": torch.zeros(4, dtype=torch.int64)}, "its curvatures are torch.int64"),
]


@pytest.mark.parametrize(("change", "said"), WRONG_ROWS)
def test_rows_that_do_not_fit_are_neither_written_nor_read(store, change, said):
    before = contents(store)
    with pytest.raises(ValueError, match=f"shard 0 of checkpoint 1 cannot be written: {said}"):
        store.write(1, 0, rows(4)._replace(**change))
    assert contents(store) == before
    k = change["features"].shape[-1] if "features" in change else 4
    save_tensors(store._shard_path(1, 0), rows(4)._asdict() | change, **header(store, k or 4))
    store.read(0, 0)
    with pytest.raises(ValueError, match=f"{said}.*; delete it and call featurize again"):
        store.read(1, 0)


@pytest.mark.parametrize(
    "about",
    [
        {},
        {"checkpoint": 1},
        {"engine": None},
        {"extra": 1},
        {"dtype": "int2"},
        {"k": 0},
        {"rounding_error": -1},
        {"rounding_error": None},
    ],
)
def test_a_header_of_another_kind_is_refused(store, about):
    save_tensors(store._shard_path(1, 0), rows(4)._asdict(), **(header(store) | about))
    if about:
        with pytest.raises(ValueError, match="its header"):
            store.read(1, 0)
    else:
        store.read(1, 0)


def test_a_shard_with_other_columns_is_refused(store):
    save_tensors(store._shard_path(1, 0), {"features": torch.zeros(4, 4)}, **header(store))
    with pytest.raises(ValueError, match="it holds features, not curvatures, features, loss_gradients, outputs"):
        store.read(1, 0)


@pytest.mark.parametrize("field", ["checkpoint", "engine", "dtype", "k", "rounding_error", "skipped"])
def test_a_header_that_lacks_a_field_is_refused(store, field):
    about = header(store)
    del about[field]
    save_tensors(store._shard_path(1, 0), rows(4)._asdict(), **about)
    with pytest.raises(ValueError, match=f"its header lacks the field '{field}'"):
        store.read(1, 0)


def test_a_shard_that_is_no_file_is_refused_at_once(store):
    path = store._shard_path(0, 1)
    path.unlink()
    os.mkfifo(path)
    for read in (store.read, store.engine_of):
        with pytest.raises(ValueError, match=r'shard-00001.safetensors" is a FIFO, not a file; delete it and call'):
            read(0, 1)
    with pytest.raises(ValueError, match="is a FIFO"):
        store.digest(0)
    store.write(0, 1, rows(4, 1))
    assert torch.equal(store.read(0, 1).features, rows(4, 1).features)


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


@pytest.mark.parametrize("damage", [lambda content: content[:-1] + b"!", lambda content: content[:50], lambda _: b""])
def test_a_damaged_extra_counts_as_lost(store, damage):
    store.write_extra(1, "context", {"bank": torch.ones(2)}, store.key)
    path = store._path(1, "context")
    whole = path.read_bytes()
    assert store.missing(1, ["context"]) == []
    path.write_bytes(damage(whole))
    with pytest.warns(UserWarning, match=r'context.safetensors" is truncated or altered .*, so it counts as lost'):
        assert store.read_extra(1, "context", store.key) is None
    with pytest.warns(UserWarning, match="counts as lost"):
        assert store.missing(1, ["context"]) == [0]
    assert store.missing(1) == []
    path.unlink()
    os.mkfifo(path)
    with pytest.warns(UserWarning, match="is a FIFO, not a file, so it counts as lost"):
        assert store.read_extra(1, "context", store.key) is None
    store.write_extra(1, "context", {"bank": torch.ones(2)}, store.key)
    assert path.read_bytes() == whole
    shutil.copy(path, store._path(0, "context"))
    with pytest.warns(UserWarning, match="holds context of checkpoint bb of this store, so it counts as lost"):
        assert store.read_extra(0, "context", store.key) is None
