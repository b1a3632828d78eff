"""A second run in the directory of a first one: refused, or continued, or in its place."""

import lightning as L
import pytest
from torch.utils.data import DataLoader

from lightning_trak import TrainingRecorder, TRAKCallback
from lightning_trak.checkpoints import resolve_checkpoints
from lightning_trak.replay.recording.reading import Recording
from tests.lit import TRAIN, LitNet, make_trainer

KINDS = {"snapshots": TRAKCallback, "recording": TrainingRecorder}


def fit(directory, kind, seed, **options):
    L.seed_everything(seed, verbose=False)
    trainer = make_trainer(max_epochs=1, callbacks=[KINDS[kind](directory, **options)])
    trainer.fit(LitNet(), DataLoader(TRAIN, batch_size=25))


def content(directory, kind):
    if kind == "recording":
        found = Recording(directory)
        return found.run, found.state(2).parameters["head.weight"].tolist()
    return [checkpoint.fingerprint() for checkpoint in resolve_checkpoints(directory)]


@pytest.mark.parametrize("kind", KINDS)
def test_another_run_is_refused_or_deletes_the_first(tmp_path, kind):
    one, other = tmp_path / "one", tmp_path / "other"
    fit(one, kind, 1)
    fit(other, kind, 2)
    (one / "notes.txt").write_text("mine")
    kept = {path: path.read_bytes() for path in one.iterdir()}
    with pytest.raises(ValueError, match=r"overwrite=True .* exist_ok=True"):
        fit(one, kind, 2)
    with pytest.raises(ValueError, match=r"overwrite=True .* exist_ok=True"):
        fit(one, kind, 2, exist_ok=True)
    with pytest.raises(TypeError, match="overwrite must be True or False; got 'no'"):
        fit(one, kind, 2, overwrite="no")
    assert {path: path.read_bytes() for path in one.iterdir()} == kept
    fit(one, kind, 2, overwrite=True)
    assert content(one, kind) == content(other, kind)
    assert {path.name for path in one.iterdir()} - {path.name for path in other.iterdir()} == {"notes.txt"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_run_again_takes_its_directory(tmp_path, kind):
    fit(tmp_path, kind, 1, exist_ok=True)
    before = content(tmp_path, kind)
    fit(tmp_path, kind, 1, exist_ok=True)
    assert content(tmp_path, kind) == before
    with pytest.raises(ValueError, match="another run"):
        fit(tmp_path, kind, 2, exist_ok=True)
    fit(tmp_path, kind, 2, exist_ok=True, overwrite=True)
    assert content(tmp_path, kind) != before


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_alive_is_not_overwritten(tmp_path, kind):
    class Second(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            with pytest.raises(ValueError, match="another run is writing"):
                fit(tmp_path, kind, 2, overwrite=True)
            self.done = True

    second = Second()
    L.seed_everything(1, verbose=False)
    trainer = make_trainer(max_epochs=1, callbacks=[KINDS[kind](tmp_path), second])
    trainer.fit(LitNet(), DataLoader(TRAIN, batch_size=25))
    assert second.done
    content(tmp_path, kind)
