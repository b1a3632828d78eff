"""Curvature of single predictions: rows whose outer products add up to it, and scores by it, against closed forms."""

import pytest
import torch

from lightning_trak import TRAK
from lightning_trak.checkpoints.subsets import TrainingSubset
from lightning_trak.checkpoints.weights import write_safetensors
from lightning_trak.methods import ExactKernel
from lightning_trak.outputs import (
    CausalLMLogLikelihood,
    CausalLMMargin,
    ClassificationMargin,
    MultiLabelMargin,
    SegmentationMargin,
)
from lightning_trak.outputs.margins import logistic_loss
from lightning_trak.projections import IdentityProjection, PrincipalProjection, SparseProjection
from lightning_trak.running.data.annotated import AnnotatedBatch
from lightning_trak.running.data.content import prefix_digests
from lightning_trak.scoring import DualScorer, PrimalScorer
from lightning_trak.scoring.newton.per_prediction import PredictionCurvature
from tests.causal_texts import CausalNet, gradients, loader, make_texts, margins, pad, pad_left
from tests.lit import make_model, make_trainer

TEXTS, ASKED = make_texts(12), make_texts(5, seed=1)


def double():
    return make_trainer(precision="64-true")


def identity(directory, texts=TEXTS, trainer=None, collate=pad, batch_size=4, **options):
    options = {"projection": IdentityProjection(), "dtype": torch.float64} | options
    trak = TRAK(CausalNet(), store=directory, **options)
    trak.featurize(trainer or double(), loader(texts, batch_size, collate))
    return trak


def rows_of(store):
    return torch.cat([store.read(0, shard).features for shard in range(store.num_shards)])


def curved_rows(trak):
    scorer = trak.make_scorer(trak.open_store(double()))
    return rows_of(scorer.curved)


def curvature_by_definition(texts, model=None):
    """sum_jt a_jt^2 R_jt g_jt g_jt^T, by autograd."""
    model, total = (model or CausalNet()).double(), 0
    for text in texts:
        values = margins(model, text)
        p = values.detach().sigmoid()
        weighted = gradients(model, values) * (p * (1 - p)).sqrt().unsqueeze(1) / len(values)
        total = total + weighted.T @ weighted
    return total


def test_each_row_is_a_sum_of_weighted_gradients_with_signs(tmp_path):
    model, rows = CausalNet().double(), curved_rows(identity(tmp_path / "store"))
    for text, row in zip(TEXTS, rows, strict=True):
        values = margins(model, text)
        p = values.detach().sigmoid()
        weighted = gradients(model, values) * (p * (1 - p)).sqrt().unsqueeze(1) / len(values)
        signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * len(values))
        sums = signs.view(-1, len(values)) @ weighted
        assert (sums - row).norm(dim=1).min() < 1e-8 * row.norm()


def test_their_outer_products_add_up_to_the_curvature_on_average(tmp_path):
    batch, module = pad(TEXTS), CausalNet().double()
    expected, total, seeds = curvature_by_definition(TEXTS), 0, 300
    positions = torch.arange(len(TEXTS)).unsqueeze(1)
    for seed in range(seeds):
        values = PredictionCurvature(CausalLMMargin(), seed).output(module, AnnotatedBatch(batch, positions))
        rows = gradients(module, values)
        total = total + rows.T @ rows / seeds
    assert (total - expected).norm() < 0.05 * expected.norm()
    assert (rows.T @ rows - expected).norm() > 0.1 * expected.norm()  # one draw is near, but not the same


