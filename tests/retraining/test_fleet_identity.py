"""What a fleet's members depend on: a fleet that is continued with something else is refused, and says with what."""

import functools

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, StochasticWeightAveraging
from torch import nn
from torch.utils.data import DataLoader

from lightning_trak.retraining import RetrainingFleet, random_subsets, read_fleet
from lightning_trak.retraining.fleets.members import Member
from tests.launch import run_module
from tests.lit import LitNet, make_data, make_trainer
from tests.retraining import fleet_script

LOADER = DataLoader(make_data(12), batch_size=4)
MASKS = random_subsets(12, 2, seed=1)


def fleet(directory, make_module=LitNet, loader=LOADER, make_loader=None, **trainer):
    options = {"max_epochs": 1} | trainer
    return RetrainingFleet(
        directory,
        make_module,
        lambda: make_trainer(**{name: value() if callable(value) else value for name, value in options.items()}),
        loader,
        make_data(3, seed=1),
        MASKS,
        make_loader=make_loader,
    )


def begin(made):
    """As if a member had been trained."""
    made.store.write(Member(0, 0), torch.zeros(3), {})


def named(**changes):
    """A subclass of LitNet that goes by the name of another one."""
    made = type("Net", (LitNet,), changes)
    made.__qualname__ = "Net"
    return made


def optimizer(kind=torch.optim.SGD, schedule=None, **settings):
    def configure_optimizers(self):
        made = kind(self.parameters(), **({"lr": 0.1} | settings))
        return made if schedule is None else {"optimizer": made, "lr_scheduler": schedule(made)}

    return configure_optimizers


def half(epoch):
    return 0.5**epoch


def third(epoch):
    return 0.3**epoch


def lambda_schedule(function):
    return functools.partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=function)


class Settings(LitNet):
    def __init__(self, kind="a", layers=(1, 2), transform=None, options=None):
        super().__init__()
        self.save_hyperparameters()


class Pretrained(LitNet):
    value = 1.0

    def __init__(self):
        super().__init__()
        nn.init.constant_(self.first.weight, self.value)


def pretrained(value):
    weights = {name: torch.full_like(tensor, value) for name, tensor in LitNet().first.state_dict().items()}

    def make_module():
        net = LitNet()
        net.first.load_state_dict(weights)
        return net

    return make_module


def initialized(scale):
    def make_module():
        net = LitNet()
        nn.init.normal_(net.head.weight, std=scale)
        return net

    return make_module


def step(self, batch):
    return F.cross_entropy(self(batch[0]), batch[1]) * 2


def smooth(self, batch):
    return F.cross_entropy(self(batch[0]), batch[1], label_smoothing=0.1)


def shuffled(dataset):
    return DataLoader(dataset, batch_size=4, shuffle=True)


def ordered(dataset):
    return DataLoader(dataset, batch_size=4)


def stopping(**options):
    return lambda: [EarlyStopping("loss", **options)]


class Noise(L.Callback):
    def __init__(self, scale):
        self.scale, self.calls = scale, 0

    def on_train_batch_end(self, *args):
        self.calls += 1


