"""What is no tensor, and NaN, which would be ranked as the highest number, are refused by all functions of scores."""

import pytest
import torch

from lightning_trak.metrics import LinearDatamodelingScore
from lightning_trak.metrics.functional import (
    bootstrap_interval,
    crossed_bootstrap_interval,
    flip_labels,
    linear_datamodeling_score,
    mislabel_detection_curve,
    noise_ceiling,
    rank_rows,
    spearman_corrcoef,
    spearman_influence,
)
from lightning_trak.reporting.shares import shares_table
from lightning_trak.retraining import joint_removal_mask, removal_masks, tune
from lightning_trak.scoring import Groups, aggregate_scores

MASKS = torch.eye(6).bool()
SCORES, OUTPUTS, SEEDS = torch.randn(3, 6), torch.randn(3, 6), torch.randn(3, 6, 2)
FLAGS = torch.arange(6) < 2

FUNCTIONS = {
    "spearman_corrcoef": (lambda x: spearman_corrcoef(x, SCORES), SCORES),
    "spearman_corrcoef, second": (lambda x: spearman_corrcoef(SCORES, x), SCORES),
    "spearman_influence": (lambda x: spearman_influence(x, SCORES), SCORES),
    "rank_rows": (rank_rows, SCORES),
    "noise_ceiling": (noise_ceiling, SEEDS),
    "linear_datamodeling_score": (lambda x: linear_datamodeling_score(x, OUTPUTS, MASKS), SCORES),
    "linear_datamodeling_score, outputs": (lambda x: linear_datamodeling_score(SCORES, x, MASKS), OUTPUTS),
    "LinearDatamodelingScore": (lambda x: LinearDatamodelingScore(MASKS).update(x, OUTPUTS), SCORES),
    "mislabel_detection_curve": (lambda x: mislabel_detection_curve(x, FLAGS), SCORES[0]),
    "removal_masks": (lambda x: removal_masks(x, 1), SCORES),
    "joint_removal_mask": (lambda x: joint_removal_mask(x, 1), SCORES),
    "shares_table": (lambda x: shares_table(x, Groups(list("abcdef"))), SCORES),
    "tune": (lambda x: tune({"a": SCORES}, MASKS, x, folds=2), OUTPUTS),
}
WITHOUT_NUMBERS = {
    "bootstrap_interval": (bootstrap_interval, SCORES[0]),
    "crossed_bootstrap_interval": (crossed_bootstrap_interval, SCORES),
    "aggregate_scores": (lambda x: aggregate_scores(x, "mean"), SCORES),
    "flip_labels": (flip_labels, torch.arange(20) % 3),
    "mislabel_detection_curve, flags": (lambda x: mislabel_detection_curve(SCORES[0], x), FLAGS),
    "masks": (lambda x: linear_datamodeling_score(SCORES, OUTPUTS, x), MASKS),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nan_is_refused(name):
    function, right = FUNCTIONS[name]
    function(right)
    wrong = right.clone()
    wrong.view(-1)[3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        function(wrong)


@pytest.mark.parametrize("name", [*FUNCTIONS, *WITHOUT_NUMBERS])
@pytest.mark.parametrize("make", [lambda x: x.numpy(), lambda x: x.tolist()], ids=["ndarray", "list"])
def test_what_is_no_tensor_is_refused(name, make):
    function, right = (FUNCTIONS | WITHOUT_NUMBERS)[name]
    function(right)
    with pytest.raises((TypeError, ValueError), match=r"^Expected .*torch\..* but got a (ndarray|list)"):
        function(make(right))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_complex_numbers_are_refused(name):
    function, right = FUNCTIONS[name]
    with pytest.raises(TypeError, match=r"real numbers, but got torch\.complex64"):
        function(right.to(torch.complex64))


@pytest.mark.parametrize("name", FUNCTIONS | WITHOUT_NUMBERS)
def test_sparse_tensors_are_refused(name):
    function, right = (FUNCTIONS | WITHOUT_NUMBERS)[name]
    with pytest.raises(TypeError, match=r"Expected `.*` as a dense tensor, but got torch.sparse_coo. Use `.to_dense"):
        function(right.to_sparse())


def test_scores_are_no_booleans():
    with pytest.raises(TypeError, match=r"Expected `scores` as numbers, but got torch\.bool"):
        linear_datamodeling_score(SCORES > 0, OUTPUTS, MASKS)
