"""Data Shapley against the definition, by brute force."""

import logging
import random
from itertools import combinations
from math import comb

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

from lightning_trak import AttributionMixin
from lightning_trak.methods import DataShapley
from lightning_trak.outputs import ContrastiveMargin, NegativeLoss
from tests.lit import LitNet, make_data, make_trainer


class Ridge(AttributionMixin, L.LightningModule):
    """Ridge regression, fitted in closed form by its one training step; its utility is minus the squared error."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.automatic_optimization = False

    def forward(self, inputs):
        return inputs @ self.weight

    def training_step(self, batch):
        inputs, labels = batch
        gram = inputs.T @ inputs + 0.5 * torch.eye(2, dtype=torch.float64)
        self.weight.data = torch.linalg.solve(gram, inputs.T @ labels)

    def configure_optimizers(self):
        return None

    def configure_model_output(self):
        return NegativeLoss(lambda module, batch: (module(batch[0]) - batch[1]) ** 2)


class Total(Ridge):
    """Its output is the sum of the labels it has seen: each example contributes its label, whenever it joins."""

    def forward(self, inputs):
        return self.weight[0].expand(len(inputs))

    def training_step(self, batch):
        self.weight.data = self.weight.data + batch[1].sum()

    def configure_model_output(self):
        return NegativeLoss(lambda module, batch: -module(batch[0]))


def quick():
    return make_trainer(max_epochs=1)


def make_rows(size, seed):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(*(torch.randn(size, *more, generator=generator, dtype=torch.float64) for more in ((2,), ())))


TRAIN, TARGETS = make_rows(4, 0), make_rows(3, 1)


def utility(subset):
    inputs, labels = (tensor[list(subset)] for tensor in TRAIN.tensors)
    weight = torch.linalg.solve(inputs.T @ inputs + 0.5 * torch.eye(2, dtype=torch.float64), inputs.T @ labels)
    return -((TARGETS.tensors[0] @ weight - TARGETS.tensors[1]) ** 2)


def contributions(player):
    """What the player adds to each set of others, with the set's Shapley weight."""
    others = [other for other in range(4) if other != player]
    for size in range(4):
        for subset in combinations(others, size):
            yield 1 / (4 * comb(3, size)), utility((*subset, player)) - utility(subset)


@pytest.mark.slow
def test_close_to_the_exact_values_and_efficient():
    permutations = 30
    method = DataShapley(Ridge, quick, permutations=permutations)
    found = method.attribute(make_trainer(), DataLoader(TRAIN, batch_size=4), TARGETS)
    exact = torch.stack([sum(w * change for w, change in contributions(i)) for i in range(4)], 1)
    square = torch.stack([sum(w * change**2 for w, change in contributions(i)) for i in range(4)], 1)
    standard_error = ((square - exact**2) / permutations).sqrt()
    assert ((found - exact).abs() < 4 * standard_error).all()
    assert (standard_error < 0.3 * exact.abs().amax(1, keepdim=True)).all()  # or anything would be close
    torch.testing.assert_close(found.sum(1), (utility(range(4)) - utility(())).float())


@pytest.mark.parametrize("step", [1, 2, 3])
def test_additive_utility_and_steps(step):
    found = DataShapley(Total, quick, permutations=3, step=step).attribute(make_trainer(), TRAIN, TARGETS)
    labels = TRAIN.tensors[1].float()
    torch.testing.assert_close(found.sum(1), labels.sum().expand(3))
    if step == 1:
        torch.testing.assert_close(found, labels.expand(3, 4))
    else:
        assert not torch.allclose(found, labels.expand(3, 4))


def count_trainings(data, **options):
    trained = []

    class Counted(Total):
        def on_train_start(self):
            trained.append(len(self.trainer.train_dataloader.dataset))

    method = DataShapley(Counted, quick, permutations=2, **options)
    return method.attribute(make_trainer(), data, TARGETS), trained


def test_truncation_saves_trainings_and_leaves_the_rest_without_a_change(caplog):
    labels = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    data = TensorDataset(torch.zeros(5, 2, dtype=torch.float64), labels)
    with caplog.at_level(logging.INFO):
        values, trained = count_trainings(data)
    assert trained == [5, 1, 2, 3, 4, 1, 2, 3, 4]
    assert "DataShapley: 9 models to train" in caplog.text
    torch.testing.assert_close(values, torch.ones(3, 5))
    values, trained = count_trainings(data, tolerance=2.5)  # 2 of 5 missing is near enough
    assert trained == [5, 1, 2, 3, 1, 2, 3]
    torch.testing.assert_close(values.sum(1), torch.full((3,), 3.0))
    assert values.unique().tolist() in ([0, 0.5, 1], [0.5, 1])
    values, trained = count_trainings(data, tolerance=6.0)
    assert trained == [5]
    assert not values.any()


