"""Parts that keep something, branch on values, or look at the rest of the batch."""

import torch
from torch import nn

from tests.fuzz.layers import ANY, WithLayer
from tests.fuzz.parts import WIDTH, Level, part


@part(ANY, Level.ODD)
class KeepsAMask(WithLayer):
    def __init__(self):
        super().__init__()
        self.kept = None

    def forward(self, x, mask):
        z = torch.tanh(self.layer(x))
        if self.kept is None:
            self.kept = z.new_tensor([1.0, 2.0, 0.5, 1.5])
        return z * self.kept


@part(ANY, Level.ODD)
class KeepsRows(WithLayer):
    def __init__(self):
        super().__init__()
        self.ones = torch.ones(1, 1)

    def forward(self, x, mask):
        if self.ones.shape != x.shape:
            self.ones = torch.ones_like(x)
        return torch.tanh(self.layer(x)) * self.ones


@part(ANY, Level.ODD)
class KeepsTheLast(WithLayer):
    def forward(self, x, mask):
        self.last = torch.tanh(self.layer(x))
        self.calls = getattr(self, "calls", 0) + 1
        return self.last


@part(ANY, Level.ODD)
class CountsInABuffer(WithLayer):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(WIDTH), persistent=False)

    def forward(self, x, mask):
        self.steps += 1
        self.mean.mul_(0.9).add_(x.detach().reshape(-1, WIDTH).mean(0), alpha=0.1)
        return torch.tanh(self.layer(x))


@part(ANY, Level.ODD)
class ReplacesABuffer(WithLayer):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(WIDTH))

    def forward(self, x, mask):
        self.seen = x.detach().reshape(-1, WIDTH).mean(0)
        return torch.tanh(self.layer(x))


@part(ANY, Level.ODD)
class BranchNeverTaken(WithLayer):
    def forward(self, x, mask):
        z = torch.tanh(self.layer(x))
        return z + 1 if z.sum() > 1e9 else z


@part(ANY, Level.ODD)
class LooksForNaN(WithLayer):
    def forward(self, x, mask):
        if torch.isnan(x).any():
            raise FloatingPointError("not finite")
        return torch.tanh(self.layer(x)) * float(torch.ones(1, dtype=x.dtype))


@part(ANY, Level.ODD)
class BranchOnEachRow(WithLayer):
    def forward(self, x, mask):
        z = torch.tanh(self.layer(x))
        return torch.stack([row * 2 if own.flatten()[0] > 0 else row - 1 for row, own in zip(z, x, strict=True)])


@part(ANY, Level.ODD)
class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, 3), nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x, mask):
        scores = self.router(x).softmax(-1)
        weight, choice = scores.max(-1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = choice == number
            if rows.any():
                y[rows] = torch.tanh(expert(x[rows])) * weight[rows].unsqueeze(-1)
        return x + y


@part(ANY, Level.ODD)
class ExpertsByIndex(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x, mask):
        flat = x.reshape(-1, WIDTH)
        y = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            (rows,) = torch.where((flat[:, 0] > 0) == bool(number))
            y = y.index_add(0, rows, torch.tanh(expert(flat[rows])))
        return x + y.reshape(x.shape)


@part(ANY, Level.WILD)
class BranchOnTheSum(WithLayer):
    def forward(self, x, mask):
        z = torch.tanh(self.layer(x))
        return z * 2 if z.sum() > 0 else z


@part(ANY, Level.WILD)
class MinusTheBatchMean(WithLayer):
    def forward(self, x, mask):
        z = self.layer(x)
        return torch.tanh(z - z.mean(0) + x)


@part(ANY, Level.WILD)
class BatchAttention(WithLayer):
    def forward(self, x, mask):
        flat = x.flatten(1)[:, :WIDTH]
        return x + torch.einsum("ab,b...->a...", (flat @ flat.T).softmax(-1), torch.tanh(self.layer(x)))


@part(ANY, Level.WILD)
class DividesByTheBatchSize(WithLayer):
    def forward(self, x, mask):
        return torch.tanh(self.layer(x)) / len(x)


@part(ANY, Level.WILD)
class BatchStatistics(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH, track_running_stats=False)

    def forward(self, x, mask):
        doubled = torch.cat([x.reshape(-1, WIDTH), x.reshape(-1, WIDTH).square()])  # else one row is zero
        return self.norm(doubled)[: len(doubled) // 2].reshape(x.shape)
