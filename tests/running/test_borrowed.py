"""The user's Trainer in every setting: what it holds is as it was, whether a call succeeds or fails."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.profilers import SimpleProfiler
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import TRAK
from lightning_trak.projections import SparseProjection
from tests.lit import TARGETS, TRAIN, LitNet, attribute, make_data, make_model, make_trainer

BAD = TensorDataset(torch.full((5, 6), torch.nan), torch.zeros(5, dtype=torch.int64))


class Logging(LitNet):
    def training_step(self, batch):
        loss = super().training_step(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch):
        self.log("val", self(batch[0]).sum())

    def predict_step(self, batch):
        return self(batch[0])


def everything(trainer):
    """All that a Trainer and what belongs to it hold."""
    validation = trainer.fit_loop.epoch_loop.val_loop
    loops = [trainer.fit_loop, validation, trainer.validate_loop, trainer.test_loop, trainer.predict_loop]
    parts = [trainer, trainer.state, trainer._data_connector, trainer._logger_connector, trainer._signal_connector]
    parts += [*loops, *(loop._data_source for loop in loops), trainer.predict_loop.batch_progress, trainer.profiler]
    return [(part, dict(vars(part))) for part in parts]


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("used", ["fresh", "fitted", "validated", "predicted"])
def test_the_trainer_holds_what_it_held(tmp_path, checkpoints, expected, used, fails):
    profiler = SimpleProfiler(dirpath=tmp_path, filename="profile")
    trainer = make_trainer(max_epochs=1, profiler=profiler, callbacks=[Timer()], log_every_n_steps=1)
    loader, model = DataLoader(make_data(8), batch_size=4), Logging()
    if used == "fitted":
        trainer.fit(model, loader, loader)
        assert set(trainer.callback_metrics) == {"loss", "val"}
    elif used == "validated":
        trainer.validate(model, loader, verbose=False)
    elif used == "predicted":
        trainer.predict(model, loader)
    before, module = everything(trainer), trainer.lightning_module
    metrics, actions = dict(trainer.callback_metrics), dict(profiler.recorded_durations)
    if fails:
        with pytest.raises(ValueError, match="not finite"):
            attribute(tmp_path, checkpoints, BAD, trainer=trainer)
    else:
        assert torch.equal(attribute(tmp_path, checkpoints, trainer=trainer), expected)
    assert everything(trainer) == before
    assert trainer.lightning_module is module
    assert trainer.callback_metrics == metrics
    assert profiler.recorded_durations == actions
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Logging(), loader, loader)
    assert set(trainer.callback_metrics) == {"loss", "val"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"barebones": True, "logger": None, "enable_checkpointing": None},
        {"overfit_batches": 1},
        {"limit_train_batches": 1, "limit_val_batches": 0},
        {"max_time": {"seconds": 0}},
        {"max_steps": 0},
        {"inference_mode": False},
        {"detect_anomaly": True},
        {"profiler": "simple"},
        {"enable_progress_bar": True},
        {"num_sanity_val_steps": 0, "check_val_every_n_epoch": None, "val_check_interval": 7},
    ],
    ids=lambda options: next(iter(options)),
)
def test_settings_for_training_change_nothing(tmp_path, checkpoints, expected, options):
    trainer = make_trainer(**options) if "barebones" not in options else L.Trainer(barebones=True, accelerator="cpu")
    torch.testing.assert_close(attribute(tmp_path, checkpoints, trainer=trainer), expected)


def test_a_trainer_in_the_middle_of_a_run_is_refused(tmp_path, checkpoints):
    class Impatient(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            TRAK(make_model(), checkpoints, tmp_path, projection=SparseProjection(32)).featurize(trainer, TRAIN)

    trainer = make_trainer(max_epochs=1, callbacks=[Impatient()])
    with pytest.raises(ValueError, match=r"in the middle of a run.*on_fit_end is late enough"):
        trainer.fit(make_model(), DataLoader(TRAIN, batch_size=10))


def test_another_trainer_in_the_middle_of_a_run(tmp_path, checkpoints, expected):
    class Patient(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            self.scores = attribute(tmp_path, checkpoints, trainer=make_trainer())

    callback = Patient()
    make_trainer(max_epochs=1, callbacks=[callback]).fit(make_model(), DataLoader(TARGETS, batch_size=8))
    assert torch.equal(callback.scores, expected)
