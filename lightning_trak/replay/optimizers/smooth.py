"""AdamW with a smoother step, for runs that are to be differentiated."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, ParamsT

from lightning_trak.replay.optimizers.adam import AdamWStep


class SmoothAdamW(Optimizer):
    """AdamW whose step is m / (sqrt(v + eps_root) + eps).

    The derivative of Adam's step by a small gradient is about 1 / (sqrt(v) + eps), which is huge where v is small, so
    that weights of examples cannot be followed through it. ``eps_root`` bounds it (Engstrom et al. 2025,
    arXiv 2503.13751). torch's AdamW has no such setting.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root.
        eps_root: added to v, the mean square of the gradient, inside the root. Good values lie near the v of typical
            weights.
        weight_decay: decoupled weight decay.

    Raises:
        ValueError: if a setting is negative.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 1)
        >>> optimizer = SmoothAdamW(net.parameters(), lr=1e-3, eps_root=1e-8)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_root: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        for name, value in {"lr": lr, "eps": eps, "eps_root": eps_root, "weight_decay": weight_decay}.items():
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be at least 0 and less than 1, got {betas}")
        settings = {"lr": lr, "betas": betas, "eps": eps, "eps_root": eps_root, "weight_decay": weight_decay}
        super().__init__(params, settings | {"amsgrad": False, "maximize": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step.

        Args:
            closure: computes the loss and the gradients.

        Returns:
            The loss, if there is a closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    kept = self.state[parameter]
                    after, moments = _STEP.update(parameter, parameter.grad, kept, group)
                    parameter.copy_(after)
                    count = kept["step"] + 1 if kept else torch.tensor(1.0)
                    kept.update(moments, step=count)
        return loss


class SmoothAdamWStep(AdamWStep, optimizer=SmoothAdamW):
    """The step of :class:`SmoothAdamW`."""


_STEP = SmoothAdamWStep()
