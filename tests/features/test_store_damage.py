"""Stores that were damaged, or whose shards do not fit: found and named."""

import os
import shutil

import pytest
import torch

from lightning_trak.features.store import FeatureStore
from lightning_trak.storage.files import save_tensors
from tests.features.small_store import IDENTITY, contents, header, rows


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


def test_a_shard_of_another_size_is_found(store):
    other = FeatureStore(store.directory.parent / "other", IDENTITY, 10, shard_size=5)
    other.write(0, 0, rows(5))
    other._shard_path(0, 0).replace(store._shard_path(0, 0))
    with pytest.raises(ValueError, match="it holds 5 examples, not 4"):
        store.read(0, 0)


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
        {"skipped": [-1]},
        {"skipped": None},
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


@pytest.mark.parametrize("field", ["checkpoint", "engine", "dtype", "k", "skipped"])
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
