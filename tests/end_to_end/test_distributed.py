"""Two real processes (`strategy="ddp"`, gloo) against one: the same scores, on every rank."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_trak import TRAK, GradientCosine, TracIn
from lightning_trak.cleaning import Ranking, duplicates, harmful
from lightning_trak.methods import DataShapley, ExactKernel, FeatureMethod, RepresentationSimilarity, TrainingLoss
from lightning_trak.outputs import CausalLMMargin, ClassificationMargin, ContrastiveMargin
from lightning_trak.projections import IdentityProjection, PrincipalProjection, SparseProjection
from lightning_trak.scoring import aggregate_scores
from tests.causal_texts import CausalNet, loader, make_texts
from tests.launch import run_by_lightning
from tests.lit import LitNet, make_checkpoints, make_data, make_model, make_trainer

pytestmark = pytest.mark.slow

TRAIN, TARGETS = make_data(53), make_data(11, seed=1)
RATES = [0.3, 0.1]
CLASSES, SOURCES = TARGETS.tensors[1], ["web" if position % 3 else "books" for position in range(53)]
UNSURE = TARGETS.tensors[0] / 3  # nearer to where models disagree
PREDICTED = ClassificationMargin(labels="predicted")
PRINCIPAL = PrincipalProjection(12, landmarks=20, sample=40, sketch=64)


def ranked(ranking: Ranking) -> tuple[torch.Tensor, torch.Tensor, tuple | None]:
    """What a ranking holds, to be saved."""
    return ranking.positions, ranking.scores, ranking.groups


class _Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.first(first), self.second(second)


TOWERS = _Towers()


def make_pairs(size: int) -> DataLoader:
    generator = torch.Generator().manual_seed(size)
    data = TensorDataset(torch.randn(size, 4, generator=generator), torch.randn(size, 5, generator=generator))
    return DataLoader(data, batch_size=3)


def make_shapley() -> DataShapley:
    return DataShapley(LitNet, lambda: make_trainer(max_epochs=1), permutations=3, step=2)


def make_exact(root: Path, checkpoints) -> dict[str, FeatureMethod]:
    """Two methods with the exact gradients."""
    return {
        "exact": ExactKernel(make_model(), checkpoints, root / "exact"),
        "identity": TRAK(make_model(), checkpoints, root / "identity", projection=IdentityProjection()),
    }


def make_texts_method(store: Path) -> TRAK:
    """Of texts, with fewer of them than features: the dual."""
    model = CausalNet()
    return TRAK(model, [model.state_dict(), CausalNet(1).state_dict()], store, projection=SparseProjection(32))


def one_process(folder: Path, checkpoints, dtype: str = "float32") -> tuple[TRAK, torch.Tensor]:
    trak = TRAK(make_model(), checkpoints, folder, projection=SparseProjection(32), dtype=dtype)
    trak.featurize(make_trainer(), TRAIN, shard_size=6)
    return trak, trak.score(make_trainer(), TARGETS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Results of both ranks, those of one process, and the folder."""
    root = tmp_path_factory.mktemp("ddp")
    checkpoints = make_checkpoints(2)
    torch.save(checkpoints, root / "checkpoints.pt")
    _, expected = one_process(root / "one", checkpoints)
    begun, _ = one_process(root / "begun by one", checkpoints)
    for path in [*begun.store.rglob("shard-0000[2467].safetensors"), *begun.store.rglob("gram-*")]:
        path.unlink()
    run_by_lightning("tests.end_to_end.ddp_script", root)
    return [torch.load(root / f"rank-{rank}.pt") for rank in range(2)], expected, root


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["shuffled", "sampler", "begun by one"])
def test_both_ranks_get_the_scores_of_one_process(runs, name):
    ranks, expected, _ = runs
    for rank in ranks:
        close(rank[name], expected)


@pytest.mark.parametrize(
    "method", ["TRAK", "RepresentationSimilarity", "EKFACInfluence", "InfluenceFunction", "Metagradient"]
)
def test_models_with_other_weights_are_refused_on_both_ranks(runs, method):
    what = "the recording is of another run" if method == "Metagradient" else "the model has other weights"
    for rank in runs[0]:
        assert f"{what} on rank 1 than on rank 0" in rank[f"{method} with other weights"]


