"""The command line from end to end: once as a process, otherwise in this one, where nothing needs to be imported."""

import io
import os
import re
import subprocess
import sys
import warnings
from argparse import ArgumentError
from base64 import b64decode
from html.parser import HTMLParser

import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import load_file, save_file

from examples.digits import LitDigits
from examples.digits_data import DigitsData
from lightning_trak import TRAK, GradientCosine, LinearDatamodelingScore
from lightning_trak.cleaning import duplicates, harmful, useful, wrong_labels
from lightning_trak.cleaning.inspected import read_positions
from lightning_trak.methods import RepresentationSimilarity
from lightning_trak.projections import SparseProjection
from lightning_trak.reporting.scores import SavedScores
from lightning_trak.retraining.fleets.members import Member, MemberStore
from tests.cli.command_line import CONFIG, command_line
from tests.launch import ROOT
from tests.lit import make_trainer

pytestmark = pytest.mark.slow
SMALL = ["--config", CONFIG, "--data.num_train", "60", "--data.num_targets", "8", "--data.batch_size", "20"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with snapshots and features; the training is a process of its own, as users start it."""
    folder = tmp_path_factory.mktemp("cli")
    command = [sys.executable, "-m", "lightning_trak.cli", "fit", *SMALL, "--trainer.max_epochs", "8"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert len(list((folder / "run/snapshots").glob("*.safetensors"))) == 2
    assert "class_path: examples.digits.LitDigits" in (folder / "run/logs/version_0/config.yaml").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for part in ("2/2", "1/2"):
            command_line(patch, "featurize", *SMALL, "--part", part, "--on_nan", "skip", "--overwrite", "true")
        command_line(patch, "score", *SMALL)
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Runs a command in the folder; gives what it printed."""
    monkeypatch.chdir(folder)

    def run(*arguments):
        command_line(monkeypatch, *arguments)
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(run, capsys):
    """Runs a command that must fail as a user error; gives its one line."""

    def refused(*arguments):
        with pytest.raises(SystemExit) as end:
            run(*arguments)
        assert end.value.code == 2
        said = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
        assert len(said) == 1
        assert said[0].startswith(f"lightning-trak {arguments[0]}: error: ")
        return said[0]

    return refused


@pytest.fixture
def scored(folder):
    return load_file(folder / "run/scores.safetensors")["scores"]


def attributed(folder, method):
    """What the method itself gives."""
    data = DigitsData(60, 8, 20)
    method = method(LitDigits(), "run/snapshots", folder / "again", projection=SparseProjection(1024))
    return method.attribute(make_trainer(), data.train_dataloader(), data.predict_dataloader())


def test_scores_are_those_of_the_method(folder, run, refused, scored, tmp_path):
    torch.testing.assert_close(scored, attributed(tmp_path, TRAK))
    top = str(tmp_path / "top.safetensors")
    printed = run("score", *SMALL, "--scores", top, "--top_k", "3", "--largest", "false", "--method", "GradientCosine")
    assert printed.endswith(f"GradientCosine: 8 targets, 60 training examples, in {top}\n")
    expected = attributed(tmp_path, GradientCosine).topk(3, largest=False)
    found = load_file(top)
    torch.testing.assert_close(found["values"], expected.values)
    assert torch.equal(found["indices"], expected.indices)
    printed = run("show", *SMALL, "--scores", top, "--targets", "[7]", "--k", "2")
    assert "opponents" in printed
    assert "proponents" not in printed
    said = refused("evaluate", "--ground_truth", top, "--scores", top)
    assert "holds only the best scores, but all are needed; score without --top_k" in said


def test_rescoring_takes_the_training_data_of_the_data_module(run, tmp_path):
    for name, rescore in (("all", "60"), ("some", "20")):
        run("score", *SMALL, "--scores", str(tmp_path / name), "--top_k", "3", "--rescore", rescore)
    found, expected = (load_file(tmp_path / name) for name in ("some", "all"))
    torch.testing.assert_close(found["values"], expected["values"], rtol=1e-3, atol=1e-3)
    assert torch.equal(found["indices"], expected["indices"])
    assert found["opponent_values"].shape == (8, 3)
    printed = run("show", *SMALL, "--scores", str(tmp_path / "some"), "--k", "2")
    assert "opponents" in printed
    assert "proponents" in printed


def test_evaluate_prints_and_logs(folder, run, refused, scored, tmp_path):
    masks = torch.rand(12, 60, generator=torch.Generator().manual_seed(0)) < 0.5
    exact = scored @ masks.float().T
    noise = torch.randn(8, 12, 3, generator=torch.Generator().manual_seed(1))
    outputs = exact[..., None] + exact.std() * noise
    truth = str(tmp_path / "truth.safetensors")
    save_file({"masks": masks, "outputs": outputs}, truth)
    logger = ["--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", str(tmp_path)]
    printed = run("evaluate", "--ground_truth", truth, *logger)
    lds = LinearDatamodelingScore(masks)
    lds.update(scored, outputs)
    low, high = lds.interval()
    assert f"LDS            {lds.compute():.3f}  (95% interval {low:.3f} to {high:.3f})" in printed
    assert f"noise ceiling  {lds.noise_ceiling():.3f}" in printed
    (metrics,) = tmp_path.rglob("metrics.csv")
    names, values = (line.split(",") for line in metrics.read_text().split())
    assert float(values[names.index("lds")]) == pytest.approx(float(lds.compute()))
    store = MemberStore(tmp_path / "fleet", {"num_targets": 8}, masks)
    for subset in range(12):
        for repetition in range(3):
            store.write(Member(subset, repetition), outputs[:, subset, repetition], {})
    assert run("evaluate", "--ground_truth", str(tmp_path / "fleet"), "--trainer.logger", "false") == printed
    SavedScores(scored, 60, "TRAK", True, masks[[4]]).save("run/of_a_member")
    said = refused("evaluate", "--ground_truth", truth, "--scores", "run/of_a_member")
    assert "1 of 12 were: rows 4 of `masks`" in said
    save_file({"masks": masks}, truth)
    assert "lacks outputs: expected a safetensors file with masks" in refused("evaluate", "--ground_truth", truth)


def test_show_as_a_table(run, scored):
    printed = run("show", *SMALL, "--targets", "0", "5", "--k", "4")
    assert printed == run("show", *SMALL, "--targets", "[0, 5]", "--k", "4")
    data = DigitsData(60, 8)
    for target in (0, 5):
        assert f"target {target}  a {int(data.targets[target][1])}\n" in printed
    rows = re.findall(r"^ +(\d) +(\d+) +([+-]\S+)  a (\d)$", printed, re.MULTILINE)
    assert len(rows) == 16
    expected = torch.cat([scored[[0, 5]].topk(4).indices, scored[[0, 5]].topk(4, largest=False).indices], 1)
    assert [int(index) for _, index, _, _ in rows] == expected.flatten().tolist()
    assert [int(label) for *_, label in rows] == [int(data.train[index][1]) for index in expected.flatten()]
    assert float(rows[0][2]) == pytest.approx(float(scored[0].max()), rel=0.01)


def test_show_with_predictions(run, refused, scored):
    shown = "show", *SMALL, "--targets", "0", "5", "--k", "1"
    printed = run(*shown, "--predictions", "true")
    line = r"^ {10}predicted \d \(\d+\.\d%\), (?:as labelled|labelled \d \(.*%\))\n"
    assert len(re.findall(line, printed, re.MULTILINE)) == 2
    assert re.sub(line, "", printed, flags=re.MULTILINE).endswith(run(*shown))  # a progress bar stands before it


def test_a_new_model_is_no_checkpoint(refused):
    for command in ("featurize", "score"):
        said = refused(command, *SMALL, "--method.checkpoints", "null")
        assert "the model of a command is new, so its current weights are not trained: name trained ones with" in said


def test_a_store_that_is_not_finished_is_named_in_one_line(run, refused, tmp_path):
    own = "--method.store", str(tmp_path / "store")
    assert "TRAK: features in " in run("featurize", *SMALL, *own, "--part", "1/2")
    said = refused("score", *SMALL, *own, "--scores", str(tmp_path / "scores"))
    assert "shards; call featurize again to finish it before scoring" in said


def test_show_as_a_picture(folder, run, refused, scored):
    run("show", *SMALL, "--targets", "[0, 5]", "--out", "run/shown.png")
    assert imread(folder / "run/shown.png").std() > 0.1
    assert 'out must end in .png, .html or .csv, got "shown.gif"' in refused("show", *SMALL, "--out", "shown.gif")


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.images, self.links, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "img":
            self.images.append(attributes.pop("src"))
        self.links += [tag, *attributes] if {"src", "href"} & set(attributes) or tag in ("script", "link") else []

    def handle_data(self, data):
        self.text += data


def test_show_as_a_page(folder, run, scored):
    printed = run("show", *SMALL, "--targets", "[0, 5]", "--k", "4", "--out", "run/shown.html")
    assert printed == "TRAK: 2 targets in run/shown.html\n"
    text = (folder / "run/shown.html").read_text()
    page = Page(text)
    assert len(page.images) == 2 * (1 + 4 + 4)
    assert not page.links
    assert "http" not in text
    assert "url(" not in text
    data = DigitsData(60, 8)
    shown = [data.targets[0], *(data.train[index] for index in scored[0].topk(4).indices)]
    for source, (image, _) in zip(page.images, shown, strict=False):
        kind, encoded = source.split(",")
        assert kind == "data:image/png;base64"
        pixels = torch.tensor(imread(io.BytesIO(b64decode(encoded))))
        torch.testing.assert_close(pixels, image[0], atol=1 / 255, rtol=0)


def test_wrong_labels_in_the_terminal_and_in_files(folder, run, refused, tmp_path):
    data = DigitsData(60, 8, 20)
    method = TRAK(LitDigits(), "run/snapshots", folder / "run/features", projection=SparseProjection(1024))
    expected = wrong_labels(method, make_trainer(), data)
    printed = run("clean", *SMALL)
    assert "TRAK: wrong labels, by suspicion: 60 of 60 training examples\n" in printed
    rows = re.findall(r"^ +(\d+) +(\S+) +(\d)  a (\d)$", printed, re.MULTILINE)
    assert [int(row[0]) for row in rows] == expected.positions[:20].tolist()
    assert [float(row[1]) for row in rows] == pytest.approx(expected.scores[:20].tolist(), rel=1e-3)
    assert all(label == text == str(int(data.train[int(position)][1])) for position, _, label, text in rows)
    out = tmp_path / "suspects.csv"
    assert f"60 rows in {out}" in run("clean", *SMALL, "--out", str(out))
    assert read_positions(out) == expected.positions.tolist()
    run("clean", *SMALL, "--out", str(out), "--k", "6")
    assert read_positions(out) == expected.positions[:6].tolist()
    picture = str(tmp_path / "found.png")
    printed = run("clean", *SMALL, "--wrong", str(out), "--plot", picture, "--k", "1")
    assert printed.endswith(f"the detection curve is drawn in {picture}\n")
    assert "100% of 6 wrong examples are among the first 10%; area under the detection curve 0.950, at best 0.950" in (
        printed
    )
    assert imread(picture).std() > 0.1


def test_harmful_useful_and_repeated_examples(folder, run):
    data = DigitsData(60, 8, 20)
    method = TRAK(LitDigits(), "run/snapshots", folder / "run/features", projection=SparseProjection(1024))
    listed = re.compile(r"^ +(\d+) +\S+ ", re.MULTILINE)
    expected = harmful(method, make_trainer(), data, data)
    printed = run("clean", *SMALL, "--find", "harmful", "--k", "5")
    assert f"TRAK: harmful examples, by mean score: {len(expected)} of 60 training examples" in printed
    assert list(map(int, listed.findall(printed))) == expected.positions[:5].tolist()
    labels = [int(data.train[i][1]) for i in range(60)]
    expected = useful(method, make_trainer(), data, data, labels)
    printed = run("clean", *SMALL, "--find", "useful", "--balanced", "true", "--k", "12")
    assert list(map(int, listed.findall(printed))) == expected.positions[:12].tolist()
    similarity = RepresentationSimilarity(LitDigits(), "run/snapshots")
    expected = duplicates(similarity, make_trainer(), data, threshold=0.9)
    printed = run("clean", *SMALL, "--find", "duplicates", "--threshold", "0.9", "--method", "RepresentationSimilarity")
    assert f"RepresentationSimilarity: duplicates, by cosine: {len(expected)} of 60 training examples" in printed
    assert list(map(int, listed.findall(printed))) == expected.positions[:20].tolist()
    printed = run("clean", *SMALL, "--find", "duplicates", "--threshold", "1", "--method", "KNNShapley")
    assert "duplicates, by cosine: 0 of 60 training examples" in printed


@pytest.mark.parametrize("method", ["EKFACInfluence", "TrainingLoss", "GradientCosine", "KNNShapley"])
def test_every_method_cleans(run, method):
    assert f"{method}: wrong labels, by suspicion: 60 of 60" in run("clean", *SMALL, "--method", method, "--k", "1")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--find", "labels"], "find: expected 'wrong_labels', 'harmful', 'useful', 'duplicates', got labels"),
        (["--out", "out.xlsx"], 'out must end in .csv or .parquet, got "out.xlsx"'),
        (["--plot", "found.png"], "plot needs wrong: a CSV file with a column `position`"),
        (["--plot", "found.pdf", "--wrong", "x.csv"], 'plot must end in .png, got "found.pdf"'),
        (["--wrong", "missing.csv"], 'there is no file "missing.csv"; give a CSV file with a column `position`'),
        (
            ["--wrong", "x.csv", "--find", "useful"],
            "wrong counts the wrong examples that wrong_labels or harmful finds",
        ),
        (["--balanced", "true"], "balanced selects useful examples of each label; find is wrong_labels"),
        (["--k", "0"], "Expected `k` to be a positive integer but got 0"),
        (["--find", "duplicates", "--threshold", "2"], "threshold must be above 0 and up to 1, got 2.0"),
        (["--find", "useful", "--method", "TrainingLoss"], "TrainingLoss has no scores for a validation set"),
        (["--find", "duplicates", "--method", "TrainingLoss"], "TrainingLoss has no vectors to compare"),
        (["--out", "s3://bucket/out.csv"], "a file must be on a disk, local or mounted"),
    ],
)
def test_what_clean_refuses(refused, options, said):
    assert said in refused("clean", *SMALL, *options)


