"""Other batches than graphs that cannot be taken apart: the examples in another dimension, or in one flat tensor."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader

from lightning_trak.methods import GradientDot
from lightning_trak.outputs import ModelOutput
from lightning_trak.projections import IdentityProjection
from tests.lit import make_trainer, open_store

LENGTHS = [1, 3, 2, 5, 4, 2, 1]  # a flat batch of the first example, or of the last, looks like one with rows
TEXTS = [torch.randn(n, 4, generator=torch.Generator().manual_seed(i)) for i, n in enumerate(LENGTHS)]
EQUAL = [torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) for i in range(7)]


class Means(ModelOutput):
    """The mean of a layer over the steps of each example."""

    def __init__(self, examples):
        self.examples = examples

    def output(self, module, batch):
        return torch.stack([module(steps).mean() for steps in self.examples(batch)])

    def loss(self, output):
        return F.softplus(-output)


def flat(items):
    return {"steps": torch.cat(items), "lengths": torch.tensor([len(item) for item in items])}


def of_flat(batch):
    return batch["steps"].split(batch["lengths"].tolist())


def of_packed(batch):
    steps, lengths = nn.utils.rnn.pad_packed_sequence(batch, batch_first=True)
    return [row[:length] for row, length in zip(steps, lengths, strict=True)]


KINDS = {
    "flat": (TEXTS, flat, of_flat),
    "packed": (TEXTS, lambda items: pack_sequence(items, enforce_sorted=False), of_packed),
    "nested": (TEXTS, torch.nested.nested_tensor, torch.Tensor.unbind),
    "time first": (EQUAL, lambda items: torch.stack(items, 1), lambda batch: batch.unbind(1)),
    "sparse": (EQUAL, lambda items: torch.stack(items).relu().to_sparse(), lambda batch: batch.to_dense().unbind()),
    "list": (TEXTS, list, list),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*nested tensors.*", "ignore:.*NestedTensor.*")
def test_gradients_are_those_of_autograd(kind, tmp_path):
    items, collate, examples = KINDS[kind]
    module, output = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)), Means(examples)
    method = GradientDot(module, store=tmp_path, output=output, projection=IdentityProjection(), dtype="float32")
    method.featurize(make_trainer(), DataLoader(items, batch_size=3, collate_fn=collate))
    store = open_store(method)
    found = torch.cat([store.read(0, shard).features for shard in range(store.num_shards)])
    expected = []
    for item in items:
        gradients = torch.autograd.grad(output.output(module, collate([item]))[0], list(module.parameters()))
        expected.append(torch.cat([gradient.flatten() for gradient in gradients]))
    torch.testing.assert_close(found, torch.stack(expected))
