"""A fleet that a user's script runs, in one process or in several one after the other."""

import sys

import torch
from torch.utils.data import DataLoader

from lightning_trak.retraining import RetrainingFleet, random_subsets
from tests.lit import LitNet, make_data, make_trainer


class Net(LitNet):
    """Has settings of all kinds."""

    def __init__(self, kinds=frozenset("abc"), transform=torch.nn.Identity(), lr=0.1):  # noqa: B008
        super().__init__()
        self.save_hyperparameters()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch)]


def main(directory: str, part: str) -> None:
    fleet = RetrainingFleet(
        directory,
        Net,
        lambda: make_trainer(max_epochs=1),
        DataLoader(make_data(12), batch_size=4),
        make_data(3, seed=1),
        random_subsets(12, 2, seed=1),
        make_loader=lambda subset: DataLoader(subset, batch_size=4, shuffle=True),
    )
    fleet.run(part, progress_bar=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
