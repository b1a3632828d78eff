"""How suspicious each label is, by every method, against what it is by definition."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_trak import TRAK, GradientCosine, GradientDot, Metagradient, TracIn, methods
from lightning_trak.methods import (
    BM25,
    ConjugateGradient,
    DataShapley,
    EKFACInfluence,
    EmpiricalInfluence,
    ExactKernel,
    Explicit,
    InfluenceFunction,
    KNNShapley,
    LabelStatistic,
    RandomScores,
    RepresentationSimilarity,
    TrainingLoss,
)
from lightning_trak.methods.baselines import knn_shapley, similarity
from lightning_trak.methods.baselines.knn_shapley import knn_shapley_values
from lightning_trak.outputs import (
    ClassificationMargin,
    ContrastiveMargin,
    DiffusionSquare,
    DirectionOutput,
    RegressionOutput,
)
from lightning_trak.projections import IdentityProjection, SparseProjection
from tests.lit import TRAIN, LitNet, make_data, make_model, make_trainer
from tests.methods.metagradients import DATA
from tests.replay.runs import Net
from tests.replay.runs import train as train_recorded

SMALL = {"projection": SparseProjection(32), "dtype": "float32"}
AS_IT_IS = {"temperature": 1, "lag": 1}


def test_every_method_says_or_refuses():
    found = [getattr(methods, name) for name in methods.__all__]
    found = [one for one in found if issubclass(one, LabelStatistic) and not inspect.isabstract(one)]
    silent = [one for one in found if one.label_suspicion is methods.Method.label_suspicion]
    assert silent == [BM25]
    assert len(found) > 12
    with pytest.raises(ValueError, match=r"^BM25 does not say whether a label is wrong; use a method that does"):
        BM25(0).label_suspicion(make_trainer(), TRAIN)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda model, weights, path: GradientDot(model, weights, path, **SMALL),
        lambda model, weights, path: TracIn(model, weights, path, learning_rates=[0.3, 0.1], **SMALL),
    ],
    ids=["GradientDot", "TracIn"],
)
def test_self_influence_is_the_diagonal(tmp_path, checkpoints, make):
    trainer = make_trainer()
    expected = make(make_model(), checkpoints, tmp_path / "one").attribute(trainer, TRAIN, TRAIN).diagonal()
    for number, data in enumerate((TRAIN, DataLoader(TRAIN, batch_size=7, shuffle=True))):
        found = make(make_model(), checkpoints, tmp_path / f"two{number}").label_suspicion(trainer, data)
        torch.testing.assert_close(found, expected.abs(), rtol=2e-4, atol=1e-5 * float(expected.abs().max()))


def mean_outputs(model, weights, output, data):
    """The mean over checkpoints of the output at each example."""
    found = []
    for state in weights:
        model.load_state_dict(state)
        found.append(output.output(model.eval(), data.tensors).detach().double())
    return torch.stack(found).mean(0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda model, weights, path: TRAK(model, weights, path, **SMALL, **AS_IT_IS),
        lambda model, weights, path: TRAK(model, weights, path, projection=SparseProjection(200), **AS_IT_IS),
        lambda model, weights, path: ExactKernel(model, weights, path, **AS_IT_IS),
        lambda model, weights, path: EKFACInfluence(model, weights, parameters=["first.*", "head.*"]),
        lambda model, weights, path: InfluenceFunction(model, weights, solver=Explicit()),
    ],
    ids=["TRAK", "TRAK with more features than examples", "ExactKernel", "EKFAC", "Explicit"],
)
def test_a_newton_step_takes_the_example_away(tmp_path, checkpoints, make):
    trainer, output = make_trainer(), ClassificationMargin()
    own = make(make_model(), checkpoints, tmp_path / "one").attribute(trainer, TRAIN, TRAIN).diagonal()
    expected = output.loss(mean_outputs(make_model(), checkpoints, output, TRAIN) - own)
    for number, data in enumerate((TRAIN, DataLoader(TRAIN, batch_size=7, shuffle=True))):
        found = make(make_model(), checkpoints, tmp_path / f"two{number}").label_suspicion(trainer, data)
        torch.testing.assert_close(found.double(), expected, rtol=2e-4, atol=1e-5)


def test_the_convergence_is_that_of_the_training_examples(checkpoints):
    few, trainer = Subset(TRAIN, range(6)), make_trainer()
    method = InfluenceFunction(make_model(), checkpoints[:1], solver=ConjugateGradient(tolerance=1e-7))
    found = method.label_suspicion(trainer, few)
    assert [len(block.iterations) for block in method.convergence] == [6]
    own, output = method.attribute(trainer, few, few).diagonal(), ClassificationMargin()
    outputs = mean_outputs(make_model(), checkpoints[:1], output, TensorDataset(*TRAIN[:6]))
    torch.testing.assert_close(found.double(), output.loss(outputs - own), rtol=1e-3, atol=1e-4)


def test_of_least_squares_it_is_the_deleted_residual(tmp_path):
    """Leaving an example out takes r / (1 - h) in place of r, which is r + h r at first order in the leverage h."""
    generator = torch.Generator().manual_seed(0)
    inputs, labels = (torch.randn(400, *shape, generator=generator, dtype=torch.float64) for shape in ((3,), ()))
    labels[7] += 5
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(inputs, labels.unsqueeze(1)).solution.T)
    residuals = (model(inputs).squeeze(1) - labels).detach()
    leverages = (inputs @ torch.linalg.inv(inputs.T @ inputs) * inputs).sum(1)
    settings = {"projection": IdentityProjection(), "damping": 0.0, "dtype": "float64"}
    method = TRAK(model, None, tmp_path, output=RegressionOutput(), **settings)
    found = method.label_suspicion(None, TensorDataset(inputs, labels))
    torch.testing.assert_close(found, 0.5 * (residuals * (1 + leverages)) ** 2)
    torch.testing.assert_close(found, 0.5 * (residuals / (1 - leverages)) ** 2, rtol=5e-3, atol=0)
    assert int(found.argmax()) == 7


def test_rare_examples_with_right_labels_are_less_suspicious_than_wrong_labels(tmp_path):
    """Rare ones have the highest self-influence: the model is as sure of them as of others, but only by themselves."""
    generator = torch.Generator().manual_seed(0)
    inputs, labels = 0.5 * torch.randn(200, 8, generator=generator), torch.arange(200) % 2
    inputs[:, 0] += 2 - 4 * labels
    wrong, rare = torch.arange(0, 20), torch.arange(20, 40)
    inputs[rare] *= 4
    inputs[rare, 0] = 0.5 - 1.0 * labels[rare]
    labels[wrong] = 1 - labels[wrong]
    model = nn.Linear(8, 2)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200)

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(model(inputs), labels)
        value.backward()
        return value

    optimizer.step(loss)
    method = TRAK(model, None, tmp_path, output=ClassificationMargin())
    suspicion = method.label_suspicion(None, TensorDataset(inputs, labels))
    assert torch.isin(suspicion.topk(20).indices, wrong).sum() > 15
    assert torch.isin(method.self_influence().topk(20).indices, wrong).sum() < 10


def test_an_output_that_does_not_determine_the_loss_is_refused(checkpoints, tmp_path):
    output = DiffusionSquare(torch.linspace(0.9, 0.1, 4), [1])
    for method in (
        TRAK(make_model(), checkpoints, tmp_path, output=output),
        EKFACInfluence(make_model(), checkpoints, output=output),
    ):
        with pytest.raises(TypeError, match="loss is not a function of DiffusionSquare"):
            method.label_suspicion(None, TRAIN)


@pytest.mark.parametrize("kind", [TRAK, ExactKernel])
def test_labels_that_a_model_has_memorised(tmp_path, kind):
    """At a temperature above 1, right labels of which the model is sure are more suspicious than the wrong ones."""
    centres, labels = 2 * torch.randn(4, 10), torch.arange(200) % 4
    inputs, wrong = centres[labels] + torch.randn(200, 10), torch.arange(0, 200, 10)
    labels[wrong] = (labels[wrong] + 1 + torch.arange(20) % 3) % 4
    model, checkpoints = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 4)), []
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(400):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        if step in (20, 399):
            checkpoints.append(copy.deepcopy(model.state_dict()))
    assert (model(inputs).argmax(1) == labels).all()
    method = kind(model, checkpoints, tmp_path, output=ClassificationMargin())
    suspicion = method.label_suspicion(None, TensorDataset(inputs, labels))
    assert torch.isin(suspicion.topk(20).indices, wrong).sum() > 15
    assert torch.isin(method.self_influence().topk(20).indices, wrong).sum() < 5


class LitScalar(LitNet):
    """A regression, whose scores have the sign of the residual."""

    def forward(self, inputs):
        return super().forward(inputs).sum(1)

    def configure_model_output(self):
        return RegressionOutput()


@pytest.mark.parametrize("kind", ["influence", "features"])
def test_a_residual_has_a_sign_and_suspicion_has_none(tmp_path, kind):
    model = LitScalar().eval()
    data = TensorDataset(TRAIN.tensors[0], torch.randn(50, generator=torch.Generator().manual_seed(0)))
    weights = [model.state_dict()]
    method = (
        InfluenceFunction(model, weights, solver=Explicit())
        if kind == "influence"
        else TRAK(model, weights, tmp_path, **SMALL, **AS_IT_IS)
    )
    own = method.attribute(make_trainer(), data, data).diagonal()
    assert (own < 0).any()
    assert (own > 0).any()
    found = method.label_suspicion(make_trainer(), data)
    outputs = mean_outputs(model, weights, RegressionOutput(), data)
    torch.testing.assert_close(found.double(), 0.5 * (outputs.abs() + own.abs()) ** 2, rtol=2e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("bytes_of_targets", [1, 1 << 31])
def test_metagradients_of_each_example_by_its_own_weight(tmp_path, monkeypatch, bytes_of_targets):
    module = Net()
    train_recorded(module, DATA, directory=tmp_path / "recording")
    method = Metagradient(module, tmp_path / "recording", check_smooth=False, progress_bar=False)
    expected = method.attribute(make_trainer(), DATA, DATA).diagonal()
    monkeypatch.setattr("lightning_trak.replay.reverse.run.COTANGENT_BYTES", bytes_of_targets)
    found = method.label_suspicion(make_trainer(), DATA)
    torch.testing.assert_close(found, expected.abs(), rtol=1e-4, atol=1e-7)


def unit_gradients(tmp_path, checkpoints):
    """Gradients of the loss of length 1, from a store without rounding."""
    method = GradientDot(make_model(), checkpoints, tmp_path / "plain", **SMALL)
    method.featurize(make_trainer(), TRAIN)
    found = method.target_features(make_trainer(), TRAIN)
    return [F.normalize(rows.features * rows.loss_gradients.unsqueeze(1)) for rows in found]


@pytest.mark.slow
@pytest.mark.parametrize("effect_on", ["loss", "output"])
def test_cosines_are_those_of_the_nearest_others(tmp_path, checkpoints, effect_on):
    cosines = sum(rows @ rows.T for rows in unit_gradients(tmp_path, checkpoints)) / len(checkpoints)
    cosines.fill_diagonal_(-torch.inf)
    expected = -cosines.topk(10, dim=1).values.mean(1)
    method = GradientCosine(make_model(), checkpoints, tmp_path / "shards", effect_on=effect_on, **SMALL)
    method.featurize(make_trainer(), TRAIN, shard_size=9)
    torch.testing.assert_close(method.label_suspicion(make_trainer(), TRAIN), expected, rtol=1e-4, atol=1e-5)


def test_cosines_of_few_examples(tmp_path, checkpoints):
    few = Subset(TRAIN, range(3))
    found = GradientCosine(make_model(), checkpoints, tmp_path / "three", **SMALL).label_suspicion(make_trainer(), few)
    assert found.isfinite().all()
    method = GradientCosine(make_model(), checkpoints, tmp_path / "one", **SMALL)
    for alone in (method, KNNShapley(make_model(), checkpoints)):
        with pytest.raises(ValueError, match="only one training example"):
            alone.label_suspicion(make_trainer(), Subset(TRAIN, [0]))


class Alone(nn.Module):
    """A head on inputs, whose representations are the inputs."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 2)


