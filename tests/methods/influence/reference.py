"""Influence functions on a small task, and what they should be: gradients an example at a time, in float64."""

import copy

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_trak.methods import Arnoldi, ConjugateGradient, EKFACInfluence, Explicit, InfluenceFunction, LiSSA
from lightning_trak.outputs import ClassificationMargin
from tests.lit import make_data, make_trainer

N, M = 20, 6
TRAIN, TARGETS = make_data(N), make_data(M, seed=1)
DAMPING = 2.0


def seeded(make, *args):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(*args)


def ekfac(model, train=TRAIN, targets=TARGETS, precision="32-true", output=None, **options):
    method = EKFACInfluence(model, [model.state_dict()], output=output or ClassificationMargin(), **options)
    return method.attribute(make_trainer(precision=precision), train, targets)


def influence(solver, curvature="gauss_newton"):
    def scores(model, train=TRAIN, targets=TARGETS, precision="32-true", output=None, **options):
        method = InfluenceFunction(
            model, [model.state_dict()], output=output or ClassificationMargin(), solver=solver, curvature=curvature,
            damping=DAMPING, **options,
        )  # fmt: skip
        return method.attribute(make_trainer(precision=precision), train, targets)

    return scores


METHODS = {
    "explicit": influence(Explicit()),
    "conjugate_gradient": influence(ConjugateGradient(tolerance=1e-6)),
    "lissa": influence(LiSSA(depth=120, batch_size=N)),
    "arnoldi": influence(Arnoldi(100, 100)),
}


def reference(model, train, targets, output=None) -> Tensor:
    """The definition with the Gauss-Newton matrix: gradients by autograd, an example at a time, in float64."""
    model, output = copy.deepcopy(model).double().eval(), output or ClassificationMargin()
    parameters = [part for part in model.parameters() if part.requires_grad]

    def rows(data):
        found = []
        for batch in DataLoader(data, batch_size=1):
            batch = [part.double() if part.is_floating_point() else part for part in batch]
            value = output.output(model, batch)
            gradients = torch.autograd.grad(value.sum(), parameters, allow_unused=True, materialize_grads=True)
            flat = [(part.to_dense() if part.is_sparse else part).flatten() for part in gradients]
            found.append((torch.cat(flat), *(part[0] for part in output.derivatives(value.detach()))))
        return map(torch.stack, zip(*found, strict=True))

    torch.set_default_dtype(torch.float64)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        (gradients, loss_gradients, curvatures), (directions, _, _) = rows(train), rows(targets)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.backends.mha.set_fastpath_enabled(True)
    gram = (gradients.T * curvatures) @ gradients
    gram = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram)).double()
    return directions @ torch.linalg.solve(gram, gradients.T * loss_gradients)


def relative_error(scores: Tensor, expected: Tensor) -> float:
    return float((scores - expected).norm() / expected.norm())


class Net(nn.Module):
    """Makes a tensor in its forward pass without saying in which dtype, and has an unsaved buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 5), nn.Linear(5, 3)
        self.register_buffer("scale", torch.tensor(1.1), persistent=False)

    def hidden(self, inputs: Tensor) -> Tensor:
        return torch.tanh(self.first(inputs) + self.first(torch.ones(1, 6, device=inputs.device)))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.hidden(inputs)) * self.scale


class Once(Net):
    """EK-FAC takes layers that are called once."""

    def hidden(self, inputs: Tensor) -> Tensor:
        return torch.tanh(self.first(inputs + torch.ones(1, 6, device=inputs.device)))
