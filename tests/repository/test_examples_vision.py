"""The examples at a tiny size: what they say, and that it means what they say it does."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_trak import TRAK
from lightning_trak.projections import SparseProjection

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from examples import clip, fact_tracing, imagenet
from examples.common import make_trainer
from examples.facts import make_data, make_facts
from examples.images import ImageFolder, write_crops
from examples.pairs import Pairs, make_scenes, read_pairs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("as_it_was")]


def _rows(text, pattern):
    """Names and numbers of the lines of a printed table."""
    found = re.findall(rf"^   ({pattern}) +((?:[-\d.]+ *)+)$", text, re.MULTILINE)
    return {name.strip(): [float(number) for number in numbers.split()] for name, numbers in found}


def test_blanks_and_the_sentences_that_state_a_fact():
    facts = [
        {"query": "Ada was born in [MASK] .", "object": "New York", "sents": [7, 3, 5]},
        {"query": "Bea died in [MASK] .", "object": "Rome", "sents": [5]},
    ]
    texts = {3: "Ada came from New York .", 5: "Ada left New York, Bea died in Rome.", 7: "Ada was a New Yorker ."}
    train, queries, relevant = make_data(facts, [{"id": number, "text": texts[number]} for number in texts], 10)
    shown = [train.show(i) for i in range(len(train))]
    assert "ada came from [new york] ." in shown
    assert len(train) == 2  # the third does not name the city
    asked = ["ada" in queries.show(row) for row in range(2)]
    for row, about_ada in enumerate(asked):
        assert relevant[row].tolist() == [about_ada or "rome" in text for text in shown]
    item = train[shown.index("ada came from [new york] .")]
    numbers = [train.vocabulary[word] for word in ("new", "york")]
    assert item["labels"][item["labels"] >= 0].tolist() == numbers
    assert item["input_ids"][4].item() == train.vocabulary["[MASK]"] or numbers[0] not in item["input_ids"][:5]


def test_made_facts_are_stated_by_their_sentences_alone():
    facts, sentences = make_facts(5)
    train, queries, relevant = make_data(facts, sentences, len(facts))
    assert len(train) == len(sentences) == int(relevant.sum())
    for row in range(len(queries)):
        (answer,) = queries.texts[row][1]
        person = re.search(r"\w+ (berg|lind|holm|dahl|falk)", queries.show(row)).group()
        for index in relevant[row].nonzero().flatten().tolist():
            assert train.texts[index][1] == [answer]
            assert person in train.show(index)


def test_fact_tracing(tmp_path, capsys):
    sizes = ["--facts", "8", "--queries", "2", "--models", "1", "--seeds", "1", "--epochs", "40"]
    fact_tracing.main(["--out", str(tmp_path), *sizes])
    text = capsys.readouterr().out
    found = re.findall(r"(\w+) +MRR ([\d.]+) +recall@10 ([\d.]+)", text)
    assert [name for name, *_ in found] == ["TRAK", "BM25", "random"]
    assert all(0 <= float(number) <= 1 for _, *numbers in found for number in numbers)
    removed = _rows(text, r"nothing|\w+ x \d|annotated")
    assert len(removed) == 8
    number, answered, log_odds, others = zip(*removed.values(), strict=True)
    assert number[0] == 0
    assert number[1] > 0
    assert number[2::2] == (number[1],) * 3
    assert number[3::2] == (2 * number[1],) * 3
    assert all(0 <= share <= 1 for share in answered + others)
    assert log_odds[1] < log_odds[0]  # what no sentence states cannot be known
    assert len(list(tmp_path.rglob("removed.png"))) == 1


def test_scenes_are_as_their_captions_say():
    scenes = make_scenes(30)
    assert make_scenes(30)[7][1] == scenes[7][1]
    image, _ = next(scene for scene in scenes if re.fullmatch(r"a red \w+ left of a \w+ \w+", scene[1]))
    pixels = np.asarray(image).astype(int)
    red = (abs(pixels - (220, 40, 40)).sum(2) < 30).nonzero()[1]
    assert len(red) > 10
    assert red.min() < 32
    wrong = sum(one[1] != other[1] for one, other in zip(make_scenes(200, wrong=1.0), make_scenes(200), strict=True))
    assert wrong > 150


def test_pairs_from_files_and_from_bytes(tmp_path):
    rows, contents = [], []
    for number, (image, caption) in enumerate(make_scenes(3)):
        image.save(tmp_path / f"{number}.jpg")
        contents.append(np.frombuffer((tmp_path / f"{number}.jpg").read_bytes(), np.uint8))
        rows.append({"image": f"{number}.jpg", "captions": [caption, f"scene {number}"][: 2 - (number == 2)]})
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train, targets = read_pairs(tmp_path)
    assert [caption for _, caption in targets] == ["scene 0", "scene 1"]
    offsets = np.cumsum([0, *map(len, contents)])
    np.savez(tmp_path / "images.npz", jpeg=np.concatenate(contents), off=offsets)
    packed, _ = read_pairs(tmp_path)
    assert Pairs(packed, 16).captions == Pairs(train, 16).captions == [row["captions"][0] for row in rows]
    assert torch.equal(Pairs(packed, 16).images, Pairs(train, 16).images)
    known = Pairs([(train[0][0], "red unheard square")], 16, {"red": 1, "square": 2})
    assert known.words[0, :3].tolist() == [1, 2, 0]


def test_clip(tmp_path, capsys):
    sizes = ["--scenes", "64", "--size", "16", "--targets", "1", "--models", "1", "--seeds", "1", "--ks", "1", "4"]
    clip.main(["--out", str(tmp_path), *sizes])
    text = capsys.readouterr().out
    rows = re.findall(r"^\| ([\w ]+) \| (\d+) \| (\S+) ", text, re.MULTILINE)
    methods = ("TRAK", "nearest neighbours", "random")
    assert [row[:2] for row in rows if row[0] in methods] == [(method, k) for method in methods for k in "14"]
    assert all(-2 <= float(fall) <= 2 for *_, fall in rows)  # between two cosines
    assert -1 <= float(re.search(r"nothing removed: (\S+)", text)[1]) <= 1
    assert len(list(tmp_path.rglob("*.png"))) == 2


def test_pairs_that_align_an_image_with_its_caption_show_the_same_things(tmp_path):
    torch.manual_seed(0)
    train, targets = Pairs(make_scenes(150), 16), make_scenes(20, seed=1)
    targets = Pairs(targets, 16, train.vocabulary)
    model = clip.LitCLIP(len(train.vocabulary) + 1)
    make_trainer(12).fit(model, DataLoader(train, batch_size=32, shuffle=True))
    trak = TRAK(model, [model.state_dict()], tmp_path, projection=SparseProjection(256))
    scores = trak.attribute(make_trainer(1), DataLoader(train, batch_size=50), targets)

    things = [[set(caption.split()) - {"a", "of"} for caption in pairs.captions] for pairs in (targets, train)]
    shared = torch.tensor([[len(one & other) for other in things[1]] for one in things[0]], dtype=torch.float32)
    first, last = (shared.gather(1, scores.topk(5, largest=largest).indices).mean() for largest in (True, False))
    assert first > shared.mean() + 0.5
    assert first > last + 0.5


def test_nearest_neighbours_of_a_training_pair_begin_with_itself():
    torch.manual_seed(0)
    train = Pairs(make_scenes(20), 16)
    model = clip.LitCLIP(len(train.vocabulary) + 1)
    similar = clip.neighbours(model, train, train)
    torch.testing.assert_close(similar.diagonal(), torch.ones(20))
    assert bool((similar <= similar.diagonal()[:, None] + 1e-5).all())


def test_imagenet(tmp_path, capsys):
    pytest.importorskip("sklearn")
    sizes = ["--size", "32", "--crops", "8", "--targets", "2", "--top", "2", "--k", "64", "--accelerator", "cpu"]
    sizes += ["--widths", "8", "16", "32", "64"]
    imagenet.main(["--out", str(tmp_path / "one"), *sizes, "--batch-size", "4", "--epochs", "2"])
    printed = capsys.readouterr().out
    again = ["--data", str(tmp_path / "one/crops-8"), "--snapshots", str(tmp_path / "one/snapshots")]
    imagenet.main(["--out", str(tmp_path / "two"), *sizes, *again, "--batch-size", "3"])
    first, second = (list(csv.DictReader((tmp_path / name / "top.csv").open())) for name in ("one", "two"))
    assert len(first) == 2 * 2 * 2
    for highest, next_one, lowest in zip(first[::4], first[1::4], first[2::4], strict=True):
        assert float(highest["score"]) >= float(next_one["score"]) >= float(lowest["score"])
    # The same snapshots and data are attributed, so that they have the same scores.
    assert [row["train"].split("crops-8")[1] for row in first] == [row["train"].split("crops-8")[1] for row in second]
    for one, other in zip(first, second, strict=True):
        assert float(other["score"]) == pytest.approx(float(one["score"]), rel=1e-2)
    proponents = [row for start in range(0, 8, 4) for row in first[start : start + 2]]
    same = sum(Path(row["train"]).parent.name == Path(row["target"]).parent.name for row in proponents)
    assert f"{same / 4:.0%} of the proponents are of the target's class" in printed
    assert (tmp_path / "two/top.png").exists()
    assert not (tmp_path / "two/snapshots").exists()


def test_a_folder_of_images(tmp_path):
    pytest.importorskip("sklearn")
    write_crops(tmp_path, 4, size=64)
    (tmp_path / "train/china/notes.txt").write_text("no image")
    folder = ImageFolder(tmp_path / "train", 16)
    assert folder.classes == ["china", "flower"]
    assert folder.labels.tolist() == [0, 0, 1, 1]
    item, label = folder[3]
    assert label == 1
    assert item.shape == (3, 16, 16)
    (tmp_path / "empty/class").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="has no images"):
        ImageFolder(tmp_path / "empty", 16)
