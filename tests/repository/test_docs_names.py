"""The modules, classes and functions that pages name by their full path exist."""

import pkgutil
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMED = re.compile(r"(?<![\w./])lightning_trak(?:\.\w+)+")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_pages_name_what_exists(page):
    for name in NAMED.findall(page.read_text()):
        pkgutil.resolve_name(name)


def test_names_are_found():
    names = {name for page in PAGES for name in NAMED.findall(page.read_text())}
    assert "lightning_trak.reporting.loggers" in names
    with pytest.raises(AttributeError, match="no_such_module"):
        pkgutil.resolve_name("lightning_trak.no_such_module")
