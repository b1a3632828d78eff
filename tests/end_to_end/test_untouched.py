"""The user's module, Trainer, loggers and random state are as they were after every call."""

import random

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import (
    DataLoader,
    Dataset,
    TensorDataset,
)

from lightning_trak import TRAK
from lightning_trak.projections import SparseProjection
from tests.lit import TARGETS, TRAIN, attribute, make_data, make_model, make_trainer


class Drawing(Dataset):
    """Draws random numbers with each item, as augmentation does."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
        return self.data[index]


def test_everything_is_as_it_was(tmp_path, checkpoints):
    model = make_model()
    model.train()
    model.norm.eval()  # a mixed mode
    model.first.weight.requires_grad_(False)
    model.head.bias.grad = torch.full((3,), 7.0)
    before = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    identities = {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    modes = {name: module.training for name, module in model.named_modules()}
    logger = CSVLogger(tmp_path / "logs")
    trainer = make_trainer(logger=logger, max_epochs=1)
    trainer.fit(model, DataLoader(make_data(8), batch_size=8))
    after_fit = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    assert not torch.equal(before["head.weight"], after_fit["head.weight"])
    attributes = set(vars(model))
    model.train()
    model.norm.eval()
    model.head.bias.grad = torch.full((3,), 7.0)
    logged = sorted((path, path.read_bytes()) for path in (tmp_path / "logs").rglob("*") if path.is_file())
    callbacks, loggers, lightning_module = list(trainer.callbacks), list(trainer.loggers), trainer.lightning_module
    torch.manual_seed(3), random.seed(3), np.random.seed(3)  # noqa: NPY002
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002

    trak = TRAK(model, checkpoints, tmp_path / "store", projection=SparseProjection(32))
    trak.featurize(trainer, DataLoader(TRAIN, batch_size=8, shuffle=True, num_workers=1))
    trak.score(trainer, DataLoader(Drawing(TARGETS), batch_size=8, shuffle=True))
    trak.score(trainer, TARGETS, top_k=3)

    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()  # noqa: NPY002
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.equal(tensor, after_fit[name]), name
        assert id(tensor) == identities[name], name
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert set(vars(model)) == attributes
    assert model.head.bias.grad.tolist() == [7.0] * 3
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True, True, True]
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert trainer.callbacks == callbacks
    assert trainer.loggers == loggers
    assert trainer.lightning_module is lightning_module is model
    assert model.trainer is trainer
    assert sorted((path, path.read_bytes()) for path in (tmp_path / "logs").rglob("*") if path.is_file()) == logged


def test_the_trainer_is_given_back_after_an_error(tmp_path, checkpoints):
    trainer = make_trainer(logger=CSVLogger(tmp_path), callbacks=[L.pytorch.callbacks.Timer()])
    callbacks, loggers = list(trainer.callbacks), list(trainer.loggers)
    bad = TensorDataset(torch.full((5, 6), torch.nan), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="not finite"):
        attribute(tmp_path, checkpoints, bad, trainer=trainer)
    assert trainer.callbacks == callbacks
    assert trainer.loggers == loggers


def test_the_users_callbacks_do_not_meet_our_predictions(tmp_path, checkpoints):
    class Writer(BasePredictionWriter):
        def __init__(self):
            super().__init__("batch")
            self.calls = 0

        def write_on_batch_end(self, *args):
            self.calls += 1

    writer = Writer()
    attribute(tmp_path, checkpoints, trainer=make_trainer(callbacks=[writer]))
    assert writer.calls == 0
