"""What people do with Lightning models, Trainers and data that a careless copy or a second setup would get wrong."""

import gc
import os
import threading
import weakref

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning_utilities.core.rank_zero import WarningCache
from torch import nn
from torch.utils.data import DataLoader, Dataset, random_split

from lightning_trak import TRAK, AttributionMixin, GradientDot
from lightning_trak.features.model import ModelCopy
from lightning_trak.methods import InfluenceFunction
from lightning_trak.outputs import ClassificationMargin, NegativeLoss
from lightning_trak.projections import IdentityProjection, SparseProjection
from tests.lit import TARGETS, TRAIN, LitNet, attribute, beyond_hooks, make_data, make_model, make_trainer, open_store

OPTIONS = {"projection": SparseProjection(32)}


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


class _Backbone(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, inputs):
        return torch.tanh(self.layer(inputs))


class _WithBackbone(AttributionMixin, L.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone = _Backbone()
        self.head = nn.Linear(4, 3)

    def forward(self, inputs):
        return self.head(self.backbone(inputs))

    def configure_model_output(self):
        return ClassificationMargin()


@pytest.mark.slow
@pytest.mark.parametrize("which", ["child", "whole", "wrapped"])
def test_compiled_modules(tmp_path, which):
    torch.manual_seed(0)
    model = _WithBackbone()
    checkpoints = [_WithBackbone().state_dict() for _ in range(2)]

    def scores(name, module):
        trak = TRAK(module, checkpoints, tmp_path / name, **OPTIONS)
        trak.featurize(make_trainer(), TRAIN)
        return trak.score(make_trainer(), TARGETS)

    plain = scores("plain", model)
    if which == "wrapped":
        model = torch.compile(model, backend="eager")
    else:
        (model.backbone if which == "child" else model).compile(backend="eager")
    close(scores(which, model), plain)


def test_checkpoints_of_a_compiled_model_fit_the_plain_one(tmp_path, checkpoints, expected):
    renamed = [{f"_orig_mod.{name}": tensor for name, tensor in weights.items()} for weights in checkpoints]
    close(attribute(tmp_path, renamed), expected)


def test_a_module_that_saves_a_part_of_its_weights(tmp_path, checkpoints):
    class Adapter(LitNet):
        strict_loading = False

    part = {name: tensor for name, tensor in checkpoints[0].items() if name.startswith("head")}
    trak = TRAK(Adapter(), [part], tmp_path, parameters="head.*", **OPTIONS)
    trak.featurize(make_trainer(), TRAIN)
    assert trak.score(make_trainer(), TARGETS).shape == (13, 50)


def test_layers_that_configure_model_makes(tmp_path):
    class Late(AttributionMixin, L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = None

        def configure_model(self):
            if self.layer is None:
                self.layer = nn.Linear(6, 3)

        def forward(self, inputs):
            return self.layer(inputs)

        def configure_model_output(self):
            return ClassificationMargin()

    trained = Late()
    trained.configure_model()
    trak = TRAK(Late(), [trained.state_dict()], tmp_path, projection=IdentityProjection())
    trak.featurize(make_trainer(), TRAIN)
    assert trak.score(make_trainer(), TARGETS).shape == (13, 50)


def test_a_model_that_cannot_be_copied_says_why(tmp_path, checkpoints):
    model = make_model()
    model.file = threading.Lock()
    with pytest.raises(ValueError, match=r"LitNet cannot be copied: .*remove tensors with gradients, locks"):
        TRAK(model, checkpoints, tmp_path, **OPTIONS).featurize(make_trainer(), TRAIN)


def test_a_random_model_is_refused(tmp_path, checkpoints):
    class Noisy(LitNet):
        def forward(self, inputs):
            return super().forward(inputs + torch.randn_like(inputs))

    trak = TRAK(Noisy(), checkpoints, tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match="output of Noisy is random in eval mode"):
        trak.featurize(make_trainer(), TRAIN)


def test_a_model_that_returns_probabilities_is_told(tmp_path, checkpoints, recwarn):
    class Sure(LitNet):
        def forward(self, inputs):
            return super().forward(inputs).softmax(1)

    TRAK(make_model(), checkpoints, tmp_path / "logits", **OPTIONS).featurize(make_trainer(), TRAIN)
    assert not any("probabilities" in str(warning.message) for warning in recwarn)
    for method in (TRAK(Sure(), checkpoints, tmp_path / "store", **OPTIONS), InfluenceFunction(Sure(), checkpoints)):
        with pytest.warns(UserWarning, match=r"Sure returns probabilities.*forward="):
            method.attribute(make_trainer(), TRAIN, TARGETS)


def test_a_training_step_that_logs_may_be_the_loss(tmp_path, checkpoints):
    class Logs(LitNet):
        def training_step(self, batch):
            loss = super().training_step(batch)
            self.log("loss", loss, prog_bar=True)
            self.log_dict({"again": loss})
            return loss

    def loss(module, batch):
        return F.cross_entropy(module(batch[0]), batch[1], reduction="none")

    output = NegativeLoss(lambda module, batch: module.training_step(batch))
    found = GradientDot(Logs(), checkpoints, tmp_path / "step", output=output).attribute(make_trainer(), TRAIN, TARGETS)
    method = GradientDot(LitNet(), checkpoints, tmp_path / "loss", output=NegativeLoss(loss))
    torch.testing.assert_close(found, method.attribute(make_trainer(), TRAIN, TARGETS))


def test_vmap_may_fail_at_any_batch(tmp_path, checkpoints, expected):
    class Sometimes(LitNet):
        def forward(self, inputs):
            if inputs.shape[0] == 1 and os.environ.get("TRAK_TEST_ITEM"):
                float(inputs.sum())
            return super().forward(inputs)

    class Switching(Dataset):
        def __len__(self):
            return 50

        def __getitem__(self, index):
            os.environ.pop("TRAK_TEST_ITEM", None)
            if index >= 30:
                os.environ["TRAK_TEST_ITEM"] = "1"
            return TRAIN[index]

    trak = TRAK(beyond_hooks(Sometimes()), checkpoints, tmp_path, **OPTIONS)
    try:
        with pytest.warns(UserWarning, match="vmap cannot differentiate Sometimes"):
            trak.featurize(make_trainer(), DataLoader(Switching(), batch_size=10))
    finally:
        os.environ.pop("TRAK_TEST_ITEM", None)
    torch.testing.assert_close(trak.score(make_trainer(), TARGETS), expected, rtol=1e-3, atol=1e-5)


def test_a_full_memory_is_not_a_reason_for_the_loop(tmp_path, checkpoints, monkeypatch):
    def full(*args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("lightning_trak.gradients.HookEngine.project", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        attribute(tmp_path, checkpoints)


@pytest.mark.slow
def test_workers_open_their_own_files(tmp_path, checkpoints):
    class Lazy(Dataset):
        opened_in = None

        def __len__(self):
            return 50

        def __getitem__(self, index):
            self.opened_in = self.opened_in or os.getpid()
            assert self.opened_in == os.getpid(), "a file handle of another process"
            return TRAIN[index]

    data = Lazy()
    attribute(tmp_path, checkpoints, DataLoader(data, batch_size=8, num_workers=2))
    assert data.opened_in is None


def test_mixing_in_the_collate_function_is_noticed(tmp_path, checkpoints):
    def mixup(items):
        assert len(items) > 1
        inputs = torch.stack([item[0] for item in items])
        return inputs + 0.1 * torch.rand(1) * inputs.roll(1, 0), torch.stack([item[1] for item in items])

    with pytest.warns(UserWarning, match="not the same twice"):
        attribute(tmp_path, checkpoints, DataLoader(TRAIN, batch_size=10, collate_fn=mixup))


class _Splitting(L.LightningDataModule):
    """Splits anew, at random, in every setup; and asks its Trainer things, as Lightning's documentation does."""

    def setup(self, stage):
        if stage == "fit":
            self.train, _ = random_split(make_data(60), [50, 10])

    def train_dataloader(self):
        assert self.trainer.world_size == 1
        return DataLoader(self.train, batch_size=10)

    def predict_dataloader(self):
        return DataLoader(TARGETS, batch_size=10)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        assert not self.trainer.training or self.trainer.state.fn == "fit"
        return batch


def test_a_data_module_is_not_split_again(tmp_path):
    data, model = _Splitting(), make_model()
    trainer = make_trainer(max_epochs=1)
    trainer.fit(model, datamodule=data)
    split = list(data.train.indices)
    trak = TRAK(model, [model.state_dict()], tmp_path, **OPTIONS)
    trak.featurize(trainer, data)
    trak.score(trainer, data)
    assert data.train.indices == split


def test_a_data_module_that_has_never_met_a_trainer(tmp_path, checkpoints):
    data = _Splitting()
    with pytest.warns(UserWarning, match="_Splitting draws the data at random"):
        assert attribute(tmp_path, checkpoints, data, data).shape == (13, 50)


def test_autocast_does_not_reach_the_scores(tmp_path, checkpoints, expected):
    trainer = make_trainer()
    trak = TRAK(make_model(), checkpoints, tmp_path, **OPTIONS)
    with torch.autocast("cpu", torch.bfloat16):
        trak.featurize(trainer, TRAIN)
        close(trak.score(trainer, TARGETS), expected)
        close(torch.cat(trainer.predict(trak.scorer(), DataLoader(TARGETS, batch_size=5))), expected)


def test_mixed_precision_rounds_features_not_scores(tmp_path, checkpoints, expected):
    trainer = make_trainer(precision="bf16-mixed")
    trak = TRAK(make_model(), checkpoints, tmp_path, **OPTIONS)
    trak.featurize(trainer, TRAIN)
    scores = trak.score(trainer, TARGETS)
    assert 0 < float((scores - expected).norm() / expected.norm()) < 0.1
    close(torch.cat(trainer.predict(trak.scorer(), DataLoader(TARGETS, batch_size=5))), scores)


def test_a_scorer_is_refused_by_a_trainer_of_another_precision(tmp_path, checkpoints, expected):
    trak = TRAK(make_model(), checkpoints, tmp_path, **OPTIONS)
    trak.featurize(make_trainer(), TRAIN)
    scorer, loader = trak.scorer(), DataLoader(TARGETS, batch_size=5)
    for precision in ("bf16-true", "bf16-mixed", "64-true"):
        with pytest.raises(ValueError, match=f"made with precision 32-true, this Trainer has precision {precision}"):
            make_trainer(precision=precision).predict(trak.scorer(), loader)
    for _ in range(2):
        scores = torch.cat(make_trainer().predict(scorer, loader))
        torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_hooks_take_the_precision_of_the_trainer(tmp_path, checkpoints, precision, expected):
    trak = TRAK(make_model(), checkpoints, tmp_path, **OPTIONS)
    trak.featurize(make_trainer(precision=precision), TRAIN)
    assert open_store(trak, make_trainer(precision=precision)).settle_engine() == "hooks"
    scores = trak.score(make_trainer(precision=precision), TARGETS)
    assert float((scores - expected).norm() / expected.norm()) < (0.1 if precision == "bf16-true" else 1e-4)


def test_nothing_of_ours_stays_in_the_trainer(tmp_path, checkpoints, monkeypatch):
    copies = []
    init = ModelCopy.__init__

    def noted(self, *args, **kwargs):
        init(self, *args, **kwargs)
        copies.append(weakref.ref(self.module))

    monkeypatch.setattr(ModelCopy, "__init__", noted)
    trainer = make_trainer()
    attribute(tmp_path, checkpoints, trainer=trainer)
    gc.collect()
    assert len(copies) == 2
    assert all(copied() is None for copied in copies)


def test_losses_that_differ_only_in_their_code_are_told_apart(tmp_path, checkpoints):
    def store(loss):
        trak = TRAK(make_model(), checkpoints, tmp_path, output=NegativeLoss(loss), **OPTIONS)
        trak.featurize(make_trainer(), TRAIN)

    store(lambda module, batch: F.cross_entropy(module(batch[0]), batch[1], reduction="none"))
    with pytest.raises(ValueError, match="was made with another output"):
        store(lambda module, batch: F.multi_margin_loss(module(batch[0]), batch[1], reduction="none"))


_said = WarningCache()


def _with_class_weights(module, batch):
    _said.warn("this loss has class weights")
    return F.cross_entropy(module(batch[0]), batch[1], weight=torch.tensor([1.0, 2.0, 3.0]))


def test_a_loss_that_says_something_once_is_the_same_loss_afterwards(tmp_path, checkpoints):
    with pytest.warns(UserWarning, match="a weighted mean of its examples' losses"):
        scores = attribute(tmp_path, checkpoints, output=NegativeLoss(_with_class_weights))
    each = NegativeLoss(lambda module, batch: F.cross_entropy(module(batch[0]), batch[1], reduction="none"))
    close(scores, attribute(tmp_path, checkpoints, output=each, name="each"))
