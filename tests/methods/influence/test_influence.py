"""Influence functions in float64: closed form, retraining, autograd's Hessian, the solvers against one another."""

import copy

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Ridge
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import TRAK, AttributionMixin
from lightning_trak.methods import Arnoldi, ConjugateGradient, Explicit, InfluenceFunction, LiSSA
from lightning_trak.methods.influence import base
from lightning_trak.outputs import ContrastiveMargin, ModelOutput, NegativeLoss, RegressionOutput
from lightning_trak.projections import IdentityProjection
from tests.lit import TARGETS, TRAIN, LitNet, ScaledData, make_checkpoints, make_data, make_model, make_trainer
from tests.methods import test_logistic
from tests.methods.influence.reference import relative_error
from tests.methods.test_logistic import LitLogistic, closed_form, fit

problem = test_logistic.problem
RIDGE = 3.0
FITTED = make_data(64)  # what make_model trains on


def double_trainer(**options) -> L.Trainer:
    return make_trainer(precision="64-true", **options)


class LitLinear(LitLogistic):
    def configure_model_output(self) -> ModelOutput:
        return RegressionOutput()


def tensors(*arrays: np.ndarray) -> TensorDataset:
    return TensorDataset(*map(torch.tensor, arrays))


@pytest.mark.parametrize("curvature", ["gauss_newton", "exact"])
@pytest.mark.parametrize("solver", [Explicit(), ConjugateGradient(tolerance=1e-10), Arnoldi(10, 10)])
def test_logistic_regression_has_the_closed_form(problem, solver, curvature):
    x, y, target_x, target_y = problem
    model = LitLogistic(fit(x, y))
    expected, damping = closed_form(problem)
    method = InfluenceFunction(model, [model.state_dict()], solver=solver, curvature=curvature, damping=damping)
    scores = method.attribute(make_trainer(), DataLoader(tensors(x, y), batch_size=64), tensors(target_x, target_y))
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def test_leverage_turns_scores_into_leave_one_out_retraining_of_ridge_regression():
    """The effect of leaving i out is tau_i / (1 - h_i) exactly, and h_i is what i says of itself: tau(i)_i / Q_i."""
    x, y = load_diabetes(return_X_y=True)
    x, y = x[:80] * 20, (y[:80] - y.mean()) / y.std()
    train, rest = (x[:60], y[:60]), (x[60:], y[60:])
    full = Ridge(RIDGE, fit_intercept=False).fit(*train)
    model = LitLinear(full.coef_)
    damping = RIDGE / np.diag(train[0].T @ train[0]).mean()
    method = InfluenceFunction(model, [model.state_dict()], solver=ConjugateGradient(tolerance=1e-12), damping=damping)
    scores = method.attribute(make_trainer(), tensors(*train), tensors(*rest)).numpy()
    own = method.attribute(make_trainer(), tensors(*train), tensors(*train)).diagonal().numpy()
    leverage = own / (train[1] - full.predict(train[0]))
    effects = [
        full.predict(rest[0])
        - Ridge(RIDGE, fit_intercept=False).fit(*(np.delete(part, i, 0) for part in train)).predict(rest[0])
        for i in range(60)
    ]
    np.testing.assert_allclose(scores / (1 - leverage), np.stack(effects, axis=1), rtol=1e-7, atol=1e-10)


