"""The guide for notebooks as a notebook, which a kernel runs."""

import re

import pytest

from tests.launch import ROOT

nbclient = pytest.importorskip("nbclient", reason="notebooks are run by nbclient")
nbformat = pytest.importorskip("nbformat", reason="notebooks are run by nbclient")
pytest.importorskip("ipykernel", reason="notebooks are run by ipykernel")

pytestmark = pytest.mark.slow

GUIDE = ROOT / "docs" / "guides" / "notebooks.md"
NAMES = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from torch.utils.data import DataLoader
from tests.lit import TARGETS as targets, TRAIN as train, make_model
model, train_loader = make_model(), DataLoader(train, batch_size=10)
"""


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """The guide's cells with their outputs. An error in a cell raises."""
    folder, patch = tmp_path_factory.mktemp("notebook"), pytest.MonkeyPatch()
    for name in ("IPYTHONDIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
        patch.setenv(name, str(folder / name.lower()))
    patch.setenv("CUDA_VISIBLE_DEVICES", "")
    codes = [NAMES, *re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in codes])
    try:
        client = nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(folder)}})
        client.execute()
    finally:
        patch.undo()
    assert (folder / "run" / "shown.html").exists()
    return notebook.cells


def bars(cell):
    """What is left of each progress bar: a widget, or the last state of a line."""
    widgets = [out for out in cell.outputs if "application/vnd.jupyter.widget-view+json" in out.get("data", {})]
    text = "".join(out.text for out in cell.outputs if out.get("name") == "stdout")
    lines = [line.split("\r")[-1] for line in text.split("\n")]
    return widgets + [line for line in lines if "%|" in line]


def holding(cells, code):
    (found,) = [cell for cell in cells if code in cell.source]
    return found


def test_each_pass_has_one_bar(cells):
    first = bars(holding(cells, "trak.featurize("))
    assert len(first) == 2  # featurize and score are in one cell
    if isinstance(first[0], str):
        assert [re.match(r"\w+, checkpoint 1: 100%", bar)[0].split(",")[0] for bar in first] == [
            "Featurizing",
            "Scoring",
        ]
    for cell in cells:
        if "score(" not in cell.source:
            assert not bars(cell)  # what show computes is too little for a bar


def test_show_is_html(cells):
    shown = [cell for cell in cells if "trak.show(" in cell.source and "out=" not in cell.source]
    assert len(shown) == 3
    for cell in shown:
        (out,) = [out for out in cell.outputs if "text/html" in out.get("data", {})]
        assert out.data["text/html"].startswith('<div class="attributions">')
        assert "predicted " in out.data["text/html"]
        assert "</h2>\n<figure>" in out.data["text/html"]
        assert out.data["text/plain"].startswith("target ")
    assert not [out for out in holding(cells, "out=").outputs if out.output_type != "stream"]


def test_the_last_line_of_a_cell_is_a_table(cells):
    (out,) = cells[-1].outputs
    assert out.output_type == "execute_result"
    assert out.data["text/html"].startswith("<table><caption>BothEnds: 13 targets")
    assert out.data["text/plain"].startswith("BothEnds(13 targets; proponents #")
