"""Notices that a hook or a callback changes weights between two steps, which a repeated run would not do."""

from collections.abc import Mapping

import torch
from torch import Tensor


class BetweenSteps:
    """Compares sums of the weights after the first step with those before the second one."""

    def __init__(self) -> None:
        self._ended: list[Tensor] | None = None
        self._compared = False

    def end(self, parameters: Mapping[str, Tensor]) -> None:
        """A step has ended, and hooks that come later have not run yet."""
        if self._ended is None:
            self._ended = _sums(parameters)

    def begin(self, parameters: Mapping[str, Tensor]) -> None:
        """A batch begins.

        Raises:
            ValueError: if the weights have changed since the first step.
        """
        if self._ended is None or self._compared:
            return
        self._compared = True
        for name, before, now in zip(parameters, self._ended, _sums(parameters), strict=True):
            if not torch.equal(before.nan_to_num(), now.nan_to_num()):
                raise ValueError(
                    f'TrainingRecorder cannot record this run: the parameter "{name}" has changed between two steps.'
                    " Perhaps a hook such as on_train_batch_end or another callback puts an average of weights there."
                    " A repeated run would not do that, and its derivative is not known: train without, or keep the"
                    " average outside of the module. Methods that need no recording, such as TRAK, take such runs"
                )


def _sums(parameters: Mapping[str, Tensor]) -> list[Tensor]:
    """Two numbers for each tensor, which almost every change changes."""
    with torch.no_grad():
        return [torch.stack([parameter.sum(), parameter.norm()]) for parameter in parameters.values()]
