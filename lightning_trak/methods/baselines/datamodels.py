"""Datamodels: the output as a sparse linear function of which examples were trained on."""

from typing import Any

import torch
from torch import Tensor

from lightning_trak.checks import needs_extra, positive
from lightning_trak.methods.baselines.subsets import SubsetMethod


class Datamodels(SubsetMethod):
    """By how much does the output at the target change if the training example is in the training set?

    A positive score says that training on the example raises the output at the target. The unit is that of the output:
    scores are the coefficients of a LASSO regression of each target's output on the subsets' masks (Ilyas et al. 2022,
    arXiv 2202.00622, section 2), which shrinks them towards zero.

    scikit-learn's ``LassoCV`` fits, with an intercept, and chooses the
    penalty of each target by cross-validation. Needs the extra ``datamodels``. An example that is in all subsets, or in
    none, gets 0: they do not show what it does.

    Args:
        masks: bool ``(num_subsets, num_train)``.
        outputs: ``(num_targets, num_subsets[, num_seeds])``, see
            :class:`~lightning_trak.methods.baselines.subsets.SubsetMethod`.
        folds: of the cross-validation, each a run of consecutive subsets.
        n_jobs: targets that are fitted at once, in threads; -1 is one for each CPU.
        **options: further options of ``sklearn.linear_model.LassoCV``, such as ``max_iter``.
    """

    def __init__(self, masks: Tensor, outputs: Tensor, *, folds: int = 5, n_jobs: int = 1, **options: Any) -> None:
        super().__init__(masks, outputs)
        if not 2 <= positive("folds", folds) <= len(masks):
            raise ValueError(f"folds must be from 2 to the number of subsets, {len(masks)}; got {folds}")
        self.folds = folds
        self.n_jobs = n_jobs
        self.options = options

    def estimate(self) -> Tensor:
        """The coefficients, ``(num_targets, num_train)``.

        Raises:
            ModuleNotFoundError: if scikit-learn is not installed.
        """
        with needs_extra("datamodels", "Datamodels needs scikit-learn"):
            from sklearn.linear_model import LassoCV
            from sklearn.utils.parallel import Parallel, delayed
        masks = self.masks.double().numpy()
        scores = torch.zeros(len(self.outputs), masks.shape[1])
        # If the output never changes, all coefficients are 0, and LassoCV cannot choose a penalty.
        units = self.outputs.amax(1) - self.outputs.amin(1)
        changing = units.nonzero().flatten()

        def fit(target: int) -> Tensor:
            unit = float(units[target])  # LassoCV tries no penalty below 1e-15
            options = self.options
            if not isinstance(options.get("alphas", 0), int | None):
                options = options | {"alphas": torch.as_tensor(options["alphas"]).double().numpy() / unit}
            found = LassoCV(cv=self.folds, **options).fit(masks, self.outputs[target].numpy() / unit)
            return torch.as_tensor(found.coef_) * unit

        fits = Parallel(n_jobs=self.n_jobs, prefer="threads")(  # the solver lets other threads run
            delayed(fit)(target) for target in changing.tolist()
        )
        for target, coefficients in zip(changing, fits, strict=True):
            scores[target] = coefficients
        return scores
