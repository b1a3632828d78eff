"""Notices that a hook or a callback changes weights between two steps, which a repeated run would not do."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_trak.replay.recording.states import named_parameters


class BetweenSteps:
    """Compares sums of the weights after the first step, and the last one of each epoch, with those before the next.

    Attributes:
        changed: the name of a weight that has changed since the last step; None if none is known to have.
    """

    def __init__(self) -> None:
        self.changed: str | None = None
        self._ended: dict[str, Tensor] | None = None
        self._first = True

    def end(self, parameters: Mapping[str, Tensor], last: bool) -> None:
        """A step has ended, and hooks that come later have not run yet.

        Args:
            parameters: the weights.
            last: whether it is the last step of an epoch.
        """
        if self._first or last:
            self._ended, self._first = _sums(parameters), False

    def begin(self, module: nn.Module) -> None:
        """A batch begins, or training ends: note whether the module's weights have changed since :meth:`end`."""
        if self._ended is None:
            return
        now = _sums(named_parameters(module))
        for name, before in self._ended.items():
            if name not in now or not torch.equal(before.nan_to_num(), now[name].nan_to_num()):
                self.changed = self.changed or name
        self._ended = None

    def require_unchanged(self) -> None:
        """The optimizer takes another step.

        Raises:
            ValueError: if the weights have changed in between.
        """
        if self.changed:
            raise ValueError(
                f'TrainingRecorder cannot record this run: the parameter "{self.changed}" has changed between two'
                " steps. Perhaps a hook such as on_train_batch_end or another callback prunes it, or puts an average of"
                " weights there. A repeated run would not do that, and its derivative is not known: train without, or"
                " keep the average outside of the module. Methods that need no recording, such as TRAK, take such runs"
            )


def _sums(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Two numbers for each tensor, which almost every change changes."""
    with torch.no_grad():
        return {name: torch.stack([parameter.sum(), parameter.norm()]) for name, parameter in parameters.items()}
