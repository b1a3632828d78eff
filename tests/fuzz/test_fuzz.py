"""Whatever the model, its data and its habits: scores are right, or refused in words.

``make fuzz`` draws many more specifications than ``make test``, and other ones each time. One that fails is made as
plain as possible and printed: ``check_scores(Spec(...))`` repeats it.
"""

import os
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from lightning_trak.projections import (
    GaussianProjection,
    KroneckerProjection,
    RademacherProjection,
    SparseProjection,
)
from tests.fuzz.check import ENGINES, check_features, check_scores
from tests.fuzz.parts import Level
from tests.fuzz.specs import alone, specs

pytestmark = pytest.mark.filterwarnings(
    "ignore:Initializing zero-element tensors", "ignore:Full backward hook is firing when gradients are computed"
)

MANY = os.environ.get("FUZZ_EXAMPLES")
FIRST_SEED = random.SystemRandom().randrange(1 << 32) if MANY else 0

# Hypothesis draws ten examples afresh, beside the simplest one, and then varies those it has: many short runs see more.
ROUND = 11


def rounds(examples: int) -> range:
    """How often a property is tried with ten examples: a fixed few times, or for as many as were asked for."""
    return range(-(-int(MANY or examples) // (ROUND - 1)))


def fuzz(check: Callable[..., None], number: int, **strategies: st.SearchStrategy[Any]) -> None:
    """One round."""

    @seed(FIRST_SEED + number)
    @settings(max_examples=ROUND, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(**strategies)
    def run(**drawn):
        check(**drawn)

    run()


# Unless there is time: odd things only, by one engine, and with vectors only where they take sequences just as well.
ALONE = {
    name: spec
    for name, spec in alone().items()
    if MANY or (spec.level > Level.PLAIN and not name.endswith(" of steps"))
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_each_alone(name):
    check_scores(ALONE[name], ENGINES if MANY else ("auto",))


@pytest.mark.slow
@pytest.mark.timeout(0)  # a failing specification takes a while to be made plain
@pytest.mark.parametrize("number", rounds(20))
def test_scores(number):
    fuzz(check_scores, number, spec=specs())


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("number", rounds(10))
def test_streamed_scores(number):
    fuzz(partial(check_scores, engines=("auto", "loop"), streamed=True), number, spec=specs())


PROJECTIONS = [
    SparseProjection(16),
    GaussianProjection(8),
    RademacherProjection(8),
    KroneckerProjection(2, 3),
    KroneckerProjection(2, 2, dim=16),
]


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("number", rounds(10))
def test_features(number):
    fuzz(check_features, number, spec=specs(), projection=st.sampled_from(PROJECTIONS))
