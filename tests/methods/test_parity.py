"""TRAK as published, against the authors' own package (traker 0.3.2) run for real on the same gradients."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from trak import TRAKer
from trak.projectors import AbstractProjector
from trak.score_computers import BasicScoreComputer

from lightning_trak import TRAK
from lightning_trak.checkpoints.digests import weights_digest
from lightning_trak.features.model import stream_of
from lightning_trak.gradients import select_parameters
from lightning_trak.projections import GaussianProjection, Projection, RademacherProjection
from tests.lit import make_checkpoints, make_data, make_model, make_trainer


class SharedProjector(AbstractProjector):
    """Gives traker the projection of this package."""

    def __init__(self, projection: Projection, sizes: dict[str, int], streams: list[int]) -> None:
        super().__init__(sum(sizes.values()), projection.dim, 0, "normal", "cpu")
        self.projection, self.sizes, self.streams = projection, sizes, streams

    def project(self, grads: dict[str, Tensor], model_id: int) -> Tensor:
        bound = self.projection.bind(
            {name: (size,) for name, size in self.sizes.items()},
            seed=0,
            checkpoint=self.streams[model_id],
            device=torch.device("cpu"),
        )
        features = torch.zeros(len(next(iter(grads.values()))), bound.dim)
        for name, gradient in grads.items():
            bound.add_(features, name, gradient.flatten(1))
        return features


class UnscaledScoreComputer(BasicScoreComputer):
    """Undoes traker's division of each checkpoint's inverse by the mean of its absolute entries."""

    def get_x_xtx_inv(self, grads: Tensor, xtx: Tensor) -> Tensor:
        return super().get_x_xtx_inv(grads, xtx) * torch.linalg.inv(xtx.float()).abs().mean()


def traker_scores(
    folder: Path, checkpoints: list[dict[str, Tensor]], projection: Projection, computer: type[BasicScoreComputer]
) -> Tensor:
    """(num_targets, num_train), by the peer."""
    model = make_model().eval()
    train, targets = make_data(90), make_data(20, seed=1)
    sizes = {
        name: parameter.numel() for name, parameter in model.named_parameters() if name in select_parameters(model)
    }
    traker = TRAKer(
        model=model,
        task="image_classification",
        train_set_size=len(train),
        save_dir=str(folder),
        device="cpu",
        projector=SharedProjector(projection, sizes, [stream_of(weights_digest(weights)) for weights in checkpoints]),
        score_computer=computer,
        use_half_precision=False,
        logging_level=40,
    )
    for number, weights in enumerate(checkpoints):
        traker.load_checkpoint(weights, model_id=number)
        for batch in DataLoader(train, batch_size=30):
            traker.featurize(batch=batch, num_samples=len(batch[0]))
    traker.finalize_features()
    for number, weights in enumerate(checkpoints):
        traker.start_scoring_checkpoint("targets", weights, model_id=number, num_targets=len(targets))
        for batch in DataLoader(targets, batch_size=10):
            traker.score(batch=batch, num_samples=len(batch[0]))
    return torch.tensor(traker.finalize_scores("targets")).T


def our_scores(folder: Path, checkpoints: list[dict[str, Tensor]], projection: Projection) -> Tensor:
    trak = TRAK.paper(make_model(), checkpoints, folder, projection=projection)
    trainer = make_trainer()
    trak.featurize(trainer, DataLoader(make_data(90), batch_size=32))
    return trak.score(trainer, DataLoader(make_data(20, seed=1), batch_size=7))


@pytest.mark.slow
@pytest.mark.parametrize("projection", [GaussianProjection(16), RademacherProjection(24)])
def test_paper_equals_traker(tmp_path, projection):
    checkpoints = make_checkpoints(3)
    theirs = traker_scores(tmp_path / "theirs", checkpoints, projection, UnscaledScoreComputer)
    ours = our_scores(tmp_path / "ours", checkpoints, projection)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=3e-4 * float(theirs.abs().mean()))


def test_paper_equals_traker_as_it_is_up_to_scale_for_one_checkpoint(tmp_path):
    checkpoints = make_checkpoints(1)
    theirs = traker_scores(tmp_path / "theirs", checkpoints, GaussianProjection(16), BasicScoreComputer)
    ours = our_scores(tmp_path / "ours", checkpoints, GaussianProjection(16))
    ours, theirs = ours / ours.norm(), theirs / theirs.norm()
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4


def test_the_comparison_can_fail(tmp_path):
    checkpoints = make_checkpoints(2)
    theirs = traker_scores(tmp_path / "theirs", checkpoints, GaussianProjection(16), UnscaledScoreComputer)
    trak = TRAK(make_model(), checkpoints, tmp_path / "ours", projection=GaussianProjection(16))
    trak.featurize(make_trainer(), make_data(90))
    ours = trak.score(make_trainer(), make_data(20, seed=1))
    assert float((ours - theirs).abs().max() / theirs.abs().max()) > 0.1
