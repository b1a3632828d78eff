"""Rankings: their slices, columns, files and curves, whatever the data hold."""

import csv
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from lightning_trak.cleaning import Ranking
from lightning_trak.cleaning.inspected import read_positions
from lightning_trak.metrics.functional import mislabel_detection_curve
from lightning_trak.reporting.items import item_label, item_text

HOSTILE = [
    '=HYPERLINK("http://evil","click")',
    "+1+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(A1)",
    "\t=1+1",
    "  =1+1",
    "\uff1d1+1",
    'a "quoted", text;\nof two lines',
    "\x1b[31mred\x1b[0m \u202egnp.exe",
    "\ud800",
    "",
    "naïve 漢字",
]


def ranking(scores, dataset=None, order=None, groups=None):
    scores = torch.tensor(scores, dtype=torch.float64)
    positions = torch.tensor(order if order is not None else range(len(scores)))
    dataset = list(range(len(scores))) if dataset is None else dataset
    return Ranking("wrong labels", "suspicion", positions.long(), scores, dataset, groups)


def read(text):
    return list(csv.reader(io.StringIO(text)))


def test_slices_are_rankings():
    whole = ranking([3.0, 2.0, 1.0], order=[2, 0, 1], groups=("a", "b", "a"))
    part = whole[:2]
    assert (len(whole), len(part)) == (3, 2)
    assert part.positions.tolist() == [2, 0]
    assert part.scores.tolist() == [3.0, 2.0]
    assert part.groups == ("a", "b")
    assert whole[1:].groups == ("b", "a")
    assert repr(part) == "Ranking(2 training examples of 3: wrong labels, by suspicion)"
    with pytest.raises(TypeError, match=r"takes slices, such as ranking\[:100\], got 3"):
        whole[3]


