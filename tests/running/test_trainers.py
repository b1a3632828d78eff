"""The Trainer that a user gives, or none."""

import logging

import lightning as L
import pytest
import torch
from lightning_utilities.core import rank_zero
from torch.utils.data import DataLoader

from lightning_trak.running.trainers import trainer_of
from tests.lit import TRAIN, make_trainer


def test_a_given_trainer_is_taken():
    trainer = make_trainer()
    assert trainer_of(trainer) is trainer


@pytest.mark.parametrize("package", ["lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"])
def test_without_one_there_is_one_on_one_device(caplog, monkeypatch, package):
    monkeypatch.setattr(rank_zero, "log", logging.getLogger(package))  # as importing the package does
    before = torch.get_rng_state()
    with caplog.at_level(logging.INFO, logger=package):
        trainer = trainer_of(None)
    assert (trainer.num_devices, trainer.world_size, trainer.precision) == (1, 1, "32-true")
    assert not trainer.loggers
    assert not trainer.checkpoint_callbacks
    assert not caplog.records
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("wrong", [DataLoader(TRAIN), TRAIN, "cpu", L.Trainer])
def test_something_else_is_refused(wrong):
    with pytest.raises(
        TypeError, match=r"Trainer of Lightning first, got (an object of|the class) .*featurize\(data=\.\.\.\)"
    ):
        trainer_of(wrong)


def test_a_trainer_of_another_package_is_told_apart():
    other = type("Trainer", (), {"__module__": "transformers.trainer"})()
    with pytest.raises(
        TypeError, match=r"Trainer of Lightning first, got an object of transformers\.trainer\.Trainer;"
    ):
        trainer_of(other)


def test_one_of_several_processes_needs_one(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="one of several processes"):
        trainer_of(None)
