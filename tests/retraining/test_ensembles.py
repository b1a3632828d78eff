"""Members of a fleet as checkpoints: their weights, their curvature, and what they may be measured on."""

import shutil

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import TRAK, LinearDatamodelingScore
from lightning_trak.callbacks import AttributionEvaluation
from lightning_trak.checkpoints import resolve_checkpoints
from lightning_trak.methods import EKFACInfluence, GradientDot, InfluenceFunction, TracIn
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.projections import SparseProjection
from lightning_trak.retraining import RetrainingFleet, random_subsets, read_fleet, split_fleet
from lightning_trak.retraining.fleets import members
from lightning_trak.retraining.fleets.members import Member
from tests.lit import LitNet, make_data, make_trainer, open_store
from tests.retraining.test_fleet_together import Net

N, SUBSETS, SEEDS = 24, 4, 2
TRAIN, TARGETS = make_data(N), make_data(5, seed=1)
LOADER = DataLoader(TRAIN, batch_size=6)
MASKS = random_subsets(N, SUBSETS, seed=3)


def make_fleet(directory, make_module=Net, num_seeds=SEEDS, **options):
    masks = options.pop("masks", MASKS)
    return RetrainingFleet(
        directory,
        make_module,
        lambda: make_trainer(max_epochs=1),
        LOADER,
        TARGETS,
        masks,
        num_seeds=num_seeds,
        **options,
    )


def run(directory, together=4, **options):
    fleet = make_fleet(directory, **options)
    fleet.run(together=together, progress_bar=False)
    return fleet


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    return run(tmp_path_factory.mktemp("kept") / "fleet", keep_weights=True)


def contents(directory, folder):
    return {path.name: path.read_bytes() for path in (directory / folder).glob("*")}


def make_trak(checkpoints, store, **options):
    return TRAK(Net(), checkpoints, store, projection=SparseProjection(16), **options)


@pytest.mark.parametrize(("module", "together"), [(LitNet, None), (Net, 4)])
def test_weights_give_the_outputs_of_their_member(tmp_path, module, together):
    fleet = run(tmp_path, make_module=module, together=together, keep_weights=True)
    for member in (Member(0, 0), Member(SUBSETS - 1, 1)):
        (checkpoint,) = resolve_checkpoints(fleet.store.weights(member))
        assert torch.equal(checkpoint.subset.mask, MASKS[member.subset])
        model = module().eval()
        model.load_state_dict(checkpoint.load())
        outputs = ClassificationMargin().output(model, list(TARGETS.tensors))
        torch.testing.assert_close(outputs.detach(), fleet.store.read(member)[0], rtol=1e-5, atol=1e-6)


def test_a_fleet_that_kept_no_weights_is_trained_again_to_the_same_outputs(tmp_path, fleet):
    plain = run(tmp_path / "fleet")
    assert not (tmp_path / "fleet/weights").exists()
    before = plain.outputs
    assert torch.equal(before, fleet.outputs)
    with pytest.raises(
        FileNotFoundError, match="has not kept the weights of subset 0, repetition 0; run it with keep_"
    ):
        plain.split(2)
    assert torch.equal(run(tmp_path / "fleet", keep_weights=True).outputs, before)
    assert contents(tmp_path / "fleet", "weights") == contents(fleet.directory, "weights")
    run(tmp_path / "fleet")  # without the option: weights stay
    assert contents(tmp_path / "fleet", "members") == contents(fleet.directory, "members")


