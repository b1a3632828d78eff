"""Methods without a Trainer and without checkpoints: one device, and the weights that the model has."""

import lightning as L
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

from lightning_trak import TRAK, AttributionMixin, GradientDot, TrainingRecorder
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
    RandomScores,
    RepresentationSimilarity,
)
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.projections import SparseProjection
from tests.lit import TARGETS, TRAIN, LitNet, make_data, make_model, make_trainer


@pytest.fixture(autouse=True)
def one_cpu(monkeypatch):
    """Lightning would take a GPU, if there is one."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.mark.slow
def test_features_and_scores(tmp_path):
    trak = TRAK(make_model(), make_model(1).state_dict(), tmp_path / "store", projection=SparseProjection(16))
    expected = trak.attribute(make_trainer(), TRAIN, TARGETS)
    trak.featurize(data=TRAIN)  # does nothing
    assert torch.equal(trak.attribute(train=TRAIN, targets=TARGETS), expected)
    assert torch.equal(trak.score(None, TARGETS), expected)
    assert torch.equal(trak.score(data=TARGETS, top_k=3).values, expected.topk(3).values)
    assert trak.score_dampings(data=TARGETS, dampings=[1.0])[1.0].shape == expected.shape
    assert trak.target_features(data=TARGETS)[0].features.shape == (13, 16)
    assert torch.equal(trak.self_influence(), trak.self_influence(make_trainer()))


def test_forgotten_data_are_refused(tmp_path):
    trak = TRAK(make_model(), None, tmp_path / "store", projection=SparseProjection(16))
    for call in (trak.featurize, trak.score, trak.attribute, trak.target_features):
        with pytest.raises(TypeError, match="there are no data"):
            call()
    with pytest.raises(
        TypeError, match=r"expected a Trainer of Lightning first, got an object of torch\.utils\.data\.dataset\.TensorD"
    ):
        trak.featurize(TRAIN)
    with pytest.raises(ValueError, match=r"expected a sequence of dampings, such as .*, got 0\.1"):
        trak.score_dampings(data=TARGETS, dampings=0.1)
    with pytest.raises(ValueError, match="expected a sequence of dampings"):
        trak.score_dampings(None, TARGETS)


def methods(tmp_path):
    model, masks = make_model(), torch.eye(50).bool()[:6]
    weights = model.state_dict()
    trainer = make_trainer(max_epochs=1, callbacks=[TrainingRecorder(tmp_path / "recording")])
    torch.manual_seed(0)
    net = LitNet()
    net.norm = torch.nn.Identity()
    trainer.fit(net, DataLoader(TRAIN, batch_size=25))
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
        assert method.attribute(train=TRAIN, targets=TARGETS).shape == (13, 50)


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
    for method in (trak, new) if change == "weight" else (trak,):
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
            make_trainer().predict(scorer, DataLoader(TARGETS, batch_size=4))
    model.load_state_dict(before)
    model.scale.fill_(1.5)
    assert torch.equal(trak.score(data=TARGETS), kept)


def test_a_store_must_be_named():
    with pytest.raises(TypeError, match=r'TRAK keeps features on disk: say where, such as store="run/features"'):
        TRAK(make_model(), "run/features")


class Clusters(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TRAIN, batch_size=10, shuffle=True)

    def predict_dataloader(self):
        return DataLoader(TARGETS, batch_size=4)


def test_data_modules():
    module = Clusters()
    method = RepresentationSimilarity(make_model())
    scores = method.attribute(train=module, targets=module)
    torch.testing.assert_close(scores, method.attribute(train=TRAIN, targets=TARGETS))


class Whole(AttributionMixin, L.LightningModule):
    """Holds a network that is saved without it."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, inputs):
        return self.network(inputs)

    def configure_model_output(self):
        return ClassificationMargin()


@pytest.mark.slow
def test_what_lightning_and_hugging_face_save_gives_the_same_scores(tmp_path):
    models = [Whole() for _ in range(2)]
    (tmp_path / "lightning").mkdir()
    for step, model in zip((900, 1000), models, strict=True):
        content = {"state_dict": model.state_dict(), "epoch": 0, "global_step": step}
        torch.save(content, tmp_path / "lightning" / f"step={step}.ckpt")
        (tmp_path / "hugging_face" / f"checkpoint-{step}").mkdir(parents=True)
        save_file(model.network.state_dict(), tmp_path / "hugging_face" / f"checkpoint-{step}" / "model.safetensors")
    weights = [model.state_dict() for model in models]
    options = {"projection": SparseProjection(16)}
    expected = TRAK(Whole(), weights, tmp_path / "store", **options).attribute(train=TRAIN, targets=TARGETS)
    for folder in ("lightning", "hugging_face"):
        trak = TRAK(Whole(), tmp_path / folder, tmp_path / "store", **options)  # the same store: the same content
        assert torch.equal(trak.score(data=TARGETS), expected)
