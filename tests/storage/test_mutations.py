"""Manifests and other JSON files that somebody or something has changed: refused by name, or harmless."""

import copy
import json
import os

import pytest
import torch

from lightning_trak.features.rows import Features
from lightning_trak.features.store import FeatureStore
from lightning_trak.retraining import read_fleet
from lightning_trak.retraining.fleets.members import Member, MemberStore
from lightning_trak.storage.files import write_json
from lightning_trak.storage.schemas import boolean, integer, items, one_of, parse_json, record, text, with_checksum

IDENTITY = {
    "seed": 0,
    "dtype": "float32",
    "projection": {"class": "SparseProjection", "dim": 4},
    "parameters": [["weight", [2, 3]], ["bias", [2]]],
    "checkpoints": ["aa", "bb"],
    "precision": "32-true",
}
FLEET = {
    "seed": 0,
    "num_targets": 3,
    "num_subsets": 2,
    "num_train": 4,
    "parameters": [["weight", [2, 3]], ["bias", []]],
    "hyperparameters": {"lr": 0.1, "name": "x"},
}
MASKS = torch.tensor([[True, False, True, True], [False, True, True, False]])


def make_store(directory):
    store = FeatureStore(directory, IDENTITY, 10, shard_size=4)
    generator = torch.Generator().manual_seed(0)
    for checkpoint in range(2):
        for shard in range(3):
            count = len(store.shard(shard))
            rows = torch.randn(count, 7, generator=generator)
            store.write(checkpoint, shard, Features(rows[:, :4], *rows[:, 4:].T.contiguous()), "hooks")
    store.settle_engine("hooks")


def read_store(directory):
    """All that a store says, by a run that featurizes and by one that scores."""
    needed = {name: value for name, value in IDENTITY.items() if name != "precision"}
    for store in (
        FeatureStore(directory, IDENTITY, 10),
        FeatureStore(directory, needed, None, read_only=True),
    ):
        store.require_complete()
        found = [store.read(checkpoint, shard) for checkpoint in range(2) for shard in range(store.num_shards)]
        yield torch.cat([torch.cat([rows.features, torch.stack(rows[1:], 1)], 1) for rows in found])
        assert store.settle_engine() == store.engine_of(1, 2) == "hooks"


def make_fleet(directory):
    store = MemberStore(directory, FLEET, MASKS)
    for subset in range(2):
        for seed in range(2):
            store.write(Member(subset, seed), torch.tensor([1.0, 2.0, 3.0]) * (subset + 2 * seed), {"steps": 3})


def read_it(directory):
    store = MemberStore(directory, FLEET, MASKS)
    yield store.outputs(2)
    masks, outputs = read_fleet(directory)
    assert torch.equal(masks, MASKS)
    yield outputs


KINDS = {"store": (make_store, read_store), "fleet": (make_fleet, read_it)}
VALUES = [None, True, 0, -1, 1, 10**30, 1.0, 2.5, "", "../../etc", "x" * 5000, [], [[[[]]]], {}, {"a": {"b": []}}]


def paths(value, path=()):
    """Where there is a value in a manifest."""
    if path:
        yield path
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in steps:
        yield from paths(inner, (*path, step))


def changed(manifest, path, change):
    result = copy.deepcopy(manifest)
    parent = result
    for step in path[:-1]:
        parent = parent[step]
    change(parent, path[-1])
    return result


def remove(parent, step):
    del parent[step]


def rename(parent, step):
    if isinstance(step, str):
        parent[step + "_"] = parent.pop(step)
    else:
        parent.append(parent.pop(step))


def double(parent, step):
    if isinstance(step, str):
        parent[step + "2"] = parent[step]
    else:
        parent.append(parent[step])


def mutations(manifest):
    for path in paths(manifest):
        for change in (remove, rename, double):
            yield changed(manifest, path, change)
        for value in VALUES:
            yield changed(manifest, path, lambda parent, step, value=value: parent.__setitem__(step, value))


