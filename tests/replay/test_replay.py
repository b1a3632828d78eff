"""Repeating a run: what it checks, and what it leaves alone."""

import copy

import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
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
            later = min(self.global_step, 1)  # the first step is repeated at once
            return super().training_step(batch, batch_idx) * (1 + later * noise)

    module = Own()
    module.calls = 0
    trainer = train(module, DATA, tmp_path)
    with pytest.raises(ValueError, match="random numbers of a generator of its own"):
        replay(module, tmp_path, trainer, DATA, progress_bar=False)


def test_a_step_may_read_its_learning_rate_and_its_logger(tmp_path):
    class Reads(Net):
        def training_step(self, batch, batch_idx):
            rate = self.optimizers().param_groups[0]["lr"]
            assert rate == self.trainer.optimizers[0].param_groups[0]["lr"]
            self.logger.experiment.add_scalar("rate", rate, self.trainer.global_step)
            return super().training_step(batch, batch_idx) * (1 + rate)

    def falling(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    module = Reads(optimizer=falling)
    trainer = train(module, DATA, tmp_path, logger=DummyLogger())
    assert replay(module, tmp_path, trainer, DATA, tolerance=0, progress_bar=False).identical


def test_a_step_s_own_hooks_may_set_the_learning_rate(tmp_path):
    class WarmUp(Net):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * min(1.0, (self.trainer.global_step + 1) / 4)
            optimizer.step(closure=optimizer_closure)

        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            optimizer.zero_grad(set_to_none=True)

    module = WarmUp()
    trainer = train(module, DATA, tmp_path)
    assert replay(module, tmp_path, trainer, DATA, tolerance=0, progress_bar=False).identical


def test_a_model_may_differentiate_by_its_input(tmp_path):
    class Physics(Net):
        def training_step(self, batch, batch_idx):
            inputs = batch[0].requires_grad_()
            slopes = torch.autograd.grad(self(inputs).sum(), inputs, create_graph=True)[0]
            return super().training_step(batch, batch_idx) + slopes.square().mean()

    module = Physics()
    trainer = train(module, DATA, tmp_path)
    assert replay(module, tmp_path, trainer, DATA, tolerance=0, progress_bar=False).identical


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
