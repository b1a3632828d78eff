import json
import logging
import math
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from benchmarks import (
    ablations,
    damping,
    evaluation,
    first_half,
    lag,
    memory,
    methods,
    one_run,
    one_run_cost,
    other_seeds,
    ours,
    predictions,
    second_stage,
    twins,
)
from benchmarks import bytes as bytes_benchmark
from benchmarks.labels import Curve, label_curves
from benchmarks.methods import small
from benchmarks.models import resnet9
from benchmarks.tasks import make_tasks
from benchmarks.timing import Run
from benchmarks.truth import Truth, outputs_of, retrain
from tests.launch import ROOT, server

UNITS = ("noise_ceilings", "unit_seconds")

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _as_before():
    threads, logger = torch.get_num_threads(), logging.getLogger("lightning.pytorch")
    level = logger.level
    yield
    torch.set_num_threads(threads)
    logger.setLevel(level)


def test_the_timed_settings_make_features():
    work = resnet9(2)
    for name, setting in ours.settings(64).items():
        if setting.precision != "bf16-true":  # which not every CPU can compute
            found = ours.featurizer(work, setting)()
            assert found.features.isfinite().all(), name


def test_every_method_is_measured(tmp_path):
    methods.main(["--quick", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "methods.json").read_text())["results"]
    names = {result["method"] for result in results}
    assert {*methods.gradient_methods(methods.SmallMLP())} - {*methods.UNDAMPED} < names
    assert {"empirical influence", "datamodels", "Data Shapley", "random"} < names
    for result in results:
        assert result["low"] <= result["lds"] <= result["high"], result
        assert result["cost"] >= result["runs"] + result["retrained"] / 2
        (same,) = (
            r["lds"] for r in results if r["method"] == "TRAK" and r["checkpoints"] == (result["checkpoints"] or 2)
        )
        assert result["behind"] == pytest.approx(same - result["lds"], abs=1e-6)
    table = (tmp_path / "methods.md").read_text()
    assert all(f"| {name} |" in table for name in names)
    assert (tmp_path / "methods.png").stat().st_size > 10_000


def test_the_picture_of_methods_is_of_the_table():
    kept_results = json.loads((ROOT / "docs" / "methods.json").read_text())
    lines = methods.tables([methods.Result(**row) for row in kept_results["results"]], *map(kept_results.get, UNITS))
    page = (ROOT / "docs" / "methods.md").read_text()
    assert all(line in page for line in lines.splitlines())


def test_the_picture_of_methods_is_drawn_again(tmp_path):
    kept_results = json.loads((ROOT / "docs" / "methods.json").read_text())
    ceiling = {"digits conv": kept_results["noise_ceilings"]["digits conv"]}
    rows = [row for row in kept_results["results"] if row["task"] in ceiling and row["method"] in ("TRAK", "random")]
    (tmp_path / "few.json").write_text(json.dumps({"noise_ceilings": ceiling, "results": rows}))
    methods.main(["--out", str(tmp_path), "--draw", str(tmp_path / "few.json")])
    assert (tmp_path / "methods.png").stat().st_size > 10_000


def test_names_stand_beside_their_curves():
    figure, axis = plt.subplots(dpi=72)
    axis.set(xlim=(0, 10), ylim=(0, 1))
    x = np.linspace(1, 7, 4)
    heights = {"first": 0.5, "second": 0.52, "a long name of the third": 0.54, "last": 0.05}
    curves = {
        name: Curve(np.stack([x, np.full(4, y)], 1), np.array([(y - 0.02, y + 0.02)] * 4), "black")
        for name, y in heights.items()
    }
    label_curves(axis, curves)
    boxes = {text.get_text(): text.get_window_extent() for text in axis.texts}
    assert boxes.keys() == heights.keys()
    for name, box in boxes.items():
        assert axis.get_window_extent().fully_containsx(box.x0)
        assert axis.get_window_extent().fully_containsx(box.x1)
        assert not any(box.overlaps(other) for key, other in boxes.items() if key != name)
        points = axis.transData.transform(curves[name].points)
        assert np.abs(points - np.mean([box.min, box.max], 0)).max(1).min() < 150
    crossing = axis.transData.transform([(4, 0.05)])[0]
    assert not boxes["last"].contains(*crossing)
    plt.close(figure)


