"""What the package leaves for Python's garbage collector.

A tensor in a reference cycle keeps its memory until the collector comes. If it is on a GPU, and the collector comes in
a forked worker of a DataLoader, CUDA aborts the worker.
"""

import gc
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_trak import TRAK, GradientCosine, Metagradient
from lightning_trak.methods import (
    ConjugateGradient,
    EKFACInfluence,
    ExactKernel,
    Explicit,
    InfluenceFunction,
    KNNShapley,
)
from tests.lit import TARGETS, TRAIN, make_checkpoints, make_model, make_trainer
from tests.replay.runs import Net, train
from tests.replay.runs import make_data as recorded_data


def metagradient(folder: Path):
    module, data = Net(), recorded_data()
    trainer = train(module, data, folder)
    return lambda _: Metagradient(module, folder, progress_bar=False).attribute(trainer, data, recorded_data(3, seed=5))


def of_model(kind, **options):
    def make(folder: Path):
        def run(name: str):
            stored = {"store": folder / name} if kind in (TRAK, GradientCosine, ExactKernel) else {}
            method = kind(make_model(), make_checkpoints(1), **stored, **options)
            return method.attribute(make_trainer(), DataLoader(TRAIN, batch_size=16), TARGETS)

        return run

    return make


METHODS = {
    "trak": of_model(TRAK),
    "functional": of_model(TRAK, engine="functional"),
    "cosine": of_model(GradientCosine),
    "exact kernel": of_model(ExactKernel),
    "explicit": of_model(InfluenceFunction, solver=Explicit()),
    "conjugate gradient": of_model(InfluenceFunction, solver=ConjugateGradient()),
    "ekfac": of_model(EKFACInfluence, parameters=["first.*", "head.*"]),
    "knn": of_model(KNNShapley),
    "metagradient": metagradient,
}


@pytest.mark.parametrize("name", METHODS)
def test_no_tensor_is_in_a_cycle(tmp_path, name):
    run = METHODS[name](tmp_path)
    run("first")  # what is kept for later calls is there
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.disable()
    try:
        run("second")
        gc.collect()
        found = [tuple(thing.shape) for thing in gc.garbage if isinstance(thing, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.enable()
        gc.garbage.clear()
        gc.collect()
    assert found == []
