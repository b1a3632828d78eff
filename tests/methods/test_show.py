"""show: targets, their strongest examples and what the model predicts."""

import csv
import re
import sys
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_trak import TRAK, GradientDot
from lightning_trak.methods import EKFACInfluence, RandomScores, RepresentationSimilarity
from lightning_trak.outputs import ClassificationMargin, NegativeLoss, RegressionOutput
from lightning_trak.projections import SparseProjection
from lightning_trak.reporting.items import describe_item
from lightning_trak.scoring import BothEnds, TopK
from tests.graphs import Data
from tests.lit import TARGETS, TRAIN, make_checkpoints, make_model, make_trainer

CHECKPOINTS = make_checkpoints(2)
SCORES = torch.randn(len(TARGETS), len(TRAIN), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def trak(tmp_path):
    """It has no store, which nothing here needs."""
    return TRAK(make_model(), CHECKPOINTS, tmp_path / "store", projection=SparseProjection(8))


def probabilities():
    model, found = make_model().eval(), []
    for weights in CHECKPOINTS:
        model.load_state_dict(weights)
        with torch.no_grad():
            found.append(model(TARGETS.tensors[0]).softmax(1))
    return torch.stack(found).mean(0)


def test_a_table_with_predictions_in_a_terminal(trak, capsys):
    trak.show(SCORES, TRAIN, DataLoader(TARGETS, batch_size=3), shown=[4, 0], k=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"target 4  label: {TARGETS[4][1]}"
    for number, start in ((4, 0), (0, 11)):
        expected, label = probabilities()[number], int(TARGETS[number][1])
        best = int(expected.argmax())
        more = ", as labelled" if best == label else f", labelled {label} ({expected[label]:.1%})"
        assert lines[start + 1].strip() == f"predicted {best} ({expected[best]:.1%}){more}"
        order = SCORES[number].argsort(descending=True)
        ranks = [int(line.split()[1]) for line in lines[start + 4 : start + 6]]
        assert ranks == order[:2].tolist()
        ranks = [int(line.split()[1]) for line in lines[start + 8 : start + 10]]
        assert ranks == order.flip(0)[:2].tolist()


def test_training_data_may_be_a_list_of_objects(trak, capsys):
    graphs = [Data(x=inputs, y=label) for inputs, label in TRAIN]
    trak.show(SCORES, graphs, TARGETS, shown=[0], k=1, describe=lambda item: type(item).__name__)
    assert re.search(r"1 +\d+ +[+]\S+  Data\n", capsys.readouterr().out)


def test_the_best_of_both_ends_or_of_one(trak, capsys):
    top, low = (TopK(*SCORES.topk(6, largest=largest)) for largest in (True, False))
    trak.show(SCORES, TRAIN, TARGETS)
    expected = capsys.readouterr().out
    assert expected.count("target ") == 5
    trak.show(BothEnds(top, low), TRAIN, TARGETS)
    assert capsys.readouterr().out == expected
    trak.show(low, TRAIN, TARGETS, largest=False, predictions=False)
    shown = capsys.readouterr().out
    assert "proponents" not in shown
    assert "predicted" not in shown
    with pytest.raises(ValueError, match=r"cannot show these scores: its scores do not have the highest first"):
        trak.show(low, TRAIN, TARGETS)


def test_the_right_label_is_said_once(trak, capsys):
    labels = probabilities().argmax(1)
    trak.show(SCORES, TRAIN, TensorDataset(TARGETS.tensors[0], labels), shown=[0])
    assert re.search(r"predicted \d \(\d+\.\d%\), as labelled\n", capsys.readouterr().out)


def test_targets_without_labels_and_named_classes(trak, capsys):
    output = ClassificationMargin(labels="predicted", classes=["cat", "dog", "fox"])
    trak.show(SCORES, TRAIN, TensorDataset(TARGETS.tensors[0]), shown=[3], output=output)
    best = int(probabilities()[3].argmax())
    assert f"predicted {['cat', 'dog', 'fox'][best]} ({probabilities()[3, best]:.1%})\n" in capsys.readouterr().out


def test_a_single_target_of_a_model_that_squeezes(tmp_path, capsys):
    """It would take a batch of one for an example without a batch."""

    class Squeezing(type(make_model())):
        def forward(self, inputs):
            return super().forward(inputs).squeeze()

    model = Squeezing()
    model.load_state_dict(make_model().state_dict())
    TRAK(model, store=tmp_path / "s").show(SCORES, TRAIN, TARGETS, shown=[2], k=1)
    assert "predicted" in capsys.readouterr().out


def test_regression(tmp_path, capsys):
    model = nn.Linear(6, 1)
    truth = torch.arange(13.0)
    trak = TRAK(model, store=tmp_path / "s", output=RegressionOutput())
    trak.show(SCORES, TRAIN, TensorDataset(TARGETS.tensors[0], truth), shown=[7], k=1)
    predicted = float(model(TARGETS.tensors[0])[7])
    assert f"predicted {predicted:.4g}, the truth is 7\n" in capsys.readouterr().out
    trak.show(SCORES, TRAIN, TensorDataset(TARGETS.tensors[0]), shown=[7], k=1)
    assert f"predicted {predicted:.4g}\n" in capsys.readouterr().out


def test_outputs_and_methods_without_predictions(tmp_path, capsys):
    model = make_model()
    TRAK(model, store=tmp_path / "s", output=NegativeLoss(lambda *_: None)).show(SCORES, TRAIN, TARGETS, k=1)
    RandomScores().show(SCORES, TRAIN, TARGETS, k=1)
    assert "predicted" not in capsys.readouterr().out
    EKFACInfluence(model, parameters="head.*").show(SCORES, TRAIN, TARGETS, k=1)
    assert capsys.readouterr().out.count("predicted") == 5


def test_a_table_in_a_file(trak, tmp_path):
    trak.show(SCORES, TRAIN, TARGETS, shown=torch.tensor([3, 7]), k=2, out=tmp_path / "top.csv")
    with open(tmp_path / "top.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [(row["target"], row["group"], row["rank"]) for row in rows]
    assert names == [(t, g, r) for t in ("3", "7") for g in ("proponents", "opponents") for r in ("1", "2")]
    best = SCORES[3].topk(2)
    assert [int(row["position"]) for row in rows[:2]] == best.indices.tolist()
    assert [float(row["score"]) for row in rows[:2]] == best.values.tolist()
    assert rows[0]["prediction"].startswith("predicted ")
    assert rows[0]["target_text"] == describe_item(TARGETS[3])
    assert rows[0]["text"] == describe_item(TRAIN[int(best.indices[0])])


def test_nothing_of_the_users_changes(trak, capsys):
    trainer, model = make_trainer(), trak.model.train()
    before, state = torch.get_rng_state(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trak.show(SCORES, TRAIN, TARGETS, trainer=trainer)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert "|" not in capsys.readouterr().err  # no progress bar


class Clusters(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TRAIN, batch_size=10, shuffle=True)

    def predict_dataloader(self):
        return DataLoader(TARGETS, batch_size=10)

    def describe(self, item):
        return f"cluster {item[1]}"


def test_a_data_module_describes_its_items(trak, capsys):
    trak.show(SCORES, Clusters(), Clusters(), shown=[1], k=1)
    assert f"target 1  cluster {TARGETS[1][1]}\n" in capsys.readouterr().out
    trak.show(SCORES, Clusters(), Clusters(), shown=[1], k=1, describe=lambda item: "an item")
    assert "target 1  an item\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("scores", "options", "error", "reason"),
    [
        (SCORES[:, :9], {}, ValueError, "the scores have 9 columns, and train has 50 examples: give"),
        (SCORES[:3], {}, ValueError, "the scores are of 3 targets and 50 training examples, the data hold 13 and 50"),
        (SCORES * torch.nan, {}, ValueError, "scores of target 0 are NaN"),
        ([SCORES, SCORES], {}, TypeError, r"expected the scores of one set of targets, .* got a list"),
        (SCORES, {"shown": [13]}, IndexError, "there is no target 13"),
        (SCORES, {"shown": torch.arange(13) < 2}, TypeError, "by their positions, not by a mask"),
        (SCORES, {"shown": [True, False]}, TypeError, "by their positions, not by a mask"),
        (SCORES, {"k": 0}, ValueError, "`k` to be a positive integer"),
        (SCORES, {"out": "a.pdf"}, ValueError, r"out must end in \.png, \.html or \.csv"),
        (SCORES, {"out": "a.png"}, ValueError, "holds no image"),
        (SCORES, {"describe": lambda item: 3}, TypeError, "describe must return a str"),
    ],
)
def test_what_does_not_fit_is_refused(trak, scores, options, error, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=reason):
        trak.show(scores, TRAIN, TARGETS, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_store_knows_how_many_examples_there_were(tmp_path):
    trak = TRAK(make_model(), store=tmp_path / "s", projection=SparseProjection(8))
    trak.featurize(data=TRAIN)
    top = trak.score(data=TARGETS, top_k=3)
    with pytest.raises(ValueError, match="and 50 training examples, the data hold 13 and 60"):
        trak.show(top, torch.utils.data.ConcatDataset([TRAIN, TensorDataset(*TRAIN[:10])]), TARGETS)
    with torch.no_grad():
        trak.model.head.weight.zero_()
    with pytest.raises(ValueError, match="made of other weights than the model has now"):
        trak.show(top, TRAIN, TARGETS)
    trak.show(top, TRAIN, TARGETS, predictions=False)


def test_pages_and_notebooks_hold_the_same(trak, tmp_path, monkeypatch):
    trak.show(SCORES, TRAIN, TARGETS, out=tmp_path / "a.html", shown=[0, 1])
    page = (tmp_path / "a.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert page.count("<section") == 2
    assert page.count("predicted ") == 2
    assert "the trained model predicts for it; of several runs" in page

    shown = []
    display = SimpleNamespace(display=lambda data, raw: shown.append((data, raw)))
    kernel = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: kernel, display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    trak.show(SCORES, TRAIN, TARGETS, shown=[0, 1])
    ((data, raw),) = shown
    assert raw
    assert data["text/html"] in page
    assert data["text/plain"].startswith("target 0  label: ")


def test_a_terminal_with_ipython_gets_a_table(trak, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace()))
    trak.show(SCORES, TRAIN, TARGETS, shown=[0])
    assert capsys.readouterr().out.startswith("target 0")


class Split(L.LightningDataModule):
    """Draws another split each time that a Trainer sets it up, unless the generator has a seed."""

    def __init__(self, seed=None):
        super().__init__()
        self.seed = seed

    def setup(self, stage):
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        self.train, self.targets = random_split(TRAIN, [40, 10], generator)

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=10)

    def predict_dataloader(self):
        return DataLoader(self.targets, batch_size=10)


@pytest.mark.parametrize("seed", [None, 0])
def test_a_data_module_that_draws_other_data_than_were_scored(tmp_path, seed, recwarn):
    data, trainer = Split(seed), make_trainer()
    data.setup("fit")
    trak = TRAK(make_model(), CHECKPOINTS, tmp_path / "store", projection=SparseProjection(8))
    trak.featurize(trainer, data.train_dataloader())
    scores = trak.score(trainer, data.predict_dataloader())
    trainer.predict(trak.scorer(), datamodule=data)
    trak.show(scores, data, data, predictions=False)
    told = [str(warning.message) for warning in recwarn if "data module gives other" in str(warning.message)]
    assert len(told) == (seed is None)


def test_a_number_of_targets_in_place_of_positions(trak):
    with pytest.raises(TypeError, match=r"targets are named by a list of positions, such as \[3\], got 3"):
        trak.show(SCORES, TRAIN, TARGETS, shown=3)


def test_the_meaning_of_scores_is_that_of_the_method(tmp_path):
    model, options = make_model(), {"projection": SparseProjection(8)}
    trak = TRAK(model, store=tmp_path, **options)
    dot = GradientDot(model, store=tmp_path, **options)
    alike = RepresentationSimilarity(model)
    assert "positive score raises the model's output" in trak.meaning
    assert "positive score lowers the model's loss" in dot.meaning
    assert GradientDot(model, store=tmp_path, effect_on="output", **options).meaning == trak.meaning
    out = tmp_path / "shown.html"
    alike.show(alike.attribute(make_trainer(), TRAIN, TARGETS), TRAIN, TARGETS, out=out, predictions=False)
    assert "how alike the example and the target are" in out.read_text()
    assert "raise" not in out.read_text()


def test_a_dataset_whose_items_need_a_collate_function(capsys):
    class Items:
        def __len__(self):
            return len(TARGETS)

        def __getitem__(self, position):
            return {"inputs": torch.zeros(position + 1), "name": f"item {position}"}

    method = EKFACInfluence(make_model(), CHECKPOINTS)
    with pytest.warns(
        UserWarning, match=r"no predictions are shown: .* keyword argument 'name'.* give the DataLoader of"
    ):
        method.show(SCORES, TRAIN, Items(), shown=[2, 3], k=1)
    assert "target 2  name: item 2" in capsys.readouterr().out
    with pytest.raises(ValueError, match="give the DataLoader of the targets"):
        method.describe_predictions(make_trainer(), Items(), [1, 2])
    with pytest.raises(TypeError, match="keyword argument 'name'"):  # a loader says how batches are made
        method.show(SCORES, TRAIN, DataLoader(Items(), batch_size=2), shown=[2, 3], k=1)


def test_scores_of_some_examples_alone(trak, capsys):
    some = torch.utils.data.Subset(TRAIN, [7, 2, 3])
    trak.featurize(make_trainer(), TRAIN)
    for scores in (trak.score(make_trainer(), TARGETS, train=some), SCORES[:, [7, 2, 3]]):
        trak.show(scores, some, TARGETS, shown=[0], k=1, predictions=False)
        assert f"{int(scores[0].argmax())}  " in capsys.readouterr().out
        with pytest.raises(
            ValueError, match=r"the scores have 3 columns, and train has 50 examples: give the examples"
        ):
            trak.show(scores, TRAIN, TARGETS)
