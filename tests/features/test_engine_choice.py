"""engine="auto": hooks where they cover the model and are right, by fixed examples, once for a store."""

import json
import logging
import re

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import TRAK, GradientDot
from lightning_trak.gradients import HookEngine
from lightning_trak.methods import ExactKernel
from lightning_trak.projections import KroneckerProjection, SparseProjection
from tests.lit import TARGETS, TRAIN, LitNet, beyond_hooks, make_model, make_trainer


def chosen(store):
    (path,) = store.glob("engine-*.json")
    return json.loads(path.read_text())["engine"]


class Scaled(LitNet):
    """Has a parameter of its own, which no layer holds."""

    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.ones(()))

    def forward(self, inputs):
        return super().forward(inputs) * self.factor


class Packed(LitNet):
    """Packs sequences, of whose lengths vmap complains in another way for each batch."""

    def __init__(self):
        super().__init__()
        self.lstm = torch.nn.LSTM(2, 3, batch_first=True)

    def forward(self, sequences, lengths):
        packed = pack_padded_sequence(sequences, lengths, batch_first=True, enforce_sorted=False)
        return self.lstm(packed)[1][0][-1]


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


def test_the_log_says_what_vmap_covers_beside_hooks(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        TRAK(Scaled(), [Scaled().state_dict()], tmp_path, projection=SparseProjection(8)).featurize(
            make_trainer(), TRAIN
        )
    assert "module hooks, chosen by engine='auto': hooks cover 6 of 7 parameters, and vmap covers factor" in caplog.text


def test_one_reason_for_the_loop_gives_one_warning(tmp_path):
    generator = torch.Generator().manual_seed(0)
    lengths = 1 + torch.arange(20) % 6
    data = TensorDataset(torch.randn(20, 6, 2, generator=generator), lengths, lengths % 3)
    trak = TRAK(Packed(), [Packed().state_dict()], tmp_path, projection=SparseProjection(8))
    with pytest.warns(UserWarning, match="vmap cannot differentiate Packed.*Reason: RuntimeError") as caught:
        trak.featurize(make_trainer(), DataLoader(data, batch_size=4))
    assert sum("vmap cannot" in str(warning.message) for warning in caught) == 1


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
