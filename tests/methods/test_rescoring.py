"""The second stage: exact scores of the candidates, which are right whatever the first stage chose."""

import copy
import dataclasses

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import TRAK
from lightning_trak.methods import Explicit, GradientDot, InfluenceFunction, TracIn
from lightning_trak.methods.features import rescoring
from lightning_trak.methods.influence import base, landmark_preconditioner, products
from lightning_trak.outputs import ClassificationMargin, ContrastiveMargin
from lightning_trak.projections import IdentityProjection, Projection, SparseProjection
from lightning_trak.scoring import TopK
from tests.lit import TARGETS, TRAIN, LitNet, ScaledData, make_checkpoints, make_data, make_model, make_trainer

K = 16


def double() -> L.Trainer:
    return make_trainer(precision="64-true")


def make_trak(path, checkpoints=2, train=TRAIN, trainer=None, **options) -> TRAK:
    """With so few features that the first stage is often wrong."""
    options = {"projection": SparseProjection(K), "damping": 0.05} | options
    trak = TRAK(make_model(), make_checkpoints(checkpoints), path / "store", **options)
    trak.featurize(trainer or double(), train)
    return trak


def exact_scores(trak: TRAK, train=TRAIN, targets=TARGETS) -> Tensor:
    """By the explicit matrix, with the lambda of the store: a share of trace / k."""
    damping = trak.damping if trak.damping == "auto" else trak.damping * parameters() / K
    method = InfluenceFunction(make_model(), make_checkpoints(2), solver=Explicit(), damping=damping)
    return method.attribute(double(), train, targets)


def parameters() -> int:
    return sum(parameter.numel() for parameter in make_model().parameters())


@pytest.mark.parametrize(("damping", "lag", "largest"), [(0.05, 1, True), ("auto", 1, False), ("auto", 3, True)])
def test_with_all_examples_as_candidates_it_is_the_exact_method(tmp_path, monkeypatch, damping, lag, largest):
    trak = make_trak(tmp_path, damping=damping, temperature=1, lag=lag)
    agreement = InfluenceFunction._noise_level
    monkeypatch.setattr(InfluenceFunction, "_noise_level", lambda *args: lag * agreement(*args))
    expected = exact_scores(trak).topk(10, dim=1, largest=largest)
    for rescore in (50, 1000):
        found = trak.score(double(), TARGETS, top_k=10, largest=largest, rescore=rescore)
        torch.testing.assert_close(found.values, expected.values, rtol=1e-3, atol=1e-4)
        assert torch.equal(found.indices, expected.indices)
    plain = trak.score(double(), TARGETS, top_k=10, largest=largest)
    assert not torch.equal(plain.indices, expected.indices)


@pytest.mark.parametrize("largest", [True, False])
def test_the_candidates_are_those_of_the_store_and_their_scores_are_exact(tmp_path, largest):
    trak = make_trak(tmp_path)
    exact = exact_scores(trak)
    candidates = trak.score(double(), TARGETS, top_k=7, largest=largest).indices
    expected = exact.gather(1, candidates).sort(dim=1, descending=largest)
    found = trak.score(double(), TARGETS, top_k=3, largest=largest, rescore=7)
    assert torch.equal(found.indices, candidates.gather(1, expected.indices[:, :3]))
    torch.testing.assert_close(found.values, expected.values[:, :3], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_both_ends_of_groups_and_another_output(tmp_path):
    trak, labels = make_trak(tmp_path), torch.arange(13) % 2
    asked = ClassificationMargin(labels="predicted")
    method = InfluenceFunction(
        make_model(), make_checkpoints(2), solver=Explicit(), damping=trak.damping * parameters() / K
    )
    images = TensorDataset(TARGETS.tensors[0])
    exact = method.attribute(double(), TRAIN, images, output=asked, aggregate="mean", groups=labels)
    candidates = trak.score(double(), images, top_k=8, output=asked, aggregate="mean", groups=labels)
    found = trak.score(double(), images, top_k=3, rescore=8, output=asked, aggregate="mean", groups=labels)
    some = torch.cat([end.indices for end in candidates], dim=1)
    for end, largest in zip(found, (True, False), strict=True):
        expected = exact.gather(1, some).sort(dim=1, descending=largest)
        assert torch.equal(end.indices, some.gather(1, expected.indices[:, :3]))
        torch.testing.assert_close(end.values, expected.values[:, :3], rtol=1e-3, atol=1e-4)
    trak.soft_threshold = 0.1
    with pytest.raises(ValueError, match="take soft_threshold=0"):
        trak.score(double(), images, top_k=3, rescore=8, aggregate="mean")


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0, 100])
def test_neither_batches_nor_order_nor_blocks_nor_the_kind_of_pass_change_them(tmp_path, monkeypatch, limit):
    trak = make_trak(tmp_path)
    expected = trak.score(double(), TARGETS, top_k=5, rescore=20)
    monkeypatch.setattr(base, "TARGET_BYTES", 5 * 8 * parameters())
    monkeypatch.setattr(products, "break_even", lambda passes: limit)
    monkeypatch.setattr(landmark_preconditioner, "_COUNT", 30)
    shuffled = DataLoader(TRAIN, batch_size=7, shuffle=True)
    found = trak.score(double(), DataLoader(TARGETS, batch_size=3), top_k=5, rescore=20, train=shuffled)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-3, atol=1e-4)


