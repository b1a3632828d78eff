"""Groups of examples, and what is refused."""

import numpy as np
import pytest
import torch

from lightning_trak.scoring import Groups, aggregate_scores


def test_groups_are_in_the_order_of_their_names():
    groups = Groups(["b", None, "a", "b"])
    assert groups.names == ("a", "b")
    assert groups.numbers.tolist() == [1, -1, 0, 1]
    assert groups.sizes.tolist() == [1, 2]
    assert Groups(np.array(["b", None, "a"], dtype=object)).numbers.tolist() == [1, -1, 0]  # as pandas has texts
    assert Groups(torch.tensor([5, 2]), names=[5, 2]).numbers.tolist() == [0, 1]


def test_a_group_that_is_left_out_counts_for_nothing():
    scores = torch.tensor([[1.0, 2.0, 4.0]])
    assert aggregate_scores(scores, train_groups=["x", None, "x"]).tolist() == [[5.0]]
    assert aggregate_scores(scores, train_groups=Groups([0, 0, 1], [1, -1, 0.5])).tolist() == [[-1.0, 2.0]]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"labels": ["a", "c"], "names": ["a", "b"]}, "label of example 1 is 'c', which is not among"),
        ({"labels": ["a", "a"], "names": ["a", "b"]}, "group 'b' has no examples"),
        ({"labels": [None, None]}, "there are no groups"),
        ({"labels": []}, "there are no groups"),
        ({"labels": ["a", 1]}, "got both"),
        ({"labels": ["a"], "names": ["a", "a"]}, "names of groups must differ"),
        ({"labels": [0.5]}, "label of example 0 is 0.5"),
        ({"labels": [True]}, "label of example 0 is True"),
        ({"labels": "abc"}, "got a str"),
        ({"labels": [1, 2], "weights": [1.0, float("nan")]}, "weight of example 1 is nan"),
        ({"labels": [1, 2], "weights": [1.0]}, "expected 2 weights"),
    ],
)
def test_what_is_refused(arguments, error):
    with pytest.raises((ValueError, TypeError), match=error):
        Groups(**arguments)


def test_a_mean_needs_weights():
    scores = torch.ones(2, 3)
    with pytest.raises(ValueError, match="group 1 are all zero"):
        aggregate_scores(scores, "mean", Groups([0, 1], [1, 0]))
    with pytest.raises(ValueError, match="weights of at least 0"):
        aggregate_scores(scores, "mean", Groups([0, 1], [1, -1]))
    with pytest.raises(ValueError, match="expected scores of shape"):
        aggregate_scores(scores[0], "mean")
