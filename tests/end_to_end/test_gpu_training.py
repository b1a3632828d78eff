"""Runs that were recorded on a GPU, and modules that are trained there together."""

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_trak.replay import replay
from lightning_trak.retraining import RecordedFleet, train_together
from tests.lit import make_trainer
from tests.methods.metagradients import DATA, NETS, TARGETS, attribute, require_derivative
from tests.replay.runs import Net, train
from tests.retraining import test_fleet_together as fleets
from tests.retraining import test_train_together as together
from tests.retraining.test_recorded import MASKS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = {"accelerator": "gpu"}


@pytest.mark.parametrize("net", ["dropout", "group norm", "attention"])
def test_a_run_is_repeated_and_differentiated(tmp_path, net):
    """Also with random numbers of the GPU's own generator."""

    def make():
        return Net(NETS[net])

    module = make()
    trainer = train(module, DATA, tmp_path, **GPU)
    repeated = replay(module, tmp_path, trainer, DataLoader(DATA, batch_size=4), progress_bar=False)
    assert repeated.largest_difference < 1e-9
    require_derivative(make, attribute(module, tmp_path, trainer), GPU)


def test_random_numbers_of_a_gpu_are_refused_on_a_cpu(tmp_path):
    module = Net(NETS["dropout"])
    train(module, DATA, tmp_path, **GPU)
    with pytest.raises(ValueError, match=r'drew random numbers on a GPU.* use a Trainer with accelerator="gpu"'):
        attribute(module, tmp_path, make_trainer(accelerator="cpu"))


def test_metagradients_are_those_on_the_cpu(tmp_path):
    found = {}
    for accelerator in ("cpu", "gpu"):
        module = Net()
        trainer = train(module, DATA, tmp_path / accelerator, accelerator=accelerator)
        found[accelerator] = attribute(module, tmp_path / accelerator, trainer, check_smooth=True)
    torch.testing.assert_close(found["gpu"], found["cpu"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("algorithm", ["sgd", "adamw"])
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
def test_modules_trained_together_are_those_on_the_cpu(algorithm):
    on_gpu, on_cpu = (
        train_together(
            lambda: together.Net(algorithm),
            together.DATA,
            together.SUBSETS,
            together.SEEDS,
            max_epochs=together.EPOCHS,
            batch_size=8,
            device=device,
        )
        for device in ("cuda", "cpu")
    )
    for found, expected in zip(on_gpu.state_dicts(), on_cpu.state_dicts(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_fleet_trained_together_has_the_outputs_of_one_on_the_cpu(tmp_path):
    found = []
    for accelerator in ("gpu", "cpu"):
        fleet = fleets.make_fleet(
            tmp_path / accelerator,
            make_trainer=lambda kind=accelerator: make_trainer(max_epochs=4, accelerator=kind),
            num_seeds=2,
        )
        fleet.run(together=3, progress_bar=False)
        found.append(fleet.outputs)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_members_of_a_recorded_run_together_are_as_alone(tmp_path):
    module = Net(NETS["group norm"])
    trainer = train(module, DATA, tmp_path / "recording", **GPU)
    found = []
    for name, number in (("alone", None), ("together", 3)):
        fleet = RecordedFleet(tmp_path / name, module, tmp_path / "recording", trainer, DATA, TARGETS, MASKS)
        fleet.run(together=number, progress_bar=False)
        found.append(fleet.outputs)
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
