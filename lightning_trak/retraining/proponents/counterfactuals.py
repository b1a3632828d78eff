"""Counterfactuals: how far predictions fall when models are trained without their strongest proponents."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_trak.checks import positive
from lightning_trak.outputs import ModelOutput
from lightning_trak.retraining.fleets.fleet import RetrainingFleet
from lightning_trak.retraining.proponents.brittleness import Brittleness
from lightning_trak.retraining.proponents.masks import removal_masks, require_scores
from lightning_trak.running.data.loaders import as_loader
from lightning_trak.running.data.loading import num_examples
from lightning_trak.texts.display import Displayed


class Counterfactuals(Displayed):
    """Removes the strongest proponents of each target, as each method ranks them, and trains again without them.

    A prediction is *brittle* if it changes when a few training examples are removed. The better a method finds these
    examples, the further predictions fall (Ilyas et al. 2022, arXiv 2202.00622, section 4.1; Park et al. 2023, arXiv
    2303.14186, section 5). For each method, target and k, ``num_seeds`` models are trained without that target's k
    strongest proponents. As references, ``num_references * num_seeds`` models are trained on everything. So there are
    ``(methods * ks * targets + num_references) * num_seeds`` models in all.

    Args:
        directory: where the models' outputs are kept; it may hold some from earlier runs, see :class:`RetrainingFleet`.
        make_module: as for :class:`RetrainingFleet`, and so are the next three.
        make_trainer: makes a new Trainer.
        train: the whole training set.
        targets: the examples whose predictions should fall; a few dozen are enough.
        scores: ``(num_targets, num_train)`` for each method by name. Give random scores
            (:class:`~lightning_trak.methods.RandomScores`) too, as the baseline that other methods must beat.
        ks: how many proponents are removed.
        num_seeds: models for each method, target and k.
        num_references: groups of ``num_seeds`` models that are trained on everything, at least 2. Their outputs are the
            reference for all targets, and the differences between the groups show the noise.
        seed: as for :class:`RetrainingFleet`, and so are the next two.
        output: the output whose fall is measured.
        make_loader: makes the loader of a subset.
        overwrite: as for :class:`RetrainingFleet`.

    Attributes:
        fleet: trains the models. Its first subsets are the references; a subset for each method, k and target follows,
            the target changing fastest.

    Raises:
        ValueError: if scores and data do not fit, or a k or number is out of range.

    Example::

        scores = {
            "TRAK": trak.score(trainer, targets),
            "random": RandomScores().attribute(trainer, train, targets),
        }
        removal = Counterfactuals(
            "run/removed", LitNet, make_trainer, train, targets, scores, (10, 40, 160)
        )
        removal.run(together=50)
        print(removal.brittleness().table().markdown())
    """

    _shown = ("methods", "ks", "num_references", "fleet.directory")

    def __init__(
        self,
        directory: str | Path,
        make_module: Callable[[], L.LightningModule],
        make_trainer: Callable[[], L.Trainer],
        train: DataLoader[Any] | Dataset[Any],
        targets: DataLoader[Any] | Dataset[Any],
        scores: Mapping[str, Tensor],
        ks: Sequence[int],
        *,
        num_seeds: int = 3,
        num_references: int = 5,
        seed: int = 0,
        output: ModelOutput | None = None,
        make_loader: Callable[[Dataset[Any]], DataLoader[Any]] | None = None,
        overwrite: bool = False,
    ) -> None:
        num_train, num_targets = (num_examples(as_loader(data)) for data in (train, targets))
        require_scores(scores, num_targets, num_train)
        if not isinstance(ks, Sequence):
            raise TypeError(f"expected ks as numbers of proponents, such as (10, 40), got {ks!r}")
        if not scores or not ks:
            raise ValueError(f"expected the scores of some methods and some ks, got {len(scores)} and {len(ks)}")
        if positive("num_references", num_references) < 2:
            raise ValueError(
                f"num_references must be at least 2, so that the noise can be measured; got {num_references}"
            )
        self.methods = tuple(scores)
        self.ks = tuple(sorted({positive("k", k) for k in ks}))
        self.num_references = num_references
        removed = [removal_masks(values.cpu(), k) for values in scores.values() for k in self.ks]
        masks = torch.cat([torch.ones(num_references, num_train, dtype=torch.bool), *removed])
        self.fleet = RetrainingFleet(
            directory,
            make_module,
            make_trainer,
            train,
            targets,
            masks,
            num_seeds=num_seeds,
            seed=seed,
            output=output,
            make_loader=make_loader,
            overwrite=overwrite,
        )

    def run(self, *args: Any, **options: Any) -> None:
        """Train the models that are missing; arguments as for :meth:`RetrainingFleet.run`."""
        self.fleet.run(*args, **options)

    def brittleness(self, threshold: float = 0.0) -> Brittleness:
        """How far the predictions fell, and how many flipped.

        Args:
            threshold: a prediction flips when the output falls to this or below.

        Raises:
            RuntimeError: if models are missing.
        """
        found = self.fleet.outputs  # of all models at all targets
        num_targets = len(found)
        removed = found[:, self.num_references :].view(num_targets, len(self.methods), len(self.ks), num_targets, -1)
        own = torch.arange(num_targets)  # each target by the models that were trained without its proponents
        outputs = removed[own, :, :, own].permute(1, 2, 0, 3)
        return Brittleness(self.methods, self.ks, outputs, found[:, : self.num_references], threshold)
