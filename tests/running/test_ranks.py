"""Sums over ranks, with a process group that only doubles what it is given."""

import pytest
import torch
import torch.distributed as dist

from lightning_trak.running.ranks import Ranks


@pytest.mark.parametrize("shape", [(), (3, 0), (7,), (5, 6)])
def test_nccl_sums_what_lies_on_the_host_in_bounded_parts(monkeypatch, shape):
    sizes = []
    monkeypatch.setattr("lightning_trak.running.ranks._SUM_BYTES", 4 * 8)  # bytes: four numbers at a time
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: sizes.append(tensor.numel()) or tensor.mul_(2))
    monkeypatch.setattr(torch.Tensor, "cuda", torch.Tensor.clone)
    values = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tensor = values.clone()
    assert Ranks(0, 2).sum(tensor) is tensor
    assert torch.equal(tensor, 2 * values)
    assert max(sizes) <= 4
    assert sum(sizes) == values.numel()


def test_ranks_with_other_weights_are_refused(monkeypatch):
    def gather(found, value):
        found[:] = ["one", "one", value]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    Ranks(0, 3).require_same_weights("one")
    with pytest.raises(ValueError, match=r"the model has other weights on rank 2 than on rank 0.*seed_everything"):
        Ranks(2, 3).require_same_weights("two")
    Ranks().require_same_weights("alone")
