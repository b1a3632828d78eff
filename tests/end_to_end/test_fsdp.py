"""Models that FSDP2 shards over two real processes (gloo) against whole ones in one process: the same features."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_trak import TRAK
from lightning_trak.features.store import FeatureStore
from lightning_trak.outputs import CausalLMMargin, ContrastiveMargin
from lightning_trak.projections import KroneckerProjection, PrincipalProjection, SparseProjection
from tests.launch import run_together
from tests.lit import LitNet, make_checkpoints, make_data, make_trainer, stored
from tests.zoo import TinyGPT

pytestmark = pytest.mark.slow

TRAIN, TARGETS = make_data(53), make_data(11, seed=1)
DESCENDING = bool(TRAIN.tensors[0][0, 0] > TRAIN.tensors[0][1, 0])
RARE = float(TRAIN.tensors[0][:, 0].topk(4).values[-1])


class Net(LitNet):
    """One layer is a unit of its own, the others are the root's."""

    def configure_model(self):
        if self.device_mesh is not None:
            self.shard()

    def shard(self, **options):
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.first, mesh=self.device_mesh["data_parallel"], **options)
        fully_shard(self, mesh=self.device_mesh["data_parallel"], **options)


class Bypassing(Net):
    """Uses a weight outside its layer's forward as well, which hooks do not see."""

    def forward(self, inputs):
        return super().forward(inputs) + F.linear(torch.ones(len(inputs), 8), self.head.weight)


class Sometimes(Net):
    """Uses a weight outside its layer's forward as well, for a few examples, and for neither of the first two."""

    def forward(self, inputs):
        rare = (inputs[:, :1] > RARE).float()
        return super().forward(inputs) + rare * F.linear(torch.ones(len(inputs), 8), self.head.weight)


class Sorted(Net):
    """Sorts its rows on the way, so that a layer's rows are another example's; the first two are in order."""

    def forward(self, inputs):
        order = inputs[:, 0].argsort(descending=DESCENDING)
        return super().forward(inputs[order])[order.argsort()]


class Neighbours(Net):
    """An output that the other examples of a larger batch have a part in."""

    def forward(self, inputs):
        return super().forward(inputs) * (inputs.mean() if len(inputs) > 2 else 1)


class Noisy(Net):
    """Another output each time."""

    def forward(self, inputs):
        return super().forward(inputs) + torch.randn(len(inputs), 3)


class Closure(Net):
    """A function made in the constructor still refers to the module that was passed."""

    def __init__(self):
        super().__init__()
        self.also = lambda inputs: self.first(inputs)

    def forward(self, inputs):
        return super().forward(inputs) + self.also(inputs)[:, :3]


class Augmented(Dataset):
    """Other items each time."""

    def __len__(self):
        return len(TRAIN)

    def __getitem__(self, index):
        inputs, label = TRAIN[index]
        return inputs + torch.randn(6), label


class Gpt(L.LightningModule):
    """Tied weights, a parameter that is no layer's, units in units."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.gpt = TinyGPT()

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        if self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            for block in self.gpt.blocks:
                fully_shard(block["qkv"], mesh=mesh)
                fully_shard(block["mlp"], mesh=mesh)
            fully_shard(self.gpt, mesh=mesh)

    def forward(self, ids):
        return self.gpt(ids)


class Clip(L.LightningModule):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(4, 3), nn.Linear(5, 3)

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        if self.device_mesh is not None:
            fully_shard(self.first, mesh=self.device_mesh["data_parallel"])

    def forward(self, first, second):
        return self.first(first), self.second(second)


class Halved(Clip):
    """Has FSDP2 compute in another precision than that of the weights."""

    def configure_model(self):
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
        fully_shard(self.first, mesh=self.device_mesh["data_parallel"], mp_policy=policy)


def make_sentences(size):
    return TensorDataset(torch.randint(17, (size, 9), generator=torch.Generator().manual_seed(size)))


def make_pairs(size):
    generator = torch.Generator().manual_seed(size)
    return TensorDataset(torch.randn(size, 4, generator=generator), torch.randn(size, 5, generator=generator))


def net_trak(root, name, model, **options):
    checkpoints = torch.load(root / "checkpoints.pt")
    return TRAK(model, checkpoints, root / name, projection=SparseProjection(32), **options)


def gpt_trak(root, model):
    output = CausalLMMargin(forward=lambda module, batch: module(batch[0]))
    covered = {"output": output, "parameters": lambda name, parameter: name != "gpt.positions"}
    return TRAK(model, [Gpt().state_dict()], root / "gpt", projection=SparseProjection(32), **covered)


def clip_trak(root, model, name="clip"):
    projection, output = SparseProjection(32), ContrastiveMargin(context_size=9)
    return TRAK(model, [Clip().state_dict()], root / name, projection=projection, output=output)


def axes_trak(root, model):
    projection = KroneckerProjection(3, 3, axes="principal", sample=7)
    return TRAK(model, torch.load(root / "checkpoints.pt"), root / "axes", projection=projection)


def principal_trak(root, model):
    projection = PrincipalProjection(6, landmarks=10, sample=12, sketch=64)
    return TRAK(model, torch.load(root / "checkpoints.pt"), root / "principal", projection=projection)


def begin(root, name):
    trak = net_trak(root, name, Net())
    trak.featurize(make_trainer(), DataLoader(TRAIN, batch_size=4), shard_size=6)
    return trak


def drop(store, shards):
    for path in [*store.rglob(f"shard-0000[{shards}].safetensors"), *store.rglob("gram-*")]:
        path.unlink()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Results of both ranks, the scores of one process, and the folder."""
    root = tmp_path_factory.mktemp("fsdp")
    torch.save(make_checkpoints(2), root / "checkpoints.pt")
    expected = begin(root, "one").score(make_trainer(), TARGETS)
    begin(root, "begun by one")
    drop(root / "begun by one", "2467")
    run_together("tests.end_to_end.fsdp_script", root)
    return [torch.load(root / f"rank-{rank}.pt") for rank in range(2)], expected, root


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["net", "begun by one", "meta", "fitted"])
def test_both_ranks_get_the_scores_of_one_process(runs, name):
    ranks, expected, _ = runs
    for rank in ranks:
        close(rank[name], expected)


