"""The examples on digits, with a hundred of them; and the help of all examples."""

import csv
import re
from importlib import import_module

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from examples import clean_digits, counterfactuals, digits, one_run, why

EXAMPLES = {
    "clean_digits": [],
    "clip": ["transformers"],
    "counterfactuals": [],
    "digits": [],
    "fact_tracing": ["transformers"],
    "imagenet": ["transformers"],
    "language_model": ["transformers"],
    "one_run": [],
    "peft_lora": ["transformers", "peft"],
    "select_instructions": ["transformers", "peft", "accelerate"],
    "text_pairs": ["transformers"],
    "why": [],
}


@pytest.fixture(autouse=True)
def _few(monkeypatch, as_it_was):
    monkeypatch.setattr(digits, "NUM_TRAIN", 120)
    monkeypatch.setattr(digits, "NUM_TARGETS", 60)


@pytest.mark.parametrize("name", EXAMPLES)
def test_help(name, capsys):
    for package in EXAMPLES[name]:
        pytest.importorskip(package)
    module = import_module(f"examples.{name}")
    with pytest.raises(SystemExit) as stopped:
        module.main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert module.__doc__.splitlines()[0] in printed
    assert "--out" in printed


@pytest.mark.slow
def test_digits(tmp_path, capsys):
    digits.main(["--out", str(tmp_path), "--subsets", "4", "--k", "64"])
    printed = capsys.readouterr().out
    assert "1. Training on 120 digits" in printed
    found = re.findall(r"^ +(TRAK\S*) +LDS (\S+) +\(95% interval (\S+) to (\S+)\)$", printed, re.M)
    assert [name for name, *_ in found] == ["TRAK", "TRAK.paper"]
    (run,) = tmp_path.iterdir()
    (row,) = [row for row in csv.DictReader((run / "logs/metrics.csv").open()) if row["lds/TRAK"]]
    for name, *numbers in found:
        value, low, high = map(float, numbers)
        assert -1 <= low <= value <= high <= 1
        assert float(row[f"lds/{name}"]) == pytest.approx(value, abs=1e-3)
    assert len(list((run / "snapshots").glob("*.safetensors"))) == 4
    shown = re.findall(r"held-out image \d+, a (\d):\n +proponents (.+)\n +opponents +(.+)\n", printed)
    assert [digit for digit, *_ in shown] == ["3", "8", "9"]
    for _, *lists in shown:
        highest, lowest = ([float(score) for score in re.findall(r"\) (\S+?)(?:,|$)", line)] for line in lists)
        assert len(highest) == len(lowest) == 3
        assert highest == sorted(highest, reverse=True)
        assert lowest == sorted(lowest)
        assert highest[-1] >= lowest[-1]
    assert (run / "attributions.png").exists()


@pytest.mark.slow
def test_why(tmp_path, capsys):
    why.main(["--out", str(tmp_path)])
    printed = capsys.readouterr().out
    lines = re.findall(r"^ +(proponents|opponents) +(.+)$", printed, re.M)
    assert len(lines) >= 2 * (3 + 1 + 1 + 1)
    for kind, line in lines:
        scores = [float(score) for score in re.findall(r"\) (\S+?)(?:,|$)", line)]
        assert len(scores) == 5
        assert scores == sorted(scores, reverse=kind == "proponents")
    shares = re.findall(r"^\| (\d) \| (\d+) \|", printed, re.M)
    assert len(shares) == 10
    assert sum(int(size) for _, size in shares) == 120
    assert {path.name for path in tmp_path.rglob("*.png")} == {"why.png", "rather.png"}


@pytest.mark.slow
def test_counterfactuals(tmp_path, capsys):
    sizes = ["--targets", "2", "--ks", "2", "5", "--seeds", "1", "--runs", "1"]
    counterfactuals.main(["--out", str(tmp_path), *sizes])
    printed = capsys.readouterr().out
    assert f"Training {5 + 4 * 2 * 2} models without proponents" in printed
    rows = re.findall(r"^\| (.+?) \| (\d+) \|", printed, re.M)
    methods = ("TRAK", "gradient cosine", "representation cosine", "random")
    assert rows == [
        *((method, k) for method in methods for k in ("2", "5")),
        ("trained again on everything", "0"),
    ]
    areas = dict(re.findall(r"^ +(.+?) +area under the detection curve (\S+), at best 0.950$", printed, re.M))
    assert list(areas) == ["loss without the image, TRAK", "self-influence, gradient dot", "loss"]
    assert all(0 <= float(area) <= 0.95 for area in areas.values())
    assert {path.name for path in tmp_path.rglob("*.png")} >= {"curves-step-0.png"}


@pytest.mark.slow
def test_one_run(tmp_path, capsys):
    one_run.main(["--out", str(tmp_path), "--targets", "4", "--subsets", "6"])
    printed = capsys.readouterr().out
    assert "3. Repeating the run 12 times" in printed
    assert re.findall(r"^ +(\d+%) removed: outputs change by 0\.\d+", printed, re.M) == ["1%", "10%"]
    found = re.findall(r"^ +(\w+) +LDS (\S+) +\(95% interval (\S+) to (\S+)\)$", printed, re.M)
    assert [name for name, *_ in found] == ["Metagradient", "TRAK"] * 2
    for name, *numbers in found:
        value, low, high = map(float, numbers)
        assert -1 <= low <= value <= high <= 1
        assert name == "TRAK" or value > 0.9
    (run,) = tmp_path.iterdir()
    assert (run / "changes.png").exists()


@pytest.mark.parametrize("sizes", [["--targets", "1"], ["--targets", "61"], ["--subsets", "2"]])
def test_one_run_refuses_sizes_without_an_interval(sizes, tmp_path, capsys):
    with pytest.raises(SystemExit):
        one_run.main(["--out", str(tmp_path), *sizes])
    assert "needs 2 to 60 --targets and at least 3 --subsets" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_clean_digits(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(clean_digits, "COPIES", 5)
    clean_digits.main(["--out", str(tmp_path), "--seeds", "1", "--images", "40", "--slow"])
    printed = capsys.readouterr().out
    found = dict(re.findall(r"^   (\S.*?) {2,}(\d+%)$", printed, re.M))
    assert {"TRAK", "EKFACInfluence", "TrainingLoss", "InfluenceFunction", "Metagradient", "TRAK, harmful"} <= set(
        found
    )
    assert {"all images", "the most useful fifth", "a random fifth"} <= set(found)
    assert len(re.findall(r"duplicates by \w+: \d+ of 5 copies, and \d+ other groups", printed)) == 2
    (run,) = tmp_path.iterdir()
    assert (run / "found.png").stat().st_size > 10_000
    rows = list(csv.DictReader((run / "seed-0/suspects.csv").open()))
    scores = [float(row["score"]) for row in rows]
    assert len(rows) == 4
    assert scores == sorted(scores, reverse=True)
    selected = list(csv.DictReader((run / "seed-0/selected.csv").open()))
    labels = [row["label"] for row in selected]
    assert labels == [row["group"] for row in selected]
    assert len(set(labels)) >= 7


def test_intervals_over_seeds():
    assert clean_digits.summary([0.5]) == " 50%"
    assert clean_digits.summary([0.5, 0.5]) == " 50%  (50% to 50%)"
