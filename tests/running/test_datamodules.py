"""A data module gives the data that training saw: it is set up when it must be, and not again."""

import lightning as L
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, Subset, TensorDataset, random_split

from lightning_trak import TRAK
from lightning_trak.callbacks import AttributionEvaluation
from lightning_trak.methods import RepresentationSimilarity
from lightning_trak.projections import SparseProjection
from lightning_trak.running.data.sources import as_loaders
from tests.lit import TARGETS, TRAIN, make_data, make_model, make_trainer

ALL = make_data(60)


class Noted(L.LightningDataModule):
    """Notes which of its hooks are called."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def prepare_data(self):
        self.calls.append("prepare")

    def setup(self, stage):
        self.calls.append(stage.value if isinstance(stage, TrainerFn) else stage)
        self.make(stage)

    def teardown(self, stage):
        self.calls.append(f"after {stage.value}")

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=10, shuffle=True)

    def predict_dataloader(self):
        return DataLoader(self.targets, batch_size=10)


class ByStage(Noted):
    """What the documentation of Lightning shows."""

    def make(self, stage):
        if stage == "fit":
            self.train = TRAIN
        if stage == "predict":
            self.targets = TARGETS


class AtRandom(Noted):
    """Splits whatever the stage is, each time in another way."""

    def make(self, stage):
        self.train, self.targets = random_split(ALL, [50, 10])


class Seeded(Noted):
    """Splits whatever the stage is, each time in the same way; draws numbers for something else."""

    def make(self, stage):
        self.train, self.targets = random_split(ALL, [50, 10], torch.Generator().manual_seed(3))
        self.mean = next(iter(DataLoader(self.train, batch_size=50)))[0].mean()


class LateTargets(Noted):
    """Takes the targets from a new split when they are asked for."""

    def make(self, stage):
        train, targets = random_split(ALL, [50, 10])
        if stage == "fit":
            self.train = train
        else:
            self.targets = targets


class Forgetful(AtRandom):
    """Lets go of its data after each stage."""

    def teardown(self, stage):
        super().teardown(stage)
        self.train = self.targets = None


def fitted(data, **options):
    trainer, model = make_trainer(max_epochs=1, **options), make_model()
    trainer.fit(model, datamodule=data)
    return trainer, TRAK(model, [model.state_dict()], trainer.default_root_dir, projection=SparseProjection(32))


@pytest.mark.slow
@pytest.mark.parametrize("same_trainer", [True, False])
@pytest.mark.parametrize("kind", [ByStage, AtRandom, Seeded])
def test_after_fit_nothing_is_prepared_or_set_up_again(tmp_path, kind, same_trainer):
    data = kind()
    trainer, trak = fitted(data, default_root_dir=tmp_path)
    trainer = trainer if same_trainer else make_trainer()
    train, calls = data.train, list(data.calls)
    assert calls == ["prepare", "fit", "after fit"]
    trak.featurize(trainer, data)
    assert data.calls == calls
    for _ in range(2):
        scores = trak.score(trainer, data)
    assert data.train is train
    assert data.calls == ([*calls, "predict"] if kind is ByStage else calls)
    torch.testing.assert_close(scores, trak.score(make_trainer(), data.targets))
    RepresentationSimilarity(make_model(), [make_model().state_dict()]).attribute(trainer, data, data)
    assert data.train is train
    if same_trainer:
        assert trainer.datamodule is data
        trainer.fit(make_model(), datamodule=data)


def test_targets_and_training_rows_stay_apart(tmp_path):
    data = AtRandom()
    trainer, trak = fitted(data, default_root_dir=tmp_path)
    trained = set(data.train.indices)
    trak.attribute(trainer, data, data)
    assert set(data.train.indices) == trained
    assert not trained & set(data.targets.indices)


@pytest.mark.parametrize("kind", [LateTargets, Forgetful])
def test_a_new_split_after_fit_is_refused(tmp_path, kind):
    data = kind()
    trainer, trak = fitted(data, default_root_dir=tmp_path)
    before = dict(vars(data))
    state = torch.get_rng_state()
    with pytest.raises(
        ValueError, match=r"setup\('\w+'\) of \w+ draws the data at random.*fixed seed, or in Python pass the load"
    ):
        trak.attribute(trainer, data, data)
    assert vars(data) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_targets_that_take_the_training_data_along_are_refused(tmp_path):
    class Generator(Noted):
        def make(self, stage):
            generator = torch.Generator()
            generator.seed()
            self.train, held_out = random_split(ALL, [50, 10], generator)
            if stage == "predict":
                self.targets = held_out

    data = Generator()
    trainer, trak = fitted(data, default_root_dir=tmp_path)
    train = data.train
    with pytest.raises(ValueError, match=r"setup\('predict'\) of Generator changes the training data"):
        trak.attribute(trainer, data, data)
    assert data.train is train


@pytest.mark.parametrize("kind", [ByStage, Seeded])
def test_one_that_no_trainer_has_met_is_prepared_and_set_up(tmp_path, checkpoints, kind):
    data, trak = kind(), TRAK(make_model(), checkpoints, tmp_path, projection=SparseProjection(32))
    trak.featurize(make_trainer(), data)
    assert data.calls == ["prepare", "fit"] + ["fit"] * (kind is Seeded)  # tried again, since it draws numbers
    calls = list(data.calls)
    trak.featurize(make_trainer(), data)
    assert data.calls == calls


def test_one_that_was_set_up_by_hand_keeps_its_data(recwarn):
    data = ByStage()
    data.setup("fit")
    assert as_loaders(data, "fit", make_trainer())[0].dataset is TRAIN
    data = AtRandom()
    data.setup("fit")
    train = data.train
    with pytest.raises(ValueError, match=r"training data that it had before.*or in Python pass the loaders"):
        as_loaders(data, "fit", make_trainer())
    assert data.train is train


def test_a_random_split_that_no_training_has_seen_is_warned_of():
    with pytest.warns(
        UserWarning, match="AtRandom draws the data at random, so they may differ from the training data"
    ):
        as_loaders(AtRandom(), "fit", make_trainer())


def test_missing_and_empty_loaders_are_named(tmp_path, checkpoints):
    class Halfway(L.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(None)

    trak = TRAK(make_model(), checkpoints, tmp_path, projection=SparseProjection(32))
    with pytest.raises(TypeError, match=r"train_dataloader\(\) of Halfway: cannot attribute to a NoneType"):
        trak.featurize(make_trainer(), Halfway())
    trak.featurize(make_trainer(), TRAIN)
    with pytest.raises(TypeError, match=r"Halfway has no predict_dataloader\(\), which must give the targets; defi.*"):
        trak.score(make_trainer(), Halfway())


def test_an_error_in_setup_is_the_users():
    class Broken(Noted):
        def make(self, stage):
            raise FileNotFoundError("no data here")

    data = Broken()
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match="no data here"):
            as_loaders(data, "fit", make_trainer())
    assert data.calls == ["prepare", "fit"] * 2  # no Trainer has met it yet


def test_datasets_without_a_class_of_ones_own(tmp_path, checkpoints, expected):
    data = L.LightningDataModule.from_datasets(TRAIN, predict_dataset=TARGETS, batch_size=16)
    trak = TRAK(make_model(), checkpoints, tmp_path, projection=SparseProjection(32))
    torch.testing.assert_close(trak.attribute(make_trainer(), data, data), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("per_node", "node", "calls"), [(True, 1, 1), (False, 1, 0), (False, 0, 1)])
def test_who_prepares(monkeypatch, per_node, node, calls):
    data, trainer = ByStage(), make_trainer()
    data.prepare_data_per_node = per_node
    monkeypatch.setattr(L.Trainer, "global_rank", property(lambda _: 4 * node))
    as_loaders(data, "fit", trainer)
    assert data.calls.count("prepare") == calls


def test_attribution_at_the_end_of_fit(tmp_path):
    data, model = AtRandom(), make_model()
    evaluation = AttributionEvaluation(
        {"similarity": lambda module: RepresentationSimilarity(module, [module.state_dict()])}, data, data
    )
    make_trainer(max_epochs=1, callbacks=[evaluation]).fit(model, datamodule=data)
    assert data.calls == ["prepare", "fit", "after fit"]
    assert evaluation.scores["similarity"].shape == (10, 50)


def test_subsets_stay_what_they_are():
    inputs, labels = ALL.tensors
    again = TensorDataset(inputs, labels)
    data = L.LightningDataModule.from_datasets(Subset(again, [3, 1]))
    assert as_loaders(data, "fit", make_trainer())[0].dataset.indices == [3, 1]
