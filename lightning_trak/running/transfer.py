"""Copies to and from a CUDA device, and work on it, that overlap with computation. On other devices they do not."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_trak.running.threads import compute_threads

T = TypeVar("T")


@functools.cache
def _download_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class HostCopy(NamedTuple):
    """Tensors that are being copied to the host.

    Attributes:
        tensors: the copies. Their content must not be read before :meth:`wait`.
        arrived: the event at which the copies are complete; None if they are complete already.
    """

    tensors: tuple[Tensor, ...]
    arrived: torch.cuda.Event | None

    @classmethod
    def start(cls, tensors: tuple[Tensor, ...]) -> "HostCopy":
        """Start to copy tensors of one device to the host, after the work queued so far and beside later work."""
        device = tensors[0].device
        if device.type != "cuda":
            return cls(tuple(tensor.cpu() for tensor in tensors), None)
        stream = _download_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            copies = tuple(tensor.to("cpu", non_blocking=True) for tensor in tensors)  # to pinned memory
        for tensor in tensors:
            tensor.record_stream(stream)
        return cls(copies, stream.record_event())

    def wait(self) -> tuple[Tensor, ...]:
        """Wait for the copies, and return them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tensors


class Waiting(NamedTuple):
    """Tensors on a CUDA device that another thread is to work on, beside later work of this one.

    Attributes:
        tensors: the tensors.
        ready: the event at which they are computed.
    """

    tensors: tuple[Tensor, ...]
    ready: torch.cuda.Event

    @classmethod
    def of(cls, tensors: tuple[Tensor, ...]) -> "Waiting":
        """Tensors of one device, after the work queued so far."""
        return cls(tensors, torch.cuda.current_stream(tensors[0].device).record_event())

    def wait(self) -> tuple[Tensor, ...]:
        """Let the work that this thread queues next begin when the tensors are there, and return them."""
        torch.cuda.current_stream(self.tensors[0].device).wait_event(self.ready)
        return self.tensors


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """Let a thread's work on a CUDA device run beside that of others, and wait for it at the end."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


class Upload:
    """Moves batches to a device on a separate stream, so that one batch is copied while another is computed.

    This needs pinned memory (``DataLoader(pin_memory=True)``). With other memory the host waits for the copy, but the
    device does not.

    Args:
        device: the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(self, move: Callable[[], Any]) -> Any:
        """Call ``move``, and make its result safe to use on the current stream.

        Args:
            move: copies a batch to the device and returns it.
        """
        if self._stream is None:
            return move()
        with torch.cuda.stream(self._stream):
            batch = move()
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        # The allocator must not reuse a tensor's memory before the stream that uses the tensor has finished.
        apply_to_collection(batch, Tensor, lambda tensor: tensor.record_stream(current) if tensor.is_cuda else None)
        return batch


def ahead(items: Iterable[T]) -> Iterator[T]:
    """Yield the items. While one is in use, a thread fetches the next."""
    iterator = iter(items)
    with compute_threads(1) as thread:
        coming = thread.submit(lambda: list(itertools.islice(iterator, 1)))
        while found := coming.result():
            coming = thread.submit(lambda: list(itertools.islice(iterator, 1)))
            yield found[0]