def test_mixed_precision(runs, tmp_path):
    ranks, exact, root = runs
    trak = net_trak(root, "one mixed", Net())
    expected = trak.attribute(make_trainer(precision="bf16-mixed"), DataLoader(TRAIN, batch_size=4), TARGETS)
    assert float((expected - exact).norm() / exact.norm()) > 1e-3, "nothing was rounded"
    for rank in ranks:
        close(rank["mixed"], expected)


def test_features_are_those_of_one_process(runs):
    _, _, root = runs
    one, two = (FeatureStore.read_manifest(root / name) for name in ("one", "net"))
    assert one == two
    stores = [stored(root / name) for name in ("one", "net")]
    assert [store.settle_engine() for store in stores] == ["hooks", "hooks"]
    for checkpoint in range(2):
        for shard in range(9):
            for found, expected in zip(*(store.read(checkpoint, shard) for store in stores), strict=True):
                close(found, expected)


def test_some_scores_and_few_targets(runs):
    ranks, expected, _ = runs
    best = expected.topk(5)
    for rank in ranks:
        close(rank["top"][0], best.values)
        assert torch.equal(rank["top"][1], best.indices)
        close(rank["candidates"], expected[:, [52, 0, 7]])
        close(rank["one target"], expected[:1])


def test_one_process_continues_what_two_began(runs):
    _, expected, root = runs
    drop(root / "begun by two", "2467")
    kept = {path: path.stat().st_mtime_ns for path in (root / "begun by two").rglob("shard-*.safetensors")}
    close(begin(root, "begun by two").score(make_trainer(), TARGETS), expected)
    assert kept == {path: path.stat().st_mtime_ns for path in kept}


@pytest.mark.parametrize(
    ("name", "make", "data"),
    [
        ("gpt", lambda root: gpt_trak(root, Gpt()), make_sentences),
        ("clip", lambda root: clip_trak(root, Clip()), make_pairs),
        ("axes", lambda root: axes_trak(root, Net()), make_data),
        ("principal", lambda root: principal_trak(root, Net()), make_data),
    ],
)
def test_other_models_outputs_and_projections(runs, tmp_path, name, make, data):
    ranks, _, root = runs
    trak = make(root)
    trak.store = tmp_path
    trak.featurize(make_trainer(), DataLoader(data(15), batch_size=2), shard_size=4)
    expected = trak.score(make_trainer(), data(3))
    for rank in ranks:
        torch.testing.assert_close(rank[name], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (
            "bypassing",
            "gradients of the sharded model wrong, use .*strategy='ddp'.*head.weight.*outside its",
        ),
        ("halved", "first.weight has torch.float32 weights and is used in torch.bfloat16.*leave param_dtype out"),
        (
            "sometimes",
            r"one of the examples \d+, \d+ at checkpoint 0 .*head.weight: hooks give it a gradient",
        ),
        ("sometimes in targets", r"one of the examples 0, 4 at checkpoint 0 .*head.weight: hooks give it a gradient"),
        ("sorted", "rows of the output of first, .* do not belong"),
        ("neighbours", r"example \d+ at checkpoint 0 .*: its output is .* in its batch and .* alone"),
        ("noisy", "its output is .* in its batch and .* alone|hooks get some gradients"),
        ("closure", "reads first.bias, first.weight of the module that was passed, not of the copy"),
        ("augmented", "examples differ each time that they are loaded.*give data without random augmentation"),
        ("scorer", "equally many batches on each rank, as a sharded model needs: use score"),
        ("own", "other shards are missing in the store of a sharded model on rank 1 than on rank 0"),
        ("trained", r"this \w*Net is sharded.*pass a new \w*Net"),
    ],
)
def test_both_ranks_refuse(runs, name, match):
    for rank in runs[0]:
        with pytest.raises(ValueError, match=match):
            raise ValueError(rank[name])