@pytest.mark.parametrize("dim", [None, 9])
@pytest.mark.parametrize("damping", [0.1, "auto"])
def test_scores_are_those_of_the_rows(tmp_path, dim, damping):
    projection = IdentityProjection() if dim is None else SparseProjection(dim)
    trak = identity(tmp_path / "store", projection=projection, damping=damping, temperature=1)
    scores = trak.score(double(), loader(ASKED))
    store = trak.open_store(double())
    scorer = trak.make_scorer(store)
    assert type(scorer) is (DualScorer if dim is None else PrimalScorer)
    d, phi = rows_of(scorer.curved), rows_of(store)
    q = torch.cat([store.read(0, shard).loss_gradients for shard in range(store.num_shards)])
    r = torch.cat([store.read(0, shard).curvatures for shard in range(store.num_shards)])
    targets = trak.target_features(double(), loader(ASKED))[0].features
    k = 0.1 * (phi.T * r) @ phi + 0.9 * d.T @ d
    w = torch.cat([0.1 * r * phi.square().sum(1), 0.9 * d.square().sum(1)])
    scorer.fit(torch.device("cpu"))
    relative = damping if damping != "auto" else scorer.noise.levels(True)[0] * 1.75 * w.square().sum() / w.sum()
    ridge = relative * k.trace() / len(k) if damping != "auto" else relative
    expected = targets @ torch.linalg.solve(k + ridge * torch.eye(len(k)), phi.T) * q
    torch.testing.assert_close(scores, expected.to(scores), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(trak.self_influence(double()), _diagonal(phi, k, ridge, q), rtol=1e-5, atol=1e-8)


def _diagonal(phi, k, ridge, q):
    return (phi * torch.linalg.solve(k + ridge * torch.eye(len(k)), phi.T).T).sum(1) * q


@pytest.mark.parametrize("engine", ["hooks", "functional", "loop"])
@pytest.mark.parametrize(("collate", "batch_size"), [(pad, 1), (pad, 12), (pad_left, 5)])
def test_rows_do_not_depend_on_batches_padding_and_engine(tmp_path, engine, collate, batch_size):
    expected = curved_rows(identity(tmp_path / "one"))
    found = curved_rows(identity(tmp_path / "two", collate=collate, batch_size=batch_size, engine=engine))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_one_prediction_has_the_curvature_of_a_margin():
    logits = torch.randn(6, 3, 1, generator=torch.Generator().manual_seed(0), requires_grad=True)
    batch = torch.zeros(6), torch.tensor([[0], [1], [2], [0], [1], [2]])
    output = SegmentationMargin(forward=lambda *_: logits)
    value = output.output(torch.nn.Identity(), batch)
    numbered = AnnotatedBatch(batch, torch.arange(6).unsqueeze(1))
    curved = PredictionCurvature(output, 0).output(torch.nn.Identity(), numbered)
    _, r = output.derivatives(value)
    (g,) = torch.autograd.grad(value.sum(), logits, retain_graph=True)
    (d,) = torch.autograd.grad(curved.sum(), logits)
    outer = torch.einsum("nci,ndi->ncd", d, d)
    torch.testing.assert_close(outer, torch.einsum("n,nci,ndi->ncd", r, g, g))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_losses_of_labels_add_up_to_that_of_the_example(reduction):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, generator=generator)
    labels = torch.randint(2, (5, 4), generator=generator)
    labels[0, 1] = labels[2, 3] = -100
    output = MultiLabelMargin(reduction, forward=lambda *_: logits)
    found = output.predictions(torch.nn.Identity(), (logits, labels))
    expected = output.loss(output.output(torch.nn.Identity(), (logits, labels)))
    torch.testing.assert_close((found.weights * logistic_loss(found.margins)).sum(1), expected)
    assert found.weights[0, 1] == 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "sqrt"])
def test_the_losses_of_tokens_add_up_to_that_of_the_text(reduction):
    output, batch = CausalLMLogLikelihood(reduction=reduction), pad(TEXTS)
    found = output.predictions(CausalNet(), batch)
    expected = -output.output(CausalNet(), batch)
    torch.testing.assert_close((found.weights * logistic_loss(found.margins)).sum(1), expected)


def test_the_losses_of_pixels_add_up_to_that_of_the_image():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 2, 5, generator=generator)
    labels = torch.randint(3, (4, 2, 5), generator=generator)
    labels[0, 0, 0] = -100
    output = SegmentationMargin(forward=lambda *_: logits)
    found = output.predictions(torch.nn.Identity(), (logits, labels))
    expected = output.loss(output.output(torch.nn.Identity(), (logits, labels)))
    torch.testing.assert_close((found.weights * logistic_loss(found.margins)).sum(1), expected)


def test_an_image_without_a_label_that_counts_has_no_weights():
    output = SegmentationMargin(forward=lambda *_: torch.zeros(2, 3, 4))
    labels = torch.full((2, 4), -100)
    labels[0] = 1
    weights = output.predictions(torch.nn.Identity(), (torch.zeros(2), labels)).weights
    assert weights[0].isfinite().all()
    assert weights[1].isnan().all()


