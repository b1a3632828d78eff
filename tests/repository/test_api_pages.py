"""The API reference lists every public name once, under the name that users import."""

import inspect
import pkgutil
import re
from collections import Counter
from importlib import import_module

from tests.launch import ROOT

# Packages whose `__all__` is public. An object that several of them name is listed under the first.
PACKAGES = [
    "lightning_trak",
    "lightning_trak.methods",
    "lightning_trak.methods.influence",
    "lightning_trak.outputs",
    "lightning_trak.projections",
    "lightning_trak.callbacks",
    "lightning_trak.checkpoints",
    "lightning_trak.replay",
    "lightning_trak.replay.optimizers",
    "lightning_trak.retraining",
    "lightning_trak.metrics",
    "lightning_trak.metrics.functional",
    "lightning_trak.scoring",
    "lightning_trak.features",
    "lightning_trak.gradients",
    "lightning_trak.reporting.loggers",
    "lightning_trak.cleaning",
]
TABLE = re.compile(r"\.\. currentmodule:: (\S+)\n\n\.\. autosummary::\n((?: {3}:.*\n)+)\n((?: {3}\S+\n)+)")


def described(obj) -> bool:
    return inspect.isclass(obj) or inspect.isfunction(obj)


def listed() -> list[str]:
    """The names for which the reference has a page of their own."""
    pages = "".join(page.read_text() for page in sorted((ROOT / "docs" / "api").glob("*.md")))
    tables = [table for table in TABLE.findall(pages) if ":toctree:" in table[1]]
    return [f"{module}.{name}" for module, _, names in tables for name in names.split()]


def test_every_public_name_is_listed_once_under_its_public_name():
    public = {}
    for package in PACKAGES:
        module = import_module(package)
        for name in module.__all__:
            if described(getattr(module, name)):
                public.setdefault(getattr(module, name), f"{package}.{name}")
    names = listed()
    assert not [name for name, count in Counter(names).items() if count > 1]
    assert sorted(set(public.values()) - set(names)) == []
    for name in names:
        obj = pkgutil.resolve_name(name)
        assert public.get(obj, name) == name


def test_the_first_table_is_of_the_root():
    import lightning_trak

    (names,) = [table[2].split() for table in TABLE.findall((ROOT / "docs" / "api" / "index.md").read_text())]
    assert names[0] == "TRAK"
    assert {*names, "__version__"} == set(lightning_trak.__all__)
