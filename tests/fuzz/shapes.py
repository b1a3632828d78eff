"""Parts that move examples about: folded, reversed, sorted, repeated, one by one, beside what is no example."""

import torch
from torch import nn

from tests.fuzz.layers import ANY, WithLayer
from tests.fuzz.parts import WIDTH, Level, part


@part(ANY, Level.ODD)
class Folded(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x, mask):
        return torch.tanh(self.layer(x.reshape(-1, 2))).reshape(x.shape)


@part(ANY, Level.ODD)
class UnderALeadingOne(WithLayer):
    def forward(self, x, mask):
        return torch.tanh(self.layer(x.unsqueeze(0))).squeeze(0)


@part(ANY, Level.ODD)
class Siamese(WithLayer):
    def forward(self, x, mask):
        first, second = torch.tanh(self.layer(torch.cat([x, x.flip(-1)]))).chunk(2)
        return first * second


@part(ANY, Level.ODD)
class Interleaved(WithLayer):
    def forward(self, x, mask):
        pairs = torch.stack([x, x.flip(-1)], 1).flatten(0, 1)
        return torch.tanh(self.layer(pairs)).unflatten(0, (-1, 2)).sum(1)


@part(ANY, Level.ODD)
class Reversed(WithLayer):
    def forward(self, x, mask):
        return torch.tanh(self.layer(x.flip(0))).flip(0)


@part(ANY, Level.ODD)
class Rolled(WithLayer):
    def forward(self, x, mask):
        return torch.tanh(self.layer(x.roll(1, 0))).roll(-1, 0)


@part(ANY, Level.ODD)
class Sorted(WithLayer):
    def forward(self, x, mask):
        order = x.flatten(1).sum(1).argsort()
        return torch.tanh(self.layer(x[order]))[order.argsort()]


@part(ANY, Level.ODD)
class Repeated(WithLayer):
    def forward(self, x, mask):
        y = torch.tanh(self.layer(x.repeat_interleave(2, 0)))
        return y[::2] * y[1::2]


@part(ANY, Level.ODD)
class FilledUp(WithLayer):
    def forward(self, x, mask):
        filled = torch.cat([torch.ones_like(x[:1]), x, torch.ones_like(x[:1])])
        return torch.tanh(self.layer(filled))[1:-1]


@part(ANY, Level.ODD)
class FilledUpToFour(WithLayer):
    def forward(self, x, mask):
        missing = -len(x) % 4
        filled = torch.cat([x, x.new_zeros(missing, *x.shape[1:])])
        return torch.tanh(self.layer(filled))[: len(x)]


@part(ANY, Level.ODD)
class InPieces(WithLayer):
    def forward(self, x, mask):
        return torch.cat([torch.tanh(self.layer(piece)) for piece in x.split(2)])


@part(ANY, Level.ODD)
class RowByRow(WithLayer):
    def forward(self, x, mask):
        return torch.stack([torch.tanh(self.layer(row)) for row in x])


@part(ANY, Level.ODD)
class OneByOne(WithLayer):
    def forward(self, x, mask):
        return torch.cat([torch.tanh(self.layer(x[i : i + 1])) for i in range(len(x))])


@part(ANY, Level.ODD)
class OnlyPositive(WithLayer):
    def forward(self, x, mask):
        rows = x[..., 0] > 0
        y = x.clone()
        y[rows] = torch.tanh(self.layer(x[rows]))
        return y


@part(ANY, Level.ODD)
class TwiceForSome(WithLayer):
    def forward(self, x, mask):
        y = torch.tanh(self.layer(x))
        rows = y[..., 0] > 0
        y = y.clone()
        y[rows] = torch.tanh(self.layer(y[rows]))
        return y


@part(ANY, Level.ODD)
class Prototypes(WithLayer):
    """The layer sees a table as well, which has as many rows as some batches."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.randn(3, WIDTH))

    def forward(self, x, mask):
        table = torch.tanh(self.layer(self.table))
        return x + (x @ table.T).softmax(-1) @ table


@part(ANY, Level.ODD)
class Generated(nn.Module):
    """A layer that makes a bias for all."""

    def __init__(self):
        super().__init__()
        self.code, self.layer = nn.Parameter(torch.randn(1, WIDTH)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, mask):
        return torch.tanh(x + self.layer(self.code)[0])


@part(ANY, Level.ODD)
class BothUses(WithLayer):
    """The same layer on the examples, and on one row that all of them share."""

    def __init__(self):
        super().__init__()
        self.register_buffer("row", torch.randn(1, WIDTH))

    def forward(self, x, mask):
        return torch.tanh(self.layer(x) + self.layer(self.row)[0])


@part(ANY, Level.ODD)
class HigherRank(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x, mask):
        return torch.tanh(self.layer(x.unflatten(-1, (2, 2)).unsqueeze(-3))).squeeze(-3).flatten(-2)


@part("vector", Level.ODD)
class OuterProduct(WithLayer):
    def forward(self, x, mask):
        return torch.tanh(self.layer(x.unsqueeze(1) * x.unsqueeze(2))).sum(2)


@part("vector", Level.ODD)
class ExamplesLast(WithLayer):
    """(steps, batch, width), as recurrent nets have it by default."""

    def forward(self, x, mask):
        return torch.tanh(self.layer(torch.stack([x, -x, x.flip(-1)]))).prod(0)


@part("vector")
class BatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x, mask):
        return self.norm(x)


@part("vector", Level.ODD)  # vmap refuses some strides
class GroupNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(2, WIDTH)

    def forward(self, x, mask):
        return self.norm(x) + x


@part("vector", Level.ODD)
class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.long = nn.GRUCell(WIDTH, WIDTH), nn.LSTMCell(WIDTH, WIDTH)

    def forward(self, x, mask):
        hidden = torch.zeros_like(x)
        for _ in range(2):
            hidden = self.cell(x, hidden)
        return self.long(hidden, (x, x))[0]


@part("vector")
class AsAnImage(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 4, 2)

    def forward(self, x, mask):
        return torch.tanh(self.layer(x.reshape(-1, 1, 2, 2))).flatten(1)


@part("vector", Level.ODD)
class AsASignal(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose1d(1, 2, 2, stride=2)
        self.down = nn.Conv1d(2, 2, 3, stride=2, groups=2, padding=1, padding_mode="circular")

    def forward(self, x, mask):
        return torch.tanh(self.down(self.up(x.unsqueeze(1)))).sum(1)


@part("vector", Level.ODD)
class UnbatchedConvolution(nn.Module):
    """One row at a time, without a batch dimension."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x, mask):
        return torch.cat([torch.tanh(self.layer(row[None])) for row in x])
