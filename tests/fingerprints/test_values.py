"""Fingerprints of values: each kind has its own, and the same again."""

import copy
import functools
import json
import re
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_trak.fingerprints import fingerprint
from tests.fingerprints import identity_nets


def make_values():
    return [
        1.5,
        float("nan"),
        "text",
        b"bytes",
        1j,
        {3, 1, 2},
        frozenset("abc"),
        {"a": [1, (2, 3)], 1: None},
        torch.arange(3),
        torch.ones(2, dtype=torch.bfloat16),
        np.arange(3),
        np.float32(2),
        np.array(["a", None], dtype=object),
        torch.float16,
        torch.device("cpu"),
        Path("a/b"),
        identity_nets.Mode.SUM,
        identity_nets.Config(4),
        SimpleNamespace(a=1),
        functools.partial(F.relu, inplace=True),
        F.cross_entropy,
        torch.sum,
        len,
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.Linear,
        identity_nets.Net,
        torch.Generator().manual_seed(3),
        torch.distributions.Normal(0.0, 1.0),
        re.compile("a+"),
        np.random.default_rng(0),
        slice(1, 2),
        functools.lru_cache(identity_nets.even),
        torch.no_grad()(identity_nets.even),
        "abc".upper,
    ]


def test_values_are_the_same_again_and_different_from_each_other():
    described = [json.dumps(fingerprint(value, "owner"), sort_keys=True) for value in make_values()]
    assert described == [json.dumps(fingerprint(value, "owner"), sort_keys=True) for value in make_values()]
    assert len(set(described)) == len(described)
    for one, other in ((nn.Dropout(0.1), nn.Dropout(0.2)), (torch.ones(2), torch.ones(2, 1)), (b"a", b"b")):
        assert fingerprint(one, "owner") != fingerprint(other, "owner")


def test_cycles_end():
    values: list = [1]
    values.append(values)
    holder = SimpleNamespace(values=values)
    holder.itself = holder
    assert fingerprint(holder, "owner") == fingerprint(copy.deepcopy(holder), "owner")

    def countdown(n):
        return countdown(n - 1) if n else 0

    assert fingerprint(countdown, "owner")["code"].keys() == {"python", "test_cycles_end.<locals>.countdown"}


@pytest.mark.parametrize("bad", [threading.Lock(), (i for i in range(3)), [{"a": sys.stdout}]])
def test_what_has_no_content_is_refused(bad):
    with pytest.raises(TypeError, match=r"options is or holds a .*; expected values, functions, modules"):
        fingerprint(bad, "options")
