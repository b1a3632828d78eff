"""Influence methods against the peers' own packages, run for real on the same model in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak.methods import Arnoldi, ConjugateGradient, EKFACInfluence, Explicit, InfluenceFunction
from lightning_trak.outputs import ClassificationMargin
from tests.lit import make_data, make_trainer
from tests.methods.influence.reference import relative_error

OUTPUT = ClassificationMargin()


def double(data: TensorDataset, shape: tuple[int, ...]) -> TensorDataset:
    return TensorDataset(data.tensors[0].double().view(-1, *shape), data.tensors[1])


def trained(net: nn.Module, data: TensorDataset, steps: int) -> nn.Module:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(data.tensors[0]), data.tensors[1]).backward()
        optimizer.step()
    return net.eval()


def margins(net: nn.Module, data: TensorDataset) -> Tensor:
    return OUTPUT.output(net, tuple(data.tensors)).detach()


@pytest.fixture
def softmax_regression():
    """Of 21 parameters, 14 matter: all logits may move together. Its Hessian is no less than zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        train, targets = double(make_data(60), (6,)), double(make_data(9, seed=1), (6,))
        return trained(nn.Linear(6, 3).double(), train, 50), train, targets


@pytest.mark.parametrize("rank", [14, 6])
def test_arnoldi_is_captums(softmax_regression, rank, tmp_path):
    """captum 0.9 scores losses, so that Q of the target stands between: to 1e-6 of the norm."""
    captum = pytest.importorskip("captum.influence._core.arnoldi_influence_function")
    net, train, targets = softmax_regression
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    peer = captum.ArnoldiInfluenceFunction(
        copy.deepcopy(net), train, str(tmp_path / "weights.pt"), loss_fn=nn.CrossEntropyLoss(reduction="none"),
        batch_size=60, projection_dim=rank, arnoldi_dim=21, arnoldi_tol=1e-12, hessian_reg=0.0,
        hessian_inverse_tol=1e-9,
    )  # fmt: skip
    expected = peer.influence(tuple(targets.tensors))
    method = InfluenceFunction(
        net, [net.state_dict()], output=OUTPUT, solver=Arnoldi(21, rank), curvature="exact", damping=0.0
    )
    scores = method.attribute(make_trainer(), train, targets)
    loss_gradients = OUTPUT.derivatives(margins(net, targets))[0]
    assert relative_error(scores * loss_gradients.unsqueeze(1), expected) < 1e-6


@pytest.mark.parametrize("solver", [Explicit(), ConjugateGradient(tolerance=1e-10)])
def test_solvers_are_dattris(softmax_regression, solver):
    """dattri 0.3 has the mean of the losses, and scores what leaving out does: to 1e-6 of the norm."""
    influence = pytest.importorskip("dattri.algorithm.influence_function")
    task = pytest.importorskip("dattri.task")
    net, train, targets = softmax_regression

    def margin(parameters, batch):
        inputs, labels = batch
        logits = torch.func.functional_call(net, parameters, (inputs.view(-1, 6),))
        likelihood = logits.log_softmax(-1).gather(1, labels.view(-1, 1)).squeeze(1)
        return likelihood - torch.log1p(-likelihood.exp())

    def loss(parameters, batch):
        return OUTPUT.loss(margin(parameters, batch)).mean()

    def target(parameters, batch):
        return margin(parameters, batch).sum()

    regularization = 0.01
    peer = influence.IFAttributorExplicit(
        task=task.AttributionTask(
            loss_func=loss,
            target_func=target,
            model=net,
            checkpoints=copy.deepcopy(net.state_dict()),
        ),
        regularization=regularization,
    )
    peer.cache(DataLoader(train, batch_size=60))
    expected = -peer.attribute(DataLoader(train, batch_size=60), DataLoader(targets, batch_size=9)).T.detach() / 60
    gradients, curvatures = gradients_and_curvatures(net, train)
    mean = (curvatures.unsqueeze(1) * gradients.square()).sum() / gradients.shape[1]
    method = InfluenceFunction(
        net,
        [net.state_dict()],
        output=OUTPUT,
        solver=solver,
        curvature="exact",
        damping=60 * regularization / float(mean),
    )
    assert relative_error(method.attribute(make_trainer(), train, targets), expected) < 1e-6


def gradients_and_curvatures(net: nn.Module, data: TensorDataset) -> tuple[Tensor, Tensor]:
    """Each margin's gradient, ``(n, p)``, by autograd, and R."""
    outputs = OUTPUT.output(net, tuple(data.tensors))
    rows = [torch.autograd.grad(value, list(net.parameters()), retain_graph=True) for value in outputs]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]), OUTPUT.derivatives(outputs)[1]


def test_ekfac_is_kronfluences(tmp_path):
    """kronfluence 1.0 with the empirical Fisher matrix, in float64: to 1e-6 of the norm.

    It has the mean over examples, and scores what training does to the loss. Its own heuristic for the damping is 0.1
    of each layer's mean eigenvalue. Its covariances count all inputs of a layer, also those that the output does not
    depend on, so this net has none of them.
    """
    analyzer = pytest.importorskip("kronfluence.analyzer")
    arguments = pytest.importorskip("kronfluence.arguments")
    task_module = pytest.importorskip("kronfluence.task")

    class Classify(task_module.Task):
        def compute_train_loss(self, batch, model, sample=False):
            assert not sample
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch, model):
            return OUTPUT.output(model, batch).sum()

    train, targets = double(make_data(60), (1, 2, 3)), double(make_data(9, seed=1), (1, 2, 3))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 2, padding=1), nn.Tanh(), nn.Conv2d(4, 3, (2, 1)), nn.Flatten(),
            nn.Linear(24, 5, bias=False), nn.Softplus(), nn.Linear(5, 3),
        )  # fmt: skip
        trained(net.double(), train, 30)
    scores = EKFACInfluence(net, [net.state_dict()], output=OUTPUT, curvature="empirical", damping=0.1).attribute(
        make_trainer(), train, targets
    )
    task = Classify()
    model = analyzer.prepare_model(copy.deepcopy(net), task)
    peer = analyzer.Analyzer("test", model, task, cpu=True, disable_tqdm=True, output_dir=str(tmp_path))
    factors = arguments.FactorArguments(
        use_empirical_fisher=True, activation_covariance_dtype=torch.float64, gradient_covariance_dtype=torch.float64,
        per_sample_gradient_dtype=torch.float64, lambda_dtype=torch.float64, eigendecomposition_dtype=torch.float64,
    )  # fmt: skip
    peer.fit_all_factors("factors", train, per_device_batch_size=60, factor_args=factors)
    score_arguments = arguments.ScoreArguments(
        damping_factor=None, per_sample_gradient_dtype=torch.float64, precondition_dtype=torch.float64,
        score_dtype=torch.float64,
    )  # fmt: skip
    peer.compute_pairwise_scores(
        "scores", "factors", targets, train, per_device_query_batch_size=9, per_device_train_batch_size=60,
        score_args=score_arguments,
    )  # fmt: skip
    expected = -peer.load_pairwise_scores("scores")["all_modules"] / 60
    assert relative_error(scores, expected) < 1e-6