def test_the_exact_second_stage_has_the_same_curvature(tmp_path):
    trak = identity(tmp_path / "store", damping=0.1)
    plain = trak.score(double(), loader(ASKED), top_k=12, largest=True)
    exact = trak.score(double(), loader(ASKED), top_k=12, largest=True, rescore=12, train=loader(TEXTS))
    assert torch.equal(plain.indices, exact.indices)
    torch.testing.assert_close(exact.values, plain.values.to(exact.values), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("part", [None, (1, 2)])
def test_the_exact_kernel_has_the_scores_of_whole_gradients(tmp_path, part):
    texts = [text for text in TEXTS if len(text["input_ids"]) > 2]
    whole = identity(tmp_path / "store", texts)
    exact = ExactKernel(CausalNet(), store=tmp_path / "kernel", dtype=torch.float64)
    padded = loader(texts, collate=to_seven)
    exact.featurize(double(), padded, shard_size=3, part=part)
    if part is not None:
        with pytest.raises(RuntimeError, match="shards"):
            exact.score(double(), loader(ASKED, collate=to_seven))
        exact.featurize(double(), padded, part=(2, 2))
    scores = exact.score(double(), loader(ASKED, collate=to_seven))
    expected = whole.score(double(), loader(ASKED))
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-8)
    again = exact.score(double(), loader(ASKED, collate=to_seven), train=padded)
    torch.testing.assert_close(again, scores, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(exact.self_influence(double()), whole.self_influence(double()), rtol=1e-5, atol=1e-8)


def to_seven(texts):
    """A batch of seven tokens a text: the exact kernel stores as many positions for all."""
    longest = {"input_ids": torch.zeros(7, dtype=torch.int64), "labels": torch.full((7,), -100)}
    return {name: column[:-1] for name, column in pad([*texts, longest]).items()}


@pytest.mark.parametrize("projection", [IdentityProjection(), SparseProjection(7)])
def test_candidates_that_are_training_texts_have_their_scores(tmp_path, projection):
    trak = identity(tmp_path / "store", projection=projection)
    scores = trak.score(double(), loader(ASKED))
    again = trak.score(double(), loader(ASKED), train=loader(TEXTS))
    torch.testing.assert_close(again, scores, rtol=1e-6, atol=1e-9)


def test_a_store_grows_with_its_curvature(tmp_path):
    trak = TRAK(CausalNet(), store=tmp_path / "grown", projection=IdentityProjection(), dtype=torch.float64)
    trak.featurize(double(), loader(TEXTS[:8]), shard_size=4)
    trak.featurize(double(), loader(TEXTS), shard_size=4)
    whole = identity(tmp_path / "whole")
    torch.testing.assert_close(curved_rows(trak), curved_rows(whole), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(trak.score(double(), loader(ASKED)), whole.score(double(), loader(ASKED)))


def test_models_of_halves_have_the_curvature_of_their_texts(tmp_path):
    mask = torch.arange(len(TEXTS)) % 2 == 0
    (data,) = prefix_digests(loader(TEXTS), len(TEXTS))[:1]
    write_safetensors(tmp_path / "half.safetensors", CausalNet().state_dict(), TrainingSubset(mask, data))
    options = {"projection": IdentityProjection(), "dtype": torch.float64, "temperature": 1, "damping": 0.1}
    half = TRAK(CausalNet(), tmp_path / "half.safetensors", tmp_path / "half", **options)
    half.featurize(double(), loader(TEXTS))
    scores = half.score(double(), loader(ASKED))
    curved, store = curved_rows(half), half.open_store(double())
    phi, r = rows_of(store), torch.cat([store.read(0, shard).curvatures for shard in range(store.num_shards)])
    q = torch.cat([store.read(0, shard).loss_gradients for shard in range(store.num_shards)])
    k = 0.1 * (phi.T * (r * mask)) @ phi + 0.9 * (curved.T * mask) @ curved
    k += 0.1 * k.trace() / len(k) * torch.eye(len(k))
    targets = half.target_features(double(), loader(ASKED))[0].features
    expected = targets @ torch.linalg.solve(k, phi.T) * q
    torch.testing.assert_close(scores, expected.to(scores), rtol=1e-5, atol=1e-8)


def test_it_is_the_default_for_several_predictions_alone(tmp_path):
    assert TRAK(CausalNet(), store=tmp_path).curvature == "per_prediction"
    assert TRAK(make_model(), store=tmp_path).curvature == "gauss_newton"
    assert TRAK(CausalNet(), store=tmp_path, projection=PrincipalProjection(4)).curvature == "gauss_newton"
    assert ExactKernel(CausalNet(), store=tmp_path).curvature == "per_prediction"
    assert TRAK.paper(CausalNet(), store=tmp_path).curvature == "identity"


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match="ClassificationMargin is none"):
        TRAK(make_model(), store=tmp_path, output=ClassificationMargin(), curvature="per_prediction")
    with pytest.raises(ValueError, match="PrincipalProjection is"):
        TRAK(CausalNet(), store=tmp_path, projection=PrincipalProjection(4), curvature="per_prediction")


def test_a_store_without_these_rows_says_what_to_do(tmp_path):
    trak = identity(tmp_path / "store", curvature="gauss_newton")
    other = TRAK(CausalNet(), store=tmp_path / "store", projection=IdentityProjection(), dtype=torch.float64)
    with pytest.raises(FileNotFoundError, match="call featurize again"):
        other.score(double(), loader(ASKED))
    assert trak.score(double(), loader(ASKED)).isfinite().all()
    other.featurize(double(), loader(TEXTS))
    assert not torch.equal(other.score(double(), loader(ASKED)), trak.score(double(), loader(ASKED)))
