"""engine="auto": hooks where they cover the model and are right, by fixed examples, once for a store."""

import json
import logging
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import TRAK, GradientDot
from lightning_trak.gradients import HookEngine
from lightning_trak.methods import ExactKernel
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.projections import KroneckerProjection, SparseProjection
from tests.lit import TARGETS, TRAIN, LitNet, beyond_hooks, make_model, make_trainer


def chosen(store):
    (path,) = store.glob("engine-*.json")
    return json.loads(path.read_text())["engine"]


class Bypassing(LitNet):
    """Uses the last layer's weight outside its forward as well, which hooks do not see."""

    def forward(self, inputs):
        last = [part for part in self.modules() if isinstance(part, torch.nn.Linear)][-1]
        return super().forward(inputs) + F.linear(torch.ones(len(inputs), last.in_features), last.weight)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "engine", "said"),
    [
        (make_model, "hooks", "gradients by module hooks.* cover all"),
        (lambda: beyond_hooks(make_model()), "functional", "gradients by vmap.*no layer class covers this type"),
        (Bypassing, "functional", "gradients by vmap.*used outside its layer's forward"),
    ],
)
def test_the_choice_is_said_and_kept(tmp_path, checkpoints, caplog, make, engine, said):
    trak = TRAK(make(), checkpoints, tmp_path, projection=SparseProjection(32))
    with caplog.at_level(logging.INFO):
        trak.featurize(make_trainer(), TRAIN)
    lines = [record.message for record in caplog.records if "chosen by engine='auto'" in record.message]
    assert len(lines) == 1
    assert re.search(said, lines[0])
    assert chosen(tmp_path) == engine
    scores = trak.score(make_trainer(), TARGETS)
    other = TRAK(make(), checkpoints, tmp_path / "loop", projection=SparseProjection(32), engine="loop")
    other.featurize(make_trainer(), TRAIN)
    expected = other.score(make_trainer(), TARGETS)
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_lines_of_the_log_name_the_method(tmp_path, checkpoints, caplog):
    method = GradientDot(make_model(), checkpoints, tmp_path, projection=SparseProjection(32))
    with caplog.at_level(logging.INFO):
        method.featurize(make_trainer(), TRAIN)
    assert {record.message.split(":")[0] for record in caplog.records if "gradients" in record.message} == {
        "GradientDot"
    }


def test_the_engine_that_was_checked_goes_on(tmp_path, checkpoints, monkeypatch):
    """What its check has found out is not found out again."""
    made = []
    monkeypatch.setattr(
        HookEngine, "__init__", lambda self, *args, init=HookEngine.__init__: (made.append(self), init(self, *args))[1]
    )
    TRAK(make_model(), checkpoints[:1], tmp_path, projection=SparseProjection(32)).featurize(make_trainer(), TRAIN)
    assert len(made) == 1


def test_a_store_keeps_the_engine_it_was_begun_with(tmp_path, checkpoints):
    TRAK(make_model(), checkpoints, tmp_path, projection=SparseProjection(32), engine="loop").featurize(
        make_trainer(), TRAIN
    )
    shard = sorted(tmp_path.rglob("shard-*.safetensors"))[3]
    before = shard.read_bytes()
    shard.unlink()
    TRAK(make_model(), checkpoints, tmp_path, projection=SparseProjection(32)).featurize(make_trainer(), TRAIN)
    assert chosen(tmp_path) == "loop"
    assert shard.read_bytes() == before


def test_a_damaged_choice_is_an_error(tmp_path, checkpoints):
    trak = TRAK(make_model(), checkpoints, tmp_path, projection=SparseProjection(32))
    trak.featurize(make_trainer(), TRAIN)
    (path,) = tmp_path.glob("engine-*.json")
    path.write_text("{")
    with pytest.raises(ValueError, match=r"engine-.*is truncated or altered"):
        trak.score(make_trainer(), TARGETS)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [None, 64])
@pytest.mark.parametrize("engine", ["hooks", "functional", "loop"])
def test_kronecker_scores_do_not_depend_on_the_engine(tmp_path, checkpoints, dim, engine):
    def scores(engine):
        trak = TRAK(
            make_model(), checkpoints, tmp_path / engine, projection=KroneckerProjection(4, 4, dim), engine=engine
        )
        trak.featurize(make_trainer(), TRAIN)
        return trak.score(make_trainer(), TARGETS)

    expected = scores("auto")
    assert chosen(tmp_path / "auto") == "hooks"
    torch.testing.assert_close(scores(engine), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", [TRAK, ExactKernel])
def test_a_choice_that_was_deleted_is_read_from_the_shards(tmp_path, checkpoints, kind):
    method = kind(make_model(), checkpoints, tmp_path)
    expected = method.attribute(make_trainer(), TRAIN, TARGETS)
    (choice,) = tmp_path.glob("engine-*.json")
    choice.unlink()
    again = kind(make_model(), checkpoints, tmp_path)
    assert torch.equal(again.attribute(make_trainer(), TRAIN, TARGETS), expected)


class Packed(nn.Module):
    """A recurrent network over packed texts. Every batch has other shapes."""

    def __init__(self):
        super().__init__()
        self.words, self.over, self.head = nn.Embedding(5, 4), nn.GRU(4, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, ids, lengths):
        packed = pack_padded_sequence(self.words(ids), lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.over(packed)[1][-1])


def test_shapes_that_differ_from_batch_to_batch_are_warned_of_once(tmp_path):
    lengths = torch.arange(12) % 5 + 1
    ids = torch.arange(5) * (torch.arange(5) < lengths[:, None])
    data = TensorDataset(ids, lengths, torch.zeros(12, dtype=torch.int64))
    trak = TRAK(Packed(), store=tmp_path / "store", output=ClassificationMargin())
    with pytest.warns(UserWarning, match="vmap cannot differentiate Packed") as told:
        trak.featurize(None, DataLoader(data, batch_size=3))
    assert sum("vmap cannot differentiate" in str(warning.message) for warning in told) == 1
