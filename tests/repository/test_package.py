import re
import subprocess
import sys
from importlib.metadata import version

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import lightning_trak
from tests.launch import ROOT, run_module


def test_public_names_are_there():
    assert set(lightning_trak.__all__) == set(dir(lightning_trak))
    for name in lightning_trak.__all__:
        assert getattr(lightning_trak, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'TRAC'"):
        lightning_trak.TRAC  # noqa: B018
    assert version("lightning-trak") == lightning_trak.__version__


@pytest.mark.slow
def test_the_metric_needs_no_lightning():
    code = (
        "import sys, torch; from lightning_trak.metrics.functional import linear_datamodeling_score as lds;"
        " masks = (torch.arange(1, 10)[:, None] >> torch.arange(7)) % 2 == 1; scores = torch.randn(4, 7);"
        " packages = {'lightning', 'pytorch_lightning', 'lightning_fabric'};"
        " print(float(lds(scores, scores @ masks.T.float(), masks)), packages & sys.modules.keys())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["1.0", "set()"]


@pytest.mark.slow
def test_the_demo_with_fewer_subsets(tmp_path):
    printed = run_module("examples.digits", "--out", str(tmp_path), "--subsets", "10")
    found = re.findall(r"TRAK(?:\.paper)? +LDS (-?\d\.\d+)  \(95% interval (-?\d\.\d+) to (-?\d\.\d+)\)", printed)
    assert len(found) == 2, printed
    assert all(float(low) < float(value) < float(high) for value, low, high in found)
    (_, low, _), (_, _, high) = found
    assert float(low) > float(high), "the defaults must be far better than TRAK as published"
    assert printed.count("proponents") == 3
    assert printed.count("opponents") == 3
    (run,) = tmp_path.iterdir()
    assert (run / "attributions.png").stat().st_size > 10_000
    assert (run / "logs" / "metrics.csv").read_text().startswith("lds/TRAK,")
    assert len(list((run / "snapshots").glob("*.safetensors"))) == 4


def requirements() -> dict[str, str]:
    """Name -> range, of what the package needs to run."""
    text = (ROOT / "pyproject.toml").read_text().partition("\ndependencies = [\n")[2].partition("\n]")[0]
    return dict(re.findall(r'^  "([\w-]+)([^"\[]*)"', text, re.MULTILINE))


def test_the_matrix_begins_at_the_lower_ends_of_the_ranges():
    ranges, lines = requirements(), (ROOT / "constraints-oldest.txt").read_text().splitlines()
    oldest = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert oldest.keys() >= {"torch", "lightning", "pytorch-lightning", "torchmetrics"}
    for name, release in oldest.items():
        lower = re.match(r">=([\d.]+)", ranges[name])
        assert lower is not None, name
        assert Version(release) == Version(lower[1]), name


@pytest.mark.parametrize("name", ["lightning", "pytorch-lightning"])
def test_compromised_releases_are_excluded(name):
    allowed = SpecifierSet(requirements()[name])
    assert not {"2.6.2", "2.6.3"} & set(allowed.filter(["2.6.1", "2.6.2", "2.6.3", "2.6.4"]))
    assert version(name) in allowed
