"""Other packages, used as in their documentation: features of a batch, and scores of a data set.

Every function imports its own package, so each package is optional.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.models import Workload
from lightning_trak.outputs import ClassificationMargin

Scores = Callable[[nn.Module, TensorDataset, TensorDataset, int], Tensor]
"""(trained model, training data, targets, number of features) -> scores, ``(num_targets, num_train)``."""

BATCH = 100


def _traker(model: nn.Module, num_train: int, k: int, folder: str) -> Any:
    from trak import TRAKer

    return TRAKer(
        model=model,
        task="image_classification",
        train_set_size=num_train,
        save_dir=folder,
        device="cpu",
        proj_dim=k,
        use_half_precision=False,  # like the other packages
        logging_level=40,
    )


def traker_featurizer(work: Workload, k: int, folder: Path) -> Callable[[], object]:
    """TRAKer.featurize of one batch."""
    # It skips examples that it has seen, so its size is larger than the number of calls.
    tracker = _traker(work.model, 10 * work.size, k, str(folder / "traker"))
    tracker.load_checkpoint(work.model.state_dict(), model_id=0)
    return lambda: tracker.featurize(batch=work.batch, num_samples=work.size)


def traker_scores(model: nn.Module, train: TensorDataset, targets: TensorDataset, k: int) -> Tensor:
    """TRAK by its authors."""
    with tempfile.TemporaryDirectory() as folder:
        tracker = _traker(model, len(train), k, folder)
        tracker.load_checkpoint(model.state_dict(), model_id=0)
        for batch in DataLoader(train, BATCH):
            tracker.featurize(batch=batch, num_samples=len(batch[0]))
        tracker.finalize_features()
        tracker.start_scoring_checkpoint("targets", model.state_dict(), model_id=0, num_targets=len(targets))
        for batch in DataLoader(targets, BATCH):
            tracker.score(batch=batch, num_samples=len(batch[0]))
        return torch.tensor(tracker.finalize_scores("targets")).T


def _dattri_task(model: nn.Module) -> tuple[Any, Callable[..., Tensor]]:
    from dattri.task import AttributionTask

    def margin(parameters: dict[str, Tensor], example: tuple[Tensor, Tensor]) -> Tensor:
        image, label = example
        logits = torch.func.functional_call(model, parameters, (image.unsqueeze(0),))
        logp = -F.cross_entropy(logits, label.unsqueeze(0))
        return logp - torch.log1p(-logp.exp())

    def probability(parameters: dict[str, Tensor], example: tuple[Tensor, Tensor]) -> Tensor:
        image, label = example
        logits = torch.func.functional_call(model, parameters, (image.unsqueeze(0),))
        return torch.exp(-F.cross_entropy(logits, label.unsqueeze(0)))

    return AttributionTask(loss_func=margin, model=model, checkpoints=model.state_dict()), probability


def dattri_featurizer(work: Workload, k: int, folder: Path) -> Callable[[], object]:
    """The work of TRAKAttributor on a training batch: per-example gradients and their projection."""
    from dattri.func.projection import random_project

    task, _ = _dattri_task(work.model)
    gradients_of = task.get_grad_loss_func(in_dims=(None, 0))
    parameters, _ = task.get_param(ckpt_idx=0)

    def featurize() -> Tensor:
        gradients = gradients_of(parameters, work.batch)
        project = random_project(gradients, work.size, proj_dim=k, proj_max_batch_size=32, device="cpu")
        return project(gradients, ensemble_id=0)

    return featurize


def dattri_scores(model: nn.Module, train: TensorDataset, targets: TensorDataset, k: int) -> Tensor:
    """Dattri's TRAK."""
    from dattri.algorithm.trak import TRAKAttributor

    task, probability = _dattri_task(model)
    attributor = TRAKAttributor(task, probability, projector_kwargs={"proj_dim": k, "device": "cpu"})
    with torch.no_grad():
        attributor.cache(DataLoader(train, BATCH))
        return attributor.attribute(DataLoader(targets, BATCH)).T


def kronfluence_scores(model: nn.Module, train: TensorDataset, targets: TensorDataset, k: int) -> Tensor:
    """EK-FAC influence functions; ``k`` is not used."""
    import copy

    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.task import Task

    class Margin(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits = model(batch[0])
            with torch.no_grad():
                labels = torch.multinomial(logits.softmax(-1), 1).flatten() if sample else batch[1]
            return F.cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            # Its scores are positive if training on an example lowers the measurement.
            return -ClassificationMargin().output(model, batch).sum()

    task = Margin()
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare_model(copy.deepcopy(model), task)
        analyzer = Analyzer("run", prepared, task, cpu=True, log_level=40, disable_tqdm=True, output_dir=folder)
        size = min(BATCH, len(train))
        analyzer.fit_all_factors("factors", train, per_device_batch_size=size)
        analyzer.compute_pairwise_scores(
            "scores", "factors", targets, train, per_device_query_batch_size=size, per_device_train_batch_size=size
        )
        return analyzer.load_pairwise_scores("scores")["all_modules"]


def captum_scores(model: nn.Module, train: TensorDataset, targets: TensorDataset, k: int) -> Tensor:
    """TracInCP of one checkpoint over convolutional and linear layers; ``k`` is not used."""
    from captum.influence import TracInCP

    layers = [name for name, part in model.named_modules() if isinstance(part, (nn.Conv2d, nn.Linear))]
    tracin = TracInCP(
        model,
        train,
        [model.state_dict()],
        checkpoints_load_func=_load,
        layers=layers,
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        batch_size=min(BATCH, len(train)),
        sample_wise_grads_per_batch=True,
    )
    return torch.cat([tracin.influence(tuple(batch)) for batch in DataLoader(targets, BATCH)])


def captum_fast_scores(model: nn.Module, train: TensorDataset, targets: TensorDataset, k: int) -> Tensor:
    """TracInCPFast of one checkpoint: the last layer alone; ``k`` is not used."""
    from captum.influence import TracInCPFast

    final = [part for part in model.modules() if isinstance(part, nn.Linear)][-1]
    tracin = TracInCPFast(
        model,
        final,
        train,
        [model.state_dict()],
        checkpoints_load_func=_load,
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        batch_size=min(BATCH, len(train)),
    )
    return torch.cat([tracin.influence(tuple(batch)) for batch in DataLoader(targets, BATCH)])


def _load(model: nn.Module, weights: dict[str, Tensor]) -> float:
    model.load_state_dict(weights)
    return 1.0  # the learning rate that a checkpoint's products are multiplied by


FEATURIZERS = {"traker": traker_featurizer, "dattri": dattri_featurizer}
SCORES: dict[str, Scores] = {
    "traker": traker_scores,
    "dattri": dattri_scores,
    "kronfluence EK-FAC": kronfluence_scores,
    "captum TracInCP": captum_scores,
    "captum TracInCPFast": captum_fast_scores,
}
PACKAGES = {"traker": "trak"}


def package_of(name: str) -> str:
    """The module to import for a peer."""
    word = name.split()[0]
    return PACKAGES.get(word, word)
