"""Identity of outputs and modules: what changes it, what must not, and how a difference is told."""

import copy
import importlib.util
import json
import re
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lightning_trak.fingerprints import changes, module_fingerprint
from lightning_trak.outputs import ClassificationMargin, ModelOutput, NegativeLoss
from tests.fingerprints import identity_nets
from tests.launch import run_script
from tests.lit import LitNet, make_data, make_trainer

PREAMBLE = """
import functools, torch, torch.nn.functional as F, lightning as L
from dataclasses import dataclass
from torch import nn
from types import SimpleNamespace
from lightning_trak.outputs import ModelOutput, NegativeLoss
"""


def run(source, name="users_script", folder=None):
    """What a user's file defines, as Python would import it."""
    module = types.ModuleType(name)
    module.__file__ = str(folder or Path("somewhere") / f"{name}.py")
    exec(compile(PREAMBLE + source, module.__file__, "exec"), module.__dict__)
    return module


def of(source, **options):
    """The fingerprint of ``make()``, an output or a module."""
    made = run(source, **options).make()
    return made.fingerprint() if isinstance(made, ModelOutput) else module_fingerprint(made)


NET = """
SCALE = 1.0
def helper(x): return x.tanh()
def other(x): return x.sigmoid()
def outer(x): return helper(x) * SCALE
@dataclass
class Config:
    width: int = 2
config, options, table = Config(), SimpleNamespace(scale=2.0, lr=1.0), {"a": 1, "b": [1, 2]}
weights, teacher = torch.ones(3), nn.Linear(3, 3).requires_grad_(False)
nn.init.ones_(teacher.weight), nn.init.ones_(teacher.bias)
class Base(nn.Module):
    factor = 2.0
    def scale(self, x): return x * self.factor
class Block(Base):
    def __init__(self, width=3):
        super().__init__()
        self.lin = nn.Linear(width, width)
        self.act = F.relu
        self._slope, self.kinds, self.setting = 0.1, ["a"], {"p": 1.0}
        self.mask = torch.ones(3)
    def forward(self, x, power=2):
        x = self.act(self.lin(x)) * self._slope + len(self.kinds) + self.setting["p"] * self.mask
        return outer(self.scale(x)) ** power * config.width * options.scale + table["a"] * weights + teacher(x)
    @staticmethod
    def unused(x): return x
def make():
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.ReLU(), nn.Dropout(0.1))
"""

