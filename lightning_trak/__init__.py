"""Training-data attribution for PyTorch Lightning: TRAK and others, and how to tell whether to believe it.

Names are imported on first use, so that ``lightning_trak.metrics.functional`` works without importing Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_trak.version import __version__

if TYPE_CHECKING:
    from lightning_trak.callbacks import TrainingRecorder, TRAKCallback
    from lightning_trak.methods import TRAK, GradientCosine, GradientDot, Metagradient, TracIn
    from lightning_trak.metrics import LinearDatamodelingScore
    from lightning_trak.outputs import AttributionMixin

_HOMES = {
    "TRAK": "methods",
    "AttributionMixin": "outputs",
    "GradientCosine": "methods",
    "GradientDot": "methods",
    "LinearDatamodelingScore": "metrics",
    "Metagradient": "methods",
    "TRAKCallback": "callbacks",
    "TracIn": "methods",
    "TrainingRecorder": "callbacks",
}

__all__ = [
    "TRAK",
    "AttributionMixin",
    "GradientCosine",
    "GradientDot",
    "LinearDatamodelingScore",
    "Metagradient",
    "TRAKCallback",
    "TracIn",
    "TrainingRecorder",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
