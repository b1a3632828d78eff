"""TRAK (Park et al. 2023, arXiv 2303.14186), with what was measured to be better than as published."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import lightning as L
from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_trak.checkpoints.reading import CheckpointsLike
from lightning_trak.checks import shows_options_of
from lightning_trak.features.store import FeatureStore
from lightning_trak.methods.features.base import FeatureMethod, FeatureOptions
from lightning_trak.methods.features.newton import CurvatureChoice, NewtonMethod
from lightning_trak.methods.features.rescoring import ExactScores
from lightning_trak.projections import GaussianProjection
from lightning_trak.running.data.sources import Data
from lightning_trak.running.ranks import Ranks
from lightning_trak.running.trainers import trainer_of
from lightning_trak.scoring.damping import Damping, require_damping
from lightning_trak.scoring.newton.dual import smaller_scorer
from lightning_trak.scoring.newton.lag import Lag
from lightning_trak.scoring.newton.temperature import Temperature
from lightning_trak.scoring.newton.trak import LossGradients, TRAKScorer


class TRAK(NewtonMethod):
    """TRAK: by how much would the output at the target change if the training example counted once more?

    A positive score says that training on the example raises the output at the target. The unit is that of the output:
    a score is the change that one Newton step on projected gradients predicts, averaged over checkpoints (Park et al.
    2023, arXiv 2303.14186).

    Every default is the best-measured one; :meth:`paper` is the published algorithm. The model, its mode, weights,
    ``.grad`` and buffers are never touched: the work is done on a copy.

    Args:
        model: the trained model; a LightningModule with :class:`~lightning_trak.AttributionMixin`, or any module when
            ``output`` is given.
        checkpoints: a directory of :class:`~lightning_trak.TRAKCallback`, of Lightning's ModelCheckpoint or of a
            Hugging Face Trainer; a safetensors, ``.ckpt`` or ``.pt`` file; a state dict; or a list of these. Scores are
            averaged over them. Members of a fleet, see :func:`~lightning_trak.retraining.split_fleet`, have curvatures
            of the examples that each has seen. Default: the weights that the model has. If these change, the store is
            refused.
        store: directory of the features, on a disk that all ranks see. It must be given.
        output: the scalar output to attribute; default: the model's ``configure_model_output()``.
        projection: what compresses gradients; default: :class:`~lightning_trak.projections.SparseProjection` to 16,384
            features, which take 8 KiB in 4 bits (twice that with ``curvature="per_prediction"``).
        curvature: the matrix K: ``"gauss_newton"`` is sum_j R_j phi_j phi_j^T; ``"identity"``, as published, takes
            R_j = 1. ``"per_prediction"`` is for outputs whose loss adds up several predictions for an example, such as
            tokens, pixels or labels: each counts as a classification of its own, too, see
            :mod:`lightning_trak.scoring.newton.per_prediction`. It needs a second row of features for each example,
            which takes as many bytes and as much time. ``"auto"`` is that where it is possible, else
            ``"gauss_newton"``.
        damping: lambda relative to the mean eigenvalue of K; ``"auto"`` chooses it from the features and the number of
            checkpoints (:func:`~lightning_trak.scoring.damping.auto_damping`). Where models were retrained,
            :meth:`score_dampings` and :func:`~lightning_trak.retraining.tune` can choose it.
        loss_gradients: how Q is averaged over checkpoints: ``"per_checkpoint"``, together with what it multiplies; or
            ``"averaged"``, separately, as published: see :class:`~lightning_trak.scoring.TRAKScorer`.
        soft_threshold: scores move towards zero by this much, in the unit of scores (0: not at all).
        temperature: outputs f of training examples are divided by this before Q is taken of them, because what an
            example adds depends on models that have not seen it, which are less sure. 1: Q as it is. ``"auto"``: 1.43
            for one checkpoint; for several, it is larger if they differ more; and it grows with the lag
            (:attr:`~lightning_trak.scoring.newton.noise.Noise.temperature`). K and the damping do not change. If R is
            the same for all examples, ``"auto"`` is 1; a number then divides the scores of a squared error, and does
            not change those of :class:`~lightning_trak.outputs.NegativeLoss`. None:
            ``"auto"`` with ``damping="auto"`` and ``loss_gradients="per_checkpoint"``, else 1.
        lag: how far each training is from its end, at least 1. The automatic damping and temperature grow with it.
            ``"auto"`` measures it by the Newton step of the residuals: 1 after most trainings, and up to 16 after a
            short or gentle one (:mod:`lightning_trak.scoring.newton.lag`). For models that were trained more gently
            than those that are asked about, such as a :class:`~lightning_trak.callbacks.SmoothTwin`, 1 is better.
        parameters: which parameters to differentiate, by name pattern; default: all that require gradients.
        engine: how gradients are computed: ``"auto"``, ``"functional"``, ``"hooks"`` or ``"loop"``, see
            :class:`~lightning_trak.features.settings.FeatureSettings`.
        seed: seed of the projection.
        dtype: how features are stored: a float dtype by name or of torch, or ``"int8"`` or ``"int4"`` (a quarter and an
            eighth of the bytes of float32). Default: ``"float32"``; with the default projection, the first of
            ``"float32"``, ``"int8"`` and ``"int4"`` in which the features of an example take at most 8 KiB.
        weights_only: ``False`` lets ``.ckpt`` and ``.pt`` files run code when they are read; for files you trust only.
        audit: how many examples of each shard, and of each thousand targets, are differentiated again, one at a time by
            plain autograd, and must have the features that the engine gave them. 0 checks none.

    Example::

        trak = TRAK(model, checkpoints="run/snapshots", store="run/features")
        trak.featurize(trainer, train_loader)
        scores = trak.score(trainer, target_loader)  # (num_targets, num_train)
        # exact scores of the best 1000
        best = trak.score(trainer, target_loader, top_k=10, rescore=1000)
    """

    @classmethod
    @shows_options_of(FeatureMethod.__init__)
    def paper(
        cls,
        model: nn.Module,
        checkpoints: CheckpointsLike | None = None,
        store: str | Path | None = None,
        *,
        curvature: CurvatureChoice = "identity",
        damping: Damping = 0.0,
        loss_gradients: LossGradients = "averaged",
        soft_threshold: float = 0.0,
        temperature: Temperature | None = None,
        lag: Lag = "auto",
        **options: Unpack[FeatureOptions],
    ) -> "TRAK":
        """TRAK as published (arXiv 2303.14186): a Gaussian projection, no curvature, no damping, Q averaged separately.

        Args:
            model: as for :class:`TRAK`.
            checkpoints: as for :class:`TRAK`.
            store: as for :class:`TRAK`.
            curvature: as for :class:`TRAK`.
            damping: as for :class:`TRAK`.
            loss_gradients: as for :class:`TRAK`.
            soft_threshold: as for :class:`TRAK`.
            temperature: as for :class:`TRAK`.
            lag: as for :class:`TRAK`.
            **options: what else :class:`TRAK` takes. The default projection is ``GaussianProjection(2048)``.

        Example::

            projection = GaussianProjection(512)
            trak = TRAK.paper(
                model, "run/snapshots", "run/features", projection=projection
            )
        """
        if options.get("projection") is None:
            options["projection"] = GaussianProjection(2048)
        return cls(
            model,
            checkpoints,
            store,
            curvature=curvature,
            damping=damping,
            loss_gradients=loss_gradients,
            soft_threshold=soft_threshold,
            temperature=temperature,
            lag=lag,
            **options,
        )

    def score_dampings(
        self,
        trainer: L.Trainer | None = None,
        data: Data | None = None,
        dampings: Sequence[Damping] = (),
    ) -> dict[Damping, Tensor]:
        """The scores at several dampings, from one pass over the targets.

        :func:`~lightning_trak.retraining.tune` chooses among them, where models were retrained. The features of all
        targets and all scores are in memory at once.

        Args:
            trainer: as for :meth:`score`.
            data: one set of targets, as for :meth:`score`.
            dampings: what takes the place of ``damping``.

        Returns:
            On every rank, by damping, a CPU Tensor ``(num_targets, num_train)``, as :meth:`score` returns.

        Raises:
            FileNotFoundError: if there is no store yet.
            RuntimeError: if featurizing is not complete.
            ValueError: if a value is not a damping, there is no value, the store was made with other settings, or a
                Gram matrix is singular.
        """
        if isinstance(dampings, str) or not isinstance(dampings, Sequence) or not dampings:
            raise ValueError(f"expected a sequence of dampings, such as [0.1, 1, 10], got {dampings!r}")
        for damping in dampings:
            require_damping(damping)
        trainer = trainer_of(trainer)
        features, store, ranks = self.target_features(trainer, data), self._open(trainer), Ranks.of(trainer)
        results: dict[Damping, Tensor] = {}
        for damping in dampings:
            method = copy.copy(self)
            method.damping = damping
            scorer = method.make_scorer(store)
            scorer.fit(trainer.strategy.root_device, ranks)
            directions = [scorer.directions(checkpoint, rows) for checkpoint, rows in enumerate(features)]
            results[damping] = cast(Tensor, scorer.score(directions, ranks=ranks))
        return results

    def _require_enough(self, num_examples: int, dim: int) -> None:
        """Without damping, the Gram matrix of fewer examples than features is singular: refuse before the work begins.

        Raises:
            ValueError: if there are fewer.
        """
        if self.used_masks is not None:
            num_examples = int(self.used_masks.sum(1).min())
        if self.damping == 0 and num_examples < dim:
            raise ValueError(
                f"damping=0 needs at least as many training examples as features, and there are {num_examples} and"
                f" {dim}: use a projection with a smaller dim, such as GaussianProjection({max(1, num_examples // 2)}),"
                " more examples, or damping='auto'"
            )

    def make_scorer(self, store: FeatureStore) -> TRAKScorer:
        """TRAK's scorer, by the smaller of the two systems."""
        store.require_complete()
        curved = self._curved(store)
        return self._new_scorer(smaller_scorer(store, curved), store, curved)

    def _exact_scores(self) -> ExactScores:
        members = [checkpoint.name for checkpoint in self.checkpoints if checkpoint.subset is not None]
        if members:
            raise ValueError(
                f"rescore= takes the curvature of all training examples, but {members[0]} has seen only some of them:"
                " score without rescore=, or use models that were trained on all examples"
            )
        curved = self._prediction_curvature() if self.curvature == "per_prediction" else None
        return ExactScores(*self._step(), self._tempered(), curved)
