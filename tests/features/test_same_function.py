"""A store is of what the model computes: resuming and scoring notice that it computes something else."""

from collections import OrderedDict, UserDict
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_trak import TRAK
from lightning_trak.features.store.examples import NotStorableError, pack, unpack
from lightning_trak.gradients.batch import ExampleBatch, find_layout
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.projections import SparseProjection
from tests.lit import TARGETS, TRAIN, LitNet, make_checkpoints, make_trainer, open_store
from tests.nested import Pair, Record, nested

SCALE = [1.0]  # a name that is no type


class Scaled(nn.Module):
    """Reads a file, which no fingerprint sees."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.first(x))) * torch.load(self.path)["scale"]


def make(path):
    torch.manual_seed(0)
    module = Scaled()
    module.path = str(path)
    return module


def trak(tmp_path, module):
    weights = [{name: (1 + c) * tensor for name, tensor in module.state_dict().items()} for c in range(2)]
    output = ClassificationMargin()
    return TRAK(module, weights, tmp_path / "store", output=output, projection=SparseProjection(32))


def test_another_function_is_noticed_when_scoring_and_resuming(tmp_path):
    path = tmp_path / "scale.pt"
    torch.save({"scale": torch.tensor(1.0)}, path)
    loader = DataLoader(TRAIN, batch_size=8)
    made = trak(tmp_path, make(path))
    made.featurize(make_trainer(), loader, shard_size=8)
    expected = made.score(make_trainer(), TARGETS)
    again = trak(tmp_path, make(path))
    assert torch.equal(again.score(make_trainer(), TARGETS), expected)
    torch.save({"scale": torch.tensor(1.1)}, path)
    with pytest.raises(
        ValueError, match=r"computed something else: the output of example 0 at checkpoint 0 .* in the store"
    ):
        again.score(make_trainer(), TARGETS)
    with pytest.raises(ValueError, match="computed something else"):
        make_trainer().predict(again.scorer(), DataLoader(TARGETS, batch_size=4))
    open_store(again, make_trainer())._shard_path(1, 3).unlink()
    with pytest.raises(ValueError, match=r"examples 0 to 1 now have other outputs at checkpoint 1"):
        again.featurize(make_trainer(), loader)
    torch.save({"scale": torch.tensor(1.0)}, path)
    again.featurize(make_trainer(), loader)
    assert torch.equal(again.score(make_trainer(), TARGETS), expected)


class Buffered(LitNet):
    """A buffer that no checkpoint holds."""

    def __init__(self, factor: float):
        super().__init__()
        self.scale.fill_(factor)


def test_buffers_that_no_checkpoint_gives_are_part_of_the_identity(tmp_path):
    checkpoints = make_checkpoints(1)
    options: dict[str, Any] = {"projection": SparseProjection(32)}
    TRAK(Buffered(1.5), checkpoints, tmp_path, **options).featurize(make_trainer(), TRAIN)
    TRAK(Buffered(1.5), checkpoints, tmp_path, **options).score(make_trainer(), TARGETS)
    words = r"at 1 checkpoint: 0, whose weights or buffers it does not have \(it has 1 other checkpoint\)"
    with pytest.raises(RuntimeError, match=words):
        TRAK(Buffered(2.0), checkpoints, tmp_path, **options).score(make_trainer(), TARGETS)


class Partial(LitNet):
    strict_loading = False


def test_base_weights_under_adapters_are_part_of_the_identity(tmp_path):
    adapters = [{name: tensor for name, tensor in weights.items() if "head" in name} for weights in make_checkpoints(2)]
    torch.manual_seed(0)
    base, other = Partial(), Partial()
    options: dict[str, Any] = {"projection": SparseProjection(32), "parameters": "head.*"}
    TRAK(base, adapters, tmp_path, **options).featurize(make_trainer(), TRAIN)
    TRAK(base, adapters, tmp_path, **options).score(make_trainer(), TARGETS)
    with pytest.raises(RuntimeError, match="at 2 checkpoints: 0, 1, whose weights or buffers it does not have"):
        TRAK(other, adapters, tmp_path, **options).score(make_trainer(), TARGETS)


def test_batches_of_many_structures_can_be_kept():
    kept = ExampleBatch(nested(2), 2, find_layout(nested(2), nested(3)))
    found = unpack(pack(kept))
    assert found.size == 2
    assert found.layout == kept.layout
    assert found.content["pair"].second == ["a", "b"]
    assert isinstance(found.content["pair"], Pair)
    assert found.content["record"].name == "shared"
    assert found.content["record"].values.tolist() == [0, 2]
    assert isinstance(found.content["ordered"], OrderedDict)
    assert found.content["ordered"]["x"][1][0].tolist() == [0, 1]
    assert isinstance(found.content["user"], UserDict)
    assert [tuple(image.shape) for image in found.content["images"]] == [(2, 2), (2, 3)]
    assert found.content["plain"] == [1, 2.5, True, None, ("text", ())]


def test_what_cannot_be_kept_is_said_and_types_of_unknown_modules_are_not_imported():
    with pytest.raises(NotStorableError, match="a batch that holds a object cannot be stored"):
        pack(ExampleBatch((torch.zeros(2), object()), 2))
    with pytest.raises(NotStorableError, match="cannot be stored"):
        pack(ExampleBatch({"x": float("nan")}, 2))
    packed = pack(ExampleBatch(Record(torch.zeros(2), "x"), 2))
    for name in ("subprocess:Popen", "antigravity:fly", "builtins:int", "tests.features.test_same_function:SCALE"):
        text = bytes(packed["structure"].tolist()).decode().replace(f"{Record.__module__}:Record", name)
        packed_again = packed | {"structure": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}
        with pytest.raises(NotStorableError, match="is not known in this process"):
            unpack(packed_again)
