"""Code in the documentation is no wider than the column of the pages, so that nobody has to scroll sideways."""

import ast
import re
from inspect import cleandoc

import pytest

from tests.launch import ROOT

PAGE = 88  # characters of a code block between the margins of a page, as in docs/ruff.toml
DOCSTRING = 80  # in the API reference, where code stands indented below its class and method
PAGES = sorted((ROOT / "docs").rglob("*.md"))
MODULES = sorted((ROOT / "lightning_trak").rglob("*.py"))
FENCED = re.compile(r"^( *)(`{3,})(.*)\n((?:.*\n)*?)\1\2$", re.MULTILINE)
INDENTED = re.compile(r"(?<=\n\n)((?: {4}.*\n|\n(?= {4}))+)")
LITERAL = re.compile(r"::\n\n((?: {4}.*\n|\n(?= {4}))+)")
DOCTEST = re.compile(r"^ *((?:>>>|\.\.\.) .*)$", re.MULTILINE)


def dedented(code: str, indent: int) -> list[str]:
    return [line[indent:] for line in code.splitlines()]


def code_of_page(text: str) -> list[str]:
    """The lines of all code blocks of a page in Markdown: fenced, and indented by four spaces after an empty line."""
    blocks = [match for match in FENCED.finditer(text) if not match[3].startswith("{")]
    lines = [line for block in blocks for line in dedented(block[4], len(block[1]))]
    return lines + [line for block in INDENTED.findall(FENCED.sub("", text)) for line in dedented(block, 4)]


def code_of_docstring(text: str) -> list[str]:
    """The lines of all literal blocks and doctests of a docstring."""
    literal = [line for block in LITERAL.findall(text + "\n") for line in dedented(block, 4)]
    return literal + DOCTEST.findall(text)


def docstrings(source: str) -> list[str]:
    """The docstrings of a module, its classes and its functions, without their indentation."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return [text for text in found if text]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT / "docs").as_posix())
def test_code_on_pages_is_as_wide_as_the_column(page):
    wide = [line for line in code_of_page(page.read_text()) if len(line) > PAGE]
    assert not wide, f"{page.name}: wrap these lines to {PAGE} characters: {wide}"


def test_code_in_docstrings_is_as_wide_as_the_column():
    wide = [
        f"{module.relative_to(ROOT)}: {line.strip()}"
        for module in MODULES
        for text in docstrings(module.read_text())
        for line in code_of_docstring(text)
        if len(line) > DOCSTRING
    ]
    assert not wide, f"wrap these lines to {DOCSTRING} characters: {wide}"


def test_code_is_found():
    blocks = [
        "    command  # comment",
        "- list\n\n  ```python\n  x = 1\n  ```",
        "```{toctree}\npage\n```",
        "```\nout\n```",
    ]
    page = "\n\n".join(["Text", *blocks, ""])
    assert code_of_page(page) == ["x = 1", "out", "command  # comment"]
    text = cleandoc(
        """A function.

        Example::

            first = 1

            second = 2

        >>> first + second
        3
        """
    )
    assert code_of_docstring(text) == ["first = 1", "", "second = 2", ">>> first + second"]
    assert len(docstrings('"""One."""\nclass A:\n    """Two."""\n    def f(self):\n        """Three."""\n')) == 3


def test_lines_are_measured():
    """Some lines of the real pages and docstrings are nearly as wide as they may be."""
    pages = [line for page in PAGES for line in code_of_page(page.read_text())]
    texts = [text for module in MODULES for text in docstrings(module.read_text())]
    assert PAGE - 3 <= max(map(len, pages)) <= PAGE
    assert DOCSTRING - 3 <= max(len(line) for text in texts for line in code_of_docstring(text)) <= DOCSTRING
