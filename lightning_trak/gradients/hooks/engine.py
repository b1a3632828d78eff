"""Per-example gradients of whole batches from one backward pass, which never forms a weight's gradient itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_trak.compatibility import is_compiled
from lightning_trak.gradients.base import EngineError, GradientEngine, differentiating
from lightning_trak.gradients.batch import ExampleBatch
from lightning_trak.gradients.hooks.coverage import Site, coverage_report, find_sites
from lightning_trak.gradients.hooks.layout import Spread, find_shared, hooked, spread
from lightning_trak.gradients.hooks.ownership import example_weights, misplaced, picks_rows, row_norms
from lightning_trak.gradients.hooks.projecting import Projecting
from lightning_trak.gradients.hooks.sketch import Sketches
from lightning_trak.gradients.hooks.tap import Tap
from lightning_trak.outputs import ModelOutput
from lightning_trak.projections.base import BoundProjection

Receive = Callable[[Site, Tensor, Tensor], None]
Shapes = tuple[Any, ...]


class HookEngine(GradientEngine):
    """Gradients by forward hooks on the layers: the input times the gradient of the output, layer by layer.

    All parameters are frozen inside their layers, so the backward pass costs what the gradients of activations cost.
    Each layer is done with as soon as the pass has reached it: :meth:`project` holds a few examples of one parameter.

    Three things are checked, since any of them would give a plausible wrong gradient:

    - Hooks see only what goes through a layer's own forward. Outside it, parameters are differentiated as usual; if one
      gets a gradient there, the engine refuses.
    - A layer's rows must belong to the examples that they are taken for. A second backward pass, in which examples have
      different weights, shows it (:func:`~lightning_trak.gradients.hooks.ownership.misplaced`). It is done whenever
      layers are called in shapes, or a number of times, that were not met before. Rows can be dealt out in another way
      each time if a layer has several of them for an example, or if the model picks rows by their values: then it is
      done for every batch.
    - :meth:`check` compares with autograd.

    Args:
        module: the model.
        output: the scalar output that is differentiated.
        names: canonical parameter name -> name in ``module``; only these are differentiated.
        autocast: what forward passes are autocast to, as by mixed precision. A layer's gradient is made in the
            precision of its output, as autograd does.

    Raises:
        EngineError: if a parameter's module is not covered, see :meth:`uncovered`.
    """

    def __init__(
        self, module: nn.Module, output: ModelOutput, names: dict[str, str], autocast: torch.dtype | None = None
    ) -> None:
        super().__init__(module, output, names, autocast)
        self._sites, left_out = find_sites(module, names)
        if left_out:
            sizes = {name: parameter.numel() for name, parameter in self.parameters.items()}
            raise EngineError(coverage_report(left_out, sizes))
        self._by_module = {site.module: site for site in self._sites}
        self._layouts: dict[Shapes, tuple[dict[nn.Module, Spread], dict[nn.Module, str]]] = {}
        self._met: set[Shapes] = set()

    @staticmethod
    def uncovered(module: nn.Module, names: dict[str, str]) -> dict[str, str]:
        """The parameters that hooks cannot differentiate, with the reasons, by canonical name.

        Args:
            module: the model.
            names: canonical parameter name -> name in ``module``.
        """
        return find_sites(module, names)[1]

    def __call__(self, batch: ExampleBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """All examples in one forward and backward pass: see :meth:`GradientEngine.__call__`."""
        rows: dict[str, Tensor] = {}

        def collect(site: Site, activation: Tensor, gradient: Tensor) -> None:
            for attribute, name in site.parameters.items():
                part = getattr(site.layer, attribute)(site.module, activation, gradient, batch.size)
                part = part.reshape(batch.size, -1)
                rows[name] = rows[name] + part if name in rows else part

        values = self._backward(batch, collect)
        return values, {
            name: rows[name] if name in rows else values.new_zeros(batch.size, parameter.numel(), dtype=parameter.dtype)
            for name, parameter in self.parameters.items()
        }

    def project(self, batch: ExampleBatch, projection: BoundProjection, features: Tensor) -> Tensor:
        """Project each layer's gradients as the backward pass reaches it: see :meth:`GradientEngine.project`."""
        return self._backward(batch, Projecting(projection, features, self.parameters))

    def check(self, batch: ExampleBatch, tolerance: float = 1e-3) -> dict[str, str]:
        """Compare the gradients of the first two examples with those of autograd for each of the two outputs.

        Both go through the same batch: of one example alone, other kernels round otherwise, and a rectifier or maximum
        that is nearly tied then turns rounding into another gradient.

        Args:
            batch: the examples.
            tolerance: largest relative error, in the norm of a parameter's gradients; never less than a few roundings
                of their dtype. Gradients below 1e-5 of the whole are rounding noise.

        Returns:
            The parameters that hooks get wrong, with what is wrong; empty if all is well.
        """
        batch = batch.take(slice(0, 2))
        wrong = {
            name: f"{self._by_module[module].path}: {reason}"
            for module, reason in self._layout(batch)[1].items()
            for name in self._by_module[module].parameters.values()
        }
        names = {name: raw for name, raw in self.names.items() if name not in wrong}
        if not names:
            return wrong
        engine = type(self)(self.module, self.output, names, self.autocast) if wrong else self
        try:
            pairs = engine._pairs(batch)
        except EngineError as refusal:
            return wrong | dict.fromkeys(refusal.parameters or names, str(refusal))
        norms = {name: float(expected.norm()) for name, (_, expected) in pairs.items()}
        noise = 1e-5 * sum(norm**2 for norm in norms.values()) ** 0.5
        for name, (rows, expected) in pairs.items():
            error = float((rows - expected).norm())
            rounding = rounding_of(self.autocast or self.parameters[name].dtype, self.parameters[name].device)
            if error > max(tolerance, 8 * rounding) * norms[name] + noise:
                wrong[name] = (
                    f"hooks give it a gradient that is off by {error:.3g} where autograd's has norm {norms[name]:.3g}:"
                    " it is also used outside its module's forward, or examples are not in the first dimension"
                )
        return wrong

    def _pairs(self, batch: ExampleBatch) -> dict[str, tuple[Tensor, Tensor]]:
        """The examples' gradients by hooks, and by autograd with a backward pass for each example.

        Sketches of them: the gradients of several examples may not fit in memory.
        """
        parameters = list(self.parameters.values())
        sketches = Sketches(
            {name: parameter.shape for name, parameter in self.parameters.items()}, parameters[0].device
        )
        found, expected = torch.zeros(2, batch.size, sketches.dim, dtype=torch.float64, device=parameters[0].device)
        self.project(batch, sketches, found)
        self._differentiate(batch, sketches, expected)
        return {name: (sketches.of(found, name), sketches.of(expected, name)) for name in self.parameters}

    def _differentiate(self, batch: ExampleBatch, sketches: Sketches, rows: Tensor) -> None:
        """Fill the rows with sketches of autograd's gradients, a backward pass for each example."""
        parameters = list(self.parameters.values())
        with self._eager(parameters):
            values = self.outputs(batch)
            for value, row in zip(values, torch.split(rows, 1), strict=True):
                gradients = torch.autograd.grad(
                    value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                for name, gradient in zip(self.parameters, gradients, strict=True):
                    sketches.add_(row, name, gradient.reshape(1, -1))

    def _backward(self, batch: ExampleBatch, receive: Receive) -> Tensor:
        """Run the model and let ``receive`` see each layer's input and output gradient; returns the outputs."""
        size = batch.size
        shared, refused = self._layout(batch)
        if refused:
            module, reason = next(iter(refused.items()))
            site = self._by_module[module]
            raise EngineError(
                f"hooks cannot tell the examples apart in {site.path} ({type(module).__name__}): {reason}",
                list(site.parameters.values()),
            )
        anchor = torch.zeros((), requires_grad=True)
        calls: list[tuple[str, int, torch.Size, torch.Size]] = []
        norms: dict[tuple[int, str], Tensor] = {}
        state: dict[str, Receive | None] = {"receive": None}

        def tap(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            if output.numel() == 0:
                return output  # as of an expert that no token was sent to
            site = self._by_module[module]
            activation = (*args, *kwargs.values())[0]
            how = shared.get(module)
            if how is not None:
                activation, output = spread(activation, size, how), spread(output, size, how).clone()
            elif size > 1 and (output.ndim < 2 or len(output) % size):
                raise EngineError(
                    f"{site.path} ({type(module).__name__}) gave an output of shape {tuple(output.shape)} in a batch of"
                    f" {size} examples; expected a multiple of {size} rows"
                )
            number = len(calls)
            calls.append((site.path, output.shape[:1].numel() // size, activation.shape, output.shape))

            def hand_over(activation: Tensor, gradient: Tensor) -> None:
                if state["receive"] is None:
                    norms[number, "weighted"] = row_norms(gradient)
                    return
                if (number, "weighted") in norms:
                    norms[number, "plain"] = row_norms(gradient)
                if activation.is_floating_point():  # not where it is indices
                    activation = activation.to(gradient.dtype)
                state["receive"](site, activation, gradient)

            tapped: Tensor = Tap.apply(output, anchor, activation, hand_over)  # type: ignore[no-untyped-call]
            return tapped

        with self._eager(self._outside()), hooked(self._by_module, tap), self._frozen_inside():
            values = self.outputs(batch)
            self._require_one_each(values, size)
            if not values.requires_grad:
                return values
            shapes = (size, *calls)
            folded = any(rows != 1 for _, rows, _, _ in calls)
            unproven = size > 1 and (folded or shapes not in self._met or picks_rows(values))
            unproven = self._anywhere(unproven)
            weights = example_weights(size, values)
            if unproven:
                torch.autograd.grad(values, anchor, weights, retain_graph=True, allow_unused=True)
            self._finish(values, anchor, state, receive)
            if unproven:
                self._require_owned(norms, weights, calls)
                self._met.add(shapes)
        return values.detach()

    def _finish(self, values: Tensor, anchor: Tensor, state: dict[str, Receive | None], receive: Receive) -> None:
        """The backward pass in which layers are received; parameters must not get gradients in it."""
        outside = self._outside()
        state["receive"] = receive
        _, *gradients = torch.autograd.grad(values.sum(), [anchor, *outside], allow_unused=True)
        used = [
            name
            for name, gradient in zip(self.parameters, gradients, strict=False)
            if gradient is not None and (gradient.to_dense() if gradient.is_sparse else gradient).any()
        ]
        if used:
            raise EngineError(
                f"{', '.join(used[:3])}{', ...' if len(used) > 3 else ''} is also used outside its layer's forward,"
                " where hooks do not see it",
                used,
            )

    def _require_owned(
        self,
        norms: dict[tuple[int, str], Tensor],
        weights: Tensor,
        calls: list[tuple[str, int, torch.Size, torch.Size]],
    ) -> None:
        parameter = next(iter(self.parameters.values()))
        tolerance = max(1e-6, min(0.05, 2**10 * rounding_of(self.autocast or parameter.dtype, parameter.device)))
        for number, (path, _, _, shape) in enumerate(calls):
            if (number, "plain") not in norms:
                continue
            if misplaced(norms[number, "plain"], norms[number, "weighted"], weights) > tolerance:
                raise EngineError(
                    f"rows of the output of {path}, of shape {tuple(shape)}, do not belong to the {len(weights)}"
                    " examples of the batch in equal parts and in their order",
                    [name for site in self._sites if site.path == path for name in site.parameters.values()],
                )

    def _anywhere(self, needed: bool) -> bool:
        """Whether a backward pass is needed by anyone who has to take part in it."""
        return needed

    def _layout(self, batch: ExampleBatch) -> tuple[dict[nn.Module, Spread], dict[nn.Module, str]]:
        """Which modules share outputs in batches of these shapes, and which cannot be hooked."""
        if batch.size < 2:
            return {}, {}  # of a single example, everything belongs to that example
        shapes = self._shapes(batch)
        if shapes not in self._layouts:
            with self._eager():
                self._layouts[shapes] = find_shared(
                    list(self._by_module), lambda count: self.outputs(batch.take(slice(0, count)))
                )
        return self._layouts[shapes]

    def _shapes(self, batch: ExampleBatch) -> Shapes:
        """What a layout is valid for."""
        return batch.shapes()

    def _outside(self) -> list[nn.Parameter]:
        """Parameters that are differentiated wherever a layer's own forward does not use them."""
        return list(self.parameters.values())

    @contextmanager
    def _frozen_inside(self) -> Iterator[None]:
        """Freeze a layer's parameters while its own forward runs."""

        def freeze(module: nn.Module, args: Any) -> None:
            del args
            for name in self._by_module[module].parameters.values():
                self.parameters[name].requires_grad_(False)

        def thaw(module: nn.Module, args: Any, output: Any) -> None:
            del args, output
            for name in self._by_module[module].parameters.values():
                self.parameters[name].requires_grad_(True)

        with ExitStack() as stack:
            for module in self._by_module:
                stack.callback(module.register_forward_pre_hook(freeze).remove)
                stack.callback(module.register_forward_hook(thaw, always_call=True).remove)
            yield

    @contextmanager
    def _eager(self, parameters: Iterable[nn.Parameter] = ()) -> Iterator[None]:
        """Only some parameters are differentiated by themselves, and no fused or compiled code skips the hooks."""
        with ExitStack() as stack:
            stack.enter_context(self._differentiating(parameters))
            stack.enter_context(torch.enable_grad())
            if is_compiled(self.module):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield

    @contextmanager
    def _differentiating(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        with differentiating(self.module, parameters):
            yield


def rounding_of(dtype: torch.dtype, device: torch.device) -> float:
    """Relative rounding error of products in this dtype; on accelerators, float32 may be computed as TF32."""
    if dtype == torch.float32 and device.type != "cpu":
        return 2**-10
    return torch.finfo(dtype).eps
