"""Modules trained together against modules trained one at a time."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from lightning_trak.outputs import ClassificationMargin
from lightning_trak.retraining import StackedModules, train_together

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


def test_a_module_that_sets_the_seed_is_refused():
    def same():
        torch.manual_seed(7)
        return Net()

    with pytest.raises(ValueError, match="sets the random seed 7"):
        train_together(same, DATA, SUBSETS, SEEDS, max_epochs=1, batch_size=8)
    assert len(train_together(Net, DATA, SUBSETS[:1], [-3], max_epochs=1, batch_size=8)) == 1


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

    with pytest.raises(TypeError, match="uses manual optimization"):
        train_together(Manual, DATA, SUBSETS, SEEDS, max_epochs=1, batch_size=8)


EXACT = TensorDataset(DATA.tensors[0].double(), DATA.tensors[1])


class Small(L.LightningModule):
    """What the modules below do in another way."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        self.add()
        self.double()

    def add(self):
        pass

    def hidden(self, x):
        return torch.tanh(self.body(x))

    def forward(self, x):
        return self.head(self.hidden(x))

    def training_step(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Closure(Small):
    def add(self):
        self.read = lambda hidden: self.head(hidden)

    def forward(self, x):
        return self.read(self.hidden(x))


class Listed(Small):
    def add(self):
        self.weights, self.biases = [self.head.weight], {"head": self.head.bias}

    def forward(self, x):
        return F.linear(self.hidden(x), self.weights[0], self.biases["head"])


class Property(Small):
    @property
    def weight(self):
        return self.head.weight

    def forward(self, x):
        return F.linear(self.hidden(x), self.weight, self.head.bias)


class TwoNames(Small):
    def add(self):
        self.parts = nn.ModuleDict({"body": self.body, "head": self.head})
        self.encoder = self.parts["body"]
        self.gain = nn.Parameter(torch.rand(6))

    def forward(self, x):
        return self.parts["head"](torch.tanh(self.encoder(x)) * self.gain)


class NewBuffer(Small):
    """Its buffer is not changed in place, but replaced."""

    def add(self):
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        hidden = self.hidden(x)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * hidden.detach().mean(0)
        return self.head(hidden - self.mean)


class Remembers(Small):
    """What it keeps of one step, it uses in the next."""

    def add(self):
        self.last, self.steps = None, 0

    def forward(self, x):
        hidden = self.hidden(x)
        if self.training:
            last, self.last, self.steps = self.last, hidden.detach().mean(0), self.steps + 1
            hidden = hidden - last / self.steps if last is not None else hidden
        return self.head(hidden)


class FrozenStatistics(Small):
    """A part of it is made in eval mode, and a Trainer leaves it so."""

    def add(self):
        self.norm = nn.BatchNorm1d(6).eval()

    def forward(self, x):
        return self.head(self.norm(self.hidden(x)))


class Encoder(Small):
    def add(self):
        self.encoder = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0.0)

    def forward(self, x):
        padding = torch.arange(5, device=x.device) > x[:, :1] + 2
        return self.head(self.encoder(self.body(torch.diag_embed(x)), src_key_padding_mask=padding).mean(1))


def train_small_alone(make, subset, seed):
    torch.manual_seed(seed)
    net = make()
    optimizer, order = net.configure_optimizers(), torch.Generator().manual_seed(seed)
    members = subset.nonzero().flatten()
    for _ in range(EPOCHS):
        for positions in members[torch.randperm(SIZE, generator=order)].split(8):
            optimizer.zero_grad()
            net.training_step([column[positions] for column in EXACT.tensors]).backward()
            optimizer.step()
    return net.eval()


@pytest.mark.parametrize(
    "make", [Small, Closure, Listed, Property, TwoNames, NewBuffer, Remembers, FrozenStatistics, Encoder]
)
def test_modules_of_any_habit_are_what_they_would_be_alone(make):
    stack = train_together(make, EXACT, SUBSETS, SEEDS, max_epochs=EPOCHS, batch_size=8)
    outputs = stack.outputs(ClassificationMargin(), EXACT.tensors)
    assert torch.backends.mha.get_fastpath_enabled()
    for i, (subset, seed) in enumerate(zip(SUBSETS, SEEDS, strict=True)):
        alone = train_small_alone(make, subset, seed)
        torch.testing.assert_close(stack.state_dicts()[i], dict(alone.state_dict()), rtol=1e-7, atol=1e-9)
        expected = ClassificationMargin().output(alone, EXACT.tensors).detach()  # with gradients: nothing is fused
        torch.testing.assert_close(outputs[i], expected, rtol=1e-7, atol=1e-9)


