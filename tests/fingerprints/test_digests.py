"""Digests see whatever an item of a dataset holds."""

import dataclasses
import datetime
import decimal
import enum
import json
import pathlib
from collections import OrderedDict, UserDict, namedtuple

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_trak.fingerprints.digests import content_digest
from lightning_trak.running.data.content import fingerprint, sample_digest
from tests.launch import run_script
from tests.lit import TRAIN


@dataclasses.dataclass
class Point:
    x: int
    y: object = None


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Plain:
    def __init__(self, value):
        self.value = value


Pair = namedtuple("Pair", "a b")


def cycle(value):
    made = [value]
    made.append(made)
    return made


def structured(value):
    return np.array([(1, value)], dtype=[("a", "i4"), ("b", "f8")])


# Values that all differ from each other, so that no two may have the same digest.
DIFFERENT = [
    *[None, True, False, 0, 1, 2, 10**30, 0.0, -0.0, 1.0, 0.1, float("nan"), float("inf"), 1j, 1 + 1j],
    *["", "a", "b", "ab", "1", "None", "\udc80", b"", b"a", b"b"],
    *[[], [1], [1, 2], [2, 1], [[1], 2], [1, [2]], ["a", "b"], ["ab"], [[]], [[], []], (), (1,), (1, 2), ([1], 2)],
    *[
        {},
        {"a": 1},
        {"a": 2},
        {"b": 1},
        {1: "a"},
        {"1": "a"},
        {"a": {"b": 1}},
        {"a": None, "b": 1},
        {"a": 1, "b": None},
    ],
    *[set(), {1}, {1, 2}, {"a", "b"}, {*"abcdefgh"}, frozenset({3})],
    *[torch.tensor(1), torch.tensor(1.0), torch.tensor([1]), torch.tensor([[1]]), torch.tensor(True), torch.tensor([])],
    *[torch.tensor([1.5], dtype=torch.bfloat16), torch.tensor([1.5], dtype=torch.float16), torch.tensor([1.5])],
    *[torch.tensor([1j]), torch.tensor([2j]), torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(6), torch.zeros(0, 2)],
    *[torch.eye(2).to_sparse(), torch.eye(2), torch.eye(3).to_sparse(), torch.zeros(2, 2).to_sparse()],
    *[torch.ones(2, dtype=torch.float8_e4m3fn)],
    *[
        np.int64(1),
        np.int32(1),
        np.float64(1),
        np.float32(1),
        np.bool_(True),
        np.str_("a"),
        np.datetime64("2020-01-01"),
    ],
    *[
        np.array([1]),
        np.array([1.0]),
        np.array(["a"]),
        np.array(["b"]),
        np.array([b"a"]),
        np.array([[1]]),
        np.array([]),
    ],
    *[np.array(["2020-01-01"], dtype="M8[D]"), np.array(["2020-01-02"], dtype="M8[D]"), np.array([1], dtype="m8[s]")],
    *[np.array([None]), np.array(["a", None], dtype=object), np.array(["b", None], dtype=object), structured(1)],
    *[structured(2), np.array([1 + 2j]), np.array([[1, "a"], [2, "b"]], dtype=object)],
    *[
        Point(1),
        Point(2),
        Point(1, 3),
        Plain(1),
        Plain(2),
        Plain([1]),
        Pair(1, 2),
        Colour.RED,
        Colour.BLUE,
        Point,
        Plain,
    ],
    *[datetime.date(2020, 1, 1), datetime.date(2020, 1, 2), datetime.timedelta(1), decimal.Decimal("1.0")],
    *[decimal.Decimal("1.1"), pathlib.PurePosixPath("a"), pathlib.PurePosixPath("b"), range(3), range(4), slice(1, 2)],
    *[cycle(1), cycle(2), [1, [1, [1]]], len, np.sin, torch.float32, torch.float64],
]


@pytest.mark.parametrize("hold", [lambda v: v, lambda v: [v], lambda v: {"key": v}, lambda v: {0: 1, 1: v}, Plain])
def test_what_differs_has_another_digest(hold):
    seen = {}
    for value in DIFFERENT:
        digest = content_digest(hold(value))
        assert digest not in seen, (value, seen[digest])
        seen[digest] = value


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions.*")
def test_quantized_tensors():
    one, other = (torch.quantize_per_tensor(torch.tensor([value]), 0.1, 0, torch.qint8) for value in (1.0, 2.0))
    assert content_digest(one) == content_digest(one.clone())
    assert len({content_digest(value) for value in (one, other, one.dequantize())}) == 3


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1, "b": [2]}, {"b": [2], "a": 1}),
        ({"a": 1, "b": 2}, OrderedDict(b=2, a=1)),
        ({"a": 1}, UserDict(a=1)),
        ({3, 1, 2}, {1, 2, 3}),
        (torch.arange(6).view(2, 3).T, torch.arange(6).view(2, 3).T.contiguous()),
        (torch.tensor([1j]).conj(), torch.tensor([1j]).conj().resolve_conj()),
        (torch.ones(2, requires_grad=True), torch.ones(2)),
        (np.arange(6).reshape(2, 3).T, np.ascontiguousarray(np.arange(6).reshape(2, 3).T)),
        (b"a", bytearray(b"a")),
        (float("nan"), -float("nan")),
        (Point(1, [2]), Point(1, [2])),
    ],
)
def test_equal_values_have_equal_digests(one, other):
    assert content_digest([one]) == content_digest([other])


def test_what_cannot_be_pickled_counts_by_its_class():
    one, other = (number for number in [1]), (number for number in [2])
    assert content_digest(one) == content_digest(other) != content_digest(iter([]))


@pytest.mark.slow
def test_digests_do_not_depend_on_the_process(tmp_path):
    script = tmp_path / "elsewhere.py"
    script.write_text(
        "import json; from tests.fingerprints.test_digests import DIFFERENT, content_digest;"
        "print(json.dumps([content_digest(value) for value in DIFFERENT]))"
    )
    assert run_script(script) == 0
    assert json.loads(script.with_suffix(".log").read_text()) == [content_digest(value) for value in DIFFERENT]


def as_they_are(items):
    return items


LABELS = [int(label) for label in TRAIN.tensors[1]]


@pytest.mark.parametrize(
    "form",
    [int, float, bool, str, np.int64, torch.tensor, lambda label: str(label).encode(), lambda label: {"y": [label]}],
)
@pytest.mark.parametrize("collate", [None, as_they_are])
def test_data_that_differ_in_a_label_alone(form, collate):
    def digest(labels):
        items = [(inputs, form(label)) for (inputs, _), label in zip(TRAIN, labels, strict=True)]
        return fingerprint(DataLoader(items, batch_size=8, collate_fn=collate), "the data")

    other = [int(LABELS[0] == 0), *LABELS[1:]]
    assert digest(LABELS) == digest(LABELS)
    assert digest(LABELS) != digest(other)


def test_items_of_many_kinds_are_read_alike_by_workers():
    items = [(value, number) for number, value in enumerate(DIFFERENT)]
    loaders = [DataLoader(items, collate_fn=as_they_are, num_workers=workers) for workers in (0, 1)]
    assert sample_digest(loaders[0]) == sample_digest(loaders[1]) is not None


def test_a_random_number_among_the_items_is_noticed():
    class Random(list):
        def __getitem__(self, index):
            return (*TRAIN[index], float(torch.rand(())))

    with pytest.warns(UserWarning, match="not the same twice"):
        assert fingerprint(DataLoader(Random(range(50))), "the data") is None
