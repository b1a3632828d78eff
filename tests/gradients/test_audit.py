"""The audit: some examples are differentiated again, and a wrong feature never reaches a store in silence."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from lightning_trak import TRAK, GradientDot
from lightning_trak.gradients import FunctionalEngine, HookEngine, LoopEngine
from lightning_trak.gradients.hooks.layers import LinearLayer
from lightning_trak.methods.influence import InfluenceFunction
from lightning_trak.outputs import ClassificationMargin, NegativeLoss
from lightning_trak.projections import IdentityProjection, SparseProjection
from tests.lit import TARGETS, TRAIN, LitNet, attribute, make_checkpoints, make_model, make_trainer, open_store

ENGINES = {"hooks": HookEngine, "functional": FunctionalEngine, "loop": LoopEngine}


@pytest.fixture
def checkpoints():
    return make_checkpoints(2)


def spoil(monkeypatch, engine, wrong):
    """Have an engine give the examples that ``wrong`` picks twice the feature that they should have."""
    right = ENGINES[engine].project

    def project(self, batch, projection, features):
        values = right(self, batch, projection, features)
        features[wrong(batch)] *= 2
        return values

    monkeypatch.setattr(ENGINES[engine], "project", project)


def negative(batch):
    return batch.content[0][:, 0] < 0


@pytest.mark.parametrize("engine", ["hooks", "functional"])
def test_a_wrong_feature_is_an_error_that_names_the_example_and_nothing_is_written(
    tmp_path, checkpoints, monkeypatch, engine
):
    spoil(monkeypatch, engine, negative)
    trak = TRAK(make_model(), checkpoints, tmp_path / "store", projection=SparseProjection(32), engine=engine)
    with pytest.raises(
        ValueError,
        match=rf"engine='{engine}' cannot differentiate.*example \d+ at checkpoint 0 .*its gradient is off by 1 of its",
    ):
        trak.featurize(make_trainer(), DataLoader(TRAIN, batch_size=8), shard_size=8)
    for path in (tmp_path / "store").rglob("shard-*"):  # of those before it, every example that was drawn is right
        assert int(path.stem[-5:]) < 7
    assert not list((tmp_path / "store").rglob("*tmp*"))


def test_without_an_audit_it_would_not_be_noticed(tmp_path, checkpoints, monkeypatch):
    spoil(monkeypatch, "functional", negative)
    options = {"projection": SparseProjection(32), "engine": "functional", "audit": 0}
    TRAK(make_model(), checkpoints, tmp_path / "store", **options).featurize(make_trainer(), TRAIN)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["hooks", "functional"])
def test_auto_moves_the_whole_store_to_the_next_engine(tmp_path, checkpoints, monkeypatch, wrong):
    expected = attribute(tmp_path / "expected", checkpoints)
    spoil(monkeypatch, "hooks", negative)
    following = {"hooks": "functional", "functional": "loop"}[wrong]
    if wrong == "functional":
        spoil(monkeypatch, "functional", negative)
    trak = TRAK(make_model(), checkpoints, tmp_path / "store", projection=SparseProjection(32))
    with pytest.warns(
        UserWarning, match=f"engine '{wrong}' cannot differentiate this model correctly, so all features"
    ):
        trak.featurize(make_trainer(), DataLoader(TRAIN, batch_size=5), shard_size=5)
    settled = json.loads(next((tmp_path / "store").glob("engine-*.json")).read_text())
    assert settled["engine"] == following
    assert wrong in settled["refuted"]
    store = open_store(trak, make_trainer())
    assert {store.engine_of(checkpoint, shard) for checkpoint in range(2) for shard in range(store.num_shards)} == {
        following
    }
    scores = trak.score(make_trainer(), TARGETS)
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    with pytest.raises(ValueError, match=f"engine='{wrong}' got a gradient wrong when store"):
        TRAK(make_model(), checkpoints, tmp_path / "store", projection=SparseProjection(32), engine=wrong).featurize(
            make_trainer(), TRAIN
        )


def test_features_of_targets_are_audited_alike(tmp_path, checkpoints, monkeypatch):
    trak = TRAK(make_model(), checkpoints, tmp_path / "store", projection=SparseProjection(32))
    trak.featurize(make_trainer(), TRAIN)
    expected = trak.score(make_trainer(), TARGETS)
    spoil(monkeypatch, "hooks", lambda batch: slice(None))
    with pytest.warns(UserWarning, match="so features of targets are computed again with engine 'functional'"):
        scores = trak.score(make_trainer(), TARGETS)
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    with pytest.raises(ValueError, match=r"engine='hooks' cannot differentiate this model correctly: .*Use score\(\)"):
        make_trainer().predict(trak.scorer(), DataLoader(TARGETS, batch_size=4))


def test_the_layers_at_fault_are_named(tmp_path, checkpoints, monkeypatch):
    right = LinearLayer.gradient

    def wrong(self, parameter, call):
        factor = 2 if parameter == "bias" and self.module.out_features == 3 else 1
        return factor * right(self, parameter, call)

    monkeypatch.setattr(LinearLayer, "gradient", wrong)
    monkeypatch.setattr(HookEngine, "check", lambda self, batch: {})
    trak = TRAK(make_model(), checkpoints, tmp_path, projection=SparseProjection(32), engine="hooks")
    with pytest.raises(ValueError, match=r"its gradient is off by .* of its norm, in head.bias, compared with plain"):
        trak.featurize(make_trainer(), TRAIN)


@pytest.mark.slow
def test_reruns_draw_the_same_examples(tmp_path, checkpoints, monkeypatch):
    drawn = []
    one = LoopEngine.one
    monkeypatch.setattr(
        LoopEngine, "one", lambda self, batch, number, original=None: (
            drawn.append(batch.content[0][number].sum().item()), one(self, batch, number, original)
        )[1],
    )  # fmt: skip
    runs = []
    for name, batch_size in (("a", 8), ("b", 8), ("c", 4)):
        drawn.clear()
        options = {"projection": SparseProjection(32), "engine": "functional", "audit": 3}
        TRAK(make_model(), checkpoints, tmp_path / name, **options).featurize(
            make_trainer(), DataLoader(TRAIN, batch_size=batch_size), shard_size=8
        )
        runs.append(sorted(drawn))
    assert runs[0] == runs[1] == runs[2]
    assert len(runs[0]) >= 3 * 2 * (len(TRAIN) // 8)


def test_a_number_that_is_none_is_refused(tmp_path, checkpoints):
    with pytest.raises(ValueError, match="audit must be a number of examples, 0 for none, got -1"):
        TRAK(make_model(), checkpoints, tmp_path, audit=-1)


class Kinks(nn.Module):
    """Rectifiers that are tied but for rounding, which goes one way for one example and the other way for many."""

    def __init__(self, share):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 3)
        self.share = share

    def forward(self, x):
        hidden = self.first(x)
        rounding = torch.finfo(x.dtype).eps * (1 if len(x) == 1 else -1)
        tied = hidden - hidden.detach() + 1e-10 + rounding  # in float64 it is not rounding that decides
        return self.second(torch.tanh(hidden) + self.share * torch.relu(tied))


def featurize_kinks(directory, share):
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(32, 64, generator=generator), torch.randint(0, 3, (32,), generator=generator))
    options = {"output": ClassificationMargin(), "projection": SparseProjection(64), "engine": "hooks"}
    module = Kinks(share)
    TRAK(module, [module.state_dict()], directory, **options).featurize(make_trainer(), DataLoader(data, batch_size=16))


def test_kinks_are_no_error(tmp_path):
    featurize_kinks(tmp_path, share=0.03)


def test_kinks_explain_a_small_share_of_a_gradient(tmp_path):
    with pytest.raises(ValueError, match=r"its gradient is off by 0\.\d+ of its norm, in first\.weight, first\.bias"):
        featurize_kinks(tmp_path, share=0.5)


class InBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.first(x)
        return self.head(hidden - hidden.mean(0))


def contrastive(module, batch):
    embedded = module.first(batch[0])
    return F.cross_entropy(embedded @ embedded.T, torch.arange(len(embedded)), reduction="none")


@pytest.mark.parametrize("engine", ["auto", "hooks", "functional", "loop"])
@pytest.mark.parametrize(
    "output",
    [
        ClassificationMargin(),
        NegativeLoss(contrastive),
        NegativeLoss(lambda module, batch: contrastive(module, batch).mean()),
    ],
    ids=["batch mean", "in-batch loss", "its mean"],
)
def test_outputs_that_depend_on_the_rest_of_the_batch_are_refused(tmp_path, output, engine):
    module = InBatch()
    trak = TRAK(module, [module.state_dict()], tmp_path, output=output, projection=SparseProjection(16), engine=engine)
    with pytest.raises(
        ValueError, match=r"depends on the rest of the batch.*use ContrastiveMargin|returned a scalar|per"
    ):
        trak.featurize(make_trainer(), TRAIN)


def scaled(module, batch):
    losses = F.cross_entropy(module.head(module.first(batch[0])), batch[1], reduction="none")
    return losses / losses.detach().std()  # NaN for one example


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
def test_outputs_that_exist_only_in_batches_are_refused(tmp_path):
    module, output = InBatch(), NegativeLoss(scaled)
    trak = TRAK(module, [module.state_dict()], tmp_path, output=output, projection=SparseProjection(16))
    with pytest.raises(ValueError, match=r"its output is nan alone and another number in a batch"):
        trak.featurize(make_trainer(), TRAIN)
    influence = InfluenceFunction(module, [module.state_dict()], output=output)
    with pytest.raises(ValueError, match=r"its output is nan alone and another number in a batch"):
        influence.attribute(make_trainer(), TRAIN, TARGETS)


def test_padding_that_is_not_masked_is_refused(tmp_path):
    class Summed(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

        def forward(self, ids):
            return self.head(torch.tanh(self.tokens(ids)).mean(1))

    def collate(items):
        ids = nn.utils.rnn.pad_sequence([ids for ids, _ in items], batch_first=True)
        return ids, torch.tensor([label for _, label in items])

    texts = [(torch.arange(1, 2 + i % 5), i % 3) for i in range(10)]
    module = Summed()
    for name, size in (("batches", 4), ("one by one", 1)):
        trak = TRAK(module, [module.state_dict()], tmp_path / name, output=ClassificationMargin())
        loader = DataLoader(texts, batch_size=size, collate_fn=collate)
        with pytest.raises(ValueError, match="padding that is not masked"):
            trak.featurize(make_trainer(), loader)


def centred(items):
    inputs, labels = default_collate(items)
    return inputs - inputs.mean(0), labels


class RandomItem(Dataset):
    def __len__(self):
        return len(TRAIN)

    def __getitem__(self, index):
        inputs, label = TRAIN[index]
        return (inputs + torch.randn(6) if index == 2 else inputs), label


@pytest.mark.parametrize("loader", [DataLoader(TRAIN, 5, collate_fn=centred), DataLoader(RandomItem(), 5)])
def test_what_differs_before_the_model_sees_it_is_told_apart(tmp_path, checkpoints, loader):
    trak = TRAK(LitNet(), checkpoints, tmp_path, projection=SparseProjection(16), audit=len(TRAIN))
    with pytest.raises(ValueError, match=r"the batch holds other numbers .*augmentation.*collate_fn that .*normalises"):
        trak.featurize(make_trainer(), loader)


class Closure(LitNet):
    def __init__(self):
        super().__init__()
        self.last = lambda hidden: self.head(hidden)

    def forward(self, inputs):
        return self.last(torch.tanh(self.first(inputs)))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("engine", ["auto", "functional", "loop"])
@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_closures_over_the_users_module_are_refused(tmp_path, engine, frozen, precision):
    model = Closure()
    model.head.requires_grad_(not frozen)
    options = {"output": ClassificationMargin(), "projection": SparseProjection(16), "engine": engine}
    trak = TRAK(model, [model.state_dict()], tmp_path, parameters="first.*", **options)
    with pytest.raises(
        ValueError, match=r"output of Closure reads head.bias, head.weight of the module that was passed"
    ):
        trak.featurize(make_trainer(precision=precision), TRAIN)


class Aliases(nn.Module):
    """One weight under several names, in a list, in a dict and behind a property."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.again = self.first
        self.weights = [self.second.weight]
        self.named = {"bias": self.second.bias}

    @property
    def transposed(self):
        return self.head.weight.T

    def forward(self, x):
        hidden = torch.tanh(self.again(torch.tanh(self.first(x))))
        return torch.tanh(F.linear(hidden, self.weights[0], self.named["bias"])) @ self.transposed + self.head.bias


