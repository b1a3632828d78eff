"""The files of a fleet: members in wrong places, torn notes, odd file systems."""

import json
import os
import pickle

import numpy as np
import pytest
import torch

from lightning_trak.retraining import RetrainingFleet, read_fleet
from lightning_trak.retraining.fleets.members import Member, MemberStore
from lightning_trak.storage.files import save_tensors
from tests.lit import LitNet, make_data, make_trainer
from tests.storage.test_mutations import FLEET, MASKS, contents, make_fleet


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
    with pytest.raises(RuntimeError, match=r"2 of 2 members failed.*failed, but the note"):
        store.require_trained([Member(1, 1), Member(0, 0)])
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


def test_members_can_be_pickled(tmp_path):
    """So that a fleet can be, and other processes train parts of it."""
    make_fleet(tmp_path)
    again = pickle.loads(pickle.dumps(MemberStore(tmp_path, FLEET, MASKS)))
    again.write(Member(0, 0), again.read(Member(0, 0))[0], {})


def test_a_fleet_that_failed_before_its_first_member_leaves_no_claim(tmp_path):
    failed = MemberStore(tmp_path, FLEET | {"seed": 1}, MASKS)
    failed.record_failure(Member(0, 0), RuntimeError("a mistake"))
    store = MemberStore(tmp_path, FLEET, ~MASKS)
    assert not store.failure(Member(0, 0))
    with pytest.raises(RuntimeError, match="another run has taken fleet"):
        failed.write(Member(0, 0), torch.ones(3), {})
    store.write(Member(0, 0), torch.ones(3), {})
    with pytest.raises(ValueError, match="made with seed 0, this one has seed 1"):
        MemberStore(tmp_path, FLEET | {"seed": 1}, MASKS)


def test_settings_that_are_no_numbers_of_json(tmp_path):
    settings = FLEET | {"hyperparameters": {"longest": float("inf"), "gap": float("nan"), "sizes": (1, 2)}}
    MemberStore(tmp_path, settings, MASKS)
    MemberStore(tmp_path, settings, MASKS)
    json.loads((tmp_path / "manifest.json").read_text(), parse_constant=pytest.fail)


def real_fleet(directory, seed=0):
    def trainer():
        return make_trainer(max_epochs=1)

    masks = torch.ones(1, 6, dtype=torch.bool)
    return RetrainingFleet(directory, LitNet, trainer, make_data(6), make_data(3, seed=1), masks, seed=seed)


def test_a_seed_of_numpy_is_a_seed(tmp_path):
    fleet = real_fleet(tmp_path, seed=np.int64(3))
    fleet.run(progress_bar=False)
    torch.testing.assert_close(real_fleet(tmp_path, seed=3).outputs, fleet.outputs)


def test_a_fleet_must_have_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    for read in (real_fleet, read_fleet):
        with pytest.raises(ValueError, match=r'a fleet must be on a disk, local or mounted, got "gs://b/fleet"; mount'):
            read("gs://b/fleet")
        with pytest.raises(NotADirectoryError, match='file" is a file, not a directory, so it cannot hold a fleet'):
            read(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_fleet_without_hard_links(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    fleet = real_fleet(tmp_path)
    fleet.run(progress_bar=False)
    assert torch.equal(read_fleet(tmp_path).outputs, fleet.outputs)
    with pytest.raises(ValueError, match="made with seed 0, this one has seed 1"):
        real_fleet(tmp_path, seed=1).run(progress_bar=False)
