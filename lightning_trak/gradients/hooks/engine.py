"""Per-example gradients of a whole batch from one backward pass over the layers' inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_trak.compatibility import is_compiled
from lightning_trak.gradients.base import EngineError, GradientEngine, differentiating
from lightning_trak.gradients.batch import ExampleBatch
from lightning_trak.gradients.hooks.capture import attached
from lightning_trak.gradients.hooks.channels_last import channels_last, reordered
from lightning_trak.gradients.hooks.hooked_pass import HookedPass, Receive, Signature
from lightning_trak.gradients.hooks.layers import LayerCall
from lightning_trak.gradients.hooks.ownership import example_weights, picks_rows
from lightning_trak.gradients.hooks.projector import LayerProjector
from lightning_trak.gradients.hooks.shared_outputs import Expansion, SharedOutputs, find_shared_outputs
from lightning_trak.gradients.hooks.sketch import Sketches
from lightning_trak.gradients.hooks.tracked_module import TrackedModule, coverage_report, find_tracked_modules
from lightning_trak.outputs import ModelOutput
from lightning_trak.outputs.base import close
from lightning_trak.projections.base import BoundProjection
from lightning_trak.texts.messages import listed

Shapes = tuple[Any, ...]


class HookEngine(GradientEngine):
    """Gradients by forward hooks on the layers: the input times the gradient of the output, layer by layer.

    All parameters are frozen inside their layers, so the backward pass computes gradients of activations only. A
    layer's gradient is used as soon as the backward pass reaches the layer. So :meth:`project` holds the gradients of
    one parameter at a time, for a few examples, or those of several small parameters.

    Three mistakes would give wrong gradients that look right. Each of them is checked:

    - A parameter may be used outside its layer's own forward, where hooks do not see it. Outside the layers, parameters
      are differentiated as usual. If a parameter gets a gradient there, the engine raises an error.
    - A row of a layer's output may belong to another example than the hooks assume. A second backward pass shows this:
      it gives the examples different weights (:func:`~lightning_trak.gradients.hooks.ownership.misplaced`). It runs for
      every new combination of the layers' calls and shapes. In two cases, it runs for every batch, since rows may
      belong to other examples each time: a layer has several rows for an example, or the model picks rows by values.
    - A layer class may be wrong. :meth:`check` compares its gradients with those of autograd.

    Args:
        module: the model.
        output: the scalar output that is differentiated.
        names: canonical parameter name -> name in ``module``. Only these parameters are differentiated.
        autocast: the dtype of autocast in forward passes, as with mixed precision. A layer's gradient is computed in
            the precision of its output, as in autograd.

    Raises:
        EngineError: if no layer class covers a parameter's module, see :meth:`uncovered`.
    """

    def __init__(
        self, module: nn.Module, output: ModelOutput, names: dict[str, str], autocast: torch.dtype | None = None
    ) -> None:
        super().__init__(module, output, names, autocast)
        tracked, left_out = find_tracked_modules(module, names)
        if left_out:
            sizes = {name: parameter.numel() for name, parameter in self.parameters.items()}
            raise EngineError(f"{coverage_report(left_out, sizes)}; or use MixedEngine")
        self._tracked = {each.module: each for each in tracked}
        self._shared: dict[Shapes, SharedOutputs] = {}
        self._proven: set[tuple[int, tuple[Signature, ...]]] = set()
        self._proofs = 0
        self._reordered = reordered(module)

    @staticmethod
    def uncovered(module: nn.Module, names: dict[str, str]) -> dict[str, str]:
        """The canonical names of parameters that hooks cannot differentiate, each with the reason.

        Args:
            module: the model.
            names: canonical parameter name -> name in ``module``.
        """
        return find_tracked_modules(module, names)[1]

    def __call__(self, batch: ExampleBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Differentiate all examples in one forward and backward pass, see :meth:`GradientEngine.__call__`."""
        rows: dict[str, Tensor] = {}

        def collect(tracked: TrackedModule, call: LayerCall) -> None:
            for attribute, name in tracked.parameters.items():
                part = tracked.layer.gradient(attribute, call).reshape(batch.size, -1)
                rows[name] = rows[name] + part if name in rows else part

        values = self.backward(batch, collect)
        return values, {
            name: rows[name] if name in rows else values.new_zeros(batch.size, parameter.numel(), dtype=parameter.dtype)
            for name, parameter in self.parameters.items()
        }

    def project(self, batch: ExampleBatch, projection: BoundProjection, features: Tensor) -> Tensor:
        """Project a layer's gradients when the backward pass reaches it, see :meth:`GradientEngine.project`."""
        projector = LayerProjector(projection, features, self.parameters)
        values = self.backward(batch, projector)
        projector.flush()
        return values

    def check(self, batch: ExampleBatch, tolerance: float = 1e-3) -> dict[str, str]:
        """Compare the gradients of the first two examples with those of autograd.

        Hooks and autograd use the same batch of two. For one example alone, kernels round differently. At a rectifier
        near zero, or at a maximum of nearly equal numbers, this would give another gradient.

        Args:
            batch: the examples.
            tolerance: the largest relative error in the norm of a parameter's gradients. It is at least 8 rounding
                errors of their dtype. Gradients below 1e-5 of the whole gradient's norm count as rounding noise.

        Returns:
            The parameters for which hooks are wrong, each with the reason; empty if hooks are right.
        """
        batch = batch.take(slice(0, 2))
        wrong = {
            name: f"{self._tracked[module].path}: {reason}"
            for module, reason in self._shared_outputs(batch).refused.items()
            for name in self._tracked[module].parameters.values()
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
        allowed = max(tolerance, 8 * self._rounding_error)
        noise = 1e-5 * sum(norm**2 for norm in norms.values()) ** 0.5
        for name, (rows, expected) in pairs.items():
            error = float((rows - expected).norm())
            if error > allowed * norms[name] + noise:
                wrong[name] = (
                    f"hooks give it a gradient that is off by {error:.3g}, and autograd's has norm {norms[name]:.3g}:"
                    " it is also used outside its module's forward, or examples are not in the first dimension"
                )
        return wrong

    def _pairs(self, batch: ExampleBatch) -> dict[str, tuple[Tensor, Tensor]]:
        """Sketches of the gradients by hooks, and by autograd with a backward pass for each example.

        The whole gradients of several examples may not fit in memory.
        """
        sketches = Sketches({name: parameter.shape for name, parameter in self.parameters.items()}, self.device)
        found, expected = torch.zeros(2, batch.size, sketches.dim, dtype=torch.float64, device=self.device)
        self.project(batch, sketches, found)
        with channels_last(self._reordered):  # otherwise, rounding could differ at a kink
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

    def backward(self, batch: ExampleBatch, receive: Receive) -> Tensor:
        """Run the model forward and backward, and pass each call of a tracked module to ``receive``.

        Args:
            batch: the examples.
            receive: called with the module and its call when the backward pass reaches this call.

        Returns:
            The outputs, shape ``(size,)``.

        Raises:
            EngineError: if hooks would give a wrong gradient.
        """
        expansions = self._expansions(batch)
        if self._reordered and batch.size > 1:
            hooks = HookedPass(self._tracked, batch.size, expansions, receive)
            try:
                with channels_last(self._reordered):
                    return self._run(batch, hooks)
            except RuntimeError:
                if hooks.has_received:
                    raise
            # The model may depend on the order in memory. If it does not, it raises the same error again.
        values = self._run(batch, HookedPass(self._tracked, batch.size, expansions, receive))
        if batch.size > 1:
            self._reordered = []
        return values

    def _run(self, batch: ExampleBatch, hooks: HookedPass) -> Tensor:
        outside = self._outside_parameters()
        with self._eager(outside), attached(self._tracked, hooks.on_forward), self._frozen_inside():
            values = self.outputs(batch)
            self._require_one_each(values, batch.size)
            if not values.requires_grad:
                return values
            signatures = batch.size, hooks.signatures
            unproven = self._on_any_rank(self._unproven(values, *signatures))
            if unproven:
                weights = example_weights(batch.size, values, self.precision, self._proofs)
                hooks.backward_weighted(values, weights)
            self._require_unused_outside(hooks.backward(values, outside))
            if unproven:
                hooks.require_owned(weights, self._ownership_tolerance)
                self._proofs += 1
                self._proven.add(signatures)
        return values.detach()

    def _unproven(self, values: Tensor, size: int, signatures: tuple[Signature, ...]) -> bool:
        """Whether a second backward pass must check which examples rows belong to."""
        if size == 1:
            return False
        several_rows = any(rows != 1 for _, rows, _, _ in signatures)
        return several_rows or (size, signatures) not in self._proven or picks_rows(values)

    @property
    def _ownership_tolerance(self) -> float:
        return max(1e-6, min(0.05, 2**10 * self._rounding_error))

    @property
    def _rounding_error(self) -> float:
        """The relative rounding error of products in a forward pass. Accelerators may compute float32 as TF32."""
        if self.precision == torch.float32 and self.device.type != "cpu":
            return 2**-10
        return torch.finfo(self.precision).eps

    def _require_unused_outside(self, gradients: Iterable[Tensor | None]) -> None:
        """Check that parameters get no gradients outside their layers. Inside, they are frozen."""
        used = [
            name
            for name, gradient in zip(self.parameters, gradients, strict=False)
            if gradient is not None and (gradient.to_dense() if gradient.is_sparse else gradient).any()
        ]
        if used:
            raise EngineError(
                f"{listed(used)} is also used outside its layer's forward, where hooks do not see it",
                used,
            )

    def _on_any_rank(self, needed: bool) -> bool:
        """Whether a rank needs one more backward pass; with FSDP2, all ranks must then take part in it."""
        return needed

    def _expansions(self, batch: ExampleBatch) -> dict[nn.Module, Expansion]:
        """How to expand the outputs that all examples share.

        Raises:
            EngineError: if a module's output cannot be split into examples.
        """
        expansions, refused = self._shared_outputs(batch)
        if refused:
            module, reason = next(iter(refused.items()))
            tracked = self._tracked[module]
            raise EngineError(
                f"hooks cannot tell the examples apart in {tracked.description}: {reason}",
                list(tracked.parameters.values()),
            )
        return expansions

    def _shared_outputs(self, batch: ExampleBatch) -> SharedOutputs:
        """Which modules have outputs that all examples share, and which cannot have hooks, in a batch like this."""
        if batch.size < 2:
            return SharedOutputs({}, {})  # with one example, every row belongs to it
        shapes = self._shapes(batch)
        if shapes not in self._shared:
            with self._eager():
                self._shared[shapes], outputs = find_shared_outputs(
                    list(self._tracked), lambda count: self.outputs(batch.take(slice(0, count)))
                )
                if self._reordered and not self._same_reordered(batch.take(slice(0, 2)), outputs):
                    self._reordered = []
        return self._shared[shapes]

    def _same_reordered(self, batch: ExampleBatch, expected: Tensor) -> bool:
        """Whether the model gives these outputs also in the other order in memory.

        It does not if its code reads memory by strides of its own, such as ``Tensor.as_strided``.
        """
        try:
            with torch.no_grad(), channels_last(self._reordered):
                found = self.outputs(batch)
        except RuntimeError:
            return False
        return close(found, expected, self._ownership_tolerance)

    def _shapes(self, batch: ExampleBatch) -> Shapes:
        """A key for batches with the same shared outputs, which are found out on two examples."""
        return batch.take(slice(0, 2)).shapes()

    def _outside_parameters(self) -> list[nn.Parameter]:
        """Parameters that are differentiated as usual outside their layer's own forward."""
        return list(self.parameters.values())

    @contextmanager
    def _frozen_inside(self) -> Iterator[None]:
        """Freeze a layer's parameters while its own forward runs."""
        with ExitStack() as stack:
            for module in self._tracked:
                stack.callback(module.register_forward_pre_hook(self._freeze).remove)
                stack.callback(module.register_forward_hook(self._thaw, always_call=True).remove)
            yield

    def _freeze(self, module: nn.Module, args: Any) -> None:
        self._require_grad(module, False)

    def _thaw(self, module: nn.Module, args: Any, output: Any) -> None:
        self._require_grad(module, True)

    def _require_grad(self, module: nn.Module, requires: bool) -> None:
        for name in self._tracked[module].parameters.values():
            self.parameters[name].requires_grad_(requires)

    @contextmanager
    def _eager(self, parameters: Iterable[nn.Parameter] = ()) -> Iterator[None]:
        """Let only these parameters require gradients, and turn off compiled code, since it could skip the hooks."""
        with (
            self._differentiating(parameters),
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager") if is_compiled(self.module) else nullcontext(),
        ):
            yield

    def _differentiating(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        return differentiating(self.module, parameters)
