"""Scores of examples that are not in the training set: as if they were added, with the curvature of the store."""

import copy

import lightning as L
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from lightning_trak import TRAK
from lightning_trak.features.rows import Features
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.projections import IdentityProjection, SparseProjection
from lightning_trak.scoring import PrimalScorer, aggregate_scores, targets
from tests.lit import TARGETS, TRAIN, make_checkpoints, make_data, make_model, make_trainer, open_store
from tests.methods.test_questions import LABELS, METHODS, close, make

NEW = make_data(9, seed=5)
MIXED = ConcatDataset([NEW, Subset(TRAIN, [49, 3])])  # some are training examples


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TRAK", "dual", "averaged", "cosine", "exact", "int4"])
def test_a_training_example_has_its_own_column(tmp_path, monkeypatch, name):
    monkeypatch.setitem(METHODS, "int4", (TRAK, {"dtype": "int4", "projection": SparseProjection(512)}))
    method, trainer = make(tmp_path, name), make_trainer()
    full = method.score(trainer, TARGETS)
    found = method.score(trainer, TARGETS, train=DataLoader(MIXED, batch_size=8))
    assert found.shape == (13, 11)
    close(found[:, 9:], full[:, [49, 3]])
    monkeypatch.setattr(targets, "TARGET_BYTES", 1)  # a block for each batch, of targets and of candidates
    loader, data = DataLoader(MIXED, batch_size=6), DataLoader(TARGETS, batch_size=8)
    close(method.score(trainer, data, train=loader), found)
    groups = ["a", "b", None, *("ab" * 4)]
    both = method.score(trainer, data, train=loader, aggregate="sum", groups=LABELS, train_groups=groups)
    close(both, aggregate_scores(found, "sum", LABELS, groups))
    top = method.score(trainer, data, train=loader, top_k=3)
    for end, largest in zip(top, (True, False), strict=True):
        close(end.values, found.topk(3, largest=largest).values)
        torch.testing.assert_close(found.gather(1, end.indices), end.values)


@pytest.mark.slow
def test_the_dual_is_the_primal(tmp_path, monkeypatch):
    """In exact arithmetic both are phi(x)^T (K + lambda I)^-1 phi_i Q_i, also where phi_i is outside the span."""
    method = make(tmp_path, "dual", projection=IdentityProjection(), dtype=torch.float64)
    trainer, output = make_trainer(), ClassificationMargin(labels=1)
    dual = method.score(trainer, TARGETS, train=NEW, output=output)
    monkeypatch.setattr("lightning_trak.methods.features.trak.smaller_scorer", lambda *_: PrimalScorer)
    close(dual, method.score(trainer, TARGETS, train=NEW, output=output))


def test_by_hand(tmp_path):
    """The formula, with the features of the store and of the candidates."""
    method, trainer = make(tmp_path, count=1, damping=0.3), make_trainer()
    (new,), (asked,) = (method.target_features(trainer, data) for data in (NEW, TARGETS))
    store = open_store(method)
    phi, _, _, curvatures = Features.cat([store.read(0, shard) for shard in range(store.num_shards)])
    gram = phi.T.double() @ (phi * curvatures.unsqueeze(1)).double()
    ridge = 0.3 * gram.trace() / len(gram)
    directions = torch.linalg.solve(gram + ridge * torch.eye(len(gram)), asked.features.double().T)
    expected = directions.T @ (new.features * new.loss_gradients.unsqueeze(1)).double().T
    close(method.score(trainer, TARGETS, train=NEW), expected)


class Candidates(L.LightningDataModule):
    """Halves its inputs on the way."""

    def train_dataloader(self):
        return DataLoader(TensorDataset(NEW.tensors[0] * 2, NEW.tensors[1]), batch_size=4, shuffle=True)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0] / 2, batch[1]


def test_a_data_module_and_what_the_user_has_stay_as_they_are(tmp_path):
    method, trainer = make(tmp_path, count=1), make_trainer()
    before, random = copy.deepcopy(method.model.state_dict()), torch.get_rng_state()
    found = method.score(trainer, TARGETS, train=Candidates())
    close(found, method.score(trainer, TARGETS, train=list(zip(*NEW.tensors, strict=True))))
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in method.model.state_dict().items())


@pytest.mark.parametrize(
    ("inputs", "labels", "error"),
    [
        (
            NEW.tensors[0],
            NEW.tensors[1] + 3,
            r"features of 9 examples \(0, 1, .*\) of train= at checkpoint 0 .* its label is",
        ),
        (NEW.tensors[0] / 0, NEW.tensors[1], r"features of 9 examples \(0, 1, .*\) of train= at checkpoint 0"),
        (NEW.tensors[0][:, :4], NEW.tensors[1], "shapes cannot be multiplied"),
        (NEW.tensors[0][:0], NEW.tensors[1][:0], "the dataset is empty"),
    ],
)
def test_bad_candidates_are_named(tmp_path, inputs, labels, error):
    method = make(tmp_path, count=1)
    with pytest.raises((ValueError, RuntimeError), match=error):
        method.score(
            make_trainer(), TARGETS, train=TensorDataset(inputs, labels.clamp(min=3) if "label" in error else labels)
        )


def test_the_store_is_not_changed(tmp_path):
    method = make(tmp_path, count=1)
    method.score(make_trainer(), TARGETS, top_k=2)
    files = {path: path.stat().st_mtime_ns for path in method.store.rglob("*")}
    method.score(make_trainer(), TARGETS, train=NEW, top_k=2)
    assert files == {path: path.stat().st_mtime_ns for path in method.store.rglob("*")}
    other = TRAK(make_model(1), make_checkpoints(1), method.store, projection=SparseProjection(25))
    with pytest.raises(ValueError, match="dim"):
        other.score(make_trainer(), TARGETS, train=NEW)
