"""Collate functions that change the order of examples are found, and others are not."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_trak.methods import Metagradient
from lightning_trak.running.data.ordering import require_order
from tests.callback_nets import make_trainer
from tests.replay.runs import Net, make_data, train

DATA = make_data()


def by_length(items):
    """Sorts longer batches, as for packed sequences."""
    return default_collate(sorted(items, key=lambda item: float(item[0][0])) if len(items) > 2 else items)


def centred(items):
    inputs, *rest = default_collate(items)
    return [inputs - inputs.mean(0), *rest]


def labels_last(items):
    """Changes the order of the inputs' padding, which shows nothing, and of the labels, which does."""
    inputs, labels, _ = default_collate(items)
    return {"inputs": torch.nn.functional.pad(inputs, (0, len(items))), "labels": labels.flip(0)}


@pytest.mark.parametrize("collate", [by_length, lambda items: default_collate(items[::-1]), labels_last])
def test_other_orders_are_found(collate):
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"collate function of the targets changes the order .* keep the order"):
        require_order(DataLoader(DATA, batch_size=4, collate_fn=collate), "the targets")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "collate", [default_collate, centred, lambda items: {"x": items, "n": torch.tensor(len(items))}]
)
@pytest.mark.parametrize("batch_size", [1, 4, 40])
def test_the_same_order_passes(collate, batch_size):
    require_order(DataLoader(DATA, batch_size=batch_size, shuffle=True, collate_fn=collate), "the targets")
    alike = TensorDataset(torch.ones(5, 2), torch.arange(5))
    require_order(DataLoader(alike, batch_size=3), "the targets")


@pytest.mark.parametrize("order", ["recorded", "average"])
def test_metagradients_need_the_order(order, tmp_path):
    def loader(data):
        return DataLoader(data, batch_size=4, shuffle=True, collate_fn=by_length)

    train(Net(), DATA, tmp_path / "run", loader=loader)
    method = Metagradient(Net(), tmp_path / "run", order=order, check_smooth=False, progress_bar=False)
    with pytest.raises(ValueError, match="collate function of the training data changes the order"):
        method.attribute(make_trainer(precision="64-true"), loader(DATA), make_data(3, seed=5))
