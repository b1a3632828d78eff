"""A fleet of three members that train in no time."""

from torch.utils.data import DataLoader

from lightning_trak.retraining import RetrainingFleet, random_subsets
from tests.lit import LitNet, make_data
from tests.lit import make_trainer as quiet_trainer

N, EPOCHS = 20, 2
TRAIN, TARGETS = make_data(N), make_data(7, seed=1)
LOADER = DataLoader(TRAIN, batch_size=4)
MASKS = random_subsets(N, 3, seed=1)


def make_trainer():
    return quiet_trainer(max_epochs=EPOCHS)


def make_fleet(directory, make_module=LitNet, make_trainer=make_trainer, train=LOADER, targets=TARGETS, **options):
    return RetrainingFleet(directory, make_module, make_trainer, train, targets, options.pop("masks", MASKS), **options)


def run(directory, *args, **options):
    fleet = make_fleet(directory, *args, **options)
    fleet.run(progress_bar=False)
    return fleet


def files(fleet):
    return {path.name: path.read_bytes() for path in (fleet.directory / "members").iterdir()}
