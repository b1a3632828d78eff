import io
import re
import sys
from base64 import b64decode

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_trak.reporting.explanations import Entry, Example, Explanation, explain
from lightning_trak.reporting.html import page
from lightning_trak.reporting.items import describe_item, find_image
from lightning_trak.reporting.plots import plot_explanations
from lightning_trak.reporting.scores import SavedScores
from lightning_trak.reporting.terminal import table
from lightning_trak.retraining.fleets.ground_truth import load_ground_truth
from lightning_trak.scoring import TopK


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ((torch.zeros(1, 8, 8), torch.tensor(3)), "label: 3"),
        ((torch.zeros(1, 8, 8), 3), "label: 3"),
        (
            {"text": "A fine\n  film.", "input_ids": torch.arange(9), "label": np.int64(1)},
            "text: A fine film., label: 1",
        ),
        ({"input_ids": torch.arange(9), "mask": [1, 1]}, "input_ids: int64 (9,), mask: list of 2"),
        (("a sentence", 0.5), "label: 0.5, a sentence"),
        ((torch.zeros(1, 8, 8), torch.tensor([1.0, 0.0, 1.0])), "labels: 0 2"),
        ({"image": torch.zeros(1, 8, 8), "labels": np.array([0, 1])}, "labels: 1"),
        (("a question", "an answer"), "a question, an answer"),
        (torch.zeros(2, 5), "float32 (2, 5)"),
        (np.zeros((3, 2)), "float64 (3, 2)"),
        (Image.new("RGB", (6, 4)), "image 6 x 4"),
        ((torch.zeros(4), torch.tensor([2.5])), "label: 2.5"),
        (object(), "object"),
    ],
)
def test_descriptions(item, expected):
    assert describe_item(item) == expected


def test_images_of_all_kinds():
    image = torch.rand(3, 6, 4, generator=torch.Generator().manual_seed(0))
    bytes_ = (image * 255).round().to(torch.uint8)
    rows = bytes_.permute(1, 2, 0).numpy()
    for item in (bytes_, (rows, 1), {"label": 1, "image": Image.fromarray(rows)}):
        torch.testing.assert_close(find_image(item), bytes_ / 255)
    torch.testing.assert_close(find_image(image), image)
    torch.testing.assert_close(find_image((image[:1], 5)), image[0])
    low, high = image.min(), image.max()
    torch.testing.assert_close(find_image(image * 4 - 2), (image - low) / (high - low))
    assert find_image(torch.zeros(4, 4) - 1).max() == 0
    for item in (torch.zeros(9), torch.arange(16).view(4, 4), "text", (torch.zeros(5, 6, 7), 1), torch.zeros(3, 1, 9)):
        assert find_image(item) is None


def test_an_image_without_a_label_has_no_words():
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    saved = SavedScores(torch.tensor([[1.5, -2.0]]), 2, "TRAK")
    captions = re.findall("<figcaption>(.*?)</figcaption>", page(explain(saved, [0], 1, images, images[:1]), "title"))
    assert captions == ["", "<b>+1.5</b> #0", "<b>-2</b> #1"]
    (explanation,) = explain(saved, [0], 1, torch.zeros(2, 9), torch.zeros(1, 9))
    assert explanation.target.text == "float32 (9,)"


def image_page(image):
    item = Example("an item", image)
    return page([Explanation(0, item, {"proponents": [Entry(0, 1.0, item)]})], "title")


@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7)])
def test_images_in_a_page(shape):
    image = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)) / 255
    sources = re.findall('src="data:image/png;base64,([^"]+)"', image_page(image))
    assert len(sources) == 2
    for source in sources:
        with Image.open(io.BytesIO(b64decode(source))) as file:
            assert file.format == "PNG"
            assert file.mode == ("L" if len(shape) == 2 else "RGB")
            read = torch.from_numpy(np.array(file))
        pixels = read if len(shape) == 2 else read.permute(2, 0, 1)
        assert torch.equal(pixels, (image * 255).round().to(torch.uint8))


