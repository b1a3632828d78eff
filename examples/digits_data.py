"""The demo's digits as a LightningDataModule, for `examples/digits.yaml`."""

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from examples.digits import NUM_TARGETS, NUM_TRAIN, make_data


class DigitsData(L.LightningDataModule):
    """Handwritten digits.

    Args:
        num_train: training images.
        num_targets: held-out images.
        batch_size: of both loaders.
    """

    def __init__(self, num_train: int = NUM_TRAIN, num_targets: int = NUM_TARGETS, batch_size: int = 100) -> None:
        super().__init__()
        train, targets = make_data()
        self.train, self.targets = Subset(train, range(num_train)), Subset(targets, range(num_targets))
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(self.targets, self.batch_size)

    def describe(self, item: tuple[Tensor, Tensor]) -> str:
        """The text that `lightning-trak show` prints for an image."""
        return f"a {int(item[1])}"