def test_columns_that_hold_nothing_are_left_out(tmp_path):
    images = [torch.zeros(1, 4, 4) for _ in range(3)]
    assert ranking([3.0, 2.0, 1.0], images).table().columns == ("position", "score")
    labelled = [(image, torch.tensor(label)) for image, label in zip(images, (7, 8, 9), strict=True)]
    table = ranking([3.0, 2.0, 1.0], labelled, order=[2, 0, 1]).table()
    assert table.columns == ("position", "score", "label")
    assert table.rows == [(2, 3.0, 9), (0, 2.0, 7), (1, 1.0, 8)]
    texts = [{"text": "a film", "label": "good"}, {"text": "another", "label": None}]
    table = ranking([2.0, 1.0], texts, groups=(1, 2)).table()
    assert table.columns == ("position", "score", "group", "label", "text")
    assert table.rows == [
        (0, 2.0, 1, "good", "text: a film, label: good"),
        (1, 1.0, 2, "", "text: another"),
    ]
    ranking([2.0, 1.0], texts).to_csv(tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_bytes().count(b"\r") == 0
    described = ranking([2.0, 1.0], labelled[:2]).table(lambda item: f"a {int(item[1])}")
    assert [row[-1] for row in described.rows] == ["a 7", "a 8"]
    with pytest.raises(TypeError, match="describe must return a str, got a int"):
        ranking([2.0], labelled[:1]).table(lambda item: 3)


@pytest.mark.parametrize(
    ("item", "label", "text"),
    [
        ((torch.zeros(3, 3), 4), 4, None),
        ((torch.zeros(3, 3), np.int64(4)), 4, None),
        ([torch.zeros(3), torch.tensor([0.5])], 0.5, None),
        (("a text", torch.tensor(1)), 1, "label: 1, a text"),
        (("question", "answer"), None, "question, answer"),
        ({"labels": 2, "ids": torch.zeros(5)}, 2, None),
        ({"label": torch.rand(5)}, None, None),
        ({"label": torch.zeros(5)}, "none", None),
        ((torch.zeros(3, 3), torch.tensor([1.0, 0.0, 0.0, 1.0])), "0 3", None),
        ((torch.zeros(3, 3), torch.tensor([1, 0, -100])), None, None),
        ((torch.zeros(3, 3), torch.zeros(101)), None, None),
        (torch.zeros(3), None, None),
        ((3,), None, None),
        ("only a text", None, "only a text"),
    ],
)
def test_labels_and_texts_of_items(item, label, text):
    found = item_label(item)
    assert found == label
    assert not isinstance(found, (torch.Tensor, np.generic))
    assert item_text(item) == text


def test_hostile_texts_are_harmless_in_a_spreadsheet(tmp_path):
    data = [(text, torch.tensor(0)) for text in HOSTILE]
    scores = [float(len(data) - i) for i in range(len(data))]
    hostile = ranking(scores, data, groups=tuple(text or "none" for text in HOSTILE))
    hostile.to_csv(tmp_path / "out.csv", describe=lambda item: item[0])
    text = (tmp_path / "out.csv").read_bytes().decode("utf-8")
    head, *rows = read(text)
    assert head == ["position", "score", "group", "label", "text"]
    assert [int(row[0]) for row in rows] == list(range(len(HOSTILE)))
    assert text.count("\n") == len(HOSTILE) + 1
    assert not set(text) & {"\x1b", "\t", "\r", "\x07", "\u202e"}
    for row, given in zip(rows, HOSTILE, strict=True):
        for cell in (row[2], row[4]):
            assert not cell.startswith(("=", "+", "-", "@", "\uff1d"))
        if given.strip().startswith(("=", "+", "-", "@", "\uff1d")):
            assert row[4] == "'" + " ".join(given.split())
    assert rows[-1][4] == "naïve 漢字"


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "deep" / "out.csv"
    ranking([2.0, 1.0]).to_csv(path)
    before = path.read_text()

    def broken(item):
        raise RuntimeError("a bug of the user")

    with pytest.raises(RuntimeError, match="a bug"):
        ranking([2.0, 1.0]).to_csv(path, describe=broken)
    assert path.read_text() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["out.csv"]
    with pytest.raises(ValueError, match=r'must be on a disk, local or mounted, got "s3://bucket/out.csv"'):
        ranking([1.0]).to_csv("s3://bucket/out.csv")


def test_parquet_keeps_texts_as_they_are(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra parquet")
    data = [{"text": text, "label": None if i == 3 else i} for i, text in enumerate(HOSTILE)]
    scores = [float(len(data) - i) for i in range(len(data))]
    ranking(scores, data, groups=("web", *range(1, len(data)))).to_parquet(
        tmp_path / "out.parquet", describe=lambda item: item["text"]
    )
    found = parquet.read_table(tmp_path / "out.parquet").to_pydict()
    assert found["position"] == list(range(len(data)))
    assert found["score"] == scores
    assert found["group"] == ["web", *map(str, range(1, len(data)))]
    assert found["label"] == [None if i == 3 else i for i in range(len(data))]
    assert found["text"] == ["\\ud800" if text == "\ud800" else text for text in HOSTILE]


def test_an_empty_ranking_is_a_file_with_a_header(tmp_path):
    empty = ranking([3.0, 2.0])[:0]
    assert (len(empty), repr(empty)) == (0, "Ranking(0 training examples of 2: wrong labels, by suspicion)")
    empty.to_csv(tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == '"position","score"\n'
    assert empty.table().markdown() == "| position | score |\n| --- | --- |"
    assert empty.table().plain() == "position  score"
    curve = empty.curve([1])
    assert curve.inspected.tolist() == [0, 1]
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra parquet")
    empty.to_parquet(tmp_path / "out.parquet")
    assert parquet.read_table(tmp_path / "out.parquet").schema.names == ["position", "score"]


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ModuleNotFoundError,
        match=r'Parquet files, other than CSV files, need pyarrow: pip install "lightning-trak\[parquet\]"$',
    ):
        ranking([1.0]).to_parquet(tmp_path / "out.parquet")
    assert list(tmp_path.iterdir()) == []


def test_the_curve_is_that_of_the_suspicion():
    generator = torch.Generator().manual_seed(0)
    suspicion = torch.randint(0, 6, (40,), generator=generator).double()  # with ties
    wrong = torch.rand(40, generator=generator) < 0.3
    order = suspicion.argsort(descending=True, stable=True)
    found = ranking(suspicion[order].tolist(), list(range(40)), order.tolist())
    expected = mislabel_detection_curve(suspicion, wrong)
    for given in (wrong, wrong.nonzero().flatten(), wrong.nonzero().flatten().tolist()):
        curve = found.curve(given)
        torch.testing.assert_close(curve.inspected, expected.inspected)
        torch.testing.assert_close(curve.found, expected.found)
        assert float(curve.share) == pytest.approx(float(wrong.double().mean()))


def test_examples_that_are_not_listed_come_last():
    found = ranking([3.0, 2.0], list(range(6)), order=[4, 1]).curve([4, 0])
    assert found.inspected.tolist() == pytest.approx([0, 1 / 6, 2 / 6, 1])
    assert found.found.tolist() == [0, 0.5, 0.5, 1]
    assert found.found_within(1 / 6) == pytest.approx(0.5)
    assert found.found_within(4 / 6) == pytest.approx(0.75)
    assert (found.found_within(0), found.found_within(1)) == (0, 1)
    with pytest.raises(ValueError, match=r"Expected `fraction` from 0 to 1, but got 1.5"):
        found.found_within(1.5)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (torch.zeros(2, dtype=torch.bool), r"a bool for each of 3 examples, got shape \(2,\)"),
        ([3], "wrong names example 3, and there are 3, from 0 to 2"),
        ([-1], "wrong names example -1"),
        ([0.5], "as bools or as positions, got torch.float32"),
        ([[1]], "as bools or as positions"),
        ([], "Expected some wrong labels and some right ones, but 0 of 3 are wrong"),
        ([0, 1, 2], "but 3 of 3 are wrong"),
    ],
)
def test_wrong_examples_that_are_none(wrong, match):
    with pytest.raises(ValueError, match=match):
        ranking([3.0, 2.0, 1.0]).curve(wrong)


