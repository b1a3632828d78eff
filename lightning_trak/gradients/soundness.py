"""What must hold of an output before many passes are spent on it: it is the copy's own, and the same each time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_trak.gradients.leaves import apart_from
from lightning_trak.outputs.evaluating import exact_attention, unchanged
from lightning_trak.running.random_states import isolated_random_states

_TRIES = 8  # of an output that draws random numbers: not every draw need change it


@contextmanager
def trying(original: nn.Module, copied: nn.Module) -> Iterator[None]:
    """For forward passes that only look: nothing stays behind, and what is read is the copy's own.

    Args:
        original: the user's module.
        copied: the copy that is worked on.

    Raises:
        ValueError: if a parameter or buffer of the original is read.
    """
    with isolated_random_states(), unchanged(copied), exact_attention(), apart_from(original, copied):
        yield


def require_repeatable(run: Callable[[], Tensor], what: str, first: Tensor | None = None) -> None:
    """Check that a function gives the same again, more than once if it draws random numbers.

    Args:
        run: the function.
        what: what it gives, for the error.
        first: what it gave before; default: it is called once more.

    Raises:
        ValueError: if it gives something else, and not by rounding alone.
    """
    first = run() if first is None else first
    allowed = max(1e-4, 8 * torch.finfo(first.dtype).eps) if first.is_floating_point() else 0.0
    for _ in range(_TRIES):
        before = _random_states()
        again = run()
        same = again.shape == first.shape
        drawn = any(not torch.equal(old, new) for old, new in zip(before, _random_states(), strict=True))
        if not same or _distance(again, first) > allowed * _norm(first):
            if not drawn:
                raise ValueError(
                    f"{what} is another one the second time, though no random numbers were drawn: does a forward pass"
                    " change weights, buffers or other state in place? It must leave the module as it was"
                )
            raise ValueError(
                f"{what} is random in eval mode: it is another one each time. Draw from a generator with a fixed seed,"
                " or leave the noise out when not training (F.dropout has training=True by default: pass"
                " training=self.training)"
            )
        if not drawn:
            return


def _random_states() -> list[Tensor]:
    states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *states]


def _distance(left: Tensor, right: Tensor) -> float:
    return _norm(left.double() - right.double())


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())
