"""Trial forward passes before many others: they read the copy only, and their result is the same each time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_trak.gradients.leaves import apart_from
from lightning_trak.outputs.evaluating import exact_attention, unchanged
from lightning_trak.running.random_states import isolated_random_states

_TRIES = 8  # for an output that draws random numbers, since a draw may leave it unchanged by chance


@contextmanager
def trying(original: nn.Module, copied: nn.Module) -> Iterator[None]:
    """For trial forward passes: they change nothing, and they may read only the copy's tensors.

    Args:
        original: the user's module.
        copied: the copy that runs.

    Raises:
        ValueError: if a parameter or buffer of the original is read.
    """
    with isolated_random_states(), unchanged(copied), exact_attention(), apart_from(original, copied):
        yield


def require_repeatable(run: Callable[[], Tensor], what: str, first: Tensor | None = None) -> None:
    """Check that a function returns the same each time. If it draws random numbers, it is called several times.

    Args:
        run: the function.
        what: the name of its result in errors.
        first: an earlier result; default: the function is called once more.

    Raises:
        ValueError: if a result differs by more than rounding.
    """
    first = run() if first is None else first
    allowed = max(1e-4, 8 * torch.finfo(first.dtype).eps) if first.is_floating_point() else 0.0
    for _ in range(_TRIES):
        before = _random_states()
        again = run()
        same = again.shape == first.shape
        drawn = any(not torch.equal(old, new) for old, new in zip(before, _random_states(), strict=True))
        if not same or torch.dist(again.double(), first.double()) > allowed * first.double().norm():
            if not drawn:
                raise ValueError(
                    f"{what} changes from one forward pass to the next, although no random numbers were drawn. Perhaps"
                    " a forward pass changes weights, buffers or other state in place; it must not change the module"
                )
            raise ValueError(
                f"{what} is random in eval mode: it changes each time. Draw random numbers from a generator with a"
                " fixed seed, or leave the noise out in eval mode (F.dropout has training=True by default: pass"
                " training=self.training)"
            )
        if not drawn:
            return


def _random_states() -> list[Tensor]:
    states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *states]
