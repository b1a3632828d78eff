"""Why did the models predict this? All checkpoints explain the class that they predict together."""

import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, get_worker_info

from lightning_trak import TRAK
from lightning_trak.methods import EKFACInfluence, ExactKernel
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.projections import SparseProjection
from tests.lit import TARGETS, TRAIN, beyond_hooks, make_checkpoints, make_model, make_trainer

INPUTS = TARGETS.tensors[0] / 3  # nearer to where models disagree
IMAGES = TensorDataset(INPUTS)
PREDICTED = ClassificationMargin(labels="predicted")


@pytest.fixture(scope="module")
def checkpoints():
    return make_checkpoints(3)


@pytest.fixture(scope="module")
def ensemble(checkpoints):
    """What the three models predict together, which is not what each predicts."""
    model, found = make_model(), []
    for weights in checkpoints:
        model.load_state_dict(weights)
        found.append(model.eval()(INPUTS).softmax(1).detach())
    labels = torch.stack(found).mean(0).argmax(1)
    assert all((one.argmax(1) != labels).any() for one in found)
    return labels


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def make(path, checkpoints, kind=TRAK, model=None, **options):
    options = ({} if kind is ExactKernel else {"projection": SparseProjection(24)}) | options
    method = kind(model or make_model(), checkpoints, path / kind.__name__, **options)
    method.featurize(make_trainer(), DataLoader(TRAIN, batch_size=8), shard_size=16)
    return method


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "net"), [(TRAK, make_model), (TRAK, lambda: beyond_hooks(make_model())), (ExactKernel, make_model)]
)
def test_all_checkpoints_explain_the_class_of_the_ensemble(tmp_path, checkpoints, ensemble, kind, net):
    method, trainer = make(tmp_path, checkpoints, kind, net()), make_trainer()
    expected = method.score(trainer, TensorDataset(INPUTS, ensemble))
    for data in (IMAGES, DataLoader(IMAGES, batch_size=4, num_workers=1), TensorDataset(INPUTS, (ensemble + 1) % 3)):
        close(method.score(trainer, data, output=PREDICTED), expected)
    both = method.score(trainer, [DataLoader(data, batch_size=8) for data in (IMAGES, TARGETS)], output=PREDICTED)
    close(both[0], expected)


@pytest.mark.slow
def test_influence_functions_explain_it_too(checkpoints, ensemble):
    method, trainer = EKFACInfluence(make_model(), checkpoints), make_trainer()
    expected = method.attribute(trainer, TRAIN, TensorDataset(INPUTS, ensemble))
    close(method.attribute(trainer, TRAIN, IMAGES, output=PREDICTED), expected)


def test_the_ends_of_the_runs_predict_and_not_what_came_before(tmp_path, capsys):
    """Two runs with two checkpoints each, in directories as the Trainer of Hugging Face makes them."""
    weights, model = make_checkpoints(4), make_model()
    for number in (0, 2):  # early models, which are sure of other classes
        weights[number] = {name: -3 * value if "head" in name else value for name, value in weights[number].items()}
    for number, state in enumerate(weights):
        place = tmp_path / f"run{number // 2}" / f"checkpoint-{number + 1}"
        place.mkdir(parents=True)
        save_file(state, place / "model.safetensors")
    found = []
    for state in weights:
        model.load_state_dict(state)
        found.append(model.eval()(INPUTS).softmax(1).detach())
    probabilities = (found[1] + found[3]) / 2
    labels = probabilities.argmax(1)
    assert (labels != torch.stack(found).mean(0).argmax(1)).any()
    trak = make(tmp_path, [tmp_path / "run0", tmp_path / "run1"])
    assert len(trak.checkpoints) == 4
    scores = trak.score(make_trainer(), TensorDataset(INPUTS, labels))
    close(trak.score(make_trainer(), IMAGES, output=PREDICTED), scores)
    trak.show(scores, TRAIN, IMAGES, shown=range(len(INPUTS)), output=PREDICTED)
    shown = re.findall(r"predicted (\d) \((.*)%\)", capsys.readouterr().out)
    assert shown == [(f"{row.argmax()}", f"{100 * row.max():.1f}") for row in probabilities]


class Dicts(Dataset):
    """Items are mappings, and a worker opens the data."""

    scale = None

    def open(self):
        self.scale = 2.0

    def __len__(self):
        return len(INPUTS)

    def __getitem__(self, index):
        return {"halves": INPUTS[index] / self.scale}


def opening(_):
    get_worker_info().dataset.open()


class Doubling(type(make_model())):
    """Makes its inputs in a transfer hook, which must see the user's batch alone."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {"inputs": batch["halves"] * 2} if isinstance(batch, dict) else batch


@pytest.mark.slow
def test_hooks_and_workers_see_the_users_batches(tmp_path, checkpoints, ensemble):
    model = Doubling()
    model.load_state_dict(make_model().state_dict())
    method, trainer = make(tmp_path, checkpoints[:2], model=model), make_trainer()
    predicted = ClassificationMargin(lambda module, batch: module(batch["inputs"]), None, labels="predicted")
    loader = DataLoader(Dicts(), batch_size=5, num_workers=1, worker_init_fn=opening)
    found = method.score(trainer, loader, output=predicted)
    close(found, method.score(trainer, IMAGES, output=PREDICTED))


def test_a_class_compared_with_itself_is_named(tmp_path, checkpoints, ensemble):
    method, first = make(tmp_path, checkpoints), int((ensemble == 1).nonzero()[0])
    with pytest.raises(ValueError, match=f"Example {first}: its label is 1, which is compared with itself"):
        method.score(make_trainer(), IMAGES, output=ClassificationMargin(labels="predicted", against=1))


def test_a_prediction_that_is_not_finite_is_named(tmp_path, checkpoints):
    method, inputs = make(tmp_path, checkpoints), INPUTS.clone()
    inputs[7] = torch.nan
    with pytest.raises(ValueError, match=r"the prediction at checkpoint 0 .* of example 7 is not finite"):
        method.score(make_trainer(), TensorDataset(inputs), output=PREDICTED)


def test_one_logit_is_a_binary_classifier():
    module, batch = nn.Linear(2, 1), torch.randn(4, 2)
    found = PREDICTED.probabilities(module, batch)
    torch.testing.assert_close(found[:, 1], module(batch).sigmoid().flatten())
    with pytest.raises(TypeError, match="predicts no labels"):
        super(ClassificationMargin, PREDICTED).probabilities(module, batch)
