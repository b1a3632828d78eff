"""Weights that something changes between two steps."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.optim.swa_utils import AveragedModel

from lightning_trak.replay import replay
from tests.replay.runs import Net, make_data, train

DATA = make_data()


class Averaged(Net):
    """Keeps an average of its weights as a part of itself, as BYOL and many diffusion models do."""

    def __init__(self):
        super().__init__()
        self.average = copy.deepcopy(self.net).requires_grad_(False)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            for kept, new in zip(self.average.parameters(), self.net.parameters(), strict=True):
                kept.lerp_(new, 0.1)


def test_an_average_inside_the_module_is_refused_at_once(tmp_path):
    module = Averaged()
    with pytest.raises(ValueError, match=r'"average\.0\.weight" has changed between two steps.*outside of the module'):
        train(module, DATA, tmp_path, max_epochs=99)
    assert module.global_step == 1


class Outside(Callback):
    """Keeps an average that is no part of the module."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.average = AveragedModel(module.net) if batch_idx == 0 else self.average
        self.average.update_parameters(module.net)


def test_an_average_outside_the_module_is_fine(tmp_path):
    module = Net()
    trainer = train(module, DATA, tmp_path, callbacks=[Outside()])
    assert replay(module, tmp_path, trainer, DATA, progress_bar=False).identical
