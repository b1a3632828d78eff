"""Repeating a run: what it checks, and what it leaves alone."""

import copy

import pytest
import torch
from torch import nn

from lightning_trak.replay import replay
from tests.replay.runs import Net, make_data, train

DATA = make_data()


def net():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 3))


def momentum(module):
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, nesterov=True)


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
@pytest.mark.parametrize("clip", ["norm", "value"])
def test_a_run_is_repeated_bit_for_bit(precision, clip, tmp_path):
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3, "gradient_clip_algorithm": clip}
    module = Net(net, momentum)
    trainer = train(module, DATA, tmp_path, precision=precision, max_epochs=3, **options)
    found = replay(Net(net, momentum), tmp_path, trainer, DATA, tolerance=0, progress_bar=False)
    assert (found.steps, found.compared, found.identical, found.largest_difference) == (6, 3, True, 0.0)


def test_code_that_has_changed_is_noticed(tmp_path):
    class Changed(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (1 + 1e-9)

    trainer = train(Net(), DATA, tmp_path)
    found = replay(Changed(), tmp_path, trainer, DATA, progress_bar=False)
    assert not found.identical
    assert 0 < found.largest_difference < 1e-6
    with pytest.raises(ValueError, match=r"cannot be repeated: before step 1, parameter/net\.\d\.\w+ differs"):
        replay(Changed(), tmp_path, trainer, DATA, tolerance=0, progress_bar=False)


def test_random_numbers_that_are_not_recorded_are_noticed(tmp_path):
    class Own(Net):
        def training_step(self, batch, batch_idx):
            noise = torch.rand((), generator=torch.Generator().manual_seed(self.calls))
            self.calls += 1
            return super().training_step(batch, batch_idx) * (1 + noise)

    module = Own()
    module.calls = 0
    trainer = train(module, DATA, tmp_path)
    with pytest.raises(ValueError, match="random numbers of a generator of its own"):
        replay(module, tmp_path, trainer, DATA, progress_bar=False)


def test_the_user_s_module_is_left_alone(tmp_path):
    module = Net(net, momentum)
    trainer = train(module, DATA, tmp_path)
    before, held = copy.deepcopy(module.state_dict()), dict(vars(module))
    state = torch.get_rng_state()
    replay(module, tmp_path, trainer, DATA, progress_bar=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert dict(vars(module)) == held
    assert torch.equal(torch.get_rng_state(), state)
    assert type(module) is Net
    with pytest.raises(TypeError, match="expected the LightningModule that was trained, got a Linear"):
        replay(nn.Linear(1, 1), tmp_path, trainer, DATA, progress_bar=False)
