"""Manifests and other JSON files that somebody or something has changed: refused by name, or harmless."""

import copy
import json
import os

import pytest
import torch

from lightning_trak.files import save_tensors, write_json
from lightning_trak.retraining import read_fleet
from lightning_trak.retraining.members import Member, MemberStore
from lightning_trak.schemas import boolean, integer, items, one_of, parse_json, record, text, with_checksum
from lightning_trak.store import Features, FeatureStore

IDENTITY = {
    "seed": 0,
    "dtype": "float32",
    "projection": {"class": "SparseProjection", "dim": 4},
    "parameters": [["weight", [2, 3]], ["bias", [2]]],
    "checkpoints": ["aa", "bb"],
    "data": "cc",
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
    num_examples = FeatureStore.read_manifest(directory)["num_examples"]
    needed = {name: value for name, value in IDENTITY.items() if name != "data"}
    for store in (
        FeatureStore(directory, IDENTITY, 10),
        FeatureStore(directory, needed, num_examples, read_only=True),
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


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_examples": -1}, "num_examples must be a whole number from 1 to .*, got -1"),
        ({"num_examples": True}, "num_examples must be a whole number .*, got True"),
        ({"shard_size": 10**30}, "shard_size must be a whole number from 1 to .*, got 1000"),
        ({"identity": []}, r"identity must be an object, got \[\]"),
        ({"identity": {"checkpoints": []}}, r"identity.checkpoints must be a list of at least 1, got \[\]"),
        ({"identity": IDENTITY | {"dtype": "int8"}}, "identity.dtype must be one of float64, .*, got 'int8'"),
        ({"extra": 1}, "it has the unknown field 'extra'"),
        ({"num_examples": 11}, "made with num_examples 11"),
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
    variants = [json.dumps({"engine": value}).encode() for value in values]
    variants += [b"", b"{", b"{}", b'{"engin": "hooks"}', b'{"engine": "hooks", "engine": "loop"}', b'"hooks"']
    variants += [b'{"engine": "h\xefoks"}', b'{"engine": NaN}', b"[" * 100_000]
    assert refused_or_harmless(made, path.name, variants) == len(variants)
    path.write_text('{"engine": "hmoks"}')
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


def test_a_stray_member_takes_no_memory_and_is_named(tmp_path):
    make_fleet(tmp_path)
    before = contents(tmp_path)
    stray = tmp_path / "members/subset-00000-seed-999999999.safetensors"
    stray.write_bytes(b"")
    for read in (lambda: read_fleet(tmp_path), lambda: MemberStore(tmp_path, FLEET, MASKS).outputs(10**9)):
        with pytest.raises(
            RuntimeError, match=r"repetition 999999999, subset-00000-seed-999999999|lacks 1999999995 of"
        ):
            read()
    stray.rename(tmp_path / "members/subset-99999-seed-000.safetensors")
    for name in ("subset-0-seed-0", "subset-00000-seed-0001", "subset-00000-seed-000 (copy)", "notes"):
        (tmp_path / f"members/{name}.safetensors").write_bytes(b"not of the fleet")
    assert read_fleet(tmp_path).outputs.shape == (3, 2, 2)
    assert {path: content for path, content in contents(tmp_path).items() if path in before} == before


@pytest.mark.parametrize("note", [b"", b"{", b"[]", b'{"attempts": "many"}', b"\xff", b'{"attempts": 10e99}'])
def test_a_torn_note_of_a_failure_hides_nothing(tmp_path, note):
    make_fleet(tmp_path)
    store = MemberStore(tmp_path, FLEET, MASKS)
    store.record_failure(Member(1, 1), RuntimeError("bad weather"))
    for member in (Member(0, 0), Member(1, 1)):
        (tmp_path / f"members/{member.stem}.safetensors").unlink()
    (tmp_path / f"failures/{Member(0, 0).stem}.json").write_bytes(note)
    said = (
        r"lacks 2 of 4 members.*subset 0, repetition 0 \(failed, but the note of it .*is truncated or altered"
        r".*subset 1, repetition 1 \(failed 1x, RuntimeError: bad weather"
    )
    for read in (lambda: read_fleet(tmp_path), lambda: store.outputs(2)):
        with pytest.raises(RuntimeError, match=said):
            read()
    assert "failed, but the note" in store.describe([Member(1, 1), Member(0, 0)])
    store.record_failure(Member(0, 0), RuntimeError("again"))
    assert store.failure(Member(0, 0))["attempts"] == 1


def test_reading_a_fleet_changes_nothing(tmp_path):
    make_fleet(tmp_path)
    members = tmp_path / "members"
    leftover = f".x.{'0' * 12}-1-00000000.tmp"
    (members / leftover).mkdir()
    os.utime(members / leftover, (0, 0))

    def state():
        return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*")}

    before = state()
    read_fleet(tmp_path)
    assert state() == before
    masks = (tmp_path / "masks.safetensors").read_bytes()
    for damage in (b"", masks[:-1] + b"\x07"):
        (tmp_path / "masks.safetensors").write_bytes(damage)
        before = state()
        with pytest.raises(ValueError, match=r'masks.safetensors" is .*; run the fleet again to restore it'):
            read_fleet(tmp_path)
        assert state() == before
    (tmp_path / "masks.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r'no ".*masks.safetensors"; run the fleet again to restore it'):
        read_fleet(tmp_path)
    for content in (b"", None):
        if content is not None:
            (tmp_path / "masks.safetensors").write_bytes(content)
        MemberStore(tmp_path, FLEET, MASKS)  # as the error says
        assert (tmp_path / "masks.safetensors").read_bytes() == masks
        (tmp_path / "masks.safetensors").unlink()
    assert not (members / leftover).exists()


def test_members_are_what_their_names_say(tmp_path):
    make_fleet(tmp_path / "one")
    other = MemberStore(tmp_path / "other", FLEET | {"seed": 1}, MASKS)
    other.write(Member(0, 0), torch.ones(3), {})
    store = MemberStore(tmp_path / "one", FLEET, MASKS)
    path = store._path(Member(0, 0))
    mine, about = path.read_bytes(), {"fleet": store.key, "member": Member(0, 0).stem}
    for content, said in [
        (store._path(Member(1, 0)).read_bytes(), "holds subset-00001-seed-000 of this fleet"),
        (other._path(Member(0, 0)).read_bytes(), "holds subset-00000-seed-000 of another fleet"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf'seed-000.safetensors" {said}; delete it and run the fleet again'):
            read_fleet(tmp_path / "one")
    for tensors in (
        {"outputs": torch.ones(4)},
        {"outputs": torch.ones(3, 1)},
        {"outputs": torch.ones(3).double()},
        {"outputs": torch.tensor([1, torch.nan, 1])},
        {"output": torch.ones(3)},
    ):
        save_tensors(path, tensors, **about)
        with pytest.raises(ValueError, match=r"it should hold finite outputs, float32 of shape \(3,\)\); delete it"):
            read_fleet(tmp_path / "one")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="is a FIFO, not a file; delete it and run the fleet again"):
        read_fleet(tmp_path / "one")
    path.unlink()
    path.write_bytes(mine)
    read_fleet(tmp_path / "one")


def test_settings_that_are_no_numbers_of_json(tmp_path):
    settings = FLEET | {"hyperparameters": {"longest": float("inf"), "gap": float("nan"), "sizes": (1, 2)}}
    MemberStore(tmp_path, settings, MASKS)
    MemberStore(tmp_path, settings, MASKS)
    json.loads((tmp_path / "manifest.json").read_text(), parse_constant=pytest.fail)
