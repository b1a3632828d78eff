"""Empirical influence and datamodels, from masks and outputs."""

import sys

import numpy as np
import pytest
import torch
from sklearn.linear_model import LassoCV

from lightning_trak.methods import Datamodels, EmpiricalInfluence
from tests.lit import TARGETS, TRAIN, make_data, make_trainer


def random_masks(num_subsets, num_train, seed=0):
    return torch.rand(num_subsets, num_train, generator=torch.Generator().manual_seed(seed)) < 0.5


def test_empirical_influence_is_a_difference_of_means():
    masks, outputs = random_masks(40, 50), torch.randn(13, 40, 3, generator=torch.Generator().manual_seed(1))
    found = EmpiricalInfluence(masks, outputs).attribute(make_trainer(), TRAIN, TARGETS)
    assert found.shape == (13, 50)
    for target, example in ((0, 0), (12, 49), (5, 20)):
        present = outputs[target, masks[:, example]].mean()
        absent = outputs[target, ~masks[:, example]].mean()
        assert float(found[target, example]) == pytest.approx(float(present - absent), abs=1e-5)


def test_examples_that_are_never_or_always_seen():
    masks, outputs = random_masks(20, 6), torch.randn(3, 20)
    masks[:, 4] = True
    with pytest.raises(ValueError, match="1 training examples are in all subsets, first 4"):
        EmpiricalInfluence(masks, outputs)
    masks[:, 2:] = False
    with pytest.raises(ValueError, match="4 training examples are in no subset, first 2"):
        EmpiricalInfluence(masks, outputs)


def sparse_truth(num_targets, num_train, num_subsets, noise):
    generator = torch.Generator().manual_seed(2)
    truth = torch.zeros(num_targets, num_train)
    for row in truth:
        row[torch.randperm(num_train, generator=generator)[:3]] = torch.tensor([2.0, -1.5, 1.0])
    masks = random_masks(num_subsets, num_train)
    outputs = truth @ masks.T.float() + 3 + noise * torch.randn(num_targets, num_subsets, generator=generator)
    return truth, masks, outputs


def test_datamodels_are_scikit_learns_lasso():
    _, masks, outputs = sparse_truth(2, 12, 60, noise=0.5)
    found = Datamodels(masks, outputs.unsqueeze(2), folds=4).attribute(make_trainer(), make_data(12), make_data(2))
    for target in range(2):
        expected = LassoCV(cv=4).fit(masks.numpy().astype(float), outputs[target].double().numpy())
        np.testing.assert_allclose(found[target].numpy(), expected.coef_, rtol=1e-5, atol=1e-6)


def test_datamodels_recover_a_sparse_truth():
    truth, masks, outputs = sparse_truth(3, 50, 150, noise=0.1)
    found = Datamodels(masks, outputs).estimate()
    assert (found - truth).abs().max() < 0.15
    assert torch.equal(found.abs().topk(3).indices.sort().values, truth.abs().topk(3).indices.sort().values)
    torch.testing.assert_close(Datamodels(masks, outputs, n_jobs=2).estimate(), found)


@pytest.mark.parametrize("options", [{}, {"alphas": [0.02, 0.1]}], ids=str)
def test_the_size_of_outputs_makes_no_difference(options):
    _, masks, outputs = sparse_truth(2, 12, 60, noise=0.5)
    expected = Datamodels(masks, outputs, **options).estimate()
    if options:
        options = {"alphas": [1e-30 * alpha for alpha in options["alphas"]]}
    found = Datamodels(masks, outputs.double() * 1e-30, **options).estimate()
    assert expected.any()
    torch.testing.assert_close(found * 1e30, expected, rtol=1e-4, atol=1e-6)


def test_a_target_whose_output_never_changes():
    _, masks, outputs = sparse_truth(2, 10, 40, noise=0.1)
    outputs[1] = 0.7
    found = Datamodels(masks, outputs).estimate()
    assert found[0].any()
    assert not found[1].any()


def test_datamodels_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    _, masks, outputs = sparse_truth(1, 10, 20, noise=0.1)
    with pytest.raises(ModuleNotFoundError, match=r"pip install \"lightning-trak\[datamodels\]\""):
        Datamodels(masks, outputs).estimate()


@pytest.mark.parametrize("method", [EmpiricalInfluence, Datamodels])
def test_what_does_not_fit_is_refused(method):
    masks, outputs = random_masks(20, 50), torch.randn(13, 20)
    with pytest.raises(ValueError, match=r"masks as bool .* got torch.float32 \(20, 50\)"):
        method(masks.float(), outputs)
    with pytest.raises(ValueError, match=r"outputs of shape \(num_targets, 20\).* got \(20, 13\)"):
        method(masks, outputs.T)
    with pytest.raises(ValueError, match="outputs of target 7 are not finite"):
        method(masks, outputs.index_fill(0, torch.tensor([7]), torch.nan))
    fine = method(masks, outputs)
    with pytest.raises(ValueError, match="masks have 50 training examples, the data have 13"):
        fine.attribute(make_trainer(), TARGETS, TARGETS)
    with pytest.raises(ValueError, match="outputs have 13 targets, the data have 50"):
        fine.attribute(make_trainer(), TRAIN, TRAIN)


def test_folds_that_cannot_be():
    with pytest.raises(ValueError, match="folds must be from 2 to the number of subsets, 20; got 1"):
        Datamodels(random_masks(20, 5), torch.randn(3, 20), folds=1)
