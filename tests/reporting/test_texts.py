"""Texts of the user's data, wherever people read them."""

import csv
import html
import io
import re
from unicodedata import bidirectional, category

import markdown
import pytest
import torch
from matplotlib import rc_context
from matplotlib.text import Text

from lightning_trak.metrics.functional import mislabel_detection_curve
from lightning_trak.reporting.explanations import Entry, Example, Explanation, described, explain
from lightning_trak.reporting.html import page
from lightning_trak.reporting.plots import (
    Picture,
    plot_explanations,
    plot_histogram,
    plot_mislabel_curves,
    plot_outcomes,
    plot_pictures,
)
from lightning_trak.reporting.scores import SavedScores
from lightning_trak.reporting.terminal import table
from lightning_trak.texts.printable import counted, printable
from lightning_trak.texts.tables import Table
from tests.retraining.brittleness import make_brittleness

ESCAPE = "\x1b]0;owned\x07\x1b[2Jx\u202egnp.exe"


def test_no_character_that_a_terminal_obeys_is_left():
    every = "".join(map(chr, range(0x110000)))
    shown = printable(every)
    assert not {"Cc", "Cs", "Zl", "Zp"} & set(map(category, shown))
    assert not {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"} & set(map(bidirectional, shown))
    assert shown.encode()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("naïve 漢字 😀 שלום", "naïve 漢字 😀 שלום"),
        ("👩\u200d🔬", "👩\u200d🔬"),  # a joiner makes one picture of two
        ("one\r\ntwo\tthree", "one two three"),
        ("\x9b31m \x7f", "\\x9b31m \\x7f"),
        (ESCAPE, "\\x1b]0;owned\\x07\\x1b[2Jx\\u202egnp.exe"),
        ("\ud800", "\\ud800"),
    ],
)
def test_other_characters_stay(text, shown):
    assert printable(text) == shown


def test_counts():
    assert [counted(number, "target") for number in (0, 1, 2)] == ["0 targets", "1 target", "2 targets"]


def explanation(text, image=None):
    item = Example(text, image)
    return Explanation(0, item, {"proponents": [Entry(0, 1.0, item)]})


def test_the_table_and_the_page_show_texts_harmlessly():
    found = table([explanation(ESCAPE + "\nrank")], 100)
    assert found.splitlines()[0] == f"target 0  {printable(ESCAPE)} rank"
    assert found.splitlines()[3].endswith(f"  {printable(ESCAPE)} rank")
    text = page([explanation(ESCAPE + "<script>\ud800")], ESCAPE + "</title>")
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "<script>" not in text
    assert f"<title>{html.escape(printable(ESCAPE))}&lt;/title&gt;</title>" in text
    text.encode()


def test_descriptions_must_be_texts():
    saved = SavedScores(torch.rand(2, 3, generator=torch.Generator().manual_seed(0)), 3, "TRAK")
    with pytest.raises(TypeError, match="describe must return a str, got a NoneType"):
        explain(saved, [0], 1, [1, 2, 3], [1, 2], lambda item: None)
    assert described(lambda item: f"a {item}", 3) == "a 3"


TEXTS = ["$\\frac$", "$\\foo{$", "$$", "costs $5 or $6", "$x^2$", "\\$5 $6$", "a\x00b\x1b[1m", "\ud800", "_private $x$"]


def figures(text):
    """Every place in a picture where a text of the user stands."""
    image = torch.zeros(4, 4)
    shown = Picture(image, text)
    yield plot_pictures([shown], {"proponents": [[shown]], text: [[shown]]})
    yield plot_explanations([explanation(text, image)])
    values = torch.rand(2, 3, generator=torch.Generator().manual_seed(0))
    yield plot_outcomes([text, "nothing"], {text: values, "others": values}, text)
    yield plot_histogram(values[0], text)
    curve = mislabel_detection_curve(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([True, False, False]))
    yield plot_mislabel_curves({text: curve})


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
def test_pictures_show_texts_as_they_are(text):
    for figure in figures(text):
        figure.savefig(io.BytesIO(), format="png")
        found = [drawn for drawn in figure.findobj(Text) if "".join(printable(text).split())[:6] in _joined(drawn)]
        assert found
        assert not any(drawn.get_parse_math() or drawn.get_usetex() for drawn in found)


def _joined(drawn):
    return "".join(drawn.get_text().split())


def test_a_legend_names_everything_that_is_drawn():
    figure = plot_outcomes(["all"], {"_a": torch.zeros(1, 2), "b": torch.ones(1, 2)}, "share")
    assert [text.get_text().strip() for text in figure.legends[0].get_texts()] == ["_a", "b"]


def test_numbers_at_axes_may_be_formulas():
    with rc_context({"axes.formatter.use_mathtext": True}):
        figure = plot_histogram(torch.arange(6.0), "$x$")
        figure.savefig(io.BytesIO(), format="png")
    labels = [label for label in figure.axes[0].get_xticklabels() if label.get_text()]
    assert labels[0].get_text().startswith("$")
    assert all(label.get_parse_math() for label in labels)


FORMULAS = ["=cmd|'/C calc'!A0", "+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "\uff1d1"]


@pytest.mark.parametrize("cell", FORMULAS)
def test_csv_holds_no_formula(cell):
    text = Table((cell, "number"), [(cell, -1.5), (cell, -2)]).csv()
    head, *rows = csv.reader(io.StringIO(text, newline=""))
    assert head == ["'" + cell, "number"]
    assert rows == [["'" + cell, "-1.5"], ["'" + cell, "-2"]]


def test_csv_gives_texts_back():
    cells = ["a\rb", "a\r\nb", 'a "quoted" b', "'", '"', "a,b;c\td", "", " =1", "ä\x1b", "1"]
    table = Table(("text", "number"), [(cell, 1 / 3) for cell in cells])
    rows = list(csv.reader(io.StringIO(table.csv(), newline="")))
    assert rows == [["text", "number"], *([cell, str(1 / 3)] for cell in cells)]
    assert Table(("text",), [("\ud800",)]).csv().encode() == b'"text"\n"\\ud800"\n'


CELLS = [
    *["a|b", "a\\|b", "\\", "a\\", "|", "| --- |", "line\nbreak\r", "`code|x`", "`", "``|``", "`a", "b` | c"],
    *["<script>alert(1)</script>", "<img src=x onerror=y>", "&lt;b&gt;", "<http://a.b>", "[x](http://e)"],
    *["![x](http://e)", "[r]: http://x", "*b* _i_ __s__", "~~x~~", "\x02wzxhzdk:0\x03", "\\`", "\ud800", ESCAPE],
]


def test_a_cell_of_markdown_stays_a_cell():
    table = Table(("c|d", "*e*"), [(cell, 1.0) for cell in CELLS])
    rendered = markdown.markdown(table.markdown(), extensions=["markdown.extensions.tables"])
    rows = re.findall(r"<tr>\s*<td>(.*?)</td>\s*<td>(.*?)</td>\s*</tr>", rendered, re.DOTALL)
    assert [tuple(map(html.unescape, row)) for row in rows] == [(printable(cell), "1") for cell in CELLS]
    assert re.findall("<th>(.*?)</th>", rendered) == ["c|d", "*e*"]


def test_tables_of_results_keep_their_numbers():
    table = make_brittleness().table()
    rows = list(csv.reader(io.StringIO(table.csv())))
    assert [row[1] for row in rows[1:]] == [str(row[1]) for row in table.rows]
