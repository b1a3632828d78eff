"""Stores of integers: what is read, how many bytes they take, and what is refused."""

import pytest
import torch
from safetensors.torch import load_file

from lightning_trak.features.dtypes import NAMES, feature_dtype
from lightning_trak.features.rows import Features, StoredFeatures
from lightning_trak.features.store import FeatureStore
from lightning_trak.storage.files import load_tensors, save_tensors

BITS = {"int8": 8, "int4": 4}
ERRORS = {"int8": 0.01, "int4": 0.125}
INTEGERS = pytest.mark.parametrize("dtype", list(BITS))


def make_rows(count, k=401, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Features(torch.randn(count, k, generator=generator), *torch.rand(3, count, generator=generator))


def make_store(path, dtype, k=401, shard_size=4):
    store = FeatureStore(path, {"checkpoints": ["a"], "dtype": dtype}, 10, shard_size=shard_size)
    for shard in range(store.num_shards):
        store.write(0, shard, make_rows(len(store.shard(shard)), k, shard))
    return store


@pytest.mark.parametrize("k", [1, 2, 7, 401])
@INTEGERS
def test_what_is_written_is_read_up_to_rounding(tmp_path, dtype, k):
    make_store(tmp_path, dtype, k)
    store = FeatureStore(tmp_path, {"checkpoints": ["a"], "dtype": dtype}, 10, read_only=True)
    for shard in range(store.num_shards):
        found, expected = store.read(0, shard), make_rows(len(store.shard(shard)), k, shard)
        assert found.features.dtype == torch.float32
        off = (found.features - expected.features).norm(dim=1) / expected.features.norm(dim=1)
        assert float(off.max()) < 1.2 * ERRORS[dtype]
        for column, given in zip(found[1:], expected[1:], strict=True):
            assert torch.equal(column, given)


@INTEGERS
def test_the_bits_on_disk(tmp_path, dtype):
    store = make_store(tmp_path, dtype)
    found = load_file(store._shard_path(0, 0))
    assert found["features"].nbytes == 4 * -(-401 * BITS[dtype] // 8)
    assert found["scales"].nbytes == 4 * 4
    assert store.read_stored(0, 0).codes.data_ptr() != 0


@pytest.mark.parametrize("dtype", NAMES)
def test_blocks_are_the_whole_shard(dtype, monkeypatch):
    floating = feature_dtype(dtype).floating
    rows = make_rows(23)
    stored = StoredFeatures.encode(rows._replace(features=rows.features.to(floating)), feature_dtype(dtype))
    monkeypatch.setattr("lightning_trak.features.rows._BLOCK_BYTES", 401 * 4 * 7)
    blocks = list(stored.blocks())
    assert [len(block.features) for block in blocks] == ([3] * 7 + [2] if dtype == "float64" else [7, 7, 7, 2])
    for found, expected in zip(Features.cat(blocks), stored.decode(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", NAMES)
def test_columns_are_those_of_the_whole(dtype):
    floating = feature_dtype(dtype).floating
    rows = make_rows(5)
    stored = StoredFeatures.encode(rows._replace(features=rows.features.to(floating)), feature_dtype(dtype))
    for columns in (range(401), range(0, 7), range(6, 40), range(396, 401), range(400, 401)):
        found = stored.decode_columns(columns)
        assert torch.equal(found, stored.decode().features[:, columns.start : columns.stop])


@INTEGERS
def test_integers_are_only_moved_as_they_are_stored(dtype):
    stored = StoredFeatures.encode(make_rows(5), feature_dtype(dtype))
    moved = []
    again = stored.moved(lambda tensor: moved.append(tensor.nbytes) or tensor.clone())
    assert sum(moved) == 5 * (-(-401 * BITS[dtype] // 8) + 4)
    assert torch.equal(again.decode().features, stored.decode().features)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"features": torch.zeros(4, 201)}, "its features are float32, not int8"),
        ({"features": torch.zeros(4, 201, dtype=torch.int8)}, "it has 201 bytes per example, but .* 401"),
        ({"scales": torch.full((4,), torch.nan)}, "its scales are not all finite and at least 0"),
        ({"scales": torch.tensor([1.0, -1.0, 1.0, 1.0])}, "its scales are not all finite and at least 0"),
        ({"scales": torch.ones(3)}, r"its scales are torch.float32 of shape \(3,\)"),
        ({"scales": torch.ones(4, dtype=torch.int64)}, "its scales are torch.int64"),
        ({"scales": None}, "it holds curvatures, features, loss_gradients, outputs, not .* scales"),
    ],
)
def test_codes_that_do_not_fit_are_refused(tmp_path, change, said):
    store = make_store(tmp_path, "int8")
    path = store._shard_path(0, 0)
    tensors, metadata = load_tensors(path)
    about = {name: value for name, value in metadata.items() if name not in ("sha256", "checksum")}
    changed = {name: tensor.clone() for name, tensor in (tensors | change).items() if tensor is not None}
    save_tensors(path, changed, **about)
    with pytest.raises(ValueError, match=rf"{said}.*; delete it and call featurize again"):
        store.read(0, 0)


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"dtype": "int4"}, "its features are int4, not int8"),
        ({"k": 400}, "it has 400 features per example, but .* 401"),
    ],
)
def test_a_header_that_says_otherwise_is_refused(tmp_path, about, said):
    store = make_store(tmp_path, "int8")
    tensors, metadata = load_tensors(store._shard_path(0, 0))
    metadata = {name: value for name, value in metadata.items() if name not in ("sha256", "checksum")} | about
    save_tensors(store._shard_path(0, 0), {name: tensor.clone() for name, tensor in tensors.items()}, **metadata)
    with pytest.raises(ValueError, match=said):
        store.read(0, 0)


@INTEGERS
def test_every_flipped_or_lost_byte_is_noticed(tmp_path, dtype):
    store = make_store(tmp_path, dtype, k=5)
    path = store._shard_path(0, 0)
    content = path.read_bytes()
    for place in range(0, len(content), 11):
        altered = bytearray(content)
        altered[place] ^= 1
        for wrong in (bytes(altered), content[:place]):
            path.write_bytes(wrong)
            store._verified.clear()
            with pytest.raises(ValueError, match="delete it and call featurize again"):
                store.read(0, 0)


@INTEGERS
def test_what_is_not_finite_is_not_written(tmp_path, dtype):
    store = make_store(tmp_path, dtype)
    before = store._shard_path(0, 0).read_bytes()
    bad = make_rows(4)
    bad.features[2, 3] = torch.nan
    with pytest.raises(ValueError, match="only finite numbers"):
        store.write(0, 0, bad)
    assert store._shard_path(0, 0).read_bytes() == before


@INTEGERS
def test_only_float32_is_rounded_to_integers(tmp_path, dtype):
    store = FeatureStore(tmp_path, {"checkpoints": ["a"], "dtype": dtype}, 4)
    with pytest.raises(ValueError, match="cannot be written: its features are float64, not float32"):
        store.write(0, 0, make_rows(4)._replace(features=torch.zeros(4, 401, dtype=torch.float64)))


@pytest.mark.parametrize("wrong", ["int2", "float", torch.int8, torch.complex64, 8, None])
def test_other_dtypes_are_refused(wrong):
    with pytest.raises(ValueError, match=r"dtype must be one of 'float64', .*'int4', or a float dtype of torch; got "):
        feature_dtype(wrong)


def test_names_and_dtypes_of_torch_mean_the_same():
    for name in ("float64", "float32", "bfloat16", "float16"):
        assert feature_dtype(getattr(torch, name)) == feature_dtype(name) == feature_dtype(feature_dtype(name))
