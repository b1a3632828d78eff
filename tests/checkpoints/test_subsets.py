"""Which training examples a model has seen: in the header of its weights, and refused where it does not fit."""

import json

import pytest
import torch

from lightning_trak.checkpoints import resolve_checkpoints
from lightning_trak.checkpoints.reading import masks_of
from lightning_trak.checkpoints.subsets import TrainingSubset, require_same_data
from lightning_trak.checkpoints.weights import read_about, write_safetensors

STATE = {"weight": torch.arange(6.0).reshape(2, 3), "tied": None}
STATE["tied"] = STATE["weight"]
MASK = torch.rand(13, generator=torch.Generator().manual_seed(0)) < 0.5


def edited(path, change):
    """The file with another header; the tensors stay where they are."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    own = json.loads(header["__metadata__"]["lightning_trak"])
    change(own)
    header["__metadata__"]["lightning_trak"] = json.dumps(own)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


@pytest.mark.parametrize("size", [1, 8, 13])
def test_a_file_says_what_its_model_has_seen(tmp_path, size):
    mask = MASK[:size] | (torch.arange(size) == 0)
    digest = write_safetensors(tmp_path / "half.safetensors", STATE, TrainingSubset(mask, "d" * 64))
    (checkpoint,) = resolve_checkpoints(tmp_path / "half.safetensors")
    assert torch.equal(checkpoint.subset.mask, mask)
    assert checkpoint.subset.data == "d" * 64
    assert read_about(str(tmp_path / "half.safetensors"))[0] == digest == checkpoint.fingerprint()
    loaded = checkpoint.load()
    assert loaded.keys() == STATE.keys()
    assert torch.equal(loaded["tied"], STATE["weight"])
    assert torch.equal(masks_of([checkpoint, checkpoint]), torch.stack([mask, mask]))


def test_other_files_say_nothing(tmp_path):
    write_safetensors(tmp_path / "whole.safetensors", STATE)
    torch.save({"weight": STATE["weight"]}, tmp_path / "whole.pt")
    checkpoints = resolve_checkpoints([tmp_path / "whole.safetensors", tmp_path / "whole.pt", {"a": torch.ones(1)}])
    assert [checkpoint.subset for checkpoint in checkpoints] == [None] * 3
    assert masks_of(checkpoints) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: own["subset"].update(bits="A" + own["subset"]["bits"][1:]), "does not match its checksum"),
        (lambda own: own["subset"].update(bits="////" * 3), "has 9 bytes, not"),
        (lambda own: own["subset"].update(bits="?"), "is not base64"),
        (lambda own: own["subset"].update(num_train=14), "does not match its checksum"),
        (lambda own: own["subset"].update(num_train=0), "must be a whole number from 1"),
        (lambda own: own["subset"].pop("sha256"), "lacks the field 'sha256'"),
        (lambda own: own.update(subset=[]), "must be an object"),
    ],
)
def test_an_altered_subset_is_refused(tmp_path, change, message):
    path = tmp_path / "half.safetensors"
    write_safetensors(path, STATE, TrainingSubset(MASK))
    edited(path, change)
    with pytest.raises(ValueError, match=rf'the header of ".*half.safetensors" was altered: .*{message}'):
        resolve_checkpoints(path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02" + bytes(7) + b"[]", b"\x09" + bytes(7) + b"{}"])
def test_what_is_no_safetensors_file_is_refused(tmp_path, content):
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r'file.safetensors" is (truncated|empty)'):
        resolve_checkpoints(path)[0].load()


def test_another_training_set_is_refused():
    subset = TrainingSubset(MASK, "a")
    require_same_data(subset, 13, "a", "x")
    require_same_data(subset, 13, None, "x")
    require_same_data(TrainingSubset(MASK), 13, "b", "x")
    with pytest.raises(ValueError, match="x was trained on a subset of 13 examples, but the training set has 12"):
        require_same_data(subset, 12, "a", "x")
    with pytest.raises(ValueError, match="x was trained on a subset of other data of this size"):
        require_same_data(subset, 13, "b", "x")