def raw_mutations(content):
    yield from (content[: int(part * len(content))] for part in (0, 0.1, 0.5, 0.9, 0.98))
    yield from (b"[]", b"null", b"1", b'"text"', b"[" * 100_000, b'{"a":' * 50_000, b"\x00" * 50, b"9" * 5000)
    yield b"[" + content + b"]"
    yield content + content
    yield content.decode().encode("utf-16")
    yield b"\xef\xbb\xbf" + content
    yield content.replace(b"seed", b"s\xffed")
    yield content.replace(b'"format"', b'"format": 2, "format"')
    yield content.replace(b'"seed"', b'"seed": 1, "seed"')
    for number in (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"0x0", b"00"):
        yield content.replace(b'"seed": 0', b'"seed": ' + number)


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    make, read = KINDS[request.param]
    directory = tmp_path_factory.mktemp("made") / request.param
    make(directory)
    return directory, list(read(directory)), lambda: list(read(directory))


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def refused_or_harmless(made, name, variants):
    """How many of the variants of a file were refused; all others change nothing."""
    directory, expected, read = made
    path, refused = directory / name, 0
    original = path.read_bytes()
    try:
        for variant in variants:
            path.write_bytes(variant)
            before = contents(directory)
            try:
                found = read()
            except (ValueError, RuntimeError) as error:
                said, refused = str(error), refused + 1
                assert str(directory) in said, variant[:200]
            else:
                assert all(map(torch.equal, found, expected)), variant[:200]
            assert contents(directory) == before, variant[:200]
    finally:
        path.write_bytes(original)
    return refused


def test_every_mutation_of_a_manifest_is_refused(made):
    manifest = json.loads((made[0] / "manifest.json").read_text())
    variants = [variant for variant in mutations(manifest) if variant != manifest or repr(variant) != repr(manifest)]
    assert len(variants) > 190
    assert refused_or_harmless(made, "manifest.json", [json.dumps(v).encode() for v in variants]) == len(variants)


def test_mutations_of_the_bytes_of_a_manifest_are_refused(made):
    variants = list(raw_mutations((made[0] / "manifest.json").read_bytes()))
    assert refused_or_harmless(made, "manifest.json", variants) == len(variants)


def test_a_manifest_in_another_layout_is_the_same(made):
    manifest = json.loads((made[0] / "manifest.json").read_text())
    turned = dict(reversed(manifest.items())) | {"identity": dict(reversed(manifest["identity"].items()))}
    variants = [json.dumps(turned).encode(), json.dumps(manifest, indent=7).encode() + b"\n\n"]
    assert refused_or_harmless(made, "manifest.json", variants) == 0


@pytest.mark.slow
def test_a_mutation_with_the_right_checksum_is_refused_by_its_field_or_harmless(made):
    """What one can do who knows how checksums are made: no internal error, no other numbers."""
    manifest = json.loads((made[0] / "manifest.json").read_text())
    del manifest["checksum"]
    variants = [json.dumps(with_checksum(variant)).encode() for variant in mutations(manifest)]
    refused_or_harmless(made, "manifest.json", variants)


@pytest.mark.parametrize("flip", range(0, 700, 7))
def test_a_flipped_bit_of_a_manifest_is_refused_or_harmless(made, flip):
    content = bytearray((made[0] / "manifest.json").read_bytes())
    content[flip % len(content)] ^= 1 << flip % 8
    refused_or_harmless(made, "manifest.json", [bytes(content)])


def _part(size):
    return {"num_examples": size, "sample": None}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"data": []}, r"data must be a list of at least 1, got \[\]"),
        ({"data": [_part(-1)]}, r"data\[0\].num_examples must be a whole number from 1 to .*, got -1"),
        ({"data": [_part(True)]}, r"data\[0\].num_examples must be a whole number .*, got True"),
        ({"data": [_part(10), _part(10)]}, r"data\[1\].num_examples must be greater than that before it"),
        ({"shard_size": 10**30}, "shard_size must be a whole number from 1 to .*, got 1000"),
        ({"identity": []}, r"identity must be an object, got \[\]"),
        ({"identity": IDENTITY | {"dtype": "int2"}}, "identity.dtype must be one of float64, .*, got 'int2'"),
        ({"extra": 1}, "it has the unknown field 'extra'"),
        ({"data": [_part(11)]}, "made with 11 training examples, this TRAK has 10"),
    ],
)
def test_the_error_names_the_field(tmp_path, fields, said):
    make_store(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text()) | fields
    del manifest["checksum"]
    write_json(tmp_path / "manifest.json", with_checksum(manifest))
    with pytest.raises(ValueError, match=said):
        FeatureStore(tmp_path, IDENTITY, 10)


