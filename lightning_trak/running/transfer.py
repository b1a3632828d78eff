"""Copies between host and CUDA device beside the computation. On other devices they are plain copies."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

T = TypeVar("T")


@functools.cache
def _download_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class HostCopy(NamedTuple):
    """Tensors that are on their way to the host.

    Attributes:
        tensors: the copies, whose content must not be read before :meth:`wait`.
        arrived: is reached when they are there; None if they are already.
    """

    tensors: tuple[Tensor, ...]
    arrived: torch.cuda.Event | None

    @classmethod
    def start(cls, tensors: tuple[Tensor, ...]) -> "HostCopy":
        """Copy tensors of one device to the host, after the computation at hand and beside the next one."""
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
        """The tensors, once they are there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tensors


class Upload:
    """Moves batches to a device on a stream of its own, so that one is copied while another is computed.

    That takes pinned memory (``DataLoader(pin_memory=True)``); from other memory the host waits, though the device does
    not.

    Args:
        device: where to.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(self, move: Callable[[], Any]) -> Any:
        """Call ``move``, and make its result safe to use on the current stream.

        Args:
            move: copies a batch to the device.
        """
        if self._stream is None:
            return move()
        with torch.cuda.stream(self._stream):
            batch = move()
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        # The allocator must not give a tensor's memory away before the stream that uses it is done.
        apply_to_collection(batch, Tensor, lambda tensor: tensor.record_stream(current) if tensor.is_cuda else None)
        return batch


def ahead(items: Iterable[T]) -> Iterator[T]:
    """Yield the items. A thread gets the next one while one is in use."""
    iterator = iter(items)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(lambda: list(itertools.islice(iterator, 1)))
        while found := coming.result():
            coming = thread.submit(lambda: list(itertools.islice(iterator, 1)))
            yield found[0]
