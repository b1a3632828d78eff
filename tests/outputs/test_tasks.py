"""The outputs of all tasks: every engine, batch and order, the training loss, and TRAK's formula by hand."""

import copy

import pytest
import torch
from torch import nn

from lightning_trak import TRAK
from lightning_trak.gradients import FunctionalEngine, HookEngine, LoopEngine, select_parameters
from lightning_trak.gradients.batch import ExampleBatch
from lightning_trak.methods.influence import Explicit, InfluenceFunction
from lightning_trak.outputs.surrogate import SurrogateOutput
from lightning_trak.projections import IdentityProjection
from tests.lit import make_trainer
from tests.outputs.tasks import TASKS, task

TRAINED = [name for name in TASKS if "direction" not in name]


def rows_by_autograd(module, output, batch, size):
    """The output and the gradient of each example, in a batch of its own."""
    parameters = list(module.parameters())
    values, rows = [], []
    for number in range(size):
        value = output.output(module, ExampleBatch(batch, size).take([number]).content)
        assert value.shape == (1,)
        gradients = torch.autograd.grad(value.sum(), parameters, allow_unused=True, materialize_grads=True)
        values.append(value.detach())
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.cat(values), torch.stack(rows)


@pytest.mark.parametrize("engine", [HookEngine, FunctionalEngine, LoopEngine])
@pytest.mark.parametrize("name", TASKS)
def test_every_engine_agrees_with_autograd(name, engine):
    module, output, items = found = task(name)
    size, batch = len(items), found.batch()
    expected_values, expected = rows_by_autograd(module, output, batch, size)
    values, gradients = engine(module, output, select_parameters(module))(ExampleBatch(batch, size))
    torch.testing.assert_close(values, expected_values)
    torch.testing.assert_close(torch.cat(list(gradients.values()), 1), expected)
    assert (expected.norm(dim=1) > 1e-4).all()


@pytest.mark.parametrize("name", TASKS)
def test_batch_and_order_do_not_matter(name):
    module, output, items = found = task(name)
    whole = output.output(module, found.batch())
    order = [4, 0, 8, 3]
    torch.testing.assert_close(output.output(module, found.batch(*order)), whole[order])
    assert len(set(whole.tolist())) == len(items)


@pytest.mark.parametrize("name", TASKS)
def test_second_derivatives_and_forward_mode(name):
    """Influence functions and metagradients differentiate the output twice, gradient products forwards."""
    module, output, _ = found = task(name)
    batch, names = found.batch(0, 1), [name for name, _ in module.named_parameters()]
    tangents = [torch.randn_like(parameter) for parameter in module.parameters()]

    def values(*parameters):
        call = _Call(module, output)
        return torch.func.functional_call(
            call, {f"module.{name}": part for name, part in zip(names, parameters, strict=True)}, (batch,)
        )

    start = tuple(parameter.detach() for parameter in module.parameters())
    _, forwards = torch.func.jvp(values, start, tuple(tangents))
    _, vjp = torch.func.vjp(values, *start)
    pulled = [vjp(row) for row in torch.eye(2, dtype=torch.float64)]
    backwards = [sum((one * two).sum() for one, two in zip(row, tangents, strict=True)) for row in pulled]
    torch.testing.assert_close(forwards, torch.stack(backwards))

    def slope(*parameters):
        return torch.func.grad(lambda *moved: values(*moved).sum(), tuple(range(len(parameters))))(*parameters)

    _, curved = torch.func.jvp(slope, start, tuple(tangents))
    step = 1e-5
    up, down = (slope(*(a + s * b for a, b in zip(start, tangents, strict=True))) for s in (step, -step))
    for found_part, above, below in zip(curved, up, down, strict=True):
        torch.testing.assert_close(found_part, (above - below) / (2 * step), rtol=1e-5, atol=1e-7)


class _Call(nn.Module):
    def __init__(self, module, output):
        super().__init__()
        self.module, self.output = module, output

    def forward(self, batch):
        return self.output.output(self.module, batch)


@pytest.mark.parametrize("name", TASKS)
def test_fingerprint_depends_on_content_alone(name):
    first, second = task(name).output, task(name).output
    assert first.fingerprint() == second.fingerprint() == copy.deepcopy(first).fingerprint()


@pytest.mark.parametrize("name", TRAINED)
def test_trak_scores_are_those_of_the_formula(name, tmp_path):
    """With all gradients as features, the scores follow from outputs and gradients by autograd."""
    module, output, items = found = task(name)
    damping = 0.3
    trak = TRAK(
        module,
        [module.state_dict()],
        tmp_path,
        output=output,
        projection=IdentityProjection(),
        curvature="gauss_newton",
        damping=damping,
        dtype=torch.float64,
    )
    trainer = make_trainer(precision="64-true")
    trak.featurize(trainer, torch.utils.data.DataLoader(items, batch_size=4))
    scores = trak.score(trainer, torch.utils.data.DataLoader(items[:3], batch_size=2))
    values, rows = rows_by_autograd(module, output, found.batch(), len(items))
    slopes, curvatures = output.derivatives(values)
    kernel = rows.T @ (curvatures.unsqueeze(1) * rows)
    kernel += damping * kernel.trace() / len(kernel) * torch.eye(len(kernel))
    expected = rows[:3] @ torch.linalg.solve(kernel, rows.T) * slopes
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["multi-label", "diffusion square"])
def test_influence_is_trak_without_a_projection(name, tmp_path):
    module, output, items = task(name)
    trainer = make_trainer(precision="64-true")
    loader, targets = (torch.utils.data.DataLoader(part, batch_size=4) for part in (items, items[:3]))
    trak = TRAK(
        module,
        [module.state_dict()],
        tmp_path,
        output=output,
        projection=IdentityProjection(),
        curvature="gauss_newton",
        damping=0.3,
        dtype=torch.float64,
    )
    influence = InfluenceFunction(module, [module.state_dict()], solver=Explicit(), damping=0.3, output=output)
    scores = influence.attribute(trainer, loader, targets)
    torch.testing.assert_close(scores, trak.attribute(trainer, loader, targets), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", [name for name in TASKS if isinstance(task(name).output, SurrogateOutput)])
def test_what_does_not_determine_the_training_loss_says_so(name):
    module, output, _ = task(name)
    with pytest.raises(TypeError, match=f"not a function of {type(output).__name__}.*losses="):
        output.loss(torch.zeros(1))
    slope, curvature = output.derivatives(torch.randn(3))
    assert slope.tolist() == curvature.tolist() == [1, 1, 1]
    with pytest.raises(TypeError, match=r"not a function of|targets alone"):
        InfluenceFunction(module, [module.state_dict()], output=output, curvature="exact")


def test_outputs_of_targets_are_refused_for_training(tmp_path):
    module, output, _ = task("direction")
    for method in (
        lambda: TRAK(module, [module.state_dict()], tmp_path, output=output),
        lambda: InfluenceFunction(module, [module.state_dict()], output=output),
    ):
        with pytest.raises(TypeError, match=r"DirectionOutput is an output of targets alone.*Metagradient"):
            method()