def test_images_in_a_page_need_pillow(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "an item" in image_page(None)
    with pytest.raises(
        ModuleNotFoundError, match=r'^pages with images need Pillow: pip install "lightning-trak\[plots\]"$'
    ):
        image_page(torch.zeros(2, 2))


def test_scores_come_back_from_the_file(tmp_path):
    full = SavedScores(torch.randn(3, 9, generator=torch.Generator().manual_seed(0)), 9, "TRAK")
    full.save(tmp_path / "full")
    found = SavedScores.load(tmp_path / "full")
    assert torch.equal(found.scores, full.scores)
    assert found[1:] == (9, "TRAK", True, None, "", None)
    full._replace(data="0" * 64).save(tmp_path / "data")
    assert SavedScores.load(tmp_path / "data").data == "0" * 64
    best = found.best(1, 20)
    assert best["proponents"].indices.tolist() == full.scores[1].argsort(descending=True).tolist()
    assert best["opponents"].indices.tolist() == full.scores[1].argsort().tolist()
    used = torch.eye(9)[:2].bool()
    full._replace(used_masks=used).save(tmp_path / "used")
    assert torch.equal(SavedScores.load(tmp_path / "used").used_masks, used)
    with pytest.raises(ValueError, match=r"its used_masks are torch.bool of shape \(2, 8\), not bool of 9 examples"):
        full._replace(used_masks=used[:, 1:]).save(tmp_path / "used")
    lowest = TopK(*full.scores.topk(4, largest=False))
    SavedScores(lowest, 9, "TRAK", largest=False).save(tmp_path / "lowest")
    (kept,) = SavedScores.load(tmp_path / "lowest").best(1, 3).items()
    assert kept[0] == "opponents"
    assert torch.equal(kept[1].indices, lowest.indices[1, :3])


def test_files_of_another_kind(tmp_path):
    (tmp_path / "text").write_text("scores")
    with pytest.raises(ValueError, match=r'text" is truncated or not a safetensors file'):
        SavedScores.load(tmp_path / "text")
    SavedScores(torch.zeros(3, 9), 9, "TRAK").save(tmp_path / "scores")
    with pytest.raises(ValueError, match="lacks masks and outputs: expected a safetensors file"):
        load_ground_truth(tmp_path / "scores")


def test_texts_are_escaped_cut_and_described_by_the_user():
    train, targets = [f"<b>{'long ' * 50}</b>", "& so on"], ["a target"]
    saved = SavedScores(torch.tensor([[1.5, -2.0]]), 2, "TRAK")
    explanations = explain(saved, [0], 1, train, targets)
    assert explanations == [
        Explanation(
            0,
            Example("a target", None),
            {
                "proponents": [Entry(0, 1.5, Example(describe_item(train[0]), None))],
                "opponents": [Entry(1, -2.0, Example("& so on", None))],
            },
        )
    ]
    assert max(map(len, table(explanations, width=80).splitlines())) == 80
    text = page(explanations, "<title>")
    assert "&lt;b&gt;long long" in text
    assert "&amp; so on" in text
    assert "<h1>&lt;title&gt;</h1>" in text
    assert "<img" not in text
    with pytest.raises(ValueError, match=r"#0 a target holds no image, so there is no picture to draw"):
        plot_explanations(explanations)
    (mine,) = explain(saved, [0], 1, train, targets, describe=str.upper)
    assert mine.target.text == "A TARGET"
    with pytest.raises(ValueError, match="at least one target, got none"):
        explain(saved, [], 1, train, targets)
    with pytest.raises(ValueError, match="`k` to be a positive integer but got 0"):
        explain(saved, [0], 0, train, targets)


def test_what_scores_mean_is_said_as_it_is(tmp_path):
    meaning = "Scores are <minus> distances."
    SavedScores(torch.tensor([[-0.5, -2.0]]), 2, "Distance", meaning=meaning).save(tmp_path / "scores")
    saved = SavedScores.load(tmp_path / "scores")
    assert saved.meaning == meaning
    (explanation,) = explain(saved, [0], 1, ["one", "two"], ["a target"])
    text = page([explanation], "Distance", saved.meaning)
    assert "<p>Scores are &lt;minus&gt; distances. Proponents have the highest scores for a target" in text
    assert "raise" not in text
    assert "<h3>proponents (no score is positive)</h3>" in text
    assert "<h3>opponents</h3>" in text
    assert "  proponents (no score is positive)\n" in table([explanation])
