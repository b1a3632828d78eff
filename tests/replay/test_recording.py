"""The files of a recording: whole, checked, and of one run."""

import json
import os
import threading
from pathlib import Path

import pytest
import torch

from lightning_trak.replay import Recording
from lightning_trak.replay.recording import writing
from lightning_trak.replay.recording.records import (
    MicroBatch,
    Settings,
    StepRecord,
    Structure,
    pack_steps,
    unpack_steps,
)
from lightning_trak.replay.recording.states import TrainingState, difference
from lightning_trak.replay.recording.writing import RecordingWriter
from lightning_trak.storage.files import load_tensors, save_tensors

RUN = {"optimizer": "torch.optim.sgd.SGD", "precision": "64-true", "num_train": 9, "data": "x", "parameters": []}
STRUCTURE = Structure((("a", "b"), ("c",)), ("d",), ("norm",))


def settings(lr):
    return Settings(({"lr": lr, "betas": (0.9, 0.99), "foreach": None}, {"lr": 1.0}), 2, 0.5, "norm")


def step(number, lr=0.1):
    states = {"torch": torch.arange(4, dtype=torch.uint8)} if number % 2 else {}
    return StepRecord(
        number, number // 3, STRUCTURE, settings(lr), (MicroBatch([number, 3], 0, states), MicroBatch([1], 1))
    )


def state(seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(3, generator=generator) for _ in range(4)]
    moments = {"a": {"exp_avg": tensors[2], "step": torch.tensor(float(seed))}}
    return TrainingState({"a": tensors[0], "a/b": tensors[3]}, {"count": torch.tensor(seed)}, moments)


def write(path, steps=4):
    writer = RecordingWriter(path, "sqrt")
    identifier = writer.begin(RUN, {})
    writer.add_state(state(0))
    for number in range(steps):
        writer.add_step(step(number))
        if number == 1:
            writer.flush()
    writer.add_state(state(steps))
    writer.flush(finished=True)
    writer.close()
    return identifier


def same_steps(found, expected):
    assert [one[:-1] for one in found] == [one[:-1] for one in expected]
    for one, other in zip(found, expected, strict=True):
        for mine, theirs in zip(one.micro_batches, other.micro_batches, strict=True):
            assert (mine.positions, mine.batch_idx) == (theirs.positions, theirs.batch_idx)
            assert mine.random_states.keys() == theirs.random_states.keys()
            assert all(torch.equal(mine.random_states[key], theirs.random_states[key]) for key in mine.random_states)


def test_steps_come_back_as_they_were():
    steps = [step(5), step(6), step(7, 0.1 + 1e-17), step(8, 1 / 3)]  # the third is the next float after 0.1
    tensors, tables = pack_steps(steps)
    assert len(tables["settings"]) == 3
    assert len(tables["structures"]) == 1
    same_steps(unpack_steps(5, tensors, json.loads(json.dumps(tables))), steps)


def test_a_recording_comes_back(tmp_path):
    write(tmp_path)
    recording = Recording(tmp_path)
    recording.require_finished()
    assert recording.num_steps == 4
    assert recording.state_steps == [0, 4]
    same_steps([recording.record(number) for number in range(4)], [step(number) for number in range(4)])
    for number in (0, 4):
        assert difference(recording.state(number), state(number)).identical
    with pytest.raises(ValueError, match="lacks step 4"):
        recording.record(4)


def test_another_run_is_refused(tmp_path):
    write(tmp_path)
    before = (tmp_path / "manifest.json").read_bytes()
    writer = RecordingWriter(tmp_path, "sqrt")
    with pytest.raises(ValueError, match="holds the recording of another run, of 4 steps"):
        writer.begin(RUN, {})
    with pytest.raises(ValueError, match="holds the recording of another run"):
        writer.resume(["0" * 32], 2, RUN, {})
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_two_runs_at_once(tmp_path):
    first, second = RecordingWriter(tmp_path, 1), RecordingWriter(tmp_path, 1)
    first.begin(RUN, {})
    with pytest.raises(ValueError, match="another run is writing"):
        second.begin(RUN, {})


def test_a_run_whose_directory_was_taken_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "hold", lambda *args: None)  # a file system without locks
    first, second = RecordingWriter(tmp_path, 1), RecordingWriter(tmp_path, 1)
    first.begin(RUN, {})
    second.begin(RUN, {})
    first.add_step(step(0))
    with pytest.raises(ValueError, match="another run took"):
        first.flush()
    assert Recording(tmp_path).num_steps == 0


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_resumed_run_replaces_later_steps(at, tmp_path):
    identifier = write(tmp_path)
    writer = RecordingWriter(tmp_path, "sqrt")
    assert writer.resume(["1" * 32, identifier], at, RUN, {}) == identifier
    with pytest.raises(ValueError, match="has not ended"):
        Recording(tmp_path).require_finished()
    later = [step(number, lr=7.0) for number in range(at, 5)]
    writer.add_state(state(at))
    for one in later:
        writer.add_step(one)
    writer.flush(finished=True)
    recording = Recording(tmp_path)
    assert recording.state_steps == [0, at]
    same_steps([recording.record(number) for number in range(5)], [*map(step, range(at)), *later])