def reference(model: nn.Module, train: TensorDataset, targets: TensorDataset, curvature: str, damping: float) -> Tensor:
    """Scores from matrices that autograd makes of the whole."""
    model = copy.deepcopy(model).double().eval()
    output = model.configure_model_output()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            return output.output(self.model, batch)

    call, flat = Call(), torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    def outputs(vector: Tensor, data: TensorDataset) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes.values()])
        named = {f"model.{name}": part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
        return functional_call(call, named, ((data.tensors[0].double(), data.tensors[1]),))

    loss_gradients, curvatures = output.derivatives(outputs(flat, train).detach())
    gradients = torch.autograd.functional.jacobian(lambda vector: outputs(vector, train), flat)
    target_gradients = torch.autograd.functional.jacobian(lambda vector: outputs(vector, targets), flat)
    gauss_newton = (gradients.T * curvatures) @ gradients
    matrix = gauss_newton
    if curvature == "exact":
        matrix = torch.autograd.functional.hessian(lambda vector: output.loss(outputs(vector, train)).sum(), flat)
    matrix = matrix + damping * gauss_newton.diagonal().mean() * torch.eye(len(flat))
    return target_gradients @ torch.linalg.solve(matrix, gradients.T * loss_gradients)


@pytest.fixture(scope="module", params=["gauss_newton", "exact"])
def net(request):
    """A trained net with batch statistics, a kind of Hessian that is positive definite there, and scores."""
    model, options = make_model(steps=1000), {"curvature": request.param, "damping": 5.0}
    return model, options, reference(model, FITTED, TARGETS, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver", [Explicit(), ConjugateGradient(tolerance=1e-9), Arnoldi(200, 200), LiSSA(depth=100, batch_size=64)]
)
def test_solvers_agree_with_autograd_on_a_net(net, solver):
    model, options, expected = net
    method = InfluenceFunction(model, [model.state_dict()], solver=solver, **options)
    scores = method.attribute(double_trainer(), FITTED, TARGETS)
    assert scores.dtype == torch.float64
    assert relative_error(scores, expected) < (2e-2 if isinstance(solver, LiSSA) else 1e-7)


@pytest.mark.slow
def test_lissa_on_random_batches_comes_near(net):
    model, options, expected = net
    solver = LiSSA(depth=100, repeats=4, batch_size=16, tolerance=1.0)
    method = InfluenceFunction(model, [model.state_dict()], solver=solver, **options)
    assert relative_error(method.attribute(double_trainer(), FITTED, TARGETS), expected) < 0.25


@pytest.mark.slow
def test_arnoldi_of_low_rank_keeps_what_matters_most(net):
    model, options, expected = net
    errors = [
        relative_error(
            InfluenceFunction(model, [model.state_dict()], solver=Arnoldi(60, rank), **options).attribute(
                double_trainer(), FITTED, TARGETS
            ),
            expected,
        )
        for rank in (5, 20, 40)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.3


@pytest.mark.parametrize("damping", [0.5, "auto"])
def test_the_gauss_newton_scores_are_those_of_trak_without_projection(tmp_path, damping):
    checkpoints = make_checkpoints(2)
    scores = InfluenceFunction(make_model(), checkpoints, solver=Explicit(), damping=damping).attribute(
        make_trainer(), TRAIN, TARGETS
    )
    options = {"projection": IdentityProjection(), "damping": damping, "temperature": 1, "lag": 1}
    trak = TRAK(make_model(), checkpoints, tmp_path, **options)
    trak.featurize(make_trainer(), TRAIN)
    torch.testing.assert_close(scores, trak.score(make_trainer(), TARGETS), rtol=1e-4, atol=1e-5)


def test_outputs_that_remember_training_data_see_the_same_as_in_trak(tmp_path):
    class LitPair(LitNet):
        def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(first), super().forward(second)

    model, output = LitPair(), ContrastiveMargin()
    train, targets = (TensorDataset(data.tensors[0], data.tensors[0].flip(1)) for data in (TRAIN, TARGETS))
    method = InfluenceFunction(model, [model.state_dict()], output=output, solver=ConjugateGradient(tolerance=1e-7))
    options = {"projection": IdentityProjection(), "temperature": 1, "lag": 1}
    trak = TRAK(model, [model.state_dict()], tmp_path, output=output, **options)
    trak.featurize(make_trainer(), train)
    expected = trak.score(make_trainer(), targets)
    assert relative_error(method.attribute(make_trainer(), train, targets), expected) < 1e-3


class Attention(AttributionMixin, L.LightningModule):
    """The fused kernel of its attention has no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.head = nn.Linear(3, 12), nn.Linear(4, 1)

    def forward(self, sequences: Tensor) -> Tensor:
        query, key, value = self.inputs(sequences.view(-1, 2, 3)).chunk(3, dim=-1)
        return self.head(F.scaled_dot_product_attention(query, key, value).mean(1))

    def configure_model_output(self) -> ModelOutput:
        return RegressionOutput()


@pytest.mark.parametrize("curvature", ["gauss_newton", "exact"])
def test_attention_is_differentiated_twice(curvature):
    torch.manual_seed(0)
    model = Attention()
    train, targets = (TensorDataset(data.tensors[0], data.tensors[1].double()) for data in (TRAIN, TARGETS))
    method = InfluenceFunction(
        model, [model.state_dict()], solver=ConjugateGradient(tolerance=1e-9), curvature=curvature, damping=20.0
    )
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        expected = reference(model, train, targets, curvature, 20.0)
    assert relative_error(method.attribute(double_trainer(), train, targets), expected) < 1e-7


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:LiSSA at:RuntimeWarning")
@pytest.mark.parametrize("solver", [Explicit(), ConjugateGradient(20, 1e-8), LiSSA(20, batch_size=8), Arnoldi(20, 10)])
def test_neither_batches_nor_order_nor_blocks_change_the_scores(monkeypatch, solver):
    method = InfluenceFunction(make_model(), make_checkpoints(2), solver=solver, curvature="gauss_newton", damping=20.0)
    expected = method.attribute(double_trainer(), TRAIN, TARGETS)
    monkeypatch.setattr(base, "TARGET_BYTES", 5 * 8 * 150)
    train = DataLoader(TRAIN, batch_size=20, shuffle=True)
    scores = method.attribute(double_trainer(), train, DataLoader(TARGETS, batch_size=3, shuffle=True))
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-9)


def test_scores_are_averaged_over_checkpoints():
    checkpoints = make_checkpoints(2)

    def scores(chosen):
        method = InfluenceFunction(make_model(), chosen, solver=Explicit(), damping=1.0)
        return method.attribute(double_trainer(), TRAIN, TARGETS)

    alone = [scores([checkpoint]) for checkpoint in checkpoints]
    torch.testing.assert_close(scores(checkpoints), sum(alone) / 2)
    assert relative_error(alone[0], alone[1]) > 0.1


def test_only_selected_parameters_count():
    model = make_model()
    method = InfluenceFunction(
        model, [model.state_dict()], solver=ConjugateGradient(tolerance=1e-9), damping=1.0, parameters="head.*"
    )
    model.first.requires_grad_(False)
    model.norm.requires_grad_(False)
    frozen = InfluenceFunction(model, [model.state_dict()], solver=Explicit(), damping=1.0)
    scores = method.attribute(double_trainer(), TRAIN, TARGETS)
    torch.testing.assert_close(scores, frozen.attribute(double_trainer(), TRAIN, TARGETS))
    whole = InfluenceFunction(make_model(), [model.state_dict()], solver=Explicit(), damping=1.0)
    assert relative_error(scores, whole.attribute(double_trainer(), TRAIN, TARGETS)) > 0.1


@pytest.mark.parametrize("inference", [False, True])
def test_the_users_module_and_random_state_are_left_alone(inference):
    model = make_model().train()
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    method = InfluenceFunction(model, make_checkpoints(1), solver=LiSSA(20, batch_size=50, tolerance=1.0))
    with torch.inference_mode(inference):
        scores = method.attribute(make_trainer(), DataLoader(TRAIN, batch_size=8, shuffle=True), TARGETS)
    assert scores.abs().max() > 0
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(part.training for part in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(part._forward_hooks for part in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.dtype == before[name].dtype


def test_a_data_modules_transfer_hooks_are_called():
    method = InfluenceFunction(make_model(), make_checkpoints(1), solver=Explicit())
    scores = method.attribute(double_trainer(), ScaledData(), ScaledData())
    train, targets = (TensorDataset(data.tensors[0].double() / 3, data.tensors[1]) for data in (TRAIN, TARGETS))
    torch.testing.assert_close(scores, method.attribute(double_trainer(), train, targets))


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        (Explicit(), "exact Hessian at checkpoint 0 .* is not positive definite: with its smallest eigenvalue, -"),
        (ConjugateGradient(), "conjugate gradients at checkpoint 0 .* a direction in which the damped Hessian is -"),
        (
            LiSSA(200, batch_size=50, scale=150.0),
            "LiSSA diverged at checkpoint 0 .* also have negative eigenvalues",
        ),
    ],
)
def test_an_indefinite_hessian_is_an_error(solver, message):
    model = make_model(steps=3)
    method = InfluenceFunction(model, [model.state_dict()], solver=solver, curvature="exact", damping=0.0)
    with pytest.raises(ValueError, match=message):
        method.attribute(double_trainer(), TRAIN, TARGETS)


def test_arnoldi_leaves_negative_curvature_out_and_says_so():
    model = make_model(steps=3)
    method = InfluenceFunction(model, [model.state_dict()], solver=Arnoldi(80, 80), curvature="exact", damping=0.3)
    with pytest.warns(RuntimeWarning, match="of the 80 leading eigenvalues of the damped Hessian .* are negative"):
        scores = method.attribute(double_trainer(), TRAIN, TARGETS)
    assert scores.isfinite().all()


def test_lissa_with_too_small_a_scale_is_an_error():
    method = InfluenceFunction(make_model(), make_checkpoints(1), solver=LiSSA(500, scale=1.0), damping=1.0)
    with pytest.raises(ValueError, match=r"LiSSA diverged .* use a larger scale \(now 1\)"):
        method.attribute(make_trainer(), TRAIN, TARGETS)


@pytest.mark.parametrize(
    ("solver", "message"),
    [(ConjugateGradient(2), "stopped after 2 iterations at a relative residual"), (LiSSA(2), "more depth or repeats")],
)
def test_what_has_not_converged_says_so(solver, message):
    method = InfluenceFunction(make_model(), make_checkpoints(1), solver=solver)
    with pytest.warns(RuntimeWarning, match=message):
        method.attribute(make_trainer(), TRAIN, TARGETS)


def test_a_singular_matrix_is_an_error():
    method = InfluenceFunction(make_model(), make_checkpoints(1), solver=Explicit(), damping=0.0)
    with pytest.raises(ValueError, match="is singular"):
        method.attribute(double_trainer(), make_data(5), TARGETS)


class Concave(RegressionOutput):
    def loss(self, output: Tensor) -> Tensor:
        return (1 + output.abs()).log()


class Plain(RegressionOutput):
    def loss(self, output: Tensor) -> Tensor:
        return -output


@pytest.mark.parametrize(
    ("output", "message"),
    [(Concave(), 'convex in the output: use curvature="exact"'), (Plain(), "no curvature at checkpoint 0")],
)
def test_losses_without_a_gauss_newton_matrix_are_refused(output, message):
    model = LitLinear(np.ones(6))
    data = TensorDataset(TRAIN.tensors[0].double(), TRAIN.tensors[1].double())
    method = InfluenceFunction(model, [model.state_dict()], output=output)
    with pytest.raises(ValueError, match=message):
        method.attribute(make_trainer(), data, data)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="curvature must be one of 'gauss_newton', 'exact'"):
        InfluenceFunction(make_model(), make_checkpoints(1), curvature="fisher")
    with pytest.raises(ValueError, match="damping must be at least 0"):
        InfluenceFunction(make_model(), make_checkpoints(1), damping=-1.0)
    with pytest.raises(TypeError, match="declares no model output"):
        InfluenceFunction(nn.Linear(2, 2), [nn.Linear(2, 2).state_dict()])


def test_a_negative_loss_has_an_empirical_fisher_matrix():
    output = NegativeLoss(
        lambda module, batch: nn.functional.cross_entropy(module(batch[0]), batch[1], reduction="none")
    )
    model = make_model()
    method = InfluenceFunction(model, [model.state_dict()], output=output, solver=Explicit(), damping=1.0)
    scores = method.attribute(double_trainer(), TRAIN, TRAIN)
    assert (scores.diagonal() > 0).all()
    torch.testing.assert_close(scores, scores.T)  # an inner product of loss gradients