def test_methods_that_have_no_features_do_not_featurize(refused):
    said = refused("score", *SMALL, "--method", "EKFACInfluence")
    assert said.endswith("score needs a method over features, such as TRAK, and EKFACInfluence has none")
    assert "featurize needs a method over features" in refused("featurize", *SMALL, "--method", "TrainingLoss")


def test_parquet_is_refused_before_the_work(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    said = refused("clean", *SMALL, "--out", "out.parquet")
    assert 'needs pyarrow: pip install "lightning-trak[parquet]"' in said


def test_the_data_must_be_those_that_were_scored(refused, scored):
    said = refused("show", *SMALL, "--data.num_train", "59")
    assert "are of 8 targets and 60 training examples, the data hold 8 and 59" in said
    said = refused("show", *SMALL, "--targets", "0", "8")
    assert said.endswith("there is no target 8: they are numbered from 0 to 7")


def test_other_data_of_the_same_size_are_warned_of(run, scored, tmp_path):
    saved, other = SavedScores.load("run/scores.safetensors"), str(tmp_path / "other")
    saved._replace(data="0" * 64).save(other)
    with pytest.warns(UserWarning, match="gives other training data than those that were scored"):
        run("show", *SMALL, "--scores", other)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the data module gives other")
        run("show", *SMALL)


def test_sections_and_files_that_are_missing(refused):
    said = refused("featurize", "--data", "examples.digits_data.DigitsData")
    assert "featurize needs `model`: give a class with --model" in said
    assert "show needs `data`: " in refused("show")
    said = refused("show", *SMALL, "--scores", "none.safetensors")
    assert 'no file "none.safetensors"; run `lightning-trak score` first' in said
    said = refused("score", *SMALL, "--method.checkpoints", "missing")
    assert '"missing" is not a directory that TRAKCallback has written: it does not exist' in said
    said = refused("score", *SMALL, "--method.checkpoints", "[a.ckpt]")
    assert "a.ckpt" in said


def test_a_store_made_with_another_seed(refused, scored):
    assert "was made with seed 0, this TRAK has seed 7" in refused("score", *SMALL, "--method.seed", "7")


def test_an_internal_error_keeps_its_traceback(run, monkeypatch, scored):
    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(SavedScores, "load", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run("show", *SMALL)


def test_a_variable_shows_the_traceback(run, monkeypatch):
    monkeypatch.setenv("LIGHTNING_TRAK_TRACEBACK", "1")
    with pytest.raises(ValueError, match="show needs `data`"):
        run("show")
    with pytest.raises(ArgumentError, match="unrecognized arguments: --topk"):
        run("score", "--topk", "3")