def test_both_ranks_use_the_same_principal_directions(runs):
    ranks, _, root = runs
    trak = TRAK(make_model(), torch.load(root / "checkpoints.pt"), root / "one principal", projection=PRINCIPAL)
    trak.featurize(make_trainer(), DataLoader(TRAIN, batch_size=4), shard_size=6)
    expected = trak.score(make_trainer(), TARGETS)
    for rank in ranks:
        torch.testing.assert_close(rank["principal"], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_both_ranks_get_the_exact_scores_of_one_process(runs, tmp_path):
    ranks, _, root = runs
    trak, _ = one_process(tmp_path, torch.load(root / "checkpoints.pt"))
    expected = trak.score(make_trainer(), TARGETS, top_k=5, rescore=20)
    for rank in ranks:
        for (values, indices), end in zip(rank["rescored"], expected, strict=True):
            assert torch.equal(indices, end.indices)
            torch.testing.assert_close(values, end.values, rtol=1e-3, atol=1e-4)


def test_both_ranks_write_the_codes_of_one_process(runs):
    ranks, _, root = runs
    alone, expected = one_process(root / "int4 alone", torch.load(root / "checkpoints.pt"), "int4")
    for rank in ranks:
        close(rank["int4"], expected)
    files = sorted(path.relative_to(alone.store) for path in alone.store.rglob("shard-*"))
    assert len(files) == 2 * 9
    for file in files:
        found, wanted = (load_file(root / name / file)["features"] for name in ("int4", "int4 alone"))
        assert float((found != wanted).float().mean()) < 0.01  # gradients are rounded by batch


@pytest.mark.parametrize("name", ["exact", "identity"])
def test_the_dual_is_shared(runs, name):
    ranks, _, root = runs
    method = make_exact(root / "one", torch.load(root / "checkpoints.pt"))[name]
    expected = method.attribute(make_trainer(), TRAIN, TARGETS)
    for number, rank in enumerate(ranks):
        close(rank[name], expected)
        close(rank[f"{name}, candidates"], method.score(make_trainer(), TARGETS, train=make_data(7, seed=5)))
        close(rank[f"{name}, self influence"], method.self_influence(make_trainer()))
        close(rank[f"{name}, scorer on rank {number}"], expected[number::2])


def test_methods_that_share_their_work(runs):
    ranks, _, root = runs
    similarity = RepresentationSimilarity(make_model(), torch.load(root / "checkpoints.pt"))
    similarities = similarity.attribute(make_trainer(), TRAIN, Subset(TARGETS, [0]))
    values = make_shapley().attribute(make_trainer(), Subset(TRAIN, range(4)), TARGETS)
    for rank in ranks:
        close(rank["similarity"], similarities)
        close(rank["shapley"], values)


def test_self_influence_is_shared(runs):
    ranks, _, root = runs
    checkpoints = torch.load(root / "checkpoints.pt")
    alone = TRAK(make_model(), checkpoints, root / "one", projection=SparseProjection(32))
    for rank in ranks:
        close(rank["self influence"], alone.self_influence(make_trainer()))


def test_cleaning_is_shared(runs):
    ranks, _, root = runs
    checkpoints, trainer = torch.load(root / "checkpoints.pt"), make_trainer()
    store = root / "one"
    alone = TRAK(make_model(), checkpoints, store, projection=SparseProjection(32))
    cosine = GradientCosine(make_model(), checkpoints, store, projection=SparseProjection(32))
    suspicion = cosine.label_suspicion(trainer, TRAIN)
    loss = TrainingLoss(make_model(), checkpoints).label_suspicion(trainer, TRAIN)
    repeated = duplicates(alone, trainer, TRAIN, threshold=0.8)
    opponents = harmful(alone, trainer, TRAIN, TARGETS)
    assert 2 < len(repeated) < 53
    for rank in ranks:
        close(rank["label suspicion"], suspicion)
        close(rank["training loss"], loss)
        for name, expected in (("duplicates", repeated), ("harmful", opponents)):
            positions, scores, groups = rank[name]
            assert torch.equal(positions, expected.positions)
            close(scores, expected.scores)
            assert groups == expected.groups


def test_groups_and_other_outputs_over_ranks(runs):
    ranks, expected, root = runs
    alone = TRAK(make_model(), torch.load(root / "checkpoints.pt"), root / "one", projection=SparseProjection(32))
    asked = {"output": ClassificationMargin(labels=1)}
    opponents = alone.score(make_trainer(), TARGETS, top_k=5, **asked).opponents
    for rank in ranks:
        close(rank["classes"], aggregate_scores(expected, "mean", CLASSES).float())
        close(rank["shares"], aggregate_scores(expected, train_groups=SOURCES).float())
        close(rank["chosen"], expected[:, [50, 3]])
        close(rank["both ends"][0], opponents.values)
        assert torch.equal(rank["both ends"][1], opponents.indices)


def test_tokens_over_ranks(runs, tmp_path):
    ranks, _, _ = runs
    alone, targets = make_texts_method(tmp_path), loader(make_texts(3, seed=1))
    alone.featurize(make_trainer(), loader(make_texts(11)))
    expected = alone.score(make_trainer(), targets, output=CausalLMMargin(per_token=True))
    parts = alone.score_tokens(make_trainer(), targets, [(2, 10), (0, 3)])
    for rank in ranks:
        close(rank["tokens"], expected)
        for found, part in zip(rank["parts"], parts, strict=True):
            close(found, part.scores)


def test_predictions_candidates_and_intervals_over_ranks(runs):
    ranks, _, root = runs
    alone = TRAK(make_model(), torch.load(root / "checkpoints.pt"), root / "one", projection=SparseProjection(32))
    predicted = alone.score(make_trainer(), TensorDataset(UNSURE), output=PREDICTED)
    new = make_data(7, seed=5)
    interval = alone.score(make_trainer(), TARGETS, top_k=4, train=new, aggregate="mean", interval=0.9)
    for rank in ranks:
        close(rank["predicted"], predicted)
        close(rank["candidates"], alone.score(make_trainer(), TARGETS, train=new))
        for (values, indices), end in zip(rank["interval"], interval.low, strict=True):
            close(values, end.values)
            assert torch.equal(indices, end.indices)


def test_top_k_is_merged_over_ranks(runs):
    ranks, expected, _ = runs
    for rank in ranks:
        for (values, indices), largest in zip(rank["top"], (True, False), strict=True):
            best = expected.topk(5, largest=largest)
            close(values, best.values)
            assert torch.equal(indices, best.indices)


def test_a_rank_without_targets(runs):
    ranks, expected, _ = runs
    for rank in ranks:
        close(rank["one target"], expected[:1])


def test_one_rank_alone_waits_for_nobody(runs):
    ranks, expected, _ = runs
    close(ranks[0]["alone"], expected)


def test_scorer_scores_what_lightning_deals_out(runs):
    ranks, expected, _ = runs
    for number, rank in enumerate(ranks):
        close(rank[f"scorer on rank {number}"], expected[number::2])


def test_other_methods_get_the_scores_of_one_process(runs):
    """TracIn needs more of a target than its features."""
    ranks, _, root = runs
    tracin = TracIn(
        make_model(),
        torch.load(root / "checkpoints.pt"),
        root / "one",
        projection=SparseProjection(32),
        learning_rates=RATES,
    )
    expected = tracin.score(make_trainer(), TARGETS)
    for number, rank in enumerate(ranks):
        close(rank["TracIn"], expected)
        close(rank[f"TracIn's scorer on rank {number}"], expected[number::2])


def test_a_context_is_the_same_on_every_rank(runs, tmp_path):
    ranks, _, _ = runs
    trak = TRAK(TOWERS, [TOWERS.state_dict()], tmp_path, output=ContrastiveMargin(context_size=9))
    trak.featurize(make_trainer(), make_pairs(20))
    expected = trak.score(make_trainer(), make_pairs(5))
    for rank in ranks:
        close(rank["pairs"], expected)


def test_one_process_continues_what_two_began(runs):
    _, expected, root = runs
    store = root / "continued by one"
    untouched = {path: path.stat().st_mtime_ns for path in store.rglob("shard-0000[013568].safetensors")}
    for path in store.rglob("shard-0000[247].safetensors"):
        path.unlink()
    _, scores = one_process(store, torch.load(root / "checkpoints.pt"))
    close(scores, expected)
    assert untouched == {path: path.stat().st_mtime_ns for path in untouched}


def test_features_are_bit_identical_for_equal_batches(runs):
    """What a rank computes depends on the examples of its batches, and those on the shard alone."""
    _, _, root = runs
    for path in (root / "shuffled").rglob("shard-*.safetensors"):
        twin = root / "sampler" / path.relative_to(root / "shuffled")
        assert path.read_bytes() == twin.read_bytes()


def test_spawned_processes_cannot_return_scores(tmp_path):
    checkpoints = make_checkpoints(1)
    trak = TRAK(make_model(), checkpoints, tmp_path, projection=SparseProjection(32))
    for call in (trak.score, trak.featurize):
        with pytest.raises(ValueError, match=r"spawns or forks processes \(DDPStrategy, by 'spawn'\).*strategy='ddp'"):
            call(make_trainer(strategy="ddp_spawn", devices=2), TARGETS)
