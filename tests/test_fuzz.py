"""Whatever the model, its data and its habits: scores are right, or refused in words.

``make fuzz`` draws many more specifications than ``make test``, and other ones each time. One that fails is printed as
an expression: ``check_scores(Spec(...))`` repeats it.
"""

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_trak.projections import (
    GaussianProjection,
    KroneckerProjection,
    RademacherProjection,
    SparseProjection,
)
from tests.fuzz.check import ENGINES, check_features, check_scores
from tests.fuzz.specs import alone, specs

MANY = os.environ.get("FUZZ_EXAMPLES")


def fuzzed(examples):
    """Settings: a fixed few examples, or as many random ones as were asked for."""
    return settings(
        max_examples=int(MANY or examples),
        derandomize=MANY is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


ALONE = alone()


@pytest.mark.parametrize("name", ALONE)
def test_each_alone(name):
    check_scores(ALONE[name], ENGINES if MANY else ("auto",))


@pytest.mark.timeout(0)
@fuzzed(40)
@given(spec=specs())
def test_scores(spec):
    check_scores(spec)


PROJECTIONS = [
    SparseProjection(16, nonzeros=4),
    GaussianProjection(8),
    RademacherProjection(8),
    KroneckerProjection(2, 3),
    KroneckerProjection(2, 2, dim=16),
]


@pytest.mark.timeout(0)
@fuzzed(15)
@given(spec=specs(), projection=st.sampled_from(PROJECTIONS))
def test_features(spec, projection):
    check_features(spec, projection)