def similar(method, **options):
    model = Alone()
    return method(model, [model.state_dict()], forward=lambda module, batch: module.head(batch[0]), **options)


def cloud(size, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(size, 2, generator=generator), torch.randint(0, classes, (size,), generator=generator)
    )


def test_representations_by_hand(monkeypatch):
    data = cloud(30)
    vectors, labels = data.tensors
    expected = []
    for i in range(30):
        near = {True: [], False: []}
        for j in range(30):
            if i != j:
                near[bool(labels[i] == labels[j])].append(float(F.cosine_similarity(vectors[i], vectors[j], dim=0)))
        best = {same: sorted(values, reverse=True)[:10] for same, values in near.items()}
        expected.append(sum(best[False]) / len(best[False]) - sum(best[True]) / len(best[True]))
    found = similar(RepresentationSimilarity).label_suspicion(make_trainer(), data)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(similarity, "_TARGETS", 7)
    torch.testing.assert_close(similar(RepresentationSimilarity).label_suspicion(make_trainer(), data), found)


def test_an_example_that_is_alone_with_its_label():
    data = TensorDataset(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.0]]), torch.tensor([0, 0, 7, 0]))
    found = similar(RepresentationSimilarity).label_suspicion(make_trainer(), data)
    cosines = F.cosine_similarity(data.tensors[0][2], data.tensors[0], dim=1).double()
    assert float(found[2]) == pytest.approx(float(cosines[[0, 1, 3]].mean() - cosines.min()), abs=1e-6)
    same = TensorDataset(torch.randn(3, 2), torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="all 3 examples have the label 1: none can be wrong"):
        similar(RepresentationSimilarity).label_suspicion(make_trainer(), same)
    assert similar(KNNShapley).label_suspicion(make_trainer(), same).isfinite().all()


