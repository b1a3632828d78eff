"""Wrong labels, harmful and useful examples, against the scores themselves."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import TRAK, GradientDot
from lightning_trak.cleaning import harmful, useful, wrong_labels
from lightning_trak.methods import (
    BM25,
    DataShapley,
    Explicit,
    InfluenceFunction,
    LabelStatistic,
    RepresentationSimilarity,
    TrainingLoss,
)
from lightning_trak.methods.base import MatrixMethod
from lightning_trak.outputs import DiffusionMean, DirectionOutput, NegativeLoss, RegressionOutput
from lightning_trak.projections import SparseProjection
from lightning_trak.scoring import Groups
from tests.lit import TARGETS, TRAIN, LitNet, make_model, make_trainer


class Given(MatrixMethod):
    """Scores that are given."""

    def __init__(self, scores):
        self.scores = torch.tensor(scores)

    def matrix(self, trainer, train, targets):
        return self.scores

    def label_suspicion(self, trainer, train):
        return self.scores[0]


def data(size):
    return TensorDataset(torch.zeros(size, 2), torch.arange(size))


def find(function, scores, *arguments, **options):
    method = Given(scores)
    return function(method, make_trainer(), data(len(scores[0])), *arguments, **options)


def test_the_most_suspicious_first_and_the_first_of_equal_ones():
    found = find(wrong_labels, [[1.0, 3.0, 1.0, 3.0, 2.0]])
    assert found.positions.tolist() == [1, 3, 4, 0, 2]
    assert found.scores.tolist() == [3, 3, 2, 1, 1]
    assert (found.what, found.measure, found.groups) == ("wrong labels", "suspicion", None)
    assert [row[-1] for row in found.table().rows] == [1, 3, 4, 0, 2]  # labels


def test_harmful_examples_have_a_negative_mean():
    found = find(harmful, [[1.0, -2.0, 0.0, -1.0, 0.5], [1.0, -2.0, 0.0, -3.0, -1.5]], data(2))
    assert found.positions.tolist() == [1, 3, 4]  # of equal ones, the first
    assert found.scores.tolist() == [-2, -2, -0.5]
    none = find(harmful, [[1.0, 0.0]], data(1))
    assert len(none) == 0
    assert none.table().rows == []


def test_useful_examples():
    found = find(useful, [[1.0, -2.0, 0.0, 4.0], [2.0, -2.0, 0.0, 2.0]], data(2))
    assert found.positions.tolist() == [3, 0, 2, 1]
    assert found.scores.tolist() == [3, 1.5, 0, -2]


@pytest.mark.parametrize("groups", [["a", "a", "b", "a", None, "b", "c"], Groups(["a", "a", "b", "a", None, "b", "c"])])
def test_as_many_of_each_group(groups):
    found = find(useful, [[7.0, 6.0, 1.0, 5.0, 9.0, 2.0, -4.0]], data(1), groups=groups)
    assert found.positions.tolist() == [0, 5, 6, 1, 2, 3]  # the best of a, b, c; the second of a, b; the third of a
    assert found.groups == ("a", "b", "c", "a", "b", "a")
    assert found.scores.tolist() == [7, 2, -4, 6, 1, 5]


def test_groups_by_number_of_a_random_matrix():
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(3, 60, generator=generator), torch.randint(0, 4, (60,), generator=generator)
    found = find(useful, scores.tolist(), data(3), groups=labels)
    mean = scores.double().mean(0)
    for k in (4, 8, 20):
        chosen = found[:k].positions
        for label in range(4):
            inside = (labels == label).nonzero().flatten()
            expected = inside[mean[inside].argsort(descending=True)[: k // 4]]
            assert set(expected.tolist()) == {i for i in chosen.tolist() if labels[i] == label}
    assert sorted(found.positions.tolist()) == list(range(60))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["features", "influence"])
def test_scores_are_the_means_of_the_matrix(tmp_path, checkpoints, kind):
    def make(name):
        if kind == "influence":
            return InfluenceFunction(make_model(), checkpoints, solver=Explicit())
        return TRAK(make_model(), checkpoints, tmp_path / name, projection=SparseProjection(32), dtype="float32")

    mean = make("one").attribute(make_trainer(), TRAIN, TARGETS).double().mean(0)
    loader, targets = DataLoader(TRAIN, batch_size=6, shuffle=True), DataLoader(TARGETS, batch_size=4)
    found = useful(make("two"), make_trainer(), loader, targets)
    torch.testing.assert_close(found.scores, mean[found.positions], rtol=1e-4, atol=1e-6)
    assert (found.scores.diff() <= 0).all()
    lowest = harmful(make("two"), make_trainer(), loader, targets)
    assert len(lowest) == int((mean < 0).sum()) > 0
    torch.testing.assert_close(lowest.scores, mean[lowest.positions], rtol=1e-4, atol=1e-6)
    assert (lowest.scores.diff() >= 0).all()


class Module(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TRAIN, batch_size=10)

    def predict_dataloader(self):
        return DataLoader(TARGETS, batch_size=10)


class Two(Module):
    def predict_dataloader(self):
        return [DataLoader(TARGETS), DataLoader(TARGETS)]


def test_data_modules(tmp_path, checkpoints):
    method = TRAK(make_model(), checkpoints, tmp_path, projection=SparseProjection(32))
    plain = useful(method, make_trainer(), TRAIN, TARGETS)
    found = useful(method, make_trainer(), Module(), Module())
    assert torch.equal(found.positions, plain.positions)
    with pytest.raises(ValueError, match="expected one set of targets, got 2 loaders"):
        harmful(method, make_trainer(), TRAIN, Two())


def test_outputs_that_are_not_better_when_higher(tmp_path, checkpoints):
    output = RegressionOutput(lambda module, batch: module(batch[0])[:, 0])
    options = {"projection": SparseProjection(32), "output": output}
    for method in (
        TRAK(make_model(), checkpoints, tmp_path / "trak", **options),
        InfluenceFunction(make_model(), checkpoints, output=output),
        GradientDot(make_model(), checkpoints, tmp_path / "dot", effect_on="output", **options),
    ):
        with pytest.raises(ValueError, match=r"the loss can rise with RegressionOutput, so that a mean .* use TracIn"):
            useful(method, make_trainer(), TRAIN, TARGETS)
    assert not (tmp_path / "trak").exists()
    loss = GradientDot(make_model(), checkpoints, tmp_path / "dot", **options)
    assert len(useful(loss, make_trainer(), TRAIN, TARGETS)) == 50
    fits = NegativeLoss(lambda module, batch: (module(batch[0])[:, 0] - batch[1]) ** 2)
    method = TRAK(make_model(), checkpoints, tmp_path / "fits", projection=SparseProjection(32), output=fits)
    assert len(useful(method, make_trainer(), TRAIN, TARGETS)) == 50


def test_similar_examples_are_not_harmful(checkpoints):
    alike = RepresentationSimilarity(make_model(), checkpoints, similarity="l2")  # all scores are negative
    for method in (alike, BM25(0)):
        with pytest.raises(ValueError, match=r"say how alike examples are, not what training on them does"):
            harmful(method, make_trainer(), TRAIN, TARGETS)
    assert len(useful(alike, make_trainer(), TRAIN, TARGETS)) == 50  # the most similar first


def test_a_mean_prediction_is_not_better_when_higher(tmp_path, checkpoints):
    output = DiffusionMean(torch.linspace(0.99, 0.01, 10), [2])
    for effect_on in ("output", "loss"):
        method = GradientDot(make_model(), checkpoints, tmp_path, output=output, effect_on=effect_on)
        for function in (harmful, useful):
            with pytest.raises(ValueError, match="DiffusionMean says how far a prediction moves, not whether it gets"):
                function(method, make_trainer(), TRAIN, TARGETS)


def test_utilities_that_are_not_better_when_higher():
    class Regression(LitNet):
        def configure_model_output(self):
            return RegressionOutput(lambda module, batch: module(batch[0])[:, 0])

    def never():
        raise AssertionError("trained")

    with pytest.raises(ValueError, match=r"the loss can rise with RegressionOutput.* a utility= that is higher"):
        harmful(DataShapley(Regression, never), make_trainer(), TRAIN, TARGETS)
    with pytest.raises(AssertionError, match="trained"):
        harmful(DataShapley(LitNet, never), make_trainer(), TRAIN, TARGETS)


def test_a_direction_is_not_better_when_higher():
    method = Given([[1.0]])
    method.output = DirectionOutput("body", torch.ones(3))
    with pytest.raises(ValueError, match="DirectionOutput says how far activations point in a direction, not whether"):
        harmful(method, make_trainer(), data(1), data(1))


def test_what_is_no_method():
    for function in (harmful, useful):
        with pytest.raises(TypeError, match=r"by a method that scores targets, such as .*, got a TrainingLoss"):
            function(TrainingLoss(make_model()), make_trainer(), TRAIN, TARGETS)
    with pytest.raises(TypeError, match=r"such as .*, got the class TRAK"):
        wrong_labels(TRAK, make_trainer(), TRAIN)


@pytest.mark.parametrize(
    ("scores", "match"),
    [
        ([[1.0, float("nan"), 2.0]], "the number of Given for training example 1 is nan, not finite"),
        ([[1.0, 2.0, float("inf")]], "training example 2 is inf"),
    ],
)
def test_numbers_that_are_not_finite(scores, match):
    for function in (lambda *rest: find(wrong_labels, *rest), lambda *rest: find(useful, *rest, data(1))):
        with pytest.raises(ValueError, match=match):
            function(scores)


def test_methods_of_another_size():
    class Wrong(LabelStatistic):
        def label_suspicion(self, trainer, train):
            return torch.zeros(3, 1)

    with pytest.raises(ValueError, match=r"expected 3 numbers from Wrong, one for each training example, got \(3, 1\)"):
        wrong_labels(Wrong(), make_trainer(), data(3))
    with pytest.raises(ValueError, match=r"^BM25 does not say whether a label is wrong"):
        wrong_labels(BM25(0), make_trainer(), TRAIN)


@pytest.mark.parametrize(
    ("groups", "match"),
    [
        (["a"] * 4, "groups has 4 labels, and there are 3 training examples"),
        (["a"], "groups has 1 label, and there are 3 training examples"),
        (Groups(["a", "b", "a"], weights=[1, 2, 1]), "groups have weights, which say nothing about how many"),
        ([None] * 3, "there are no groups"),
    ],
)
def test_groups_that_do_not_fit(groups, match):
    with pytest.raises(ValueError, match=match):
        find(useful, [[1.0, 2.0, 3.0]], data(1), groups=groups)


def test_the_model_and_random_state_are_as_they_were(tmp_path, checkpoints):
    model, trainer = make_model(), make_trainer()
    model.train()
    before, state = {name: part.clone() for name, part in model.state_dict().items()}, torch.get_rng_state()
    wrong_labels(TrainingLoss(model, checkpoints), trainer, TRAIN)
    harmful(TRAK(model, checkpoints, tmp_path, projection=SparseProjection(32)), trainer, TRAIN, TARGETS)
    assert model.training
    assert all(torch.equal(part, before[name]) for name, part in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert trainer.lightning_module is None


def test_without_a_trainer_on_one_device():
    model = make_model()
    found = wrong_labels(TrainingLoss(model), None, TRAIN)
    expected = wrong_labels(TrainingLoss(model, [model.state_dict()]), make_trainer(accelerator="auto"), TRAIN)
    assert torch.equal(found.positions, expected.positions)
