"""Files of scores and of ground truth: right, or refused by name."""

import os

import pytest
import torch
from safetensors.torch import save_file

from lightning_trak.reporting.scores import SavedScores
from lightning_trak.retraining.fleets.ground_truth import load_ground_truth
from lightning_trak.scoring.topk import BothEnds, TopK
from lightning_trak.storage.files import save_tensors

SCORES = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
TOP = TopK(*SCORES.topk(4))
ABOUT = {"num_train": 9, "method": "TRAK", "largest": True}


@pytest.mark.parametrize("scores", [SCORES, SCORES.double(), TOP, TopK(*SCORES.topk(4, largest=False)), SCORES[:0]])
def test_what_is_saved_is_loaded(tmp_path, scores):
    largest = not isinstance(scores, TopK) or bool(scores.values[0, 0] > 0)
    SavedScores(scores, 9, "TRAK", largest).save(tmp_path / "a" / "scores")
    found = SavedScores.load(tmp_path / "a" / "scores")
    assert found[1:] == (9, "TRAK", largest, None, "", None)
    assert all(map(torch.equal, *((item,) if torch.is_tensor(item) else item for item in (found.scores, scores))))


@pytest.mark.parametrize("scores", [SCORES, TOP])
def test_any_flipped_bit_is_found(tmp_path, scores):
    path = tmp_path / "scores"
    SavedScores(scores, 9, "TRAK").save(path)
    whole = path.read_bytes()
    for position in range(0, len(whole), 5):
        content = bytearray(whole)
        content[position] ^= 1 << position % 8
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r'scores" is'):
            SavedScores.load(path)


def with_value(tensor, value):
    tensor = tensor.clone()
    tensor[1, 2] = value
    return tensor


WRONG = [
    ({"scores": with_value(SCORES, torch.nan)}, "scores of target 1 are NaN or infinite"),
    ({"scores": with_value(SCORES, -torch.inf)}, "scores of target 1 are NaN or infinite"),
    ({"scores": SCORES[:, :8]}, "the scores are of 8 training examples, not 9"),
    ({"scores": torch.zeros(3, 10)}, "the scores are of 10 training examples, not 9"),
    ({"scores": torch.zeros(9)}, r"the scores are torch.float32 of shape \(9,\)"),
    ({"scores": torch.zeros(3, 9, dtype=torch.int64)}, "the scores are torch.int64 of shape"),
    (TOP._replace(values=with_value(TOP.values, torch.nan)), "scores of target 1 are NaN"),
    (TOP._replace(indices=with_value(TOP.indices, 9)), r"indices from \d to 9, of 9 training examples"),
    (TOP._replace(indices=with_value(TOP.indices, -1)), r"indices from -1 to \d, of 9 training examples"),
    (TOP._replace(indices=TOP.indices.int()), "its indices are torch.int32"),
    (TOP._replace(indices=TOP.indices[:, :3]), r"its indices are torch.int64 of shape \(3, 3\), not int64 \(3, 4\)"),
    (TOP._replace(indices=TOP.indices[0]), r"of shape \(4,\), not int64 \(3, 4\)"),
    (TOP._replace(indices=with_value(TOP.indices, TOP.indices[1, 0])), "names a training example twice"),
    (TopK(*(part.flip(1) for part in TOP)), "its scores do not have the highest first"),
]