OUTPUT = """
def helper(x): return x.sum(1)
def scaled(scale, shift):
    def loss(module, batch): return scale * module(batch) + shift["by"]
    return loss
class Loss:
    def __init__(self, weight): self.weight, self.calls = weight, 0
    def __call__(self, module, batch, eps=0.1):
        self.calls += 1
        return self.weight * module(batch) + eps
class Output(ModelOutput):
    power = 2
    def __init__(self, weight=1.0):
        self.weight, self._shift, self.seen = weight, 0.5, 0
        self.loss_fn = scaled(2.0, {"by": 1.0})
        self.call, self.table = Loss(3.0), torch.arange(3)
        self.part = functools.partial(torch.mul, other=2)
    def output(self, module, batch, extra=1, *, more=2):
        self.seen += 1
        return helper(module(batch)) * self.weight + self._shift
    def loss(self, output):
        return output ** self.power
def make(): return Output()
"""


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("x.tanh()", "x.sin()", "helper has changed"),
        ("return helper(x) * SCALE", "return other(x) * SCALE", "outer has changed"),
        ("return helper(x) * SCALE", "return SCALE * helper(x)", "outer has changed"),
        ("SCALE = 1.0", "SCALE = 1.5", "outer has changed"),
        ("factor = 2.0", "factor = 3.0", r"module 0 factor was 2\.0 and is 3\.0"),
        ("return x * self.factor", "return x / self.factor", r"Base\.scale has changed"),
        (
            "self.act = F.relu",
            "self.act = F.gelu",
            r'module 0 act was "torch\.nn\.functional\.relu" and is "torch\._C\._nn\.gelu"',
        ),
        ("self.act(self", "F.gelu(self", r"Block\.forward has changed"),
        ("power=2", "power=3", r"Block\.forward has changed"),
        (
            "self._slope, self.kinds, self.setting = 0.1",
            "self._slope, self.kinds, self.setting = 0.2",
            "_slope was 0.1",
        ),
        ('["a"], {"p"', '["a", "b"], {"p"', "module 0 kinds was"),
        ('{"p": 1.0}', '{"p": 2.0}', "module 0 setting p was"),
        ("self.mask = torch.ones(3)", "self.mask = torch.zeros(3)", "module 0 mask"),
        ("width: int = 2", "width: int = 4", r"Block\.forward has changed"),
        ("scale=2.0, lr", "scale=2.5, lr", r"Block\.forward has changed"),
        ('"a": 1, "b"', '"a": 2, "b"', r"Block\.forward has changed"),
        ("weights, teacher = torch.ones(3)", "weights, teacher = torch.zeros(3)", r"Block\.forward has changed"),
        ("nn.init.ones_(teacher.bias)", "nn.init.zeros_(teacher.bias)", r"Block\.forward has changed"),
        ("nn.ReLU()", "nn.GELU()", r"module 1 class was \"torch.nn.modules.activation.ReLU\" and is .*GELU"),
        ("nn.ReLU()", "nn.LeakyReLU(0.2)", "module 1 class was"),
        ("self.act(self.lin(x))", "self.act(self.lin(x), inplace=False)", "forward has changed"),
        ("    def scale", "    @torch.no_grad()\n    def scale", "module 0 scale is new"),
        ("Dropout(0.1)", "Dropout(0.2)", "module 2 p was 0.1 and is 0.2"),
        ("class Block(Base)", "class Block(nn.Module)", r"module 0 factor is gone|Base\.scale is gone"),
        ("def make():", "def changed(x): return x\ndef make():\n    Block.forward = changed", "changed is new"),
    ],
)
def test_a_changed_module_is_seen(old, new, named):
    assert old in NET
    assert re.search(named, changes(of(NET), of(NET.replace(old, new))))


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("x.sum(1)", "x.mean(1)", "helper has changed"),
        ("self.weight + self._shift", "self.weight - self._shift", r"Output\.output has changed"),
        ("return output ** self.power", "return output.abs() ** self.power", r"Output\.loss has changed"),
        ("power = 2", "power = 3", "power was 2 and is 3"),
        ("weight=1.0", "weight=2.0", r"weight was 1\.0 and is 2\.0"),
        ("self._shift, self.seen = weight, 0.5", "self._shift, self.seen = weight, 0.6", "_shift was 0.5 and is 0.6"),
        ("scaled(2.0", "scaled(3.0", r"loss has changed"),
        ('{"by": 1.0}', '{"by": 2.0}', r"loss has changed"),
        ("scale * module(batch)", "scale + module(batch)", r"loss has changed"),
        ("Loss(3.0)", "Loss(4.0)", r"call weight was 3\.0 and is 4\.0"),
        ("eps=0.1", "eps=0.2", r"Loss\.__call__ has changed"),
        ("self.weight * module", "self.weight - module", r"Loss\.__call__ has changed"),
        ("torch.arange(3)", "torch.arange(3) * 2", "table"),
        ("other=2", "other=3", "part"),
        ("torch.mul", "torch.sub", "part"),
        ("extra=1", "extra=2", r"Output\.output has changed"),
        ("more=2", "more=3", r"Output\.output has changed"),
    ],
)
def test_a_changed_output_is_seen(old, new, named):
    assert old in OUTPUT
    assert re.search(named, changes(of(OUTPUT), of(OUTPUT.replace(old, new))))


