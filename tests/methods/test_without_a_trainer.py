"""Every method without a Trainer: the same scores as with one on one device."""

import inspect

import pytest
import torch

from lightning_trak import TRAK, GradientDot, TrainingRecorder
from lightning_trak.methods import (
    BM25,
    Datamodels,
    DataShapley,
    EKFACInfluence,
    ExactKernel,
    Explicit,
    InfluenceFunction,
    KNNShapley,
    Metagradient,
    Method,
    RandomScores,
    RepresentationSimilarity,
)
from lightning_trak.projections import SparseProjection
from tests.lit import TARGETS, TRAIN, LitNet, make_data, make_model, make_trainer


@pytest.fixture(autouse=True)
def one_cpu(monkeypatch):
    """Lightning would take a GPU, if there is one."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.mark.slow
def test_features_and_scores(tmp_path):
    trak = TRAK(make_model(), make_model(1).state_dict(), tmp_path / "store", projection=SparseProjection(16))
    trainer = make_trainer()
    trak.featurize(data=TRAIN)
    trak.featurize(trainer, TRAIN)  # does nothing
    for call in (
        lambda *first, **named: trak.score(*first, **(named or {"data": TARGETS})),
        lambda *first, **named: trak.attribute(*first, **(named or {"train": TRAIN, "targets": TARGETS})),
        lambda *first, **named: trak.score_dampings(*first, dampings=[1.0], **(named or {"data": TARGETS}))[1.0],
        lambda *first, **named: trak.score(*first, top_k=3, **(named or {"data": TARGETS})).values,
        lambda *first, **named: trak.target_features(*first, **(named or {"data": TARGETS}))[0].features,
    ):
        assert torch.equal(call(), call(trainer))
    assert torch.equal(trak.score(None, TARGETS), trak.score(trainer, TARGETS))
    assert torch.equal(trak.self_influence(), trak.self_influence(trainer))


def test_forgotten_data_are_refused(tmp_path):
    trak = TRAK(make_model(), None, tmp_path / "store", projection=SparseProjection(16))
    for call in (trak.featurize, trak.score, trak.attribute, trak.target_features):
        with pytest.raises(TypeError, match="there are no data"):
            call()
    with pytest.raises(TypeError, match="expected a Trainer first, got a TensorDataset"):
        trak.featurize(TRAIN)
    with pytest.raises(ValueError, match="expected a sequence of dampings"):
        trak.score_dampings(None, TARGETS)


def methods(tmp_path):
    model, masks = make_model(), torch.eye(50).bool()[:6]
    weights = model.state_dict()
    trainer = make_trainer(max_epochs=1, callbacks=[TrainingRecorder(tmp_path / "recording")])
    torch.manual_seed(0)
    net = LitNet()
    net.norm = torch.nn.Identity()
    trainer.fit(net, torch.utils.data.DataLoader(TRAIN, batch_size=25))
    return [
        GradientDot(model, weights, tmp_path / "dot", projection=SparseProjection(16)),
        ExactKernel(model, weights, tmp_path / "kernel"),
        InfluenceFunction(model, weights, solver=Explicit(), parameters="head.*"),
        EKFACInfluence(model, weights, parameters="head.*"),
        RepresentationSimilarity(model, weights),
        KNNShapley(model, weights),
        RandomScores(),
        BM25(lambda item: item[1]),
        Datamodels(masks, torch.randn(13, 6), folds=2),
        DataShapley(LitNet, lambda: make_trainer(max_epochs=1), permutations=1, step=50),
        Metagradient(net, tmp_path / "recording", check_smooth=False, progress_bar=False),
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_method(tmp_path):
    for method in methods(tmp_path):
        scores = method.attribute(train=TRAIN, targets=TARGETS)
        assert scores.shape == (13, 50)
        assert torch.equal(scores, method.attribute(make_trainer(), TRAIN, TARGETS)), type(method).__name__
        assert inspect.signature(method.attribute).parameters.keys() >= inspect.signature(
            Method.attribute
        ).parameters.keys() - {"self"}


@pytest.mark.slow
def test_current_weights_are_the_default(tmp_path):
    model = make_model()
    options = {"projection": SparseProjection(16)}
    trak = TRAK(model, store=tmp_path / "store", **options)
    trak.featurize(data=TRAIN)
    given = TRAK(model, model.state_dict(), tmp_path / "store", **options)  # by content, so the store is the same
    assert torch.equal(trak.score(data=TARGETS), given.score(data=TARGETS))
    for kind in (RepresentationSimilarity, KNNShapley):
        assert torch.equal(
            *(kind(model, weights).attribute(None, TRAIN, TARGETS) for weights in (None, model.state_dict()))
        )
    influence = (
        InfluenceFunction(model, w, solver=Explicit(), parameters="head.*") for w in (None, model.state_dict())
    )
    assert torch.equal(*(method.attribute(None, TRAIN, TARGETS) for method in influence))


@pytest.mark.slow
@pytest.mark.parametrize("change", ["weight", "statistics", "buffer"])
def test_later_training_is_refused(tmp_path, change):
    model = make_model()
    trak = TRAK(model, store=tmp_path / "store", projection=SparseProjection(16))
    trak.featurize(data=TRAIN)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept, scorer = trak.score(data=TARGETS), trak.scorer()
    with torch.no_grad():
        if change == "weight":
            model.head.weight.add_(1e-3)
        elif change == "statistics":
            model.train()(make_data(8).tensors[0])
        else:
            model.scale.mul_(2)
    new = TRAK(model, store=tmp_path / "store", projection=SparseProjection(16))
    for method in (trak, new):
        for call in (
            lambda: method.score(data=TARGETS),  # noqa: B023
            lambda: method.featurize(data=TRAIN),  # noqa: B023
            lambda: method.self_influence(),  # noqa: B023
            lambda: method.target_features(data=TARGETS),  # noqa: B023
            lambda: method.scorer(),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=r"made of other weights than the model has now.*trained further"):
                call()
    if change != "buffer":  # which is no part of the checkpoint
        with pytest.raises(ValueError, match=r"weights at checkpoint 0 \(the model's current weights\) have changed"):
            make_trainer().predict(scorer, torch.utils.data.DataLoader(TARGETS, batch_size=4))
    model.load_state_dict(before)
    model.scale.fill_(1.5)
    assert torch.equal(trak.score(data=TARGETS), kept)


def test_a_store_must_be_named():
    with pytest.raises(TypeError, match=r'TRAK keeps features on disk: say where, such as store="run/features"'):
        TRAK(make_model())