@pytest.mark.parametrize(("tensors", "said"), WRONG)
def test_scores_that_cannot_be_are_refused(tmp_path, tensors, said):
    path = tmp_path / "scores"
    tensors = tensors._asdict() if isinstance(tensors, TopK) else tensors
    save_tensors(path, tensors, **ABOUT)
    with pytest.raises(ValueError, match=rf'scores" is wrong: .*{said}.*; score again'):
        SavedScores.load(path)
    path.write_bytes(b"kept")
    with pytest.raises(ValueError, match=rf'cannot write ".*scores": .*{said}.*; score again'):
        SavedScores(tensors["scores"] if "scores" in tensors else TopK(**tensors), 9, "TRAK").save(path)
    assert path.read_bytes() == b"kept"


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"num_train": "9"}, "its header.num_train must be a whole number from 1 to .*, got '9'"),
        ({"num_train": -9}, "num_train must be a whole number"),
        ({"largest": "True"}, "largest must be true or false, got 'True'"),
        ({"method": None}, "method must be a text, got None"),
        ({"more": 1}, "has the unknown field 'more'"),
    ],
)
def test_a_wrong_header_is_refused(tmp_path, about, said):
    save_tensors(tmp_path / "scores", {"scores": SCORES}, **(ABOUT | about))
    with pytest.raises(ValueError, match=rf'scores" is not a file of `lightning-trak score`: .*{said}'):
        SavedScores.load(tmp_path / "scores")
    save_tensors(tmp_path / "scores", {"scores": SCORES}, num_train=9)
    with pytest.raises(ValueError, match="its header lacks the field 'method'"):
        SavedScores.load(tmp_path / "scores")
    save_tensors(tmp_path / "scores", {"values": TOP.values}, **ABOUT)
    with pytest.raises(ValueError, match="is not a file of `lightning-trak score`: 'indices'"):
        SavedScores.load(tmp_path / "scores")


def test_what_is_no_file_of_scores(tmp_path):
    save_file({"scores": SCORES}, tmp_path / "plain")
    with pytest.raises(
        ValueError,
        match=r'plain" is truncated or altered \(its header lacks the checksum\); give a file of .*, or score again',
    ):
        SavedScores.load(tmp_path / "plain")
    os.mkfifo(tmp_path / "fifo")
    for load in (SavedScores.load, load_ground_truth):
        with pytest.raises(ValueError, match='fifo" is a FIFO, not a file'):
            load(tmp_path / "fifo")
        with pytest.raises(FileNotFoundError, match=r'there is no file ".*none"; (run|it should)'):
            load(tmp_path / "none")
        with pytest.raises(ValueError, match="must be on a disk"):
            load("s3://bucket/scores")
    with pytest.raises(ValueError, match='" is a directory, not a file'):
        SavedScores.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"masks": torch.ones(4, 9)}, r"holds masks, torch.float32 \(4, 9\)"),
        ({"masks": torch.ones(9, dtype=torch.bool)}, r"holds masks, torch.bool \(9,\)"),
        ({"outputs": torch.zeros(3, 5)}, r"outputs, torch.float32 \(3, 5\): expected"),
        ({"outputs": torch.zeros(12)}, r"outputs, torch.float32 \(12,\): expected"),
        ({"outputs": torch.zeros(3, 4, dtype=torch.int64)}, "outputs, torch.int64"),
        ({"outputs": torch.full((3, 4), torch.nan)}, "holds outputs that are NaN or infinite"),
    ],
)
def test_ground_truth_that_does_not_fit_is_refused(tmp_path, change, said):
    good = {"masks": torch.ones(4, 9, dtype=torch.bool), "outputs": torch.zeros(3, 4, 2)}
    save_file(good, tmp_path / "truth")
    assert load_ground_truth(tmp_path / "truth").outputs.shape == (3, 4, 2)
    save_file(good | change, tmp_path / "truth")
    with pytest.raises(ValueError, match=rf'truth" {said}|truth" .*{said}'):
        load_ground_truth(tmp_path / "truth")


ENDS = BothEnds(TOP, TopK(*SCORES.topk(2, largest=False)))


def test_both_ends_are_kept(tmp_path):
    SavedScores(ENDS, 9, "TRAK").save(tmp_path / "ends")
    saved = SavedScores.load(tmp_path / "ends")
    assert all(map(torch.equal, (*saved.scores[0], *saved.scores[1]), (*ENDS[0], *ENDS[1])))
    best = saved.best(1, 2)
    assert best["proponents"].indices.tolist() == TOP.indices[1, :2].tolist()
    assert best["opponents"].values.tolist() == ENDS.opponents.values[1].tolist()


@pytest.mark.parametrize(
    ("ends", "error"),
    [
        (ENDS._replace(opponents=TOP), "its scores do not have the lowest first"),
        (ENDS._replace(opponents=TopK(*(part[1:] for part in ENDS.opponents))), "other numbers of targets"),
    ],
)
def test_ends_that_do_not_fit_are_refused(tmp_path, ends, error):
    with pytest.raises(ValueError, match=error):
        SavedScores(ends, 9, "TRAK").save(tmp_path / "ends")
