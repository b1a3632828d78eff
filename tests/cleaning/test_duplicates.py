"""Groups of near-duplicates, against all pairs."""

import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.csgraph import connected_components
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_trak import TRAK
from lightning_trak.cleaning import duplicates
from lightning_trak.cleaning.duplicates import near_duplicates
from lightning_trak.methods import BM25, ExactKernel, KNNShapley, RepresentationSimilarity
from lightning_trak.projections import SparseProjection
from lightning_trak.running.ranks import Ranks
from tests.lit import TRAIN, make_model, make_trainer, open_store

CPU = torch.device("cpu")


def spans(total, step):
    return [range(start, min(start + step, total)) for start in range(0, total, step)]


def clustered(total, width=6, seed=0, noise=0.3):
    """Vectors of many lengths near few directions: chains of them are common."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(12, width, generator=generator)
    near = centres[torch.randint(0, 12, (total,), generator=generator)]
    return (near + noise * torch.randn(total, width, generator=generator)) * torch.rand(
        total, 1, generator=generator
    ).exp()


def by_all_pairs(matrices, threshold):
    cosines = sum(F.cosine_similarity(m[:, None].double(), m[None].double(), dim=2) for m in matrices) / len(matrices)
    cosines.fill_diagonal_(-1)
    alike = cosines >= threshold
    labels = torch.tensor(connected_components(alike.numpy(), directed=False)[1])
    firsts = torch.stack([(labels == label).nonzero()[0, 0] for label in labels])
    return firsts, torch.where(alike, cosines, 0.0).amax(1)


def find(matrices, step, threshold, ranks=Ranks()):
    read = lambda checkpoint, span: matrices[checkpoint][span.start : span.stop]  # noqa: E731
    return near_duplicates(read, spans(len(matrices[0]), step), len(matrices), threshold, CPU, ranks)


@pytest.mark.parametrize("step", [1, 7, 64, 1000])
@pytest.mark.parametrize("threshold", [0.8, 0.95, 0.99])
def test_groups_are_the_components_of_all_pairs(step, threshold):
    matrices = [clustered(60, seed=0), clustered(60, seed=0) + 0.05 * clustered(60, seed=1)]
    firsts, best = find(matrices, step, threshold)
    expected_firsts, expected_best = by_all_pairs(matrices, threshold)
    assert torch.equal(firsts, expected_firsts)
    assert 0 < int((firsts == torch.arange(60)).sum()) < 60
    torch.testing.assert_close(best, expected_best, rtol=1e-5, atol=1e-6)


def test_a_long_chain_is_one_group():
    angles = torch.arange(0, 3, 0.05)[torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    chain = torch.stack([angles.cos(), angles.sin()], 1)
    for step in (1, 9, 100):
        firsts, _ = find([chain], step, 0.998)
        assert firsts.unique().tolist() == [0]
        assert len(find([chain], step, 0.9999)[0].unique()) == 60


def test_exact_duplicates_at_a_threshold_of_one():
    vectors = torch.randn(40, 513, generator=torch.Generator().manual_seed(0))
    vectors[[7, 30]] = vectors[3] * torch.tensor([[2.0], [1e-3]])
    for scale in (1.0, 1e-30, 1e30):
        firsts, best = find([vectors * scale], 16, 1)
        assert (firsts != torch.arange(40)).nonzero().flatten().tolist() == [7, 30]
        assert best[[3, 7, 30]].tolist() == pytest.approx([1, 1, 1], abs=1e-6)
        assert float(best.max()) <= 1


def test_vectors_of_zeros_and_opposites_are_like_no_other():
    vectors = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 2.0], [-1.0, -2.0]])
    for threshold in (1e-7, 0.5):
        firsts, best = find([vectors], 2, threshold)
        assert firsts.tolist() == [0, 1, 2, 3]
        assert best.tolist() == [0, 0, 0, 0]


class Shared(Ranks):
    """Ranks that take turns in one process: what all of them have found is given to the last."""

    found: list = []  # noqa: RUF012

    def gather(self, value):
        self.found.append(value)
        return self.found


def test_ranks_share_the_pairs():
    matrices = [clustered(90)]
    alone = find(matrices, 7, 0.95)
    for world in (2, 5):
        Shared.found = []
        for rank in range(world):
            together = find(matrices, 7, 0.95, Shared(rank, world))
        assert not all(torch.equal(firsts, alone[0]) for firsts, _ in Shared.found)
        assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))


def planted():
    """TRAIN with three copies, one of which has another label."""
    inputs, labels = (part.clone() for part in TRAIN.tensors)
    inputs[[10, 44, 31]] = inputs[[3, 3, 25]]
    labels[[10, 44]] = int(labels[3])
    labels[31] = int(labels[25] + 1) % 3
    return TensorDataset(inputs, labels)


@pytest.mark.parametrize("dtype", ["float32", "int4"])
def test_stored_features_tell_labels_apart(tmp_path, checkpoints, dtype):
    data = planted()
    method = TRAK(make_model(), checkpoints, tmp_path, projection=SparseProjection(64), dtype=dtype)
    method.featurize(make_trainer(), data, shard_size=7)
    found = duplicates(method, make_trainer(), DataLoader(data, batch_size=7, shuffle=True), threshold=1)
    assert found.positions.tolist() == [3, 10, 44]
    assert found.groups == (1, 1, 1)
    assert found.scores.tolist() == pytest.approx([1, 1, 1], abs=1e-6)
    store = open_store(method)
    features = [torch.cat([store.read(c, shard).features for shard in range(store.num_shards)]) for c in range(2)]
    loose = duplicates(method, make_trainer(), data, threshold=0.9)
    firsts, best = by_all_pairs(features, 0.9)
    members = (firsts.bincount(minlength=50)[firsts] > 1).nonzero().flatten()
    assert sorted(loose.positions.tolist()) == members.tolist()
    torch.testing.assert_close(loose.scores, best[loose.positions], rtol=1e-5, atol=1e-6)
    groups = {}
    for position, group in zip(loose.positions.tolist(), loose.groups, strict=True):
        groups.setdefault(group, set()).add(int(firsts[position]))
    assert all(len(found) == 1 for found in groups.values())
    assert len(set.union(*groups.values())) == len(groups)


def test_of_a_store_that_has_grown(tmp_path, checkpoints):
    """Its shards are those of its parts, so that the number of a shard does not follow from its first example."""
    data, trainer = planted(), make_trainer()
    grown, made = (TRAK(make_model(), checkpoints, tmp_path / name) for name in ("grown", "made"))
    grown.featurize(trainer, Subset(data, range(17)), shard_size=7)
    for method in (grown, made):
        method.featurize(trainer, data, shard_size=7)
    found, expected = (duplicates(method, trainer, data, threshold=0.9) for method in (grown, made))
    assert found.positions.tolist() == expected.positions.tolist()
    assert found.groups == expected.groups
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [RepresentationSimilarity, KNNShapley])
def test_representations_do_not(checkpoints, method):
    found = duplicates(method(make_model(), checkpoints), make_trainer(), planted(), threshold=1)
    groups = {}  # of equal examples: rounding decides which group comes first
    for position, group in zip(found.positions.tolist(), found.groups, strict=True):
        groups.setdefault(group, []).append(position)
    assert sorted(groups.values()) == [[3, 10, 44], [25, 31]]
    assert [row[2] for row in found.table().rows] == list(found.groups)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 2)


def test_the_closest_groups_come_first_and_none_is_no_error():
    angles = torch.tensor([0.0, 1.0, 2.0, 1.01, 0.1, 2.0])
    data = TensorDataset(torch.stack([angles.cos(), angles.sin()], 1))
    model = Plain()
    method = RepresentationSimilarity(model, [model.state_dict()], forward=lambda module, batch: module.head(batch[0]))
    found = duplicates(method, make_trainer(), data, threshold=0.99)
    assert found.positions.tolist() == [2, 5, 1, 3, 0, 4]
    assert found.groups == (1, 1, 2, 2, 3, 3)
    spread = TensorDataset(torch.eye(2))
    empty = duplicates(method, make_trainer(), spread, threshold=0.5)
    assert len(empty) == 0
    assert empty.table().rows == []


@pytest.mark.parametrize("threshold", [0, -0.5, 1.1, float("nan")])
def test_thresholds_out_of_range(tmp_path, checkpoints, threshold):
    method = TRAK(make_model(), checkpoints, tmp_path / "store")
    with pytest.raises(ValueError, match=r"threshold must be above 0 and up to 1, got"):
        duplicates(method, make_trainer(), TRAIN, threshold)
    assert not (tmp_path / "store").exists()


def test_methods_without_vectors(tmp_path, checkpoints):
    with pytest.raises(TypeError, match="BM25 has no vectors to compare: use TRAK"):
        duplicates(BM25(0), make_trainer(), TRAIN)
    with pytest.raises(ValueError, match="ExactKernel keeps gradients as factors, which have no cosine"):
        duplicates(ExactKernel(make_model(), checkpoints, tmp_path / "kernel"), make_trainer(), TRAIN)
    assert not (tmp_path / "kernel").exists()