def test_the_picture_has_the_curve_and_both_limits():
    found = ranking([3.0, 2.0, 1.0, 0.0], order=[1, 0, 2, 3])
    figure = found.plot([1], "TRAK")
    assert isinstance(figure, Figure)
    for axis in figure.axes:  # the whole, and enlarged
        curve, random, best = axis.lines
        assert list(curve.get_xdata()) == [0, 0.25, 0.5, 0.75, 1]
        assert list(curve.get_ydata()) == [0, 1, 1, 1, 1]
        assert (list(random.get_xdata()), list(random.get_ydata())) == ([0, 1], [0, 1])
        assert (list(best.get_xdata()), list(best.get_ydata())) == ([0, 0.25, 1], [0, 1, 1])
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["TRAK: area 0.875", "at random: area 0.500", "at best: area 0.875"]
    assert found.plot([1]).legends[0].get_texts()[0].get_text() == "suspicion: area 0.875"


def test_a_table_for_a_terminal_fits():
    data = [{"text": "word " * 50}, {"text": "\x1b[31m"}]
    shown = ranking([12.345678, 1.0], data).table().plain(40)
    lines = shown.splitlines()
    assert lines[0] == "position  score  text"
    assert lines[1].startswith("       0  12.35  text: word")
    assert all(len(line) <= 40 for line in lines)
    assert "\x1b" not in shown


def test_positions_come_back_from_the_file(tmp_path):
    path = tmp_path / "wrong.csv"
    texts = [(text, 0) for text in HOSTILE]
    order = [5, 2, 9, *(i for i in range(12) if i not in (5, 2, 9))]
    ranking([float(12 - i) for i in range(12)], texts, order=order)[:3].to_csv(path, describe=lambda item: item[0])
    assert read_positions(path) == [5, 2, 9]
    long = f"position,text\n3,{'x' * 200_000}\n"  # more than the csv module takes by default
    separated = "\ufefftext;position\nx;3\n", "position\tscore\r\n 3 \t0.5\r\n"
    for content in ("position\n3\n", *separated, long, "position\n"):
        path.write_text(content, encoding="utf-8")
        assert read_positions(path) == ([3] if "3" in content else [])


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"score\n3\n", "has no column `position` in its first line, which is 'score'"),
        (b"", "has no column `position`"),
        (b"position\n3\nx\n", "has 'x' as the position of row 3, not an integer"),
        (b"position\n-1\n", "has '-1' as the position of row 2"),
        (b"position,score\n,2\n", "has '' as the position of row 2"),
        (b"\xff\xfe\x00", "is not a CSV file in UTF-8"),
        ("position\n\u0663\n".encode(), "as the position of row 2"),
    ],
)
def test_files_without_positions(tmp_path, content, match):
    path = tmp_path / "wrong.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=match):
        read_positions(path)
    with pytest.raises(FileNotFoundError, match=r"there is no file .* give a CSV file with a column `position`"):
        read_positions(Path(tmp_path / "none.csv"))
