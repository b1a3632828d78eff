"""Per-example gradients of whole batches from one backward pass, which never forms a weight's gradient itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_trak.gradients.base import GradientEngine, differentiating
from lightning_trak.gradients.batch import slice_batch
from lightning_trak.gradients.hooks.coverage import Site, coverage_report, find_sites
from lightning_trak.gradients.hooks.layout import find_shared, hooked, spread
from lightning_trak.gradients.hooks.projecting import Projecting
from lightning_trak.gradients.hooks.sketch import Sketches
from lightning_trak.gradients.hooks.tap import Tap
from lightning_trak.gradients.sharding import squared_norm
from lightning_trak.outputs import ModelOutput
from lightning_trak.precision import explained_bfloat16
from lightning_trak.projections.base import BoundProjection

Receive = Callable[[Site, Tensor, Tensor], None]


class HookEngine(GradientEngine):
    """Gradients by forward hooks on the layers: the input times the gradient of the output, layer by layer.

    All parameters are frozen while it runs, so the backward pass costs what the gradients of activations cost. Each
    layer is done with as soon as the pass has reached it: :meth:`project` holds a few examples of one parameter.

    Hooks see only what goes through a layer's own forward. A weight that is also used elsewhere, by ``F.linear`` say,
    gets an incomplete gradient: :meth:`check` finds out.

    Args:
        module: the model.
        output: the scalar output that is differentiated.
        names: canonical parameter name -> name in ``module``; only these are differentiated.
        autocast: what forward passes are autocast to, as by mixed precision. A layer's gradient is made in the
            precision of its output, as autograd does.

    Raises:
        ValueError: if a parameter's module is not covered, see :meth:`uncovered`.
    """

    def __init__(
        self, module: nn.Module, output: ModelOutput, names: dict[str, str], autocast: torch.dtype | None = None
    ) -> None:
        super().__init__(module, output, names)
        self.autocast = autocast
        self._sites, left_out = find_sites(module, names)
        if left_out:
            sizes = {name: parameter.numel() for name, parameter in self.parameters.items()}
            raise ValueError(coverage_report(left_out, sizes))
        self._by_module = {site.module: site for site in self._sites}
        self._shared: set[nn.Module] | None = None
        self._refused: dict[nn.Module, str] = {}

    @staticmethod
    def uncovered(module: nn.Module, names: dict[str, str]) -> dict[str, str]:
        """The parameters that hooks cannot differentiate, with the reasons, by canonical name.

        Args:
            module: the model.
            names: canonical parameter name -> name in ``module``.
        """
        return find_sites(module, names)[1]

    def __call__(self, batch: Any, size: int) -> tuple[Tensor, dict[str, Tensor]]:
        """All examples in one forward and backward pass.

        Raises:
            ValueError: if a layer's output does not hold the examples in its first dimension.
        """
        rows: dict[str, Tensor] = {}

        def collect(site: Site, activation: Tensor, gradient: Tensor) -> None:
            for attribute, name in site.parameters.items():
                part = getattr(site.layer, attribute)(site.module, activation, gradient, size).reshape(size, -1)
                rows[name] = rows[name] + part if name in rows else part

        values = self._backward(batch, size, collect)
        return values, {
            name: rows[name] if name in rows else values.new_zeros(size, parameter.numel(), dtype=parameter.dtype)
            for name, parameter in self.parameters.items()
        }

    def project(self, batch: Any, size: int, projection: BoundProjection, features: Tensor) -> Tensor:
        """Project each layer's gradients as the backward pass reaches it: see :meth:`GradientEngine.project`.

        Raises:
            ValueError: if a layer's output does not hold the examples in its first dimension.
        """
        return self._backward(batch, size, Projecting(projection, features, self.parameters))

    def check(self, batch: Any, size: int, tolerance: float = 1e-3) -> dict[str, str]:
        """Compare the gradients of the first two examples with those of autograd for each of the two outputs.

        Both go through the same batch: of one example alone, other kernels round otherwise, and a rectifier or maximum
        that is nearly tied then turns rounding into another gradient.

        Args:
            batch: a batch without inference tensors.
            size: its number of examples.
            tolerance: largest relative error, in the norm of a parameter's gradients; never less than a few roundings
                of their dtype. Gradients below 1e-5 of the whole are rounding noise.

        Returns:
            The parameters that hooks get wrong, with what is wrong; empty if all is well.
        """
        two = min(size, 2)
        batch = slice_batch(batch, size, 0, two)
        self._find_layout(batch, two)
        wrong = {
            name: f"{self._by_module[module].path}: {reason}"
            for module, reason in self._refused.items()
            for name in self._by_module[module].parameters.values()
        }
        names = {name: raw for name, raw in self.names.items() if name not in wrong}
        if not names:
            return wrong
        engine = type(self)(self.module, self.output, names, self.autocast) if wrong else self
        pairs = engine._pairs(batch, two)
        norms = {name: _norm(expected) for name, (_, expected) in pairs.items()}
        noise = 1e-5 * sum(norm**2 for norm in norms.values()) ** 0.5
        for name, (rows, expected) in pairs.items():
            error = _norm([row.double() - gradient.double() for row, gradient in zip(rows, expected, strict=True)])
            rounding = _rounding(self.autocast or self.parameters[name].dtype, self.parameters[name].device)
            if not error <= max(tolerance, 8 * rounding) * norms[name] + noise:
                wrong[name] = (
                    f"hooks give it a gradient that is off by {error:.3g} where autograd's has norm {norms[name]:.3g}:"
                    " it is also used outside its module's forward, or examples are not in the first dimension"
                )
        return wrong

    def _pairs(self, batch: Any, size: int) -> dict[str, tuple[Sequence[Tensor], Sequence[Tensor]]]:
        """The examples' gradients by hooks, and by autograd with a backward pass for each example.

        Sketches of them: the gradients of several examples may not fit in memory.
        """
        parameters = list(self.parameters.values())
        sketches = Sketches(
            {name: parameter.shape for name, parameter in self.parameters.items()}, parameters[0].device
        )
        found, expected = torch.zeros(2, size, sketches.dim, dtype=torch.float64, device=parameters[0].device)
        self.project(batch, size, sketches, found)
        with self._eager(), differentiating(self.module, parameters), torch.enable_grad():
            values = self._outputs(batch)
            for value, row in zip(values, expected.split(1), strict=True):
                gradients = torch.autograd.grad(
                    value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                for name, gradient in zip(self.parameters, gradients, strict=True):
                    sketches.add_(row, name, gradient.reshape(1, -1))
        return {name: (list(sketches.of(found, name)), list(sketches.of(expected, name))) for name in self.parameters}

    def _backward(self, batch: Any, size: int, receive: Receive) -> Tensor:
        """Run the model and let ``receive`` see each layer's input and output gradient; returns the outputs."""
        self._find_layout(batch, size)
        if self._refused:
            module, reason = next(iter(self._refused.items()))
            site = self._by_module[module]
            raise ValueError(
                f"hooks cannot tell the examples apart in {site.path} ({type(module).__name__}): {reason}; use"
                f" engine='functional', or vmap for {', '.join(site.parameters.values())} (MixedEngine)"
            )
        shared = self._shared or set()
        anchor = torch.zeros((), requires_grad=True)

        def tap(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            site = self._by_module[module]
            activation = (*args, *kwargs.values())[0]
            if module in shared:
                activation, output = spread(activation, size), spread(output, size).clone()
            elif len(output) % size:
                raise ValueError(
                    f"{site.path} ({type(module).__name__}) was called on {len(activation)} rows in a batch of"
                    f" {size} examples; expected a multiple: use engine='functional' or engine='loop'"
                )

            def hand_over(activation: Tensor, gradient: Tensor) -> None:
                if activation.is_floating_point():  # not where it is indices
                    activation = activation.to(gradient.dtype)
                receive(site, activation, gradient)

            tapped: Tensor = Tap.apply(output, anchor, activation, hand_over)  # type: ignore[no-untyped-call]
            return tapped

        with self._eager(), torch.enable_grad(), hooked(self._by_module, tap):
            values = self._outputs(batch)
            if values.shape != (size,):
                raise ValueError(
                    f"{type(self.output).__name__}.output returned shape {tuple(values.shape)} for a batch of {size}"
                    f" examples; expected ({size},): one scalar per example"
                )
            self._require_gradient(values)
            torch.autograd.grad(values.sum(), anchor, allow_unused=True)
        return values.detach()

    def _outputs(self, batch: Any) -> Tensor:
        if self.autocast is None:
            return self.output.output(self.module, batch)
        device = next(iter(self.parameters.values())).device.type
        with torch.autocast(device, self.autocast), explained_bfloat16(self.module):
            return self.output.output(self.module, batch)

    def _find_layout(self, batch: Any, size: int) -> None:
        """Once, when a batch is large enough to show it; of a single example, everything belongs to that example."""
        if self._shared is None and size > 1:
            with self._eager():
                self._shared, self._refused = find_shared(
                    list(self._by_module),
                    lambda count: self._outputs(slice_batch(batch, size, 0, count)),
                )

    def _frozen(self) -> AbstractContextManager[None]:
        return differentiating(self.module, ())

    @contextmanager
    def _eager(self) -> Iterator[None]:
        """Nothing is differentiated by itself, and no fused or compiled code skips the hooks."""
        fastpath = torch.backends.mha.get_fastpath_enabled()
        compiled = any("_orig_mod" in part._modules or part._compiled_call_impl for part in self.module.modules())
        with self._frozen():
            torch.backends.mha.set_fastpath_enabled(False)
            try:
                if compiled:
                    with torch.compiler.set_stance("force_eager"):
                        yield
                else:
                    yield
            finally:
                torch.backends.mha.set_fastpath_enabled(fastpath)


def _norm(gradients: Iterable[Tensor]) -> float:
    """Euclidean norm of several gradients as one."""
    return float(sum(squared_norm(gradient) for gradient in gradients) ** 0.5)


def _rounding(dtype: torch.dtype, device: torch.device) -> float:
    """Relative rounding error of products in this dtype; on accelerators, float32 may be computed as TF32."""
    if dtype == torch.float32 and device.type != "cpu":
        return 2**-10
    return torch.finfo(dtype).eps
