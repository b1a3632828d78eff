"""Identity of a module that was made: what was set or hooked since then, wrappers, and its size."""

import json
import re
import types

import pytest
import torch
from torch import nn

from lightning_trak import TRAK
from lightning_trak.fingerprints import changes, module_fingerprint
from tests.lit import TARGETS, TRAIN, LitNet, make_checkpoints, make_trainer


def halved(module, inputs):
    return tuple(part / 2 for part in inputs)


def replaced(x):
    return x + 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda net: setattr(net[0], "forward", replaced), "replaced is new"),
        (lambda net: setattr(net[0], "forward", types.MethodType(lambda self, x: x, net[0])), "<lambda> is new"),
        (lambda net: net[1].register_forward_pre_hook(halved), "halved is new"),
        (lambda net: net[1].register_full_backward_hook(lambda *_: None), "backward hooks is new"),
        (lambda net: setattr(net[2], "p", 0.3), "module 2 p was 0.5 and is 0.3"),
        (lambda net: net.insert(1, nn.Tanh()), "module 1 class was .*ReLU.* and is .*Tanh"),
        (lambda net: net.__setitem__(1, torch.jit.script(nn.ReLU())), "module 1 class was"),
        (lambda net: net.__setitem__(0, net[3]), "module 3 class is gone"),
    ],
)
def test_a_changed_instance_is_seen(change, named):
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 4))
    before = module_fingerprint(net)
    change(net)
    assert re.search(named, changes(before, module_fingerprint(net)))


def test_scripted_and_traced_modules_stand_by_their_code():
    def twice(x):
        return x + x

    class Scripted(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function

        def forward(self, x):
            return self.function(x)

    for wrap in (torch.fx.symbolic_trace, lambda module: torch.jit.trace(module, torch.ones(2))):
        first, again, other = (
            module_fingerprint(wrap(Scripted(function))) for function in (torch.relu, torch.relu, twice)
        )
        assert first == again
        assert "module program has changed" in changes(first, other)


def test_metrics_in_a_module_do_not_count():
    from torchmetrics import MeanMetric

    net = LitNet()
    before = module_fingerprint(net)
    net.average = MeanMetric()
    assert module_fingerprint(net) == before


def test_a_big_model_has_a_small_fingerprint():
    from transformers import BertConfig, BertModel

    def make(layers=24, **options):
        return BertModel(
            BertConfig(hidden_size=8, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=8, **options)
        )

    net = make()
    before = module_fingerprint(net)
    assert len(json.dumps(before)) < 20_000
    net(torch.arange(5)[None])
    net.gradient_checkpointing_enable()
    assert module_fingerprint(net) == before
    assert "encoder.layer.* parts was 24 and is 23" in changes(before, module_fingerprint(make(23)))
    changed = changes(before, module_fingerprint(make(hidden_act="relu")))
    assert "intermediate_act_fn" in changed
    net.encoder.layer[7].attention.self.dropout.p = 0.9
    assert changes(before, module_fingerprint(net)).count("encoder.layer.*.attention.self.dropout") >= 1


@pytest.mark.slow
def test_a_store_of_other_code_is_refused(tmp_path):
    class Net(LitNet):
        act = staticmethod(torch.tanh)

        def forward(self, inputs):
            return self.head(self.act(self.norm(self.first(inputs)))) * self.scale

    class Changed(Net):
        act = staticmethod(torch.sin)

    Changed.__qualname__ = Net.__qualname__
    checkpoints, trainer = make_checkpoints(1), make_trainer()
    TRAK(Net(), checkpoints, tmp_path / "store").featurize(trainer, TRAIN)
    expected = TRAK(Net(), checkpoints, tmp_path / "store").score(trainer, TARGETS)
    with pytest.raises(
        ValueError, match=r"made with another model, this TRAK has one that differs: module act was .*tanh"
    ):
        TRAK(Changed(), checkpoints, tmp_path / "store").score(trainer, TARGETS)
    Net.act = staticmethod(torch.sin)
    with pytest.raises(ValueError, match="another directory or the same model"):
        TRAK(Net(), checkpoints, tmp_path / "store").featurize(trainer, TRAIN)
    Net.act = staticmethod(torch.tanh)
    assert torch.equal(TRAK(Net(), checkpoints, tmp_path / "store").score(trainer, TARGETS), expected)