@pytest.mark.parametrize("engine", ["auto", "functional", "loop"])
def test_aliases_are_right(tmp_path, engine):
    module, output = Aliases().double(), ClassificationMargin()
    inputs, labels = TRAIN.tensors
    data = TensorDataset(inputs.double(), labels)
    method = GradientDot(
        module, [module.state_dict()], tmp_path, output=output, projection=IdentityProjection(), engine=engine,
        dtype=torch.float64, effect_on="output",
    )  # fmt: skip
    scores = method.attribute(make_trainer(), data, data)
    rows, loss_gradients = [], []
    for x, y in data:
        value = output.output(module, (x[None], y[None]))
        loss_gradients.append(output.derivatives(value)[0])
        rows.append(torch.cat([part.flatten() for part in torch.autograd.grad(value.sum(), list(module.parameters()))]))
    expected = torch.stack(rows) @ (torch.stack(rows) * torch.stack(loss_gradients)).T
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9)


def test_a_parameter_that_is_not_registered_is_refused(tmp_path):
    class Loose(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 3)
            self.more = [nn.Parameter(torch.ones(3))]

        def forward(self, x):
            return self.head(x) * self.more[0]

    module = Loose()
    trak = TRAK(module, [module.state_dict()], tmp_path, output=ClassificationMargin())
    with pytest.raises(ValueError, match=r"1 tensors that require gradients and are not parameters of the copy"):
        trak.featurize(make_trainer(), TRAIN)