@pytest.mark.parametrize("source", [NET, OUTPUT], ids=["net", "output"])
@pytest.mark.parametrize("name", ["__main__", "users_script", "folder.users_script"])
def test_what_does_not_change_it(source, name, tmp_path):
    """Files, names of files, lines, comments and docstrings."""
    expected = of(source)
    assert of("\n\n# a comment\n" + source, name=name, folder=tmp_path) == expected
    documented = source.replace("def helper(x):", 'def helper(x):\n    """Sums."""\n   ')
    assert documented != source
    assert of(documented) == expected
    assert of(source.replace("lr=1.0", "lr=2.0")) == expected, "only what is read of an object counts"
    assert json.loads(json.dumps(expected)) == expected


def loaded_from(path):
    spec = importlib.util.spec_from_file_location("nets_elsewhere", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fingerprints()


@pytest.mark.slow
def test_other_processes_and_places_agree(tmp_path):
    expected = identity_nets.fingerprints()
    path = tmp_path / "elsewhere.py"
    path.write_text(Path(identity_nets.__file__).read_text())
    assert loaded_from(path) == expected
    assert run_script(path) == 0
    assert json.loads(path.with_suffix(".log").read_text()) == expected


LOADER = DataLoader(make_data(8), batch_size=4)


@pytest.mark.parametrize("make", [identity_nets.Net, LitNet])
def test_use_leaves_it_alone(make):
    net = make()
    expected = module_fingerprint(net, ClassificationMargin())
    net(torch.randn(5, 6))
    assert module_fingerprint(net, ClassificationMargin()) == expected
    make_trainer(max_epochs=1).fit(net, LOADER)
    for same in (net, copy.deepcopy(net), torch.compile(net), net.eval(), net.double()):
        assert module_fingerprint(same, ClassificationMargin()) == expected
    if make is LitNet:
        net.first = torch.compile(net.first)
        assert module_fingerprint(net, ClassificationMargin()) == expected


def test_an_output_is_used_without_a_change():
    output = run(OUTPUT).make()
    before = output.fingerprint()
    output.output(nn.Identity(), torch.randn(3, 2)), output.call(nn.Identity(), torch.randn(3, 2))
    assert (output.seen, output.call.calls) == (1, 1)
    assert output.fingerprint() == before
    assert copy.deepcopy(output).fingerprint() == before


@pytest.mark.parametrize("method", ["explain_nan", "suspicion", "prediction", "describe_prediction"])
def test_what_an_output_tells_people_does_not_count(method):
    own = f"    def {method}(self, *given): return other_words()\n"
    source = OUTPUT.replace("def make():", f"{own}def other_words(): return 'its label is wrong'\ndef make():")
    assert source != OUTPUT
    assert of(source) == of(OUTPUT)


STATEFUL = """
CACHE = {}
class Net(L.LightningModule):
    def __init__(self, lr=0.1, scale=2.0, width=3):
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.history, self.memo, self.seen, self.ema = lr, [], {}, 0, torch.zeros(1)
        self.cells, self.total, self.extra = [0], [0.0], [[0]]
        self.inner = nn.Linear(6, width)
    def forward(self, x):
        memo = self.memo
        memo["last"] = CACHE["last"] = x
        self.history.append(x), self.ema.mul_(0.9).add_(1), self.cells.__setitem__(0, 1)
        self.seen += 1
        self.total[0] += 1
        self.extra[0][0] = 2
        self.inner.last_input = x
        return self.inner(x) * self.hparams.scale
    def helper(self):
        return self.extra, self.total, self.memo, self.history, self.seen, self.ema, self.cells, self.inner.last_input
    def training_step(self, batch):
        self.log_it()
        return F.cross_entropy(self(batch[0]), batch[1])
    def log_it(self): self.logged = True
    def on_train_start(self): self.started = True
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)
def make(): return Net()
"""


def test_what_a_forward_pass_keeps_and_what_only_training_uses():
    script = run(STATEFUL)
    net = script.make()
    before = module_fingerprint(net)
    make_trainer(max_epochs=1).fit(net, LOADER)
    assert module_fingerprint(net) == before
    for harmless in (
        ("lr=0.1", "lr=0.2"),
        ("F.cross_entropy(self(batch[0]), batch[1])", "self(batch[0]).sum()"),
        ("optim.SGD", "optim.Adam"),
        ("started = True", "started = False"),
    ):
        other = STATEFUL.replace(*harmless)
        assert of(other) == before
        assert changes(
            module_fingerprint(script.make(), training=True), module_fingerprint(run(other).make(), training=True)
        )
    assert "hparams.scale was 2.0 and is 3.0" in changes(before, of(STATEFUL.replace("scale=2.0", "scale=3.0")))


def test_what_an_output_calls_matters_whatever_its_name():
    output = NegativeLoss(lambda module, batch: module.training_step(batch) + module.lr)
    nets = [
        run(STATEFUL.replace(*change)).make() for change in (("", ""), ("F.cross", "-F.cross"), ("lr=0.1", "lr=0.2"))
    ]
    found = [module_fingerprint(net, output) for net in nets]
    assert changes(found[0], found[1]) == "Net.training_step has changed"
    assert changes(found[0], found[2]).startswith("module lr was 0.1 and is 0.2")


REGISTRY = """
ACTS = {}
def register(name):
    def keep(function):
        ACTS[name] = function
        return function
    return keep
@register("act")
def act(x): return x * 2
class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, grad): return grad * 5
class Norm(nn.BatchNorm1d):
    def __init__(self):
        super().__init__(2)
        self.eps = 1e-3
class Double(nn.Module):
    def forward(self, weight): return weight * 4
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.kind, self.layer, self.norm, self.list = "act", nn.Linear(2, 2), Norm(), [nn.ReLU(), lambda x: x * 6]
        self.scale_1, self.unread = 7, 1
        nn.utils.parametrize.register_parametrization(self.layer, "weight", Double())
    @property
    def scale(self): return 8
    def forward(self, x):
        def inner(y, k=9): return y * k
        for part in self.list: x = part(x)
        return inner(Straight.apply(ACTS[self.kind](self.norm(self.layer(x))))) * self.scale
    def at(self, i): return getattr(self, f"scale_{i}")
def make():
    net = Net()
    net.best_score = 10
    return net
"""


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("x * 2", "x * 3", "act has changed"),
        ("grad * 5", "grad * 6", r"Straight\.backward has changed"),
        ("eps = 1e-3", "eps = 1e-5", "module norm eps was 0.001 and is 1e-05"),
        ("weight * 4", "weight * 5", r"Double\.forward has changed"),
        ("x * 6", "x * 7", "<lambda> has changed"),
        ("scale_1, self.unread = 7", "scale_1, self.unread = 8", "module scale_1 was 7 and is 8"),
        ("return 8", "return 9", r"Net\.scale has changed"),
        ("k=9", "k=10", r"Net\.forward has changed"),
        ("best_score = 10", "best_score = 11", ""),
    ],
)
def test_indirect_ways_to_code(old, new, named):
    found = changes(of(REGISTRY), of(REGISTRY.replace(old, new)))
    assert re.search(named, found) if named else not found


def test_a_method_of_the_model_does_not_bring_its_weights():
    class Net(LitNet):
        def per_example(self, module, batch):
            return F.cross_entropy(module(batch[0]), batch[1], reduction="none")

        def configure_model_output(self):
            return NegativeLoss(self.per_example)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        outputs = [Net().configure_model_output().fingerprint() for _ in range(2)]
    assert outputs[0] == outputs[1]
    teachers = [nn.Linear(3, 3), nn.Linear(3, 3)]
    first, second = (NegativeLoss(lambda module, batch, t=t: module(t(batch))).fingerprint() for t in teachers)
    assert first != second


def test_another_python_is_named_alone():
    before = {"python": "3.10", "Net.forward": "0123456789abcdef"}
    assert changes(before, {"python": "3.11", "Net.forward": "fedcba9876543210"}) == (
        "Python is 3.11 and was 3.10, so code cannot be compared"
    )