def test_what_cannot_be_resumed(tmp_path):
    writer = RecordingWriter(tmp_path / "none", "sqrt")
    with pytest.raises(ValueError, match="holds no recording of the steps before it"):
        writer.resume(["1" * 32], 3, RUN, {})
    identifier = write(tmp_path)
    writer = RecordingWriter(tmp_path, "sqrt")
    with pytest.raises(ValueError, match="has only 4 steps"):
        writer.resume([identifier], 5, RUN, {})
    with pytest.raises(ValueError, match=r"another num_train than this run has.*recorded: 9; now: 8"):
        writer.resume([identifier], 4, RUN | {"num_train": 8}, {})


@pytest.mark.parametrize("name", ["manifest.json", "part-00000000-00000002.safetensors"])
@pytest.mark.parametrize("how", ["truncated", "altered", "missing"])
def test_damage_is_noticed(name, how, tmp_path):
    write(tmp_path)
    path = tmp_path / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(content if how == "altered" else content[: len(content) // 2])
    with pytest.raises((ValueError, FileNotFoundError), match=rf"{name}.*; (restore it from a copy|check the path)"):
        Recording(tmp_path).record(0)


def test_a_replaced_file_is_noticed(tmp_path):
    write(tmp_path)
    path = tmp_path / "part-00000000-00000002.safetensors"
    tensors, metadata = load_tensors(path)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    tensors["positions"] += 1
    own = {key: value for key, value in metadata.items() if key not in ("sha256", "checksum")}
    save_tensors(path, tensors, **own)
    with pytest.raises(ValueError, match="was replaced"):
        Recording(tmp_path).record(0)


@pytest.mark.parametrize("name", ["manifest.json", "part-00000001-00000002.safetensors"])
def test_a_full_disk_loses_nothing(name, tmp_path, monkeypatch):
    writer = RecordingWriter(tmp_path, 1)
    writer.begin(RUN, {})
    writer.add_step(step(0))
    writer.flush()
    writer.add_step(step(1))
    replace = os.replace

    def full(source, target):
        if Path(target).name == name:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=rf"was not written.*{name}.*free some space"):
        writer.flush()
    monkeypatch.undo()
    assert Recording(tmp_path).num_steps == 1
    writer.flush()
    assert Recording(tmp_path).num_steps == 2


def test_files_are_written_while_training_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "BUFFER_BYTES", 100)
    writer = RecordingWriter(tmp_path, 1)
    writer.begin(RUN, {})
    for number in range(9):
        writer.add_state(state(number))
        assert writer.has_state(number)
        writer.add_step(step(number))
        assert writer.num_steps == number + 1
    writer.flush(finished=True)
    recording = Recording(tmp_path)
    assert len(recording.manifest["parts"]) > 2
    assert recording.state_steps == list(range(9))
    same_steps([*map(recording.record, range(9))], [step(number) for number in range(9)])
    assert all(difference(recording.state(number), state(number)).identical for number in range(9))


def test_an_error_of_the_writing_thread_is_raised_and_loses_nothing(tmp_path, monkeypatch):
    writer = RecordingWriter(tmp_path, 1)
    writer.begin(RUN, {})
    replace, asked = os.replace, threading.Event()

    def full(source, target):
        assert asked.wait(10)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "BUFFER_BYTES", 1)
    monkeypatch.setattr(os, "replace", full)
    writer.add_step(step(0))
    monkeypatch.setattr(writing, "BUFFER_BYTES", 1 << 20)
    writer.add_step(step(1))
    asked.set()
    with pytest.raises(OSError, match=r"was not written.*free some space"):
        writer.flush()
    assert Recording(tmp_path).num_steps == 0
    monkeypatch.setattr(os, "replace", replace)
    writer.flush(finished=True)
    same_steps([*map(Recording(tmp_path).record, range(2))], [step(0), step(1)])


def test_the_directory_is_held_until_all_is_written(tmp_path, monkeypatch):
    writer, other = RecordingWriter(tmp_path, 1), RecordingWriter(tmp_path, 1)
    writer.begin(RUN, {})
    monkeypatch.setattr(writing, "BUFFER_BYTES", 1)
    writer.add_step(step(0))
    writer.close()
    with pytest.raises(ValueError, match="holds the recording of another run, of 1 steps"):
        other.begin(RUN, {})


def test_no_recording(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a directory that TrainingRecorder has written"):
        Recording(tmp_path)
