"""Scores of several methods as one."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from lightning_trak.scoring import combine_runs, combine_scores

GENERATOR = torch.Generator().manual_seed(0)
SCORES = torch.randn(4, 9, generator=GENERATOR) + 0.5
OTHERS = 20 * (SCORES + torch.randn(4, 9, generator=GENERATOR)) - 3


def test_is_the_mean_of_the_scores_and_of_their_fit_by_the_others() -> None:
    combined = combine_scores(SCORES, OTHERS).numpy()
    for scores, others, found in zip(SCORES.double().numpy(), OTHERS.double().numpy(), combined, strict=True):
        slope, constant = np.polyfit(others, scores, 1)
        assert slope > 0
        np.testing.assert_allclose(found, (scores + constant + slope * others) / 2, rtol=1e-10)


def test_the_others_count_as_much_as_they_correlate() -> None:
    combined = combine_scores(SCORES, OTHERS)
    for scores, others, found in zip(SCORES, OTHERS, combined, strict=True):
        first, second = ((row - row.mean()) / row.std() for row in (scores.double(), others.double()))
        correlation = torch.corrcoef(torch.stack([first, second]))[0, 1]
        expected = first + correlation * second
        assert torch.corrcoef(torch.stack([expected, found]))[0, 1] > 1 - 1e-12


@pytest.mark.parametrize("others", [-SCORES, torch.full_like(SCORES, 0.1), torch.zeros_like(SCORES)])
def test_others_that_do_not_agree_change_no_order(others: torch.Tensor) -> None:
    mean = SCORES.double().mean(1, keepdim=True)
    torch.testing.assert_close(combine_scores(SCORES, others) - mean, (SCORES - mean) / 2)


def test_unit_and_level_of_the_others_do_not_count() -> None:
    combined = combine_scores(SCORES, OTHERS)
    torch.testing.assert_close(combine_scores(SCORES, 1e-200 * OTHERS.double()), combined)
    torch.testing.assert_close(combine_scores(SCORES, 1e200 * OTHERS.double()), combined)
    torch.testing.assert_close(combine_scores(SCORES, OTHERS + 7), combined, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(combine_scores(2 * SCORES, OTHERS), 2 * combined)


def test_targets_are_treated_alone() -> None:
    torch.testing.assert_close(combine_scores(SCORES, OTHERS)[2:3], combine_scores(SCORES[2:3], OTHERS[2:3]))


def test_equal_scores_stay() -> None:
    torch.testing.assert_close(combine_scores(SCORES, SCORES), SCORES.double())
    torch.testing.assert_close(combine_scores(SCORES[:, :1], OTHERS[:, :1]), SCORES[:, :1].double())


@pytest.mark.parametrize(
    ("others", "error", "match"),
    [
        (OTHERS[:2], ValueError, r"\(4, 9\) and others \(2, 9\); expected scores of the same targets"),
        (OTHERS[0], ValueError, r"others of shape \(num_targets, num_train\), got \(9,\)"),
        (OTHERS[:, :0], ValueError, r"got \(4, 0\)"),
        (OTHERS.index_fill(0, torch.tensor([1]), torch.nan), ValueError, "others of target 1 are not finite"),
        (OTHERS.numpy(), TypeError, "`others` as a torch.Tensor, but got a ndarray"),
        (OTHERS + 0j, TypeError, "got torch.complex64"),
    ],
)
def test_refusals(others: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        combine_scores(SCORES, others)


def of_runs(noise: float, runs: int = 3, seed: int = 0) -> list[torch.Tensor]:
    """Scores that agree between runs up to noise."""
    generator = torch.Generator().manual_seed(seed)
    return [SCORES + noise * torch.randn(SCORES.shape, generator=generator) for _ in range(runs)]


def centred(scores: torch.Tensor) -> np.ndarray[Any, Any]:
    return (scores - scores.mean(1, keepdim=True)).double().numpy()


@pytest.mark.parametrize("runs", [2, 3])
def test_weights_predict_the_run_that_is_left_out(runs: int) -> None:
    methods = of_runs(2, runs), of_runs(1, runs, seed=1), [-own for own in of_runs(1, runs, seed=2)]
    columns, goals = [], []
    for run in range(runs):
        goal = centred(methods[0][run])
        norms = np.linalg.norm(goal, axis=1, keepdims=True)
        rest = [[own for place, own in enumerate(method) if place != run] for method in methods]
        columns.append(np.stack([(centred(torch.stack(own).mean(0)) / norms).ravel() for own in rest], 1))
        goals.append((goal / norms).ravel())
    weights, _ = nnls(np.concatenate(columns), np.concatenate(goals))
    assert weights[1] > 0
    assert weights[2] == 0
    expected = sum(
        weight * torch.stack(method).double().mean(0) for weight, method in zip(weights, methods, strict=True)
    )
    torch.testing.assert_close(combine_runs(*methods), torch.as_tensor(expected), rtol=1e-6, atol=1e-6)


def test_what_runs_share_counts() -> None:
    own, shared = of_runs(20), of_runs(0.01, seed=1)
    found = combine_runs(own, shared)
    assert torch.corrcoef(torch.stack([found[0], SCORES[0].double()]))[0, 1] > 0.98
    assert torch.corrcoef(torch.stack([sum(own)[0], SCORES[0]]))[0, 1] < 0.9


def test_runs_that_agree_keep_their_scores() -> None:
    found = combine_runs([SCORES, SCORES + 1e-6 * OTHERS], [torch.zeros_like(SCORES)] * 2)
    torch.testing.assert_close(found, SCORES.double(), rtol=1e-3, atol=1e-3)


def test_units_and_the_order_of_runs_do_not_count() -> None:
    methods = of_runs(1), of_runs(1, seed=1)
    found = combine_runs(*methods)
    torch.testing.assert_close(combine_runs(methods[0], [1e-200 * own.double() for own in methods[1]]), found)
    torch.testing.assert_close(combine_runs([1e200 * own.double() for own in methods[0]], methods[1]), 1e200 * found)
    torch.testing.assert_close(combine_runs(*(method[::-1] for method in methods)), found)
    torch.testing.assert_close(combine_runs(*methods, methods[1]), found)


def test_targets_with_equal_scores_tell_nothing() -> None:
    methods = of_runs(1), of_runs(1, seed=1)
    more = [[torch.cat([own, torch.full((1, 9), 0.1)]) for own in method] for method in methods]
    torch.testing.assert_close(combine_runs(*more)[:4], combine_runs(*methods))


@pytest.mark.parametrize(
    ("methods", "error", "match"),
    [
        ([SCORES], TypeError, "method 0 as a sequence, one tensor for each run, got a Tensor"),
        ([[]], ValueError, "no scores of method 0; expected those of two runs"),
        ([[SCORES]], ValueError, "combine_runs needs two at least, and combine_scores takes scores of one"),
        ([[SCORES, SCORES]], ValueError, "run 1 has the same scores as an earlier one; expected runs with other seeds"),
        ([[SCORES, OTHERS[:2]]], ValueError, r"method 0 have the shapes \[\(4, 9\), \(2, 9\)\]"),
        ([[SCORES, OTHERS], [SCORES]], ValueError, r"method 1 .* \(1, 4, 9\), method 0 of \(2, 4, 9\)"),
        ([[SCORES, OTHERS.log()]], ValueError, "scores of method 0 at run 1 of target 0 are not finite"),
        ([[SCORES, None]], TypeError, "method 0 at run 1` as a torch.Tensor, but got a NoneType"),
        ([[SCORES, -SCORES]], ValueError, "no method predicts the first one's scores at another run"),
    ],
)
def test_refusals_of_runs(methods: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        combine_runs(*methods)