def test_equal_scores_are_in_the_order_of_positions(tmp_path):
    inputs, labels = (part[:6] for part in TRAIN.tensors)
    twice = TensorDataset(torch.cat([inputs, inputs]), torch.cat([labels, labels]))
    trak = make_trak(tmp_path, train=twice)
    found = trak.score(double(), TARGETS, top_k=12, rescore=12)
    assert torch.equal(found.indices.sort(dim=1).values, torch.arange(12).expand(13, 12))
    first, second = found.indices[:, ::2], found.indices[:, 1::2]
    assert torch.equal(second, first + 6)
    lowest = trak.score(double(), TARGETS, top_k=1, rescore=12, largest=False)
    assert torch.equal(lowest.indices[:, 0], first[:, -1])


def test_fewer_examples_than_asked_for(tmp_path):
    trak = make_trak(tmp_path, train=make_data(3))
    found = trak.score(double(), TARGETS, top_k=5, rescore=9)
    assert found.values.shape == found.indices.shape == (13, 3)


@pytest.mark.slow
def test_without_a_projection_nothing_changes(tmp_path):
    for number, options in enumerate(
        [{}, {"loss_gradients": "averaged"}, {"curvature": "identity"}, {"soft_threshold": 0.1}, {"damping": 0.3}]
    ):
        options = {"damping": "auto", "dtype": torch.float64} | options
        trak = make_trak(tmp_path / str(number), projection=IdentityProjection(), **options)
        expected = trak.score(double(), TARGETS, top_k=6)
        found = trak.score(double(), TARGETS, top_k=6, rescore=50)
        torch.testing.assert_close(found.values, expected.values, rtol=1e-3, atol=1e-4)
        if "soft_threshold" not in options:
            assert torch.equal(found.indices, expected.indices)


def test_outputs_that_remember_training_data(tmp_path):
    class LitPair(LitNet):
        def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(first), super().forward(second)

    train, targets = (TensorDataset(data.tensors[0], data.tensors[0].flip(1)) for data in (TRAIN, TARGETS))
    model = LitPair()
    output = ContrastiveMargin(context_size=9)
    trak = TRAK(model, [model.state_dict()], tmp_path, output=output, projection=IdentityProjection())
    trak.featurize(make_trainer(), train)
    expected = trak.score(make_trainer(), targets, top_k=6)
    found = trak.score(make_trainer(), targets, top_k=6, rescore=50)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-2, atol=1e-3)


def test_a_store_in_mixed_precision_has_exact_scores_in_float32(tmp_path):
    trainer = make_trainer(precision="bf16-mixed")
    trak = make_trak(tmp_path, trainer=trainer)
    found = trak.score(trainer, TARGETS, top_k=10, rescore=50)
    expected = exact_scores(trak).topk(10, dim=1)
    assert found.values.dtype == torch.float32
    torch.testing.assert_close(found.values.double(), expected.values, rtol=1e-2, atol=1e-3)


def test_several_sets_of_targets_are_scored_together(tmp_path):
    trak = make_trak(tmp_path)
    parts = [TensorDataset(*(part[rows] for part in TARGETS.tensors)) for rows in (slice(0, 4), slice(4, 13))]
    expected = trak.score(double(), TARGETS, top_k=4, rescore=20)
    found = trak.score(double(), [DataLoader(part, batch_size=5) for part in parts], top_k=4, rescore=20)
    torch.testing.assert_close(torch.cat([part.values for part in found]), expected.values, rtol=1e-3, atol=1e-4)
    assert torch.equal(torch.cat([part.indices for part in found]), expected.indices)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["loop", "functional"])
def test_the_engine_of_the_store_is_used(tmp_path, monkeypatch, engine):
    trak = make_trak(tmp_path, engine=engine)
    found = trak.score(double(), TARGETS, top_k=4, rescore=20)
    other = make_trak(tmp_path / "auto").score(double(), TARGETS, top_k=4, rescore=20)
    torch.testing.assert_close(found.values, other.values)


def test_a_new_object_needs_the_data_and_a_data_module_will_do(tmp_path):
    expected = make_trak(tmp_path, train=ScaledData()).score(double(), ScaledData(), top_k=5, rescore=20)
    trak = TRAK(make_model(), make_checkpoints(2), tmp_path / "store", projection=SparseProjection(K), damping=0.05)
    with pytest.raises(ValueError, match="rescore needs the training data: pass train="):
        trak.score(double(), ScaledData(), top_k=5, rescore=20)
    found = trak.score(double(), ScaledData(), top_k=5, rescore=20, train=ScaledData())
    assert torch.equal(found.indices, expected.indices)
    with pytest.raises(
        ValueError, match=r"output of training example 0 at checkpoint 0 .* needs the data and the model"
    ):
        trak.score(double(), ScaledData(), top_k=5, rescore=20, train=TRAIN)  # the same items, but not the same batches


