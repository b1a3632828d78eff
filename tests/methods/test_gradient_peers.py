"""TracIn and gradient cosine against captum and dattri, run for real on the same models."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import GradientCosine, TracIn
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.projections import IdentityProjection
from tests.lit import make_data, make_trainer

RATES = [0.3, 0.1]
EXACT = {"output": ClassificationMargin(), "projection": IdentityProjection(), "dtype": torch.float64}


def make_net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)).double()


def make_double(size, seed=0):
    inputs, labels = make_data(size, seed).tensors
    return TensorDataset(inputs.double(), labels)


NET, STATES = make_net(), [make_net(seed).state_dict() for seed in (1, 2)]
TRAIN, TARGETS = make_double(31), make_double(8, seed=1)


def load(module, number):
    module.load_state_dict(STATES[number])
    return RATES[number]


def close(found, expected, rtol=1e-9):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def test_all_layers_are_captums_tracincp(tmp_path):
    influence = pytest.importorskip("captum.influence")
    peer = influence.TracInCP(
        make_net(),
        TRAIN,
        checkpoints=[0, 1],
        checkpoints_load_func=load,
        layers=["0", "1", "3"],
        loss_fn=nn.CrossEntropyLoss(reduction="none"),
        batch_size=10,
    )
    tracin = TracIn(NET, STATES, tmp_path, learning_rates=RATES, **EXACT)
    close(tracin.attribute(make_trainer(), TRAIN, TARGETS), peer.influence(tuple(TARGETS.tensors)))


def test_the_last_layer_is_captums_fast_tracincp(tmp_path):
    """Whose last layer is without its bias."""
    influence = pytest.importorskip("captum.influence")
    net = make_net()
    peer = influence.TracInCPFast(
        net,
        net[3],
        TRAIN,
        checkpoints=[0, 1],
        checkpoints_load_func=load,
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        batch_size=10,
    )
    tracin = TracIn(NET, STATES, tmp_path, learning_rates=RATES, parameters="3.weight", **EXACT)
    close(tracin.attribute(make_trainer(), TRAIN, TARGETS), peer.influence(tuple(TARGETS.tensors)))


def test_cosines_are_dattris(tmp_path):
    """Which sums in float32."""
    pytest.importorskip("dattri")
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.task import AttributionTask

    net = make_net()

    def loss(parameters, example):
        inputs, label = example
        logits = torch.func.functional_call(net, parameters, (inputs.unsqueeze(0),))
        return F.cross_entropy(logits, label.unsqueeze(0))

    peer = TracInAttributor(AttributionTask(loss, net, STATES), weight_list=torch.tensor(RATES), normalized_grad=True)
    peer.projector_kwargs = None  # the argument None stands for its default projection
    theirs = peer.attribute(DataLoader(TRAIN, batch_size=10), DataLoader(TARGETS, batch_size=3)).T
    ours = GradientCosine(NET, STATES, tmp_path, learning_rates=RATES, **EXACT)
    close(ours.attribute(make_trainer(), TRAIN, TARGETS).float(), theirs, rtol=1e-6)
