"""Scores and choices that cannot be logged are refused with the reason."""

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_trak.reporting.loggers import log_attributions
from lightning_trak.scoring import TopK
from tests.lit import TARGETS, TRAIN

SCORES = torch.randn(len(TARGETS), len(TRAIN), generator=torch.Generator().manual_seed(0))


def test_best_scores_that_do_not_fit_are_refused(tmp_path):
    best, worst = (TopK(*SCORES.topk(5, largest=largest)) for largest in (True, False))
    logger = CSVLogger(tmp_path)
    with pytest.raises(ValueError, match="do not have the highest first, as largest=True says"):
        log_attributions([logger], worst, TRAIN, TARGETS)
    with pytest.raises(ValueError, match="do not have the lowest first, as largest=False says"):
        log_attributions([logger], best, TRAIN, TARGETS, largest=False)
    with pytest.raises(ValueError, match="of 13 targets and 50 training examples, the data hold 50 and 50"):
        log_attributions([logger], best, TRAIN, TRAIN)
    with pytest.raises(ValueError, match=r"it has indices from \d+ to \d+, of 13 training examples"):
        log_attributions([logger], best, TARGETS, TARGETS)
    with pytest.raises(TypeError, match="by their positions, not by a mask"):
        log_attributions([logger], best, TRAIN, TARGETS, shown=[True] * 13)
    with pytest.raises(IndexError, match="there is no target -1"):
        log_attributions([logger], best, TRAIN, TARGETS, shown=[-1])


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"shown": 3}, TypeError, r"a list of positions, such as \[3\], got 3"),
        ({"image": lambda item: None}, TypeError, "image must return a Tensor, got a NoneType"),
        ({"image": lambda item: item[0]}, ValueError, r"image \(height, width\) or .*, got \(6,\)"),
        ({"image": lambda item: item[0].view(6, 1, 1)}, ValueError, r"or \(1 or 3, height, width\), got \(6, 1, 1\)"),
    ],
)
def test_what_cannot_be_logged(tmp_path, options, error, match):
    with pytest.raises(error, match=match):
        log_attributions([CSVLogger(tmp_path)], SCORES, TRAIN, TARGETS, k=1, **options)
