"""Texts with coloured tokens: what they say, and that no text of the user's data is obeyed."""

import html
import re
from html.parser import HTMLParser
from unicodedata import bidirectional, category

import pytest
import torch

from lightning_trak.reporting.html import token_page
from lightning_trak.reporting.terminal import token_lines
from lightning_trak.reporting.tokens import ScoredText, scored_text
from lightning_trak.texts.printable import printable_piece

EVIL = "</span><script>x</script>\"'&\x1b]0;owned\x07\u202egnp\ud800"
TEXT = ScoredText("#7 <for> target\n3", ["Say", " it", ":", " now", "\n", EVIL], [None, 0.5, -0.25, 0.0, -0.5, 0.1])
SEQUENCES = re.compile(r"\x1b\[[0-9;]*m")


class Spans(HTMLParser):
    """The text, style and title of each span; and all tags."""

    def __init__(self, page):
        super().__init__()
        self.spans, self.tags, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "span":
            self.spans.append([dict(attributes), ""])

    def handle_data(self, data):
        self.text += data
        if self.spans and self.tags[-1] == "span":
            self.spans[-1][1] += data


def opacity(style):
    return float(re.search(r"([\d.]+)\)$", style)[1])


def test_page_shows_tokens_in_their_colours():
    page = Spans(token_page([TEXT], "Why?"))
    assert "script" not in page.tags
    spans = [span for span in page.spans if "title" in span[0] or span[0].get("class") == "none"]
    assert [text for _, text in spans][:4] == ["Say", " it", ":", " now"]
    assert "title" not in spans[0][0]
    titles = [attributes.get("title") for attributes, _ in spans]
    assert titles == [None, "token 1: +0.5", "token 2: -0.25", "token 3: +0", "token 4: -0.5", "token 5: +0.1"]
    styles = [attributes["style"] for attributes, _ in spans[1:]]
    shades = [opacity(style) for style in styles]
    assert shades == [0.75, 0.375, 0, 0.75, 0.15]
    assert [style.split(",")[0] for style in styles[:2]] == ["background: rgba(31", "background: rgba(255"]


def test_page_holds_nothing_that_is_obeyed():
    page = token_page([TEXT, ScoredText(EVIL, [EVIL], [1.0])], EVIL)
    assert page.encode()
    shown = html.unescape(page)
    assert not {"Cs"} & set(map(category, shown))
    assert {character for character in shown if category(character) == "Cc"} <= {"\n"}
    assert not {"RLO", "LRO", "RLE", "LRE"} & set(map(bidirectional, shown))
    assert "<script>" not in page


def test_terminal_with_colours_and_without():
    coloured, plain = token_lines([TEXT]), token_lines([TEXT], colour=False)
    assert SEQUENCES.sub("", coloured).splitlines()[2:] == [
        "#7 <for> target 3",
        "Say it: now\\n",
        "</span><script>x</script>\"'&\\x1b]0;owned\\x07\\u202egnp\\ud800",
    ]
    for line in coloured.splitlines():
        assert line.count("\x1b[0m") * 2 == len(SEQUENCES.findall(line))  # each line ends its colours
    assert plain.splitlines() == [
        "scores from -0.5{---} to +0.5{+++}",
        "",
        "#7 <for> target 3",
        "Say it{+++}:{--} now\\n{---}",
        "</span><script>x</script>\"'&\\x1b]0;owned\\x07\\u202egnp\\ud800{+}",
    ]
    assert not {"Cc", "Cs"} & set(map(category, plain.replace("\n", "")))
    blue, orange = ("\x1b[38;5;16;48;5;33m it", "\x1b[38;5;16;48;5;208m\\n")
    assert blue in coloured
    assert orange in coloured


def test_scores_of_zero_have_no_colour():
    text = ScoredText("zeros", ["a", "b"], [0.0, None])
    assert token_lines([text], colour=False) == "all scores are 0\n\nzeros\nab\n"
    assert all(opacity(span["style"]) == 0 for span, _ in Spans(token_page([text], "")).spans if "style" in span)


def test_tokens_are_what_each_adds_to_the_text():
    """Words have their spaces, and a character of several tokens is with the last of them."""
    pieces = {0: b"Ada", 1: b" n", 2: b"\xc3", 3: b"\xa9", 4: b"e", 5: b"\xf0\x9f"}

    def decode(ids):
        return b"".join(pieces[number] for number in ids).decode(errors="replace")

    found = scored_text("", torch.tensor([0, 1, 2, 3, 4, 5]), torch.tensor([2, 4]), torch.tensor([0.5, -1.0]), decode)
    assert found.tokens == ["Ada", " n", "", "é", "e", "\ufffd"]
    assert found.scores == [None, None, 0.5, None, -1.0, None]
    assert "n·é" in SEQUENCES.sub("", token_lines([found]))


def test_tokens_of_a_tokenizer():
    pytest.importorskip("transformers")
    from examples.texts import learn_tokenizer

    text = "Ada, née Byron, writes: “1 + 1”.\n  In 東京."
    tokenizer = learn_tokenizer(["Ada writes"], vocab_size=300)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = scored_text("", ids, [], [], tokenizer.decode)
    assert "".join(found.tokens) == text
    assert len(found.tokens) == len(ids)


@pytest.mark.parametrize(
    ("ids", "positions", "scores", "error"),
    [
        ([0, 1], [2], [1.0], "token 2 has a score, but the text has 2 tokens"),
        ([0, 1], [-1], [1.0], "token -1 has a score"),
        ([0, 1], [0, 1], [1.0], "got 1 for 2 positions"),
        ([0, 1], [0], [float("nan")], "the score of token 0 is nan"),
    ],
)
def test_scores_that_do_not_fit(ids, positions, scores, error):
    with pytest.raises(ValueError, match=error):
        scored_text("", ids, positions, scores, str)
    for draw in (token_lines, lambda texts: token_page(texts, "")):
        with pytest.raises(ValueError, match="2 scores for 1 token"):
            draw([ScoredText("", ["a"], [1.0, 2.0])])
        with pytest.raises(ValueError, match="NaN or infinite"):
            draw([ScoredText("", ["a"], [float("inf")])])


def test_no_character_that_a_terminal_obeys_is_left():
    shown = printable_piece("".join(map(chr, range(0x110000)))).replace("\n", "")
    assert not {"Cc", "Cs", "Zl", "Zp"} & set(map(category, shown))
