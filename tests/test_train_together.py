"""Modules trained together against modules trained one at a time."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from lightning_trak.outputs import ClassificationMargin
from lightning_trak.retraining import train_together

N, SIZE, EPOCHS = 24, 15, 3
DATA = TensorDataset(
    torch.randn(N, 5, generator=torch.Generator().manual_seed(0)),
    torch.randint(3, (N,), generator=torch.Generator().manual_seed(1)),
)
SUBSETS = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(s)) < SIZE for s in range(4)])
SEEDS = [3, 1, 4, 15]


class Net(L.LightningModule):
    """Buffers that training changes (batch normalisation), a tied weight (twin) and a shared module (again)."""

    def __init__(self, algorithm="sgd"):
        super().__init__()
        self.algorithm = algorithm
        self.body = nn.Sequential(nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6))
        self.head = nn.Linear(6, 3)
        self.twin = nn.Linear(6, 3)
        self.twin.weight = self.head.weight
        self.again = self.head

    def forward(self, x):
        return self.head(self.body(x)) + self.twin(x.new_ones(6)) + self.again(x.new_ones(6))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss)
        return {"loss": loss}

    def configure_optimizers(self):
        if self.algorithm == "sgd":
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        else:
            optimizer = torch.optim.AdamW(
                [{"params": self.body.parameters()}, {"params": [*self.head.parameters(), self.twin.bias], "lr": 0.05}]
            )
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.2, 1.0, total_iters=4)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train_alone(subset, seed, algorithm):
    """The same initialisation and order of examples, in a plain loop."""
    torch.manual_seed(seed)
    net = Net(algorithm).train()
    configured = net.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    order = torch.Generator().manual_seed(seed)
    members = subset.nonzero().flatten()
    for _ in range(EPOCHS):
        for positions in members[torch.randperm(SIZE, generator=order)].split(8):
            x, y = (column[positions] for column in DATA.tensors)
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            scheduler.step()
    return net.eval()


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
@pytest.mark.parametrize("algorithm", ["sgd", "adamw"])
def test_each_is_what_it_would_be_alone(algorithm):
    stack = train_together(lambda: Net(algorithm), DATA, SUBSETS, SEEDS, max_epochs=EPOCHS, batch_size=8)
    states = stack.state_dicts()
    outputs = stack.outputs(ClassificationMargin(), DATA.tensors)
    assert outputs.shape == (4, N)
    for i, (subset, seed) in enumerate(zip(SUBSETS, SEEDS, strict=True)):
        alone = train_alone(subset, seed, algorithm)
        torch.testing.assert_close(states[i], dict(alone.state_dict()), rtol=1e-3, atol=1e-5)
        expected = ClassificationMargin().output(alone, DATA.tensors).detach()
        torch.testing.assert_close(outputs[i], expected, rtol=1e-3, atol=1e-4)
        loaded = Net()
        loaded.load_state_dict(states[i])


def test_global_random_state_is_left_alone():
    before = torch.random.get_rng_state()
    train_together(Net, DATA, SUBSETS, SEEDS, max_epochs=1, batch_size=8)
    assert torch.equal(before, torch.random.get_rng_state())


def test_what_does_not_fit_is_refused():
    uneven = SUBSETS.clone()
    uneven[0, uneven[0].nonzero()[0]] = False
    with pytest.raises(ValueError, match=r"subsets of one size, got sizes \[14, 15\]"):
        train_together(Net, DATA, uneven, SEEDS, max_epochs=1, batch_size=8)
    with pytest.raises(ValueError, match=r"expected 3 subsets.* of 24 examples, got \(4, 24\)"):
        train_together(Net, DATA, SUBSETS, SEEDS[:3], max_epochs=1, batch_size=8)
    too_wide = torch.cat([SUBSETS, SUBSETS], 1)
    with pytest.raises(ValueError, match=r"expected 4 subsets.* of 24 examples, got \(4, 48\)"):
        train_together(Net, DATA, too_wide, SEEDS, max_epochs=1, batch_size=8)

    class Manual(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(TypeError, match="optimizes by hand"):
        train_together(Manual, DATA, SUBSETS, SEEDS, max_epochs=1, batch_size=8)