def changed(position: int) -> TensorDataset:
    inputs, labels = TRAIN.tensors
    inputs = inputs.clone()
    inputs[position] += 1
    return TensorDataset(inputs, labels)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (make_data(49), "which has 50 examples; the data given have 49"),
        (make_data(50, seed=3), "some items of the data given are others"),
        (changed(0), "some items of the data given are others"),
        (changed(3), "the output of training example 3 at checkpoint 0"),
    ],
)
def test_other_data_are_refused(tmp_path, train, message):
    with pytest.raises(ValueError, match=message):
        make_trak(tmp_path).score(double(), TARGETS, top_k=5, rescore=20, train=train)


def test_data_that_change_are_refused(tmp_path):
    class Noisy(TensorDataset):
        def __getitem__(self, index):
            inputs, label = super().__getitem__(index)
            return inputs + torch.randn(6), label

    with pytest.warns(UserWarning, match="not the same twice"):
        trak = make_trak(tmp_path, train=Noisy(*TRAIN.tensors))
    with pytest.raises(ValueError, match="rescore would see other items"):
        trak.score(double(), TARGETS, top_k=5, rescore=20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rescore": 20}, "rescore needs a top_k of at most rescore=20, got top_k=None"),
        ({"rescore": 4, "top_k": 5}, "at most rescore=4, got top_k=5"),
        ({"rescore": 0, "top_k": 5}, "`rescore` to be a positive integer but got 0"),
        ({"rescore": 2.5, "top_k": 1}, "`rescore` to be a positive integer but got 2.5"),
        ({"train": [1, 2], "top_k": 1, "rescore": 2}, "rescore chooses its candidates among all training examples"),
    ],
)
def test_arguments_are_checked_before_any_work(tmp_path, options, message):
    trak = TRAK(make_model(), make_checkpoints(1), tmp_path / "none")
    with pytest.raises(ValueError, match=message):
        trak.score(double(), TARGETS, **options)


def test_a_singular_matrix_is_refused_before_any_work(tmp_path):
    trak = make_trak(tmp_path, damping=0.0)
    with pytest.raises(ValueError, match="matrix of 50 gradients of 99 parameters is singular"):
        trak.score(double(), TARGETS, top_k=5, rescore=20)


def test_a_singular_matrix_that_the_targets_do_not_touch_needs_no_damping(tmp_path):
    """The margin does not change with all logits, so no gradient is along these directions."""

    def best(name: str, projection: Projection, damping: float, **score) -> TopK:
        trak = TRAK(
            make_model(), make_checkpoints(1), tmp_path / name, projection=projection, damping=damping,
            curvature="identity", parameters="head.weight", dtype=torch.float64,
        )  # fmt: skip
        trak.featurize(double(), make_data(200))
        return trak.score(double(), TARGETS, top_k=3, **score)

    expected = best("whole", IdentityProjection(), 1e-9)
    found = best("projected", SparseProjection(4), 0.0, rescore=200)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-3, atol=1e-5)
    assert torch.equal(found.indices, expected.indices)


@pytest.mark.parametrize("method", [GradientDot, TracIn])
def test_other_methods_say_why_they_cannot(tmp_path, method):
    options = {"learning_rates": 0.1} if method is TracIn else {}
    found = method(make_model(), make_checkpoints(1), tmp_path / "none", **options)
    with pytest.raises(ValueError, match=f"{method.__name__} cannot rescore: its scores are products"):
        found.score(double(), TARGETS, top_k=5, rescore=20, train=TRAIN)


def test_a_score_that_does_not_converge_is_refused(tmp_path, monkeypatch):
    trak = make_trak(tmp_path)
    monkeypatch.setattr(rescoring, "_SOLVER", dataclasses.replace(rescoring._SOLVER, max_iterations=1))
    monkeypatch.setattr(landmark_preconditioner, "_COUNT", 5)
    with pytest.raises(ValueError, match=r"conjugate gradients at checkpoint 0 .* for target \d+ .*a larger damping"):
        trak.score(double(), TARGETS, top_k=5, rescore=20)


def test_module_random_state_and_trainer_are_left_alone(tmp_path):
    trak, trainer = make_trak(tmp_path), double()
    trak.model.train()
    before, state = copy.deepcopy(trak.model.state_dict()), torch.get_rng_state()
    trak.score(trainer, TARGETS, top_k=5, rescore=20)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trak.model.state_dict().items())
    assert all(part.training and not part._forward_hooks for part in trak.model.modules())
    assert all(parameter.grad is None for parameter in trak.model.parameters())
