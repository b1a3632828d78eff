"""Members that fail: recorded, named, and tried again."""

import json
import signal

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Timer
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak.retraining import read_fleet
from lightning_trak.retraining.fleets.members import Member
from tests.lit import LitNet
from tests.lit import make_trainer as quiet_trainer
from tests.retraining.small_fleet import EPOCHS, LOADER, MASKS, TARGETS, TRAIN, N, make_fleet, make_trainer, run


class Flaky(LitNet):
    """Fails on one of the subsets, as often as it is told to."""

    failures = 0

    def on_train_start(self):
        if len(self.trainer.train_dataloader.dataset) == 11 and Flaky.failures:
            Flaky.failures -= 1
            raise ArithmeticError("bad weather")


UNEVEN = torch.stack([MASKS[0], torch.arange(N) < 11, MASKS[1]])


def test_failures_are_recorded_and_tried_again(tmp_path):
    Flaky.failures = 3
    fleet = make_fleet(tmp_path, Flaky, masks=UNEVEN)
    summary = r"1 of 3 members failed.*: subset 1, repetition 0 \(failed 2x, ArithmeticError: bad weather\).*run again"
    with pytest.raises(RuntimeError, match=summary), pytest.warns(UserWarning, match="subset 1, repetition 0 failed"):
        fleet.run(progress_bar=False)
    assert fleet.store.finished() == {Member(0, 0), Member(2, 0)}
    failure = json.loads((tmp_path / "failures" / "subset-00001-seed-000.json").read_text())
    assert failure["attempts"] == 2
    assert "in on_train_start" in failure["traceback"]
    with pytest.raises(RuntimeError, match=r"lacks 1 of 3 members.*failed 2x, ArithmeticError: bad weather"):
        _ = fleet.outputs
    with pytest.warns(UserWarning, match="bad weather"):
        make_fleet(tmp_path, Flaky, masks=UNEVEN).run(progress_bar=False)  # fails once more, and is tried again
    assert fleet.outputs.isfinite().all()
    assert fleet.store.failure(Member(1, 0))["attempts"] == 3


def test_an_interrupt_stops_the_fleet(tmp_path):
    class Interrupted(LitNet):
        def training_step(self, batch):
            raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run(tmp_path, Interrupted)
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored, and exits
    assert not (tmp_path / "failures").exists()


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize(
    ("make_trainer", "train", "match"),
    [
        (
            lambda: quiet_trainer(max_epochs=0),
            LOADER,
            "training took 0 steps in 0 epochs.*max_epochs=0 and .*, over 3 batches",
        ),
        (make_trainer, DataLoader(TRAIN, batch_size=16, drop_last=True), "training took 0 steps .*over 0 batches"),
        (
            lambda: quiet_trainer(max_epochs=EPOCHS, limit_train_batches=0),
            LOADER,
            "training took 0 steps .*limit_train_batches=0",
        ),
    ],
)
def test_training_that_does_not_happen_is_a_failure(tmp_path, make_trainer, train, match):
    fleet = make_fleet(tmp_path, make_trainer=make_trainer, train=train)
    with pytest.raises(RuntimeError, match=match):
        fleet.run(progress_bar=False, retries=0)
    assert not fleet.store.finished()


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_training_that_a_clock_stops_is_a_failure(tmp_path, interval):
    def timed(seconds):
        return quiet_trainer(max_epochs=EPOCHS, callbacks=[Timer({"seconds": seconds}, interval)])

    late = make_fleet(tmp_path / "late", make_trainer=lambda: timed(0))
    with pytest.raises(RuntimeError, match=r"stopped by max_time or a Timer: .* depends on the machine"):
        late.run(progress_bar=False, retries=0)
    in_time = run(tmp_path / "in_time", make_trainer=lambda: timed(3600))
    torch.testing.assert_close(in_time.outputs, run(tmp_path / "untimed").outputs, rtol=0, atol=0)


def test_training_that_goes_on_from_elsewhere_is_a_failure(tmp_path):
    class Resumed(LitNet):
        def on_fit_start(self):  # what loading a checkpoint does to the loops
            self.trainer.fit_loop.epoch_progress.current.processed = 1

    with (
        pytest.raises(RuntimeError, match="training began at step 0, epoch 1"),
        pytest.warns(UserWarning, match="failed"),
    ):
        make_fleet(tmp_path, Resumed).run(retries=0)


def test_a_callback_may_stop_early(tmp_path):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = True

    fleet = run(tmp_path, make_trainer=lambda: quiet_trainer(max_epochs=5, callbacks=[Stop()]))
    assert fleet.store.read(Member(0, 0))[1]["steps"] < 15
    stepwise = run(tmp_path / "steps", make_trainer=lambda: quiet_trainer(max_steps=4))
    assert stepwise.store.read(Member(0, 0))[1]["steps"] == 4


def test_outputs_that_are_not_finite_are_a_failure(tmp_path):
    bad = TensorDataset(TARGETS.tensors[0], TARGETS.tensors[1].clone())
    bad.tensors[1][5] = -100
    with (
        pytest.raises(RuntimeError, match="not finite at 1 targets, target 5 first"),
        pytest.warns(UserWarning, match="failed"),
    ):
        make_fleet(tmp_path, targets=bad).run(retries=0)


def test_a_mistake_before_the_first_member_can_be_mended(tmp_path):
    Flaky.failures = 1
    only = UNEVEN[1:2]
    with pytest.raises(RuntimeError, match="failed 1x"), pytest.warns(UserWarning, match="bad weather"):
        make_fleet(tmp_path, Flaky, masks=only, seed=1).run(retries=0)
    fleet = run(tmp_path, Flaky, masks=only)
    assert fleet.store.failure(Member(0, 0)) == {}
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="holds members of a fleet but no manifest"):
        run(tmp_path, Flaky, masks=only)
    with pytest.raises(FileNotFoundError, match="is not a fleet yet; run it first"):
        read_fleet(tmp_path / "nothing")