def test_ablations(tmp_path):
    ablations.main(["--quick", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "ablations.json").read_text())
    points = {(p["ablation"], p["settings"], p["models"], p["x"]): p["lds"] for p in written["results"]}
    assert len(points) == len(written["results"]) == 16
    # The last checkpoint of each of two runs is what two runs of all epochs end with.
    for settings in ablations.SETTINGS:
        assert points["runs", settings, 2, 2] == pytest.approx(points["epochs", settings, 2, 2], abs=1e-9)
    table = (tmp_path / "ablations.md").read_text()
    for _, published in ablations.LITERATURE.values():
        assert all(f"{lds:.3f}" in table for lds in published.values())
    assert (tmp_path / "ablations.png").stat().st_size > 10_000


def test_evaluation(tmp_path, capsys):
    evaluation.main(["--quick", "--out", str(tmp_path)])
    text = (tmp_path / "evaluation.md").read_text()
    assert text in capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line]
    sizes, methods = rows[2 : 2 + len(evaluation.PARTS)], rows[4 + len(evaluation.PARTS) :]
    lds = {name: value for name, value, _ in methods}
    assert sizes[-2][3] == lds[evaluation.BEST]  # all of the truth
    assert [row[6] for row in sizes] == ["20", "20", "20", "40", "60", "60", "60"]
    assert [bool(row[5]) for row in sizes] == [False, False, False, True, True, True, True]  # one seed has no ceiling


def test_one_run(tmp_path):
    one_run.main(["--quick", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "one_run.json").read_text())
    results, (verdict,) = found["lds"], found["smoothness"]
    assert verdict["smooth"]
    assert verdict["value"] > 0.8
    more = {"metagradient, two runs", one_run.AVERAGE, one_run.COMBINED}
    assert {result["method"] for result in results} == {*one_run.METHODS, *more}
    assert 0 < verdict["seeds_ceiling"] <= 1
    assert len(results) == 8 * (len(one_run.FRACTIONS) + 1)
    assert all(result["low"] <= result["lds"] <= result["high"] and result["cost"] > 1 for result in results)
    assert (tmp_path / "one_run.png").stat().st_size > 10_000


def test_other_seeds(tmp_path):
    other_seeds.main(["--quick", "--out", str(tmp_path)])
    single, together = json.loads((tmp_path / "other_seeds.json").read_text())
    assert (single["runs"], single["repeats"], together["runs"], together["repeats"]) == (1, 2, 2, 1)
    assert set(together["lds"]) == {*single["lds"], other_seeds.MEAN, other_seeds.RUNS} == set(other_seeds.METHODS)
    for line in (single, together):
        assert 0 < line["ceiling"] <= 1
        assert all(low <= mean <= high for mean, low, high in line["gain"].values())
        for method, (mean, _, _) in line["gain"].items():
            assert mean == pytest.approx(line["lds"][method] - line["lds"][other_seeds.KERNEL])
    assert len((tmp_path / "other_seeds.md").read_text().splitlines()) == 4


def test_first_half(tmp_path):
    first_half.main(["--quick", "--out", str(tmp_path)])
    single, together = json.loads((tmp_path / "first_half.json").read_text())
    assert (single["runs"], single["repeats"], together["runs"], together["repeats"]) == (1, 2, 2, 1)
    for line in (single, together):
        assert set(line["lds"]) == set(first_half.METHODS)
        mean, low, high = line["gain"][first_half.COMBINED]
        assert low <= mean <= high
        assert mean == pytest.approx(line["lds"][first_half.COMBINED] - line["lds"][first_half.KERNEL])
    assert len((tmp_path / "first_half.md").read_text().splitlines()) == 4


@pytest.mark.parametrize("number", [1, 3])
def test_the_recorded_run_is_trained_again(number, tmp_path):
    task, losses = one_run.make_tasks()[number]
    task = replace(task, max_epochs=1)
    module = one_run.fit(task, 0, tmp_path).eval()
    kept = torch.ones(2, len(task.train), dtype=torch.bool)
    kept[1, 0] = False
    same, other = one_run.again(task, module, tmp_path, losses, kept).T
    with torch.no_grad():
        outputs = task.output.output(module, list(task.targets.tensors))
    torch.testing.assert_close(same, outputs, rtol=1e-3, atol=1e-4)
    assert not torch.equal(same, other)


def test_second_stage():
    task = small(make_tasks()["digits MLP"])
    solved, rescored = second_stage.measured(*second_stage.first_targets(task, retrain(task, 10, 1, 1), 3), 200)
    assert [row.split(" | ")[3] for row in solved] == list(second_stage.SOLVERS)
    assert len({row.split(" | ")[6] for row in solved}) == 1  # the same LDS
    assert rescored[-1].endswith("| 1.000 |")