def test_labels_may_have_another_place():
    inputs, labels = cloud(30).tensors
    expected = similar(RepresentationSimilarity).label_suspicion(make_trainer(), TensorDataset(inputs, labels))
    method = similar(RepresentationSimilarity, labels_key=1)
    data = TensorDataset(inputs, labels, torch.zeros(30, 4))
    torch.testing.assert_close(method.label_suspicion(make_trainer(), data), expected)


def test_neighbours_vote_for_all_but_themselves(monkeypatch):
    data = cloud(23)
    vectors, labels = data.tensors
    expected = torch.zeros(23, dtype=torch.float64)
    for target in range(23):
        others = [i for i in range(23) if i != target]
        nearness = -torch.cdist(vectors[[target]].double(), vectors[others].double())
        expected[others] -= knn_shapley_values(nearness, (labels[others] == labels[target])[None], 4)[0]
    for block in (256, 5):
        monkeypatch.setattr(knn_shapley, "_TARGETS", block)
        found = similar(KNNShapley, k=4).label_suspicion(make_trainer(), data)
        torch.testing.assert_close(found, expected)


def test_memorization_is_the_self_score_of_retrained_models():
    masks = torch.rand(20, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    outputs = torch.randn(5, 20, generator=torch.Generator().manual_seed(1))
    data = Subset(TRAIN, range(5))
    expected = [outputs[i, masks[:, i]].mean() - outputs[i, ~masks[:, i]].mean() for i in range(5)]
    found = EmpiricalInfluence(masks, outputs).label_suspicion(make_trainer(), data)
    torch.testing.assert_close(found, torch.stack(expected).abs())
    with pytest.raises(ValueError, match=r"at the 5 training examples, in their order; .* of 4 targets"):
        EmpiricalInfluence(masks, outputs[:4]).label_suspicion(make_trainer(), data)
    with pytest.raises(ValueError, match="the masks have 5 training examples, the data have 50"):
        EmpiricalInfluence(masks, outputs).label_suspicion(make_trainer(), TRAIN)


@pytest.mark.slow
def test_shapley_values_at_themselves():
    data = Subset(TRAIN, range(4))
    method = DataShapley(LitNet, lambda: make_trainer(max_epochs=1), permutations=2, step=2)
    expected = method.attribute(make_trainer(), data, data).diagonal().abs()
    torch.testing.assert_close(method.label_suspicion(make_trainer(), data), expected)


def test_the_loss_is_that_of_training_in_eval_mode(checkpoints):
    expected = torch.zeros(50, dtype=torch.float64)
    for weights in checkpoints:
        model = make_model()
        model.load_state_dict(weights)
        with torch.no_grad():
            expected += F.cross_entropy(model.eval()(TRAIN.tensors[0]), TRAIN.tensors[1], reduction="none") / 2
    model, trainer = make_model(), make_trainer()
    model.train()
    before, state = {name: part.clone() for name, part in model.state_dict().items()}, torch.get_rng_state()
    for loader in (TRAIN, DataLoader(TRAIN, batch_size=1), DataLoader(TRAIN, batch_size=8, shuffle=True)):
        found = TrainingLoss(model, checkpoints).label_suspicion(trainer, loader)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert model.training
    assert all(torch.equal(part, before[name]) for name, part in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_losses_that_are_not_known_are_refused(checkpoints):
    with pytest.raises(ValueError, match="ContrastiveMargin depends on other training examples too"):
        TrainingLoss(make_model(), checkpoints, output=ContrastiveMargin(context_size=4))
    with pytest.raises(TypeError, match="is an output of targets alone"):
        TrainingLoss(make_model(), checkpoints, output=DirectionOutput("first", torch.ones(8)))
    broken = {name: part * torch.nan if name == "head.bias" else part for name, part in checkpoints[0].items()}
    with pytest.raises(ValueError, match=r"the loss at .* of example \d+ is not finite"):
        TrainingLoss(make_model(), [broken]).label_suspicion(make_trainer(), TRAIN)


def test_random_numbers_are_those_of_the_first_target():
    expected = RandomScores(3).attribute(make_trainer(), TRAIN, make_data(2))[0]
    assert torch.equal(RandomScores(3).label_suspicion(make_trainer(), TRAIN), expected)