def test_real_training_from_scratch_and_correctness():
    train, targets = make_data(6), make_data(5, seed=1)
    correct = lambda module, batch: (module(batch[0]).argmax(1) == batch[1]).float()  # noqa: E731
    torch.manual_seed(5), random.seed(5)
    states = torch.get_rng_state(), random.getstate()

    def attribute(train_batch, target_batch):
        method = DataShapley(LitNet, quick, utility=correct, permutations=2, step=2, seed=3)
        loader = DataLoader(train, batch_size=train_batch, shuffle=True)
        return method.attribute(make_trainer(), loader, DataLoader(targets, batch_size=target_batch))

    values = attribute(2, 5)
    torch.testing.assert_close(attribute(2, 2), values)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]

    def correctness(fit):
        torch.manual_seed(3)
        model = LitNet()
        if fit:
            quick().fit(model, DataLoader(train, batch_size=2, shuffle=True))
        return correct(model.eval(), targets.tensors)

    torch.testing.assert_close(values.sum(1), correctness(True) - correctness(False))


def test_factories_that_give_the_same_again():
    module, trainer, weight = Ridge(), quick(), nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def sharing():
        module = Ridge()
        module.weight = weight
        return module

    def attribute(make_module, make_trainer_):
        return DataShapley(make_module, make_trainer_).attribute(make_trainer(), TRAIN, TARGETS)

    with pytest.raises(ValueError, match="make_module returned the same Ridge object twice"):
        attribute(lambda: module, quick)
    with pytest.raises(ValueError, match="make_module returned the same weights twice"):
        attribute(sharing, quick)
    with pytest.raises(ValueError, match="make_trainer returned the same Trainer object twice"):
        attribute(Ridge, lambda: trainer)


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TRAIN, batch_size=4)

    def predict_dataloader(self):
        return DataLoader(TARGETS, batch_size=2)


def test_a_data_module():
    method = DataShapley(Ridge, quick, permutations=1)
    found = method.attribute(make_trainer(), Data(), Data())
    torch.testing.assert_close(found.sum(1), (utility(range(4)) - utility(())).float())

    class Scaling(Data):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch

    with pytest.raises(ValueError, match="Scaling has on_after_batch_transfer, which is not called for subsets"):
        method.attribute(make_trainer(), Scaling(), Data())


def test_bad_options_and_data():
    with pytest.raises(ValueError, match=r"`step` to be a positive integer but got 0"):
        DataShapley(Ridge, quick, step=0)

    class Contrastive(Ridge):
        def configure_model_output(self):
            return ContrastiveMargin()

    with pytest.raises(ValueError, match="ContrastiveMargin depends on other training examples too; pass utility="):
        DataShapley(Contrastive, quick).attribute(make_trainer(), TRAIN, TARGETS)
    with pytest.raises(ValueError, match=r"expected one utility per example.*\(2,\)"):
        DataShapley(Ridge, quick, utility=lambda module, batch: batch[0]).attribute(make_trainer(), TRAIN, TARGETS)
    with pytest.raises(ValueError, match="make_trainer, got one of 2"):
        DataShapley(Ridge, lambda: make_trainer(devices=2)).attribute(make_trainer(), TRAIN, TARGETS)
    with pytest.raises(ValueError, match="a Trainer with overfit_batches, which trains on the first batches"):
        DataShapley(Ridge, lambda: make_trainer(overfit_batches=1)).attribute(make_trainer(), TRAIN, TARGETS)
    weighted = DataLoader(TRAIN, sampler=WeightedRandomSampler([1.0] * 4, 4))
    with pytest.raises(ValueError, match="the loader has a WeightedRandomSampler"):
        DataShapley(Ridge, quick).attribute(make_trainer(), weighted, TARGETS)
    subset = DataLoader(TRAIN, sampler=SubsetRandomSampler([0, 1]))
    with pytest.raises(ValueError, match="draws a subset"):
        DataShapley(Ridge, quick).attribute(make_trainer(), subset, TARGETS)
