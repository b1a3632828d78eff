"""Errors about a misspelt argument of a constructor name the user's class and the nearest right name."""

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