def test_damping(tmp_path):
    damping.main(["--quick", "--methods", "default", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "damping.json").read_text())
    assert [(row["method"], row["models"]) for row in found] == [("default", 1), ("default", 2)]
    assert all(row["auto_lds"] != row["former_lds"] < row["best_lds"] for row in found)
    assert len((tmp_path / "damping.md").read_text().splitlines()) == 4


@pytest.mark.slow
def test_lag(tmp_path):
    lag.main(["--quick", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "lag.json").read_text())
    assert [row["models"] for row in found] == [1, 2, 1, 2]
    assert all(row["lag"][0] > 1 and row["without"] < row["measured"] for row in found)
    assert len((tmp_path / "lag.md").read_text().splitlines()) == 6


def test_predictions(tmp_path):
    predictions.main(["--quick", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "predictions.json").read_text())
    assert [(row["predictions"], row["models"]) for row in found] == [(4, 1), (4, 2)]
    for row in found:
        gain, low, high = row["gain"]
        assert gain == pytest.approx(row["single"] - row["whole"], abs=1e-6)
        assert low < gain < high
        assert row["best"] > 0.9 * row["single"]
    assert len((tmp_path / "predictions.md").read_text().splitlines()) == 4


@pytest.mark.parametrize("peak", [0.03, 10, 2000])
def test_the_best_constant_is_found(peak):
    best, height = damping.best_constant(lambda value: -abs(math.log(value / peak)))
    assert abs(math.log10(best / peak)) <= 1 / 6 + 1e-9
    assert height == -abs(math.log(best / peak))


def test_difference_is_that_of_the_scores():
    torch.manual_seed(0)
    masks = torch.rand(30, 40) < 0.5
    good = torch.randn(8, 40)
    truth = Truth(masks, (good @ masks.float().T)[..., None] + 2 * torch.randn(8, 30, 2), [])
    worse = good + torch.randn(8, 40)
    mean, low, high = truth.difference(good, worse)
    assert mean == pytest.approx(float(truth.measure(good).compute() - truth.measure(worse).compute()), abs=1e-9)
    assert low < mean < high
    assert truth.difference(good, 3 * good) == (0, 0, 0)


def test_retraining_is_as_wide_as_asked(monkeypatch):
    task = small(make_tasks()["digits MLP"])
    truth = retrain(task, 7, 2, models=3)
    assert truth.outputs.shape == (20, 7, 2)
    assert len(truth.states) == 3
    monkeypatch.setattr("benchmarks.truth.TOGETHER", 4)  # in two parts
    torch.testing.assert_close(outputs_of(task, truth.masks, 3), truth.outputs[..., 0], atol=1e-4, rtol=1e-4)


def test_bytes_has_every_setting(tmp_path):
    bytes_benchmark.main(["--quick", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "bytes.json").read_text())
    assert [row["setting"] for row in found] == 2 * list(bytes_benchmark.SETTINGS)
    assert {row["models"] for row in found} == {1, 2}
    assert all(-1 <= row["lds"] <= 1 and row["bytes"] > 0 for row in found)
    sizes = {row["setting"]: row["bytes"] for row in found}
    assert sizes["sparse 2048, int8"] < sizes[bytes_benchmark.OLD] / 3
    assert (tmp_path / "bytes.png").stat().st_size > 10_000


def test_twins(tmp_path):
    twins.main(["--quick", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "twins.json").read_text())
    assert {row["run"] for row in found} == {"original", *twins.RUNS}
    assert {row["models"] for row in found} == {1, 2}
    gains = {(row["run"], row["models"]): row["gain"] for row in found}
    assert gains["original", 2] == 0
    losses = {row["run"]: row["loss"] for row in found}
    assert losses["original"] < losses["lr x 0.3"] < losses["lr x 0.1"]
    assert all(row["run"] in (tmp_path / "twins.md").read_text() for row in found)


def test_the_cost_of_one_run(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CONTEXT", server())  # to import everything takes longer than to measure
    found = {row.name: row for row in one_run_cost.one_run(Run(tmp_path, 1, torch.device("cpu"), quick=True))}
    for name in ("1 target", "5 targets", "1 target, with the check"):
        assert found[f"1 thread: {name}"].value > 0
    recorded = [(name, row.value) for name, row in found.items() if "TrainingRecorder, " in name]
    assert len(recorded) == len(one_run_cost.RECORDED)
    assert all(value > 0 for _, value in recorded)
    few, many = (found[f"{steps} steps: disk"] for steps in one_run_cost.QUICK_STEPS)
    assert 0 < few.value < many.value  # more states
    assert all(found[f"{steps} steps: memory of {what}"].value >= 0 for steps in (20, 80) for what in ("fit", "scores"))
    assert not list(tmp_path.iterdir())