def test_mutations_of_the_engine_file_are_refused(tmp_path):
    make_store(tmp_path)
    made = tmp_path, list(read_store(tmp_path)), lambda: list(read_store(tmp_path))
    (path,) = tmp_path.glob("engine-*.json")
    values = [*VALUES, "hmoks", ["hooks"], "Hooks", "functional ", "auto"]
    variants = [json.dumps({"engine": value, "refuted": {}}).encode() for value in values]
    variants += [
        json.dumps({"engine": "hooks", "refuted": value}).encode() for value in (None, [], "", {"hooks": 1}, {"x": ""})
    ]
    variants += [b"", b"{", b"{}", b'{"engin": "hooks"}', b'{"engine": "hooks", "engine": "loop"}', b'"hooks"']
    variants += [b'{"engine": "h\xefoks"}', b'{"engine": NaN}', b"[" * 100_000]
    assert refused_or_harmless(made, path.name, variants) == len(variants)
    path.write_text('{"engine": "hmoks", "refuted": {}}')
    with pytest.raises(ValueError, match=r'engine-.*json" is .*engine must be one of hooks, functional, loop, got'):
        FeatureStore(tmp_path, IDENTITY, 10).settle_engine()


def make_fifo(path):
    os.mkfifo(path)


def make_dangling(path):
    path.symlink_to(path.parent / "nowhere")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (make_fifo, "it is a FIFO, not a file; restore it"),
        (lambda path: path.mkdir(), "it is a directory, not a file"),
        (make_dangling, 'is a link to ".*nowhere", which does not exist; restore that file'),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_that_is_no_file_is_refused_at_once(tmp_path, kind, make, said):
    write, read = KINDS[kind]
    write(tmp_path)
    (tmp_path / "manifest.json").unlink()
    make(tmp_path / "manifest.json")
    with pytest.raises(ValueError, match=said):
        list(read(tmp_path))
    with pytest.raises(ValueError, match=said):
        FeatureStore(tmp_path, IDENTITY, 10) if kind == "store" else MemberStore(tmp_path, FLEET, MASKS)


def test_a_huge_manifest_is_not_read(tmp_path):
    make_store(tmp_path)
    os.truncate(tmp_path / "manifest.json", 1 << 40)  # sparse
    with pytest.raises(ValueError, match="it is larger than"):
        FeatureStore(tmp_path, IDENTITY, 10)


def test_schemas():
    schema = record({"a": integer(0, 9)}, {"b": items(one_of("x", "y"), 1), "c": record({}, others=boolean)})
    good = [{"a": 0}, {"a": 9, "b": ["x", "y"]}, {"a": 1, "c": {"any": True}}]
    for value in good:
        assert parse_json(json.dumps(value).encode(), schema) == value
    for value, said in [
        ([], r"it must be an object, got \[\]"),
        ({}, "it lacks the field 'a'"),
        ({"a": 1, "d": 2}, "it has the unknown field 'd'"),
        ({"a": 10}, "a must be a whole number from 0 to 9, got 10"),
        ({"a": 1, "b": ["x", "z"]}, r"b\[1\] must be one of x, y, got 'z'"),
        ({"a": 1, "c": {"any": 1}}, "c.any must be true or false, got 1"),
    ]:
        with pytest.raises(ValueError, match=said):
            parse_json(json.dumps(value).encode(), schema)
    with pytest.raises(ValueError, match=r"it must be a name, got '\.\./x'"):
        parse_json(b'"../x"', text(r"[\w-]+", "a name"))
