"""Constructors and methods show all their arguments, and errors about a misspelt one name the nearest right one."""

import inspect

import pytest

from lightning_trak import methods
from tests.lit import make_model


@pytest.mark.parametrize(
    ("made", "given", "message"),
    [
        (methods.TRAK, "dampng", "TRAK got .* 'dampng': did you mean 'damping'"),
        (methods.TRAK.paper, "outputt", "TRAK got .* 'outputt': did you mean 'output'"),
        (methods.TracIn, "outputt", "TracIn got .* 'outputt': did you mean 'output'"),
        (methods.TracIn, "learning_rate", "did you mean 'learning_rates'"),
        (methods.GradientDot, "preconditoned", "did you mean 'preconditioned'"),
        (methods.InfluenceFunction, "dampening", "InfluenceFunction got .* did you mean 'damping'"),
        (methods.EKFACInfluence, "parameter", "did you mean 'parameters'"),
        (methods.KNNShapley, "label_key", "did you mean 'labels_key'"),
    ],
)
def test_the_nearest_right_name(made, given, message):
    with pytest.raises(TypeError, match=message):
        made(make_model(), **{given: 1})


@pytest.mark.parametrize(
    ("made", "last", "default"),
    [
        (methods.TRAK, "audit", 2),
        (methods.TRAK.paper, "projection", None),
        (methods.TracIn, "engine", "auto"),
        (methods.InfluenceFunction, "weights_only", True),
        (methods.KNNShapley, "layer", None),
        (methods.TRAK.score, "train_groups", None),
        (methods.TRAK.attribute, "candidates", None),
        (methods.TRAK.featurize, "overwrite", False),
        (methods.ExactKernel.featurize, "part", None),
    ],
)
def test_help_shows_the_arguments_that_methods_share(made, last, default):
    arguments = inspect.signature(made).parameters
    assert arguments[last].default == default
    assert not any(argument.kind is argument.VAR_KEYWORD for argument in arguments.values())
