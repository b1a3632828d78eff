"""Rarer things that people do in forward, and some that have no one right answer."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from tests.fuzz.layers import ANY, WithLayer
from tests.fuzz.parts import VOCABULARY, WIDTH, Level, part


@part(ANY, Level.ODD)
class PermutedByAMatrix(WithLayer):
    def forward(self, x, mask):
        flat = x.flatten(1)
        order = F.one_hot(flat.sum(1).argsort(), len(x)).to(x.dtype)
        y = torch.tanh(self.layer((order @ flat).reshape(x.shape)))
        return (order.T @ y.flatten(1)).reshape(x.shape)


@part(ANY, Level.ODD)
class RolledByValue(WithLayer):
    def forward(self, x, mask):
        shift = int(x.flatten(1).sum(1).argmax())
        return torch.tanh(self.layer(x.roll(shift, 0))).roll(-shift, 0)


@part(ANY, Level.ODD)
class SkippedIfNoneNeedsIt(WithLayer):
    def forward(self, x, mask):
        rows = x[..., :1] > 0.5
        return torch.where(rows, torch.tanh(self.layer(x)), x) if rows.any() else x


@part(ANY, Level.ODD)
class ScaledWeights(WithLayer):
    def forward(self, x, mask):
        scaled = {name: parameter * 2 for name, parameter in self.layer.named_parameters()}
        return torch.tanh(functional_call(self.layer, scaled, (x,)))


@part(ANY, Level.ODD)
class Forces(WithLayer):
    """The gradient of an energy by its input."""

    def forward(self, x, mask):
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            energy = torch.tanh(self.layer(x)).square().sum()
            (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return x + force


@part(ANY, Level.ODD)
class StraightThrough(WithLayer):
    def forward(self, x, mask):
        soft = torch.sigmoid(self.layer(x))
        return x + soft + ((soft > 0.5).to(x.dtype) - soft).detach()


def _doubled(gradient):
    return gradient * 2


def _doubled_input(module, inputs, outputs):
    return tuple(None if gradient is None else gradient * 2 for gradient in inputs)


@part(ANY, Level.ODD)
class ScaledGradient(WithLayer):
    def forward(self, x, mask):
        y = torch.tanh(self.layer(x))
        if y.requires_grad:
            y.register_hook(_doubled)
        return y


@part(ANY, Level.ODD)
class WithBackwardHook(WithLayer):
    def __init__(self):
        super().__init__()
        self.layer.register_full_backward_hook(_doubled_input)

    def forward(self, x, mask):
        return torch.tanh(self.layer(x))


@part(ANY, Level.ODD)
class SpectralNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x, mask):
        return torch.tanh(self.layer(x))


@part(ANY, Level.ODD)
class Stacked(nn.Module):
    """Two layers' weights in one parameter, and layers in a nested module."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(2, WIDTH, WIDTH) / 2)
        self.layers = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(WIDTH, WIDTH)])})

    def forward(self, x, mask):
        flat = x.reshape(-1, WIDTH)
        y = torch.bmm(flat.expand(2, -1, -1), self.weights).tanh().sum(0).reshape(x.shape)
        return self.layers["a"][0](y)


@part(ANY, Level.ODD)
class Interpolated(WithLayer):
    """The mean of the layer's outputs on points between zero and the input."""

    def forward(self, x, mask):
        points = torch.cat([x * step for step in (0.3, 0.6, 1.0)])
        return torch.tanh(self.layer(points)).reshape(3, *x.shape).mean(0)


@part(ANY, Level.ODD)
class Distinct(WithLayer):
    """Each row is computed once, however often it is there; half of them are zero."""

    def forward(self, x, mask):
        rows = torch.where(x[..., :1] > 0, x, torch.zeros_like(x)).reshape(-1, WIDTH)
        distinct, where = torch.unique(rows.detach(), dim=0, return_inverse=True)
        first = torch.full((len(distinct),), len(rows)).scatter_reduce(0, where, torch.arange(len(rows)), "amin")
        return x + torch.tanh(self.layer(rows[first]))[where].reshape(x.shape)


@part("ids", Level.ODD)
class DistinctTokens(nn.Module):
    gives = "sequence"

    def __init__(self):
        super().__init__()
        self.tokens, self.layer = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, mask):
        distinct, where = torch.unique(x, return_inverse=True)
        return torch.tanh(self.layer(self.tokens(distinct)))[where]


@part("ids", Level.ODD)
class GeneratedTokens(nn.Module):
    gives = "sequence"

    def __init__(self):
        super().__init__()
        self.tokens, self.layer = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, mask):
        return F.embedding(x, self.layer(self.tokens.weight))


@part("pool", Level.ODD)
class SegmentSum(nn.Module):
    """Rows of all examples in one list, as graph nets have their nodes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, mask):
        owner = torch.arange(len(x)).unsqueeze(1).expand(mask.shape)[mask]
        return torch.zeros_like(x[:, 0]).index_add(0, owner, torch.tanh(self.layer(x[mask])))


@part(ANY, Level.WILD)
class WithParameterHook(WithLayer):
    def __init__(self):
        super().__init__()
        self.layer.weight.register_hook(_doubled)

    def forward(self, x, mask):
        return torch.tanh(self.layer(x))


@part(ANY, Level.WILD)
class ClampsItsWeights(WithLayer):
    def forward(self, x, mask):
        with torch.no_grad():
            self.layer.weight.clamp_(-0.2, 0.2)
        return torch.tanh(self.layer(x))


@part(ANY, Level.WILD)
class Noise(WithLayer):
    def forward(self, x, mask):
        return torch.tanh(self.layer(x + torch.randn_like(x)))


@part(ANY, Level.WILD)
class DrawnForTheBatch(WithLayer):
    """The same numbers each time, by the place in the batch."""

    def forward(self, x, mask):
        noise = torch.randn(len(x), generator=torch.Generator().manual_seed(0), dtype=x.dtype)
        return torch.tanh(self.layer(x)) + noise.reshape(-1, *[1] * (x.ndim - 1))


@part(ANY, Level.WILD)
class CountsCalls(WithLayer):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x, mask):
        self.calls += 1
        return torch.tanh(self.layer(x)) / self.calls


@part(ANY, Level.WILD)
class RemembersTheLast(WithLayer):
    def __init__(self):
        super().__init__()
        self.register_buffer("state", torch.zeros(WIDTH))

    def forward(self, x, mask):
        y = torch.tanh(self.layer(x + self.state))
        self.state = y.detach().reshape(-1, WIDTH).mean(0)
        return y
