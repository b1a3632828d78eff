"""Errors about the arguments of constructors name the class that the user wrote."""

import inspect

import pytest

from lightning_trak import callbacks, methods, outputs, projections, replay, retraining
from lightning_trak.methods import influence
from tests.lit import make_model

FOLDERS = (callbacks, methods, influence, outputs, projections, replay, retraining)
PUBLIC = [getattr(folder, name) for folder in FOLDERS for name in folder.__all__]
MADE = [found for found in PUBLIC if inspect.isclass(found) and not inspect.isabstract(found)]


@pytest.mark.parametrize("made", [*dict.fromkeys(MADE)], ids=lambda made: made.__name__)
def test_an_unknown_argument(made):
    required = [
        argument.name
        for argument in inspect.signature(made).parameters.values()
        if argument.default is argument.empty
        and argument.kind in (argument.POSITIONAL_OR_KEYWORD, argument.KEYWORD_ONLY)
    ]
    given = {name: {} for name in required}  # no methods and no outputs, where they are checked first
    if made is methods.Datamodels:
        pytest.skip("it gives its options to scikit-learn")
    with pytest.raises(TypeError, match=rf"{made.__name__}\b.*(outputt|takes no arguments)"):
        made(**given, outputt=None)


@pytest.mark.parametrize(
    ("made", "given", "message"),
    [
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


def test_the_constructor_of_a_base_is_as_it_was():
    assert inspect.signature(outputs.CausalLMMargin).parameters.keys() >= {"pad_token_id", "per_token"}
    assert outputs.CausalLMMargin(pad_token_id=3).fingerprint() != outputs.CausalLMMargin().fingerprint()
    with pytest.raises(TypeError, match=r"TRAK\.__init__\(\) missing 1 required positional argument: 'model'"):
        methods.TRAK()
