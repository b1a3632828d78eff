"""Where models begin and end: from inputs to a sequence or vector, from a sequence to a vector, from that to logits."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.fuzz.parts import VOCABULARY, WIDTH, Level, part


@part("vectors")
class Vectors(nn.Module):
    gives = "vector"

    def forward(self, x, mask):
        return x


@part("floats")
class Steps(nn.Module):
    gives = "sequence"

    def forward(self, x, mask):
        return x


@part("images")
class Patches(nn.Module):
    gives = "sequence"

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(2, WIDTH, 2, stride=2)

    def forward(self, x, mask):
        return torch.tanh(self.layer(x)).flatten(2).mT, torch.ones(len(x), 4, dtype=torch.bool)


@part("images")
class NormedImage(nn.Module):
    gives = "vector"

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(2, WIDTH, 3, stride=2, padding=1), nn.BatchNorm2d(WIDTH), nn.Tanh())

    def forward(self, x, mask):
        return self.layers(x).mean((2, 3))


@part("images", Level.ODD)
class GroupedStem(nn.Module):
    gives = "vector"

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 4, 2, groups=2, dilation=2, bias=False), nn.InstanceNorm2d(4, affine=True), nn.MaxPool2d(2)
        )

    def forward(self, x, mask):
        return self.layers(x).flatten(1)


class _Embedding(nn.Module):
    gives = "sequence"

    def __init__(self, **options):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH, **options)

    def forward(self, x, mask):
        return self.tokens(x)


@part("ids")
class Tokens(_Embedding):
    pass


@part("ids")
class PaddedTokens(_Embedding):
    def __init__(self):
        super().__init__(padding_idx=0)


@part("ids", Level.ODD)
class UnpaddedTokens(_Embedding):
    def forward(self, x, mask):
        full = torch.zeros(*x.shape, WIDTH, dtype=self.tokens.weight.dtype)
        full[mask] = self.tokens(x[mask])
        return full


@part("ids", Level.ODD)
class OneHot(_Embedding):
    def forward(self, x, mask):
        return F.one_hot(x, VOCABULARY).to(self.tokens.weight.dtype) @ self.tokens.weight


@part("ids", Level.WILD)
class SparseTokens(_Embedding):
    def __init__(self):
        super().__init__(sparse=True)


@part("ids", Level.WILD)
class BoundedTokens(_Embedding):
    def __init__(self):
        super().__init__(max_norm=1.0)


@part("ids", Level.WILD)
class TokensByFrequency(_Embedding):
    def __init__(self):
        super().__init__(scale_grad_by_freq=True)


@part("ids")
class Bag(nn.Module):
    gives, sparse = "vector", False

    def __init__(self):
        super().__init__()
        self.tokens = nn.EmbeddingBag(VOCABULARY, WIDTH, mode="mean", padding_idx=0, sparse=self.sparse)

    def forward(self, x, mask):
        return self.tokens(x)


@part("ids", Level.WILD)
class SparseBag(Bag):
    sparse = True


@part("ids", Level.ODD)
class WeightedBag(nn.Module):
    gives = "vector"

    def __init__(self):
        super().__init__()
        self.tokens = nn.EmbeddingBag(VOCABULARY, WIDTH, mode="sum")

    def forward(self, x, mask):
        return self.tokens(x, per_sample_weights=mask.to(self.tokens.weight.dtype))


@part("ids", Level.ODD)
class FlatBag(WeightedBag):
    def forward(self, x, mask):
        lengths = mask.sum(1)
        return self.tokens(x[mask], offsets=lengths.cumsum(0) - lengths)


@part("pool")
class Mean(nn.Module):
    def forward(self, x, mask):
        weights = mask.to(x.dtype).unsqueeze(-1)
        return (x * weights).sum(1) / weights.sum(1)


@part("pool")
class First(nn.Module):
    def forward(self, x, mask):
        return x[:, 0]


@part("pool")
class Last(nn.Module):
    def forward(self, x, mask):
        last = (mask.sum(1) - 1)[:, None, None].expand(-1, 1, x.shape[2])
        return x.gather(1, last).squeeze(1)


@part("pool", Level.ODD)
class LastByIndex(nn.Module):
    def forward(self, x, mask):
        return x[torch.arange(len(x)), mask.sum(1) - 1]


@part("pool", Level.ODD)
class Query(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x, mask):
        weights = (x @ self.query).masked_fill(~mask, -torch.inf).softmax(1)
        return (weights.unsqueeze(-1) * x).sum(1)


@part("pool", Level.ODD)
class AttentionPool(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.attention = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.MultiheadAttention(WIDTH, 1)

    def forward(self, x, mask):
        x = x.transpose(0, 1)
        return self.attention(self.query.expand(1, x.shape[1], -1), x, x, key_padding_mask=~mask)[0][0]


@part("head")
class Linear(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.out = nn.Linear(WIDTH, classes)

    def forward(self, x, net):
        return self.out(x)


@part("head")
class Hidden(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.layer, self.norm = nn.Linear(WIDTH, 5), nn.LayerNorm(5)
        self.out = nn.Linear(5, classes)

    def forward(self, x, net):
        return self.out(self.norm(F.gelu(self.layer(x))))


@part("head", Level.ODD)
class Matrix(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.out = nn.Parameter(torch.randn(WIDTH, classes))

    def forward(self, x, net):
        return x @ self.out


@part("head", Level.ODD)
class Cosine(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.layer = nn.Linear(WIDTH, classes, bias=False)

    def forward(self, x, net):
        return F.linear(F.normalize(x, dim=-1, eps=1e-3), F.normalize(self.layer.weight, dim=-1, eps=1e-3)) * 3


@part("head", Level.ODD)
class HeadForEach(nn.Module):
    """One of two heads, by the example."""

    def __init__(self, classes):
        super().__init__()
        self.out, self.other = nn.Linear(WIDTH, classes), nn.Linear(WIDTH, classes)

    def forward(self, x, net):
        rows = x[:, 0] > 0
        logits = self.out(x)
        logits[rows] = self.other(x[rows])
        return logits


@part("head", Level.ODD)
class Tied(nn.Module):
    """The embedding's weight, for models that have one."""

    def __init__(self, classes):
        super().__init__()
        self.out = nn.Linear(WIDTH, classes)

    def forward(self, x, net):
        tokens = getattr(net.stem, "tokens", None)
        return self.out(x) if tokens is None else self.out(x) + F.linear(x, tokens.weight)[:, : self.out.out_features]
