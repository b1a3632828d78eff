"""Parts that take the last dimension of anything: ``x`` of shape (batch, 4) or (batch, steps, 4)."""

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.fuzz.parts import WIDTH, Level, part

ANY = "vector sequence"


class WithLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)


@part(ANY)
class Dense(WithLayer):
    def forward(self, x, mask):
        return x + torch.tanh(self.layer(x))


@part(ANY)
class WithoutBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x, mask):
        return torch.sigmoid(self.layer(x))


@part(ANY)
class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x, mask):
        return self.norm(x)


@part(ANY)
class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, 6), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(6, WIDTH))

    def forward(self, x, mask):
        return x + self.layers(x)


@part(ANY)
class AddedInPlace(WithLayer):
    def forward(self, x, mask):
        y = self.layer(x)
        y += x
        return y.mul_(0.5)


@part(ANY)
class CalledTwice(WithLayer):
    def forward(self, x, mask):
        return torch.tanh(self.layer(torch.tanh(self.layer(x))))


@part(ANY)
class Unused(WithLayer):
    def forward(self, x, mask):
        return torch.sin(x)


@part(ANY)
class Activation(nn.Module):
    def __init__(self):
        super().__init__()
        self.activation = nn.PReLU(WIDTH)

    def forward(self, x, mask):
        return self.activation(x) if x.ndim == 2 else self.activation(x.mT).mT  # channels are dimension 1


@part(ANY, Level.ODD)
class OneSlope(nn.Module):
    def __init__(self):
        super().__init__()
        self.activation = nn.PReLU()

    def forward(self, x, mask):
        return self.activation(x)


@part(ANY, Level.ODD)
class WeightNormed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x, mask):
        return torch.tanh(self.layer(x))


@part(ANY, Level.ODD)
class OwnNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x, mask):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


@part(ANY, Level.ODD)
class FreeParameters(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.rand(WIDTH)), nn.ParameterDict({"a": nn.Parameter(torch.rand(1))})
        self.mixes = nn.ParameterList([torch.randn(WIDTH, WIDTH) for _ in range(2)])

    def forward(self, x, mask):
        for mix in self.mixes:
            x = torch.tanh(torch.einsum("...i,ij->...j", x, mix))
        return x * self.gain + self.shift["a"]


@part(ANY, Level.ODD)
class UsedOutside(WithLayer):
    def forward(self, x, mask):
        return F.linear(torch.tanh(self.layer(x)), self.layer.weight.T)


@part(ANY, Level.ODD)
class NeverCalled(WithLayer):
    def forward(self, x, mask):
        return torch.tanh(F.linear(x, self.layer.weight, self.layer.bias))


@part(ANY, Level.ODD)
class UsedOutsideForSome(WithLayer):
    def forward(self, x, mask):
        z = torch.tanh(self.layer(x))
        return torch.where(x[..., :1] > 0.3, F.linear(z, self.layer.weight), z)


@part(ANY, Level.ODD)
class InAList(WithLayer):
    def __init__(self):
        super().__init__()
        self.weights = [self.layer.weight]

    def forward(self, x, mask):
        return torch.tanh(F.linear(torch.tanh(self.layer(x)), self.weights[0]))


@part(ANY, Level.ODD)
class InADict(WithLayer):
    def __init__(self):
        super().__init__()
        self.tensors = {"nested": {"weight": self.layer.weight, "bias": self.layer.bias}}

    def forward(self, x, mask):
        return torch.tanh(F.linear(x, **self.tensors["nested"]))


@part(ANY, Level.ODD)
class Property(WithLayer):
    @property
    def weight(self):
        return self.layer.weight

    def forward(self, x, mask):
        return torch.tanh(F.linear(torch.tanh(self.layer(x)), self.weight))


@part(ANY, Level.ODD)
class LayersInAList(WithLayer):
    def __init__(self):
        super().__init__()
        self.again = [self.layer]

    def forward(self, x, mask):
        return torch.tanh(self.again[0](torch.tanh(self.layer(x))))


@part(ANY, Level.ODD)
class TwoNames(WithLayer):
    def __init__(self):
        super().__init__()
        self.alias = self.layer
        self.gain = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x, mask):
        return torch.tanh(self.alias(self.layer(x) * self.gain))


@part(ANY, Level.ODD)
class BoundMethod(WithLayer):
    def __init__(self):
        super().__init__()
        self.call = self.layer.forward

    def forward(self, x, mask):
        return torch.tanh(self.call(x))


@part(ANY, Level.ODD)
class Partial(WithLayer):
    def __init__(self):
        super().__init__()
        self.call = functools.partial(F.linear, weight=self.layer.weight, bias=self.layer.bias)

    def forward(self, x, mask):
        return torch.tanh(self.call(x))


@part(ANY, Level.ODD)
class Keyword(WithLayer):
    def forward(self, x, mask):
        return torch.tanh(self.layer(input=x))


@part(ANY, Level.ODD)
class Checkpointed(WithLayer):
    def forward(self, x, mask):
        return torch.tanh(checkpoint(self.layer, x, use_reentrant=False))


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 3 * x.square()


@part(ANY, Level.ODD)
class OwnFunction(WithLayer):
    def forward(self, x, mask):
        return Cube.apply(torch.tanh(self.layer(x)))


@part(ANY, Level.ODD)
class WithoutGradient(WithLayer):
    def forward(self, x, mask):
        with torch.no_grad():
            frozen = self.layer(x)
        return x + torch.tanh(frozen)


@part(ANY, Level.ODD)
class HalfDetached(WithLayer):
    def forward(self, x, mask):
        y = self.layer(x)
        return torch.tanh(y) * y.detach()


def _doubled(module, args, output):
    return output * 2


def _shifted(module, args):
    return (args[0] + 0.5,)


@part(ANY, Level.ODD)
class WithHooks(WithLayer):
    def __init__(self):
        super().__init__()
        self.layer.register_forward_hook(_doubled)
        self.layer.register_forward_pre_hook(_shifted)

    def forward(self, x, mask):
        return torch.tanh(self.layer(x))


@part(ANY, Level.ODD)
class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Bilinear(WIDTH, WIDTH, WIDTH)

    def forward(self, x, mask):
        return torch.tanh(self.layer(x, x.flip(-1)))


@part(ANY, Level.ODD)
class Empty(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.nothing = nn.Linear(WIDTH, 0), nn.Parameter(torch.empty(0))

    def forward(self, x, mask):
        return torch.cat([x, self.layer(x), x[..., :0] * self.nothing], -1)


@part(ANY, Level.ODD)
class Derived(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = type("Own", (nn.Linear,), {"forward": lambda self, x: F.linear(x, self.weight.tanh(), self.bias)})(
            WIDTH, WIDTH
        )

    def forward(self, x, mask):
        return torch.tanh(self.layer(x))


@part(ANY, Level.WILD)
class Closure(WithLayer):
    def __init__(self):
        super().__init__()
        self.call = lambda x: self.layer(x)

    def forward(self, x, mask):
        return torch.tanh(self.call(x))


@part(ANY, Level.WILD)
class NestedClosure(WithLayer):
    def __init__(self):
        super().__init__()
        weight = self.layer.weight
        self.calls = {"a": [lambda x: F.linear(x, weight)]}

    def forward(self, x, mask):
        return torch.tanh(self.calls["a"][0](torch.tanh(self.layer(x))))
