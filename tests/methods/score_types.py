"""What type checkers say of scores. mypy checks this file (`make lint`); nothing runs it."""

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import assert_type

from lightning_trak import TRAK
from lightning_trak.methods import Method
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.scoring import BothEnds, Interval, TopK


def types_of_scores(trak: TRAK, trainer: L.Trainer, data: DataLoader[Tensor]) -> None:
    assert_type(trak.score(trainer, data), Tensor)
    assert_type(trak.score(trainer, data, train=[0, 3], output=ClassificationMargin(labels=1)), Tensor)
    assert_type(trak.score(trainer, data, aggregate="mean", groups=["a", None], train_groups=[0, 1]), Tensor)
    top = trak.score(trainer, data, top_k=10)
    assert_type(top, BothEnds)
    assert_type(top.values, Tensor)
    assert_type(top.opponents.indices, Tensor)
    assert_type(trak.score(trainer, data, top_k=10, largest=False), TopK)
    assert_type(trak.score(trainer, data, top_k=10, rescore=100, train=data), BothEnds)
    assert_type(trak.score(data=data), Tensor)
    assert_type(trak.score(None, data, top_k=10), BothEnds)
    assert_type(trak.score(data=data, top_k=10, largest=True), TopK)
    assert_type(trak.score(trainer, data, train=data), Tensor)
    assert_type(trak.score(trainer, data, top_k=10, aggregate="mean", interval=0.9), Interval)


def types_of_attributions(method: Method, trainer: L.Trainer, data: DataLoader[Tensor]) -> None:
    assert_type(method.attribute(trainer, data, data), Tensor)
    assert_type(method.attribute(trainer, data, data, aggregate="sum", candidates=data), Tensor)
    assert_type(method.attribute(trainer, data, data, top_k=3), BothEnds)
    assert_type(method.attribute(trainer, data, data, top_k=3, largest=True), TopK)
    assert_type(method.attribute(trainer, data, data, aggregate="mean", interval=0.9), Interval)
    assert_type(method.attribute(train=data, targets=data), Tensor)
    assert_type(method.attribute(train=data, targets=data, top_k=3), BothEnds)
