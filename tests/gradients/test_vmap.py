"""What plain vmap cannot do: give values to Python code, fill new tensors, begin with one state for all examples."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from lightning_trak.compatibility import values_under_vmap
from lightning_trak.gradients import FunctionalEngine, LoopEngine, select_parameters
from lightning_trak.gradients.base import EngineError
from lightning_trak.gradients.batch import ExampleBatch
from lightning_trak.gradients.branches import CommonValues
from lightning_trak.outputs import ClassificationMargin

LENGTHS = torch.tensor([4, 2, 4, 3, 2, 4])


class Masked(nn.Module):
    """Asks whether there is padding, as the models of transformers do, and how long a text is."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        hidden = self.inner(inputs).tanh()
        mask = torch.arange(inputs.shape[1]) < lengths.unsqueeze(1)
        if not mask.all():
            hidden = hidden * mask.unsqueeze(-1) / 2
        longest = int(lengths.max())
        return self.head(hidden[:, :longest].sum(1))


class Sized(nn.Module):
    """Takes values as sizes, masks as indices, and turns integers into vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        inputs = inputs[:, : lengths.max()]
        mask = torch.arange(lengths.max()) < lengths.unsqueeze(1)
        hidden = torch.zeros_like(self.inner(inputs))
        hidden[mask] = self.inner(inputs[mask]).tanh()
        return self.head(hidden.sum(1) * F.one_hot(lengths, 5) + hidden[:, mask[0].nonzero()[:, 0]].mean(1))


class Filling(nn.Module):
    """Writes its results into tensors that it makes, and numbers where a mask is true."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        inputs = inputs * 1
        inputs[inputs > 1] = 1.5
        states = torch.zeros(len(inputs), inputs.shape[1], 5)
        seen = inputs.new_empty(inputs.shape[:2], dtype=torch.bool)
        for step in range(inputs.shape[1]):
            states[:, step] = self.inner(inputs[:, step]).tanh()
            seen[:, step] = step < lengths
        states[~seen] = 0
        return self.head(states.sum(1))


class Checkpointed(nn.Module):
    """Asks that gradients are tracked, as the models of transformers do for gradient checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        inputs = inputs.detach().requires_grad_()
        return self.head(self.inner(inputs).requires_grad_(requires_grad=True).tanh().sum(1) / lengths.unsqueeze(1))


class Recurrent(nn.Module):
    """Begins with zeros, or with a state that is learned."""

    def __init__(self, kind: type[nn.RNNBase], learned: bool) -> None:
        super().__init__()
        self.layer, self.head = kind(3, 5, batch_first=True), nn.Linear(5, 3)
        self.first = nn.Parameter(torch.randn(1, 1, 5)) if learned else None

    def forward(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        first = None if self.first is None else self.first.repeat(1, len(inputs), 1)
        if first is not None and isinstance(self.layer, nn.LSTM):
            first = (first, 2 * first)
        states = self.layer(inputs, first)[0]
        return self.head(states[torch.arange(len(inputs)), lengths - 1])


@pytest.mark.parametrize(
    "module",
    [
        Masked(),
        Sized(),
        Filling(),
        Checkpointed(),
        *(Recurrent(kind, learned) for kind in (nn.LSTM, nn.GRU, nn.RNN) for learned in (False, True)),
    ],
    ids=lambda module: f"{type(module).__name__}-{type(getattr(module, 'layer', None)).__name__}",
)  # fmt: skip
def test_it_gives_what_autograd_gives_for_each_example(module):
    torch.set_default_dtype(torch.float64)
    try:
        module, names = module.double().eval(), select_parameters(module)
        batch = ExampleBatch((torch.randn(6, 4, 3), LENGTHS, torch.arange(6) % 3), 6)
        engines = (kind(module, ClassificationMargin(), names) for kind in (FunctionalEngine, LoopEngine))
        (values, rows), (expected_values, expected) = (engine(batch) for engine in engines)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(values, expected_values)
    assert list(rows) == list(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(rows[name], gradient)


def test_an_example_on_a_path_of_its_own_each_time_is_left_to_the_loop():
    class Ragged(Masked):
        def forward(self, inputs: Tensor, lengths: Tensor) -> Tensor:
            return super().forward(inputs, lengths) * inputs.sum().item()

    module = Ragged()
    engine = FunctionalEngine(module, ClassificationMargin(), select_parameters(module))
    with pytest.raises(EngineError, match=r"such as \.item\(\) .*, and most of the examples have different ones"):
        engine(ExampleBatch((torch.randn(6, 4, 3), LENGTHS, torch.arange(6) % 3), 6))


@pytest.mark.parametrize(
    ("ask", "found"),
    [
        (bool, True), (int, 2), (float, 2.0), (Tensor.item, 2.0), (Tensor.tolist, 2.0), (lambda x: 2 in x, True),
        (lambda x: torch.equal(x, x), True), (lambda x: torch.allclose(x, torch.tensor(3.0)), False),
    ],
)  # fmt: skip
def test_values_that_all_examples_have(ask, found):
    got = []

    def function(x: Tensor) -> Tensor:
        with CommonValues():
            got.append(ask(x - x + 2))
        return x

    vmap(function)(torch.randn(3))
    assert got == [found]
    assert type(got[0]) is type(found)


def test_the_values_of_all_examples():
    rows, got = torch.randn(3, 2), []

    def function(row: Tensor) -> Tensor:
        got.extend(values_under_vmap(part) for part in (row, row.sum(), rows))
        torch.func.grad(lambda x: got.append(values_under_vmap(2 * x)) or x.sum())(row)
        vmap(lambda x: got.append(values_under_vmap(x)) or x)(row)
        return row

    vmap(function, in_dims=1)(rows)
    for found, expected in zip(got, (rows.T, rows.sum(0), None, 2 * rows.T, None), strict=True):
        assert found is expected is None or torch.equal(found, expected)