def test_a_run_that_ends_between_weights_and_outputs_is_continued(tmp_path, fleet, monkeypatch):
    def die(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(members, "save_tensors", die)
        broken = make_fleet(tmp_path / "fleet", keep_weights=True)
        with pytest.raises(KeyboardInterrupt):
            broken.run(together=4, progress_bar=False)
    assert not contents(tmp_path / "fleet", "members")
    again = run(tmp_path / "fleet", keep_weights=True)
    for folder in ("members", "weights"):
        assert contents(again.directory, folder) == contents(fleet.directory, folder)
    lost = again.directory / "weights" / f"{Member(1, 0).stem}.safetensors"
    lost.unlink()
    assert torch.equal(run(tmp_path / "fleet", keep_weights=True).outputs, fleet.outputs)
    assert lost.exists()


def test_a_split_shares_no_subset(fleet):
    for checkpoints, held_out in (fleet.split(2), split_fleet(fleet.directory, 2)):
        assert [path.stem for path in checkpoints] == [Member(subset, 0).stem for subset in range(2)]
        assert torch.equal(held_out.masks, MASKS[2:])
        assert torch.equal(held_out.outputs, fleet.outputs[:, 2:])
    assert len(fleet.split(2, num_seeds=2).checkpoints) == 4
    assert len(fleet.split(SUBSETS).held_out.masks) == 0
    for wrong in ({"num_subsets": SUBSETS + 1}, {"num_subsets": 1, "num_seeds": SEEDS + 1}):
        with pytest.raises(ValueError, match="has 4 subsets with 2 models each, fewer than"):
            fleet.split(**wrong)
    with pytest.raises(ValueError, match="`num_subsets` to be a positive integer but got 0"):
        fleet.split(0)


def test_equal_subsets_are_not_held_out(tmp_path):
    fleet = run(tmp_path, masks=torch.cat([MASKS[:3], MASKS[:1]]), num_seeds=1, keep_weights=True)
    assert torch.equal(fleet.split(1).held_out.masks, MASKS[1:3])


def test_files_in_wrong_places_are_refused(tmp_path, fleet):
    shutil.copytree(fleet.directory, tmp_path / "fleet")
    first, second = (tmp_path / "fleet/weights" / f"{Member(subset, 0).stem}.safetensors" for subset in range(2))
    shutil.copy(second, first)
    problem = "does not hold the weights that gave the outputs of subset 0, .*; delete it and run the fleet again with"
    with pytest.raises(ValueError, match=problem):
        split_fleet(tmp_path / "fleet", 1)
    first.write_bytes(second.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"is damaged, or {problem}") as refused:
        split_fleet(tmp_path / "fleet", 1)
    assert "is truncated or not a safetensors file" in str(refused.value.__cause__)


def reference(trak, trainer, masks, damping):
    """TRAK's formula in float64, with K over the examples that each model has seen."""
    store, scores = open_store(trak), []
    for checkpoint, rows in enumerate(trak.target_features(trainer, TARGETS)):
        shards = [store.read(checkpoint, shard) for shard in range(store.num_shards)]
        phi, _, q, r = (torch.cat(column).double().numpy() for column in zip(*shards, strict=True))
        seen = masks[checkpoint].numpy()
        gram = (phi[seen] * r[seen, None]).T @ phi[seen]
        gram += damping * np.diag(gram).mean() * np.eye(len(gram))
        scores.append(rows.features.double().numpy() @ np.linalg.inv(gram) @ phi.T * q)
    return np.mean(scores, axis=0)


def test_labels_are_judged_without_what_a_model_has_learned_from_them(tmp_path, fleet):
    """Models that have not seen an example judge its label as they are; from the others the example is taken away."""
    checkpoints, trainer = fleet.split(2).checkpoints, make_trainer()
    found = make_trak(checkpoints, tmp_path / "both", damping=0.3).label_suspicion(trainer, TRAIN)
    outputs = torch.zeros(N)
    for number, checkpoint in enumerate(checkpoints):
        trak = make_trak([checkpoint], tmp_path / f"{number}", damping=0.3)
        own = trak.attribute(trainer, TRAIN, TRAIN).diagonal()
        (shard,) = [rows.outputs for rows in trak.target_features(trainer, TRAIN)]
        outputs += (shard - own * MASKS[number]) / 2
    torch.testing.assert_close(found.float(), ClassificationMargin().loss(outputs), rtol=2e-2, atol=1e-3)


def test_each_checkpoint_has_the_curvature_of_its_own_examples(tmp_path, fleet):
    checkpoints, _ = fleet.split(2)
    trainer = make_trainer()
    trak = make_trak(checkpoints, tmp_path, damping=0.3)
    trak.featurize(trainer, LOADER, shard_size=5)
    scores = trak.score(trainer, TARGETS)
    expected = reference(trak, trainer, MASKS[:2], 0.3)
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert (
        np.abs(reference(trak, trainer, torch.ones(2, N).bool(), 0.3) - expected).max() > 0.05 * np.abs(expected).max()
    )
    torch.testing.assert_close(trak.score(trainer, TARGETS), scores)  # from the Gram matrices that are kept
    torch.testing.assert_close(torch.cat(trainer.predict(trak.scorer(), DataLoader(TARGETS, 2))), scores)
    # The same weights as models of all data share the features, but not the Gram matrices.
    states = [checkpoint.load() for checkpoint in trak.checkpoints]
    whole = make_trak(states, tmp_path, damping=0.3)
    np.testing.assert_allclose(
        whole.score(trainer, TARGETS).numpy(),
        reference(whole, trainer, torch.ones(2, N).bool(), 0.3),
        rtol=1e-3,
        atol=1e-4 * np.abs(expected).max(),
    )
    torch.testing.assert_close(trak.score(trainer, TARGETS), scores)


def test_scores_are_not_measured_on_their_own_checkpoints(tmp_path, fleet):
    checkpoints, held_out = fleet.split(1)
    made = []

    def method(model):
        made.append(TRAK(model, checkpoints, tmp_path, projection=SparseProjection(16)))
        return made[-1]

    trainer = make_trainer()
    evaluation = AttributionEvaluation({"TRAK": method}, LOADER, TARGETS, read_fleet(fleet.directory))
    with pytest.raises(ValueError, match="1 of 4 were: rows 0 of `masks`"):
        evaluation.evaluate(trainer, Net())
    assert not any(tmp_path.iterdir())  # before any work
    assert torch.equal(made[0].used_masks, MASKS[:1])
    evaluation = AttributionEvaluation({"TRAK": method}, LOADER, TARGETS, held_out)
    evaluation.evaluate(trainer, Net())
    assert evaluation.lds["TRAK"].compute().isfinite()
    # Another seed of a used subset is used, too.
    other = fleet.split(1, num_seeds=2).checkpoints[1]
    with pytest.raises(ValueError, match="1 of 4 were: rows 0 of"):
        LinearDatamodelingScore(MASKS, used_masks=make_trak([other], tmp_path / "other").used_masks)


def test_other_training_data_are_refused_before_any_work(tmp_path, fleet):
    trak = make_trak(fleet.split(2).checkpoints, tmp_path / "store")
    shuffled = TensorDataset(*(column.flip(0) for column in TRAIN.tensors))
    for data, message in ((make_data(N + 1), "24 examples, but the training set has 25"), (shuffled, "other data")):
        with pytest.raises(
            ValueError, match=rf"subset-00000-seed-000.safetensors was trained on a subset of {message}"
        ):
            trak.featurize(make_trainer(), data)
    assert not (tmp_path / "store").exists()
    states = [checkpoint.load() for checkpoint in trak.checkpoints]
    make_trak(states, tmp_path / "store").featurize(make_trainer(), shuffled)
    with pytest.raises(ValueError, match="trained on a subset of other data of this size"):
        trak.score(make_trainer(), TARGETS)


def test_methods_that_need_models_of_all_data_say_so(tmp_path, fleet):
    checkpoints, _ = fleet.split(2)
    for method in (InfluenceFunction, EKFACInfluence):
        with pytest.raises(ValueError, match=f"{method.__name__} takes the curvature from all training examples"):
            method(Net(), checkpoints)
    with pytest.raises(ValueError, match="TracIn adds up steps of training on an example"):
        TracIn(Net(), checkpoints, tmp_path, learning_rates=0.1)
    assert torch.equal(GradientDot(Net(), checkpoints, tmp_path).used_masks, MASKS[:2])
    with pytest.raises(ValueError, match="at least as many training examples as features, and there are 12 and 16"):
        make_trak(checkpoints, tmp_path, damping=0.0).featurize(make_trainer(), LOADER)
