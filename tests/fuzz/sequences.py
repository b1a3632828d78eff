"""Parts for sequences of different lengths: ``x`` of shape (batch, steps, 4) and a mask, True where a token is."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.fuzz.layers import WithLayer
from tests.fuzz.parts import LONGEST, WIDTH, Level, part


@part("sequence", Level.ODD)
class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(LONGEST + 2, WIDTH)

    def forward(self, x, mask):
        return x + self.table(torch.arange(x.shape[1]))


@part("sequence", Level.ODD)  # vmap refuses some strides
class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x, mask):
        return x + torch.tanh(self.layer((x * mask.unsqueeze(-1)).mT)).mT


@part("sequence")
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x, mask):
        return x + self.attention(x, x, x, key_padding_mask=~mask, need_weights=False)[0]


@part("sequence")
class EncoderLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 6, batch_first=True, norm_first=True)

    def forward(self, x, mask):
        return self.layer(x, src_key_padding_mask=~mask)


@part("sequence", Level.ODD)
class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 6, batch_first=True), 1)

    def forward(self, x, mask):
        y = self.layers(x, src_key_padding_mask=~mask)
        return F.pad(y, (0, 0, 0, x.shape[1] - y.shape[1]))


@part("sequence", Level.ODD)
class EncoderTimeMajor(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 6, activation="gelu")

    def forward(self, x, mask):
        return self.layer(x.transpose(0, 1), src_key_padding_mask=~mask).transpose(0, 1)


@part("sequence", Level.ODD)
class Causal(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, mask):
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


@part("sequence", Level.ODD)
class Lstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x, mask):
        return self.layer(x)[0]


@part("sequence", Level.ODD)
class GruTimeMajor(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(WIDTH, WIDTH)

    def forward(self, x, mask):
        return self.layer(x.transpose(0, 1))[0].transpose(0, 1)


@part("sequence", Level.ODD)
class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True)

    def forward(self, x, mask):
        packed = pack_padded_sequence(x, mask.sum(1), batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.layer(packed)[0], batch_first=True, total_length=x.shape[1])[0]


@part("sequence", Level.ODD)
class PositionTable(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, LONGEST + 2, WIDTH))

    def forward(self, x, mask):
        return x + self.table[:, : x.shape[1]].expand(len(x), -1, -1)


@part("sequence", Level.ODD)
class ProjectedPositions(nn.Module):
    """A layer sees a row for each step, and another time the examples."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("table", torch.randn(LONGEST + 2, WIDTH))

    def forward(self, x, mask):
        return torch.tanh(self.layer(x) + self.layer(self.table[: x.shape[1]]))


@part("sequence", Level.ODD)
class Cls(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))

    def forward(self, x, mask):
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)[:, : LONGEST + 1]
        return x, F.pad(mask, (1, 0), value=True)[:, : LONGEST + 1]


@part("sequence", Level.ODD)
class TimeMajor(WithLayer):
    def forward(self, x, mask):
        return torch.tanh(self.layer(x.transpose(0, 1))).transpose(0, 1)


@part("sequence", Level.ODD)
class TimeInTheBatch(WithLayer):
    def forward(self, x, mask):
        return torch.tanh(self.layer(x.reshape(-1, WIDTH))).view(x.shape)


@part("sequence", Level.ODD)
class TimeMajorInTheBatch(WithLayer):
    def forward(self, x, mask):
        steps = x.transpose(0, 1)
        return torch.tanh(self.layer(steps.reshape(-1, WIDTH))).view(steps.shape).transpose(0, 1)


@part("sequence", Level.ODD)
class Unpadded(WithLayer):
    def forward(self, x, mask):
        rows = torch.tanh(self.layer(x[mask]))
        full = torch.zeros_like(x)
        full[mask] = rows
        return full


@part("sequence", Level.ODD)
class LongestFirst(WithLayer):
    def forward(self, x, mask):
        order = mask.sum(1).argsort(descending=True, stable=True)
        return torch.tanh(self.layer(x[order]))[order.argsort()]


@part("sequence", Level.ODD)
class StepByStep(WithLayer):
    def forward(self, x, mask):
        return torch.stack([torch.tanh(self.layer(x[:, step])) for step in range(x.shape[1])], 1)


@part("sequence", Level.ODD)
class OwnRecurrence(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(WIDTH, WIDTH)

    def forward(self, x, mask):
        hidden, states = torch.zeros_like(x[:, 0]), []
        for step in x.unbind(1):
            hidden = self.cell(step, hidden)
            states.append(hidden)
        return torch.stack(states, 1)


@part("sequence", Level.ODD)
class ShrinkingBatch(WithLayer):
    """Steps of those that are long enough, as packed recurrent nets do it by hand."""

    def forward(self, x, mask):
        y = torch.zeros_like(x)
        for step in range(int(mask.sum(1).max())):
            rows = mask[:, step]
            y[rows, step] = torch.tanh(self.layer(x[rows, step]))
        return y


@part("sequence", Level.ODD)
class Trimmed(WithLayer):
    def forward(self, x, mask):
        longest = int(mask.sum(1).max())
        return torch.tanh(self.layer(x[:, :longest])), mask[:, :longest]


@part("sequence", Level.ODD)
class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x, mask):
        steps = x.shape[1]
        pairs = torch.cat([x.unsqueeze(1).expand(-1, steps, -1, -1), x.unsqueeze(2).expand(-1, -1, steps, -1)], -1)
        weights = mask.to(x.dtype)[:, None, :, None]
        return x + (torch.tanh(self.layer(pairs)) * weights).sum(2)


@part("sequence", Level.ODD)
class StepNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x, mask):
        return self.norm(x.mT).mT


@part("sequence", Level.ODD)
class FirstStepOnly(WithLayer):
    """Rank 2 here; the head is a layer of rank 2 as well."""

    def forward(self, x, mask):
        return torch.cat([torch.tanh(self.layer(x[:, 0])).unsqueeze(1), x[:, 1:]], 1)