def of(**hyperparameters):
    return lambda: Settings(**hyperparameters)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ({"make_module": named(training_step=step)}, {"make_module": named(training_step=smooth)}, "smooth is new"),
        (
            {"make_module": LitNet},
            {"make_module": named()},
            'another module, .* module class was "LitNet" and is "Net"',
        ),
        (
            {"make_module": named(configure_optimizers=optimizer())},
            {"make_module": named(configure_optimizers=optimizer(torch.optim.Adam))},
            "another module|another optimizer",
        ),
        (
            {"make_module": named(configure_optimizers=optimizer(lr=0.1))},
            {"make_module": named(configure_optimizers=optimizer(lr=0.2))},
            "configure_optimizers has changed",
        ),
        (
            {"make_module": named(configure_optimizers=optimizer(schedule=lambda_schedule(half)))},
            {"make_module": named(configure_optimizers=optimizer(schedule=lambda_schedule(third)))},
            "configure_optimizers has changed|half is gone",
        ),
        (
            {"make_module": of(layers=(1, 2))},
            {"make_module": of(layers=(1, 3))},
            r"another make_module|hyperparameters",
        ),
        ({"make_module": pretrained(1.0)}, {"make_module": pretrained(2.0)}, "another make_module"),
        (
            {"make_module": initialized(1.0)},
            {"make_module": initialized(2.0)},
            "another make_module, .*make_module has",
        ),
        ({"make_loader": shuffled}, {"make_loader": ordered}, "another loader, .* sampler was .*Random.* and is"),
        (
            {"make_loader": lambda dataset: DataLoader(dataset, batch_size=4, shuffle=True)},
            {"make_loader": lambda dataset: DataLoader(dataset, shuffle=True, batch_size=2 + 2)},
            "another loader, .*<lambda> has changed",
        ),
        ({}, {"loader": DataLoader(make_data(12), batch_size=4, drop_last=True)}, "loader.*drop_last was false"),
        (
            {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "norm"},
            {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"},
            "another gradient_clip_algorithm|made with gradient_clip_algorithm",
        ),
        ({}, {"limit_train_batches": 1}, r"made with limit_train_batches 1\.0, this one has limit_train_batches 1"),
        ({}, {"reload_dataloaders_every_n_epochs": 2}, "reload_dataloaders_every_n_epochs"),
        ({}, {"val_check_interval": 1}, "val_check_interval"),
        ({"check_val_every_n_epoch": 2}, {"check_val_every_n_epoch": 3}, "check_val_every_n_epoch 2, .* 3"),
        ({}, {"callbacks": stopping()}, "another callbacks|callbacks"),
        ({"callbacks": stopping()}, {"callbacks": stopping(patience=5)}, "callbacks.*EarlyStopping"),
        ({}, {"callbacks": lambda: [StochasticWeightAveraging(swa_lrs=0.1)]}, "StochasticWeightAveraging"),
        ({"callbacks": lambda: [Noise(1)]}, {"callbacks": lambda: [Noise(2)]}, "Noise"),
    ],
)
def test_a_fleet_of_other_training_is_refused(tmp_path, old, new, match):
    begin(fleet(tmp_path, **old))
    assert fleet(tmp_path, **old).store.finished()
    with pytest.raises(ValueError, match=match) as caught:
        _ = fleet(tmp_path, **new).store
    assert "use another directory or the same" in str(caught.value)
    assert len(str(caught.value)) < 600
    assert fleet(tmp_path, **old).store.finished(), "nothing is lost"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"layers": (1, 2)}, {"layers": (1, 3)}),
        ({"kind": "a"}, {"kind": "b"}),
        ({"transform": torch.relu}, {"transform": torch.tanh}),
        ({"transform": nn.Dropout(0.1)}, {"transform": nn.Dropout(0.2)}),
        ({"options": {"a": [torch.ones(2)]}}, {"options": {"a": [torch.zeros(2)]}}),
        ({"options": Noise(1)}, {"options": Noise(2)}),
        ({"transform": lambda x: x + 1}, {"transform": lambda x: x + 2}),
    ],
)
def test_hyperparameters_of_all_kinds_count(tmp_path, old, new, monkeypatch):
    class Net(Settings):
        given: dict = {}  # noqa: RUF012

        def __init__(self):
            super().__init__(**type(self).given)

    def of(given):
        monkeypatch.setattr(Net, "given", given)
        made = fleet(tmp_path, Net)
        made._identity["module"] = None  # which sees it, too
        return made

    begin(of(old))
    with pytest.raises(ValueError, match=r"one that differs: .*(layers|kind|transform|options|given)"):
        _ = of(new).store
    assert of(old).store.finished()


def test_a_hyperparameter_without_content_is_named(tmp_path):
    class Odd:
        def __deepcopy__(self, memo):
            return self

        def __reduce_ex__(self, protocol):
            raise TypeError("it is odd")

    expected = r'hyperparameter "options" is or holds a Odd.*it is odd.*; leave it out by save_hyperparameters\(ignore='
    with pytest.raises(TypeError, match=expected):
        fleet(tmp_path, of(options=[Odd()]))


def test_what_only_watches_does_not_count(tmp_path):
    begin(fleet(tmp_path))
    assert fleet(tmp_path, callbacks=lambda: [LearningRateMonitor()], logger=None).store.finished()


def test_weights_that_come_from_elsewhere_count_and_random_ones_do_not(tmp_path, monkeypatch):
    def digest():
        return fleet(tmp_path, Pretrained)._identity["initial_weights"]

    before = digest()
    torch.manual_seed(3)
    assert digest() == before
    monkeypatch.setattr(Pretrained, "value", 2.0)
    assert digest() != before
    first, second = (fleet(tmp_path, named())._identity["initial_weights"] for _ in range(2))
    assert first == second


def test_optimizers_that_need_a_training_run_stand_by_their_code(tmp_path):
    class Net(LitNet):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            steps = self.trainer.estimated_stepping_batches
            return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)]

    made = fleet(tmp_path, Net)
    assert made._identity["optimizer"] is None
    assert "configure_optimizers" in str(made._identity["module"].keys())
    made.run(progress_bar=False)
    assert fleet(tmp_path, Net).store.finished()


@pytest.mark.slow
def test_another_process_continues(tmp_path):
    run_module("tests.retraining.fleet_script", str(tmp_path), "1/2")
    fleet_script.main(str(tmp_path), "2/2")  # imported, where it was a script
    assert read_fleet(tmp_path).outputs.shape == (3, 2, 1)