class RandomFeatures(Small):
    def add(self):
        self.features = torch.randn(5, 5).double()

    def forward(self, x):
        return super().forward(x @ self.features)


class RandomScale(Small):
    def add(self):
        self.scale = float(torch.rand([]))

    def forward(self, x):
        return super().forward(x) * self.scale


class Unregistered(Small):
    def add(self):
        self.more = [nn.Parameter(torch.zeros(3))]

    def forward(self, x):
        return super().forward(x) + self.more[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (RandomFeatures, r"the loss, the gradient of body.weight, .* of module 3 differs between training together"),
        (RandomScale, r"the loss.* of module 3 differs between training together .* \(register_buffer\)"),
        (Unregistered, r"the loss of Unregistered depends on 1 tensors that require gradients .* of shape \(3,\)"),
    ],
)
def test_modules_that_would_share_what_is_their_own_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        train_together(make, EXACT, SUBSETS, SEEDS, max_epochs=1, batch_size=8)


class NormOfAll(torch.optim.SGD):
    def step(self):
        torch.nn.utils.clip_grad_norm_([part for group in self.param_groups for part in group["params"]], 1.0)
        super().step()


class DecaysMatrices(Small):
    """Biases of stacked modules are matrices."""

    def configure_optimizers(self):
        parts = list(self.parameters())
        groups = [[part for part in parts if (part.ndim > 1) == matrices] for matrices in (True, False)]
        return torch.optim.AdamW(
            [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}]
        )


class OwnRate(Small):
    def add(self):
        self.rate = float(torch.rand([]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.rate)


class OwnFrozen(Small):
    def add(self):
        self.body.requires_grad_(bool(torch.rand([]) < 0.5))


class WarmUp(Small):
    """Its first step has a rate of zero."""

    def configure_optimizers(self):
        optimizer = NormOfAll(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def by(optimizer):
    class Optimized(Small):
        def configure_optimizers(self):
            return optimizer(self.parameters(), lr=0.1)

    return Optimized


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (by(torch.optim.Adafactor), r"the step of body\.weight, .* of module 0 differs .* without norms or shapes"),
        (by(NormOfAll), r"the step of body\.weight, "),
        (WarmUp, r"the step of body\.weight, "),
        (DecaysMatrices, r"the settings of head\.bias, .* the same groups and settings for all modules"),
        (OwnRate, r"the settings of body\.weight, .* of module 1 differs"),
        (OwnFrozen, r"the settings of body\.weight, "),
        (by(torch.optim.LBFGS), r"cannot make a step of many modules at once .*closure.*: train them one at a time"),
    ],
)
def test_optimizers_that_would_not_treat_each_module_as_alone_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        train_together(make, EXACT, SUBSETS, SEEDS, max_epochs=1, batch_size=8)


def test_buffers_hold_what_differs():
    class Registered(RandomFeatures):
        def add(self):
            self.register_buffer("features", torch.randn(5, 5))

    stack = train_together(Registered, EXACT, SUBSETS, SEEDS, max_epochs=EPOCHS, batch_size=8)
    alone = train_small_alone(Registered, SUBSETS[2], SEEDS[2])
    torch.testing.assert_close(stack.state_dicts()[2], dict(alone.state_dict()), rtol=1e-7, atol=1e-9)


def test_looking_at_a_module_changes_nothing_of_its_training():
    """Dropout draws the same numbers, and statistics see each batch once."""

    class Noisy(Small):
        def add(self):
            self.norm, self.calls = nn.BatchNorm1d(6), []

        def hidden(self, x):
            self.calls.append(len(x))
            return F.dropout(self.norm(super().hidden(x)))

    stack = train_together(Noisy, EXACT, SUBSETS, SEEDS, max_epochs=EPOCHS, batch_size=8)
    assert stack.stacked.norm.num_batches_tracked.tolist() == [2 * EPOCHS] * 4
    assert stack.stacked.calls == [8, 7] * EPOCHS


def test_stacked_modules_leave_the_originals_alone_and_do_not_use_them():
    modules = [Small().eval() for _ in range(3)]
    before = [{name: tensor.clone() for name, tensor in module.state_dict().items()} for module in modules]
    outputs = StackedModules(modules).outputs(ClassificationMargin(), EXACT.tensors)
    expected = torch.stack([ClassificationMargin().output(module, EXACT.tensors) for module in modules])
    torch.testing.assert_close(outputs, expected.detach())
    for module, state in zip(modules, before, strict=True):
        torch.testing.assert_close(dict(module.state_dict()), state, rtol=0, atol=0)
    stack = StackedModules([Closure().eval() for _ in range(3)])
    with pytest.raises(ValueError, match=r"reads head.bias, head.weight of the module that was passed"):
        stack.outputs(ClassificationMargin(), EXACT.tensors)
