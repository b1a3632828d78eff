"""The arguments that all methods over features share."""

from typing import TypedDict

from lightning_trak.features.dtypes import Dtype
from lightning_trak.features.engines import EngineName
from lightning_trak.gradients import ParameterSelection
from lightning_trak.outputs import ModelOutput
from lightning_trak.projections import Projection


class FeatureOptions(TypedDict, total=False):
    """The keyword arguments of all methods over features, see :class:`~lightning_trak.methods.FeatureMethod`."""

    output: ModelOutput | None
    projection: Projection | None
    parameters: ParameterSelection
    engine: EngineName
    seed: int
    dtype: Dtype | None
    weights_only: bool
    audit: int
