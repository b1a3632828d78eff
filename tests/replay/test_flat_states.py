"""Full states as a few long tensors: they come back with the same bits."""

import json

import pytest
import torch

from lightning_trak.replay.recording.flat_states import FlatState, pack_states, unpack_state
from lightning_trak.replay.recording.states import TrainingState, difference


def state(seed, dtype=torch.float32, moments=True):
    torch.manual_seed(seed)
    weights = {"a": torch.randn(2, 3, dtype=dtype), "a/b": torch.randn(3, 4, dtype=dtype).T, "none": torch.zeros(0, 2)}
    kept = {"a": {"exp_avg": torch.randn(2, 3, dtype=dtype), "step": torch.tensor(float(seed))}}
    buffers = {"count": torch.tensor(seed), "mask": torch.rand(5) > 0.5, "half": torch.randn(3).bfloat16()}
    return TrainingState(weights, buffers, kept if moments else {})


def back(states):
    tensors, tables = pack_states(states)
    layouts = json.loads(json.dumps(tables))["layouts"]
    return [unpack_state(step, tensors, layouts) for step in states], layouts


def test_states_come_back_with_the_same_bits():
    states = {0: state(0, moments=False), 1: state(1), 4: state(4), 14: state(14)}
    found, layouts = back({step: FlatState.of(one) for step, one in states.items()})
    assert len(layouts) == 2
    for one, (step, expected) in zip(found, states.items(), strict=True):
        assert difference(one, expected).identical
        names = dict(expected.tensors())
        assert all(tensor.dtype == names[name].dtype for name, tensor in one.tensors()), step


def test_a_copy_does_not_follow_the_state():
    one = state(0)
    copy = FlatState.of(one)
    one.parameters["a"].zero_()
    ((found,), _) = back({0: copy})
    assert difference(found, state(0)).identical


@pytest.mark.parametrize(
    ("spare", "used"),
    [(state(1), True), (state(1, torch.float64), False), (state(1, moments=False), False)],
    ids=["alike", "another dtype", "other tensors"],
)
def test_spare_memory_is_used_if_it_fits(spare, used):
    memory = FlatState.of(spare)
    copy = FlatState.of(state(2), memory)
    assert (copy is memory) == used
    ((found,), _) = back({0: copy})
    assert difference(found, state(2)).identical