def test_gradient_hooks_of_parameters_are_refused(tmp_path, checkpoints):
    model = make_model()
    model.head.weight.register_hook(lambda gradient: gradient * 0)
    trak = TRAK(model, checkpoints, tmp_path)
    with pytest.raises(ValueError, match=r"parameters of LitNet have gradient hooks: head\.weight"):
        trak.featurize(make_trainer(), TRAIN)


def test_a_copy_that_shares_weights_is_refused(tmp_path, checkpoints):
    class Shared(LitNet):
        def __deepcopy__(self, memo):
            return self

    with pytest.raises(ValueError, match=r"a deepcopy of Shared shares tensors with it: .*; change __deepcopy__ so"):
        TRAK(Shared(), checkpoints, tmp_path).featurize(make_trainer(), TRAIN)


class Forces(nn.Module):
    """Differentiates by its own input, as force fields do."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 1)

    def forward(self, x):
        x = x.detach().requires_grad_()
        energy = self.second(torch.tanh(self.first(x)))
        (force,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return force[:, :3]


def test_leaves_that_a_forward_pass_makes_are_its_own(tmp_path):
    module = Forces()
    options = {"output": ClassificationMargin(), "projection": SparseProjection(16), "engine": "loop"}
    TRAK(module, [module.state_dict()], tmp_path, **options).featurize(make_trainer(), TRAIN)


def test_weights_that_a_forward_pass_changes_are_refused(tmp_path):
    class Clamping(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            logits = self.head(x)
            self.head.weight.data.clamp_(-0.1, 0.1)
            return logits

    module = Clamping()
    trak = TRAK(module, [module.state_dict()], tmp_path, output=ClassificationMargin(), projection=SparseProjection(16))
    with pytest.raises(ValueError, match="output of Clamping changes from one forward pass to the next, although no r"):
        trak.featurize(make_trainer(), TRAIN)
