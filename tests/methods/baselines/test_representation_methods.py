"""Methods on representations, against what they are by definition."""

from itertools import combinations
from math import comb

import pytest
import torch
from scipy.spatial.distance import cdist
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from lightning_trak.methods import KNNShapley, RepresentationSimilarity
from lightning_trak.methods.baselines import similarity
from lightning_trak.methods.baselines.knn_shapley import knn_shapley_values
from lightning_trak.outputs import ContrastiveMargin
from tests.lit import TARGETS, TRAIN, LitNet, make_data, make_model, make_trainer
from tests.methods.baselines.test_representation_inputs import matrix
from tests.zoo import specimen


def penultimate(weights, data):
    model = make_model()
    model.load_state_dict(weights)
    model.eval()
    with torch.no_grad():
        return torch.tanh(model.norm(model.first(data.tensors[0]))).double().numpy()


def expected_similarity(checkpoints, kind):
    pairs = [(penultimate(weights, TARGETS), penultimate(weights, TRAIN)) for weights in checkpoints]
    by_kind = {
        "dot": lambda targets, train: targets @ train.T,
        "cosine": lambda targets, train: 1 - cdist(targets, train, "cosine"),
        "l2": lambda targets, train: -cdist(targets, train),
    }
    return torch.tensor(sum(by_kind[kind](*pair) for pair in pairs) / len(pairs)).float()


@pytest.mark.parametrize("kind", ["dot", "cosine", "l2"])
def test_similarity_of_penultimate_activations(checkpoints, kind):
    method = RepresentationSimilarity(make_model(), checkpoints, similarity=kind)
    scores = method.attribute(make_trainer(), TRAIN, TARGETS)
    assert scores.shape == (13, 50)
    torch.testing.assert_close(scores, expected_similarity(checkpoints, kind), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [RepresentationSimilarity, KNNShapley])
def test_how_the_data_comes_does_not_matter(checkpoints, method):
    def scores(train, targets):
        return method(make_model(), checkpoints).attribute(make_trainer(), train, targets)

    plain = scores(TRAIN, TARGETS)
    for loader in (
        DataLoader(TRAIN, batch_size=1),
        DataLoader(TRAIN, batch_size=7, shuffle=True, drop_last=True),
        DataLoader(TRAIN, batch_size=16, num_workers=1),
    ):
        torch.testing.assert_close(scores(loader, DataLoader(TARGETS, batch_size=5, shuffle=True)), plain)


def test_model_trainer_and_random_state_are_as_they_were(checkpoints):
    model, trainer = make_model(), make_trainer()
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state, callbacks = torch.get_rng_state(), list(trainer.callbacks)
    RepresentationSimilarity(model, checkpoints).attribute(trainer, DataLoader(TRAIN, shuffle=True), TARGETS)
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(part.training and not part._forward_pre_hooks for part in model.modules())
    assert trainer.callbacks == callbacks
    assert trainer.lightning_module is None


def test_the_modules_own_hooks_prepare_batches(checkpoints):
    class Doubling(LitNet):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] * 2, batch[1]

    half = [TensorDataset(data.tensors[0] / 2, data.tensors[1]) for data in (TRAIN, TARGETS)]
    scores = RepresentationSimilarity(Doubling(), checkpoints).attribute(make_trainer(), *half)
    torch.testing.assert_close(scores, expected_similarity(checkpoints, "cosine"), rtol=1e-5, atol=1e-5)


def test_a_named_layer_and_a_call_of_ones_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    method = RepresentationSimilarity(
        model, [model.state_dict()], layer="2", similarity="dot", forward=lambda module, batch: module(batch[0])
    )
    with torch.no_grad():
        train, targets = (model[1](model[0](data.tensors[0])) for data in (TRAIN, TARGETS))
    torch.testing.assert_close(method.attribute(make_trainer(), TRAIN, TARGETS), targets @ train.T)


def test_a_compiled_model(checkpoints):
    plain, compiled = make_model(), torch.compile(make_model(), backend="eager")
    methods = [RepresentationSimilarity(model, checkpoints) for model in (plain, compiled)]
    first, second = (method.attribute(make_trainer(), TRAIN, TARGETS) for method in methods)
    torch.testing.assert_close(first, second)


class Items(Dataset):
    """The examples of one collated batch."""

    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return len(self.batch["labels"])

    def __getitem__(self, index):
        return {name: column[index] for name, column in self.batch.items()}


def sequence_scores(**options):
    """Of the input of an encoder's normalisation: (batch, length, width)."""
    module, output, batch, _ = specimen("text_classifier")
    data = Items(batch)
    method = RepresentationSimilarity(
        module, [module.state_dict()], layer="encoder.norm1", similarity="dot", forward=output.output, **options
    )
    embedded = module.embedding(batch["input_ids"]).detach()
    return method.attribute(make_trainer(), data, data), embedded, batch["attention_mask"]


def test_sequences_are_averaged_where_the_mask_is():
    scores, embedded, mask = sequence_scores()
    pooled = torch.stack([row[:length].mean(0) for row, length in zip(embedded, mask.sum(1), strict=True)])
    torch.testing.assert_close(scores, pooled @ pooled.T)


def test_pooling_of_ones_own():
    scores, embedded, _ = sequence_scores(pool=lambda activations, batch: activations[:, 0])
    torch.testing.assert_close(scores, embedded[:, 0] @ embedded[:, 0].T)


class TensorList(Dataset):
    """Rows of a tensor, which collate to a tensor."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def test_sequences_without_a_mask_are_averaged_over_all_positions():
    module, output, ids, _ = specimen("gpt_tied")
    method = RepresentationSimilarity(module, [module.state_dict()], similarity="dot", forward=output.output)
    scores = method.attribute(make_trainer(), TensorList(ids), TensorList(ids))
    inputs = []
    module.head.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().mean(1)))
    module(ids)
    torch.testing.assert_close(scores, inputs[0] @ inputs[0].T)


def test_a_mask_of_another_length_is_refused():
    batch = {"labels": torch.zeros(3), "attention_mask": torch.ones(3, 4), "x": torch.randn(3, 5, 2)}
    model = nn.Linear(2, 1)
    method = RepresentationSimilarity(model, [model.state_dict()], forward=lambda module, batch: module(batch["x"]))
    with pytest.raises(ValueError, match=r"attention_mask should have shape \(2, 5\), not \(2, 4\).*pool="):
        method.attribute(make_trainer(), Items(batch), Items(batch))


def test_layers_that_cannot_be_taken(checkpoints):
    def attribute(**options):
        return RepresentationSimilarity(make_model(), checkpoints, **options).attribute(make_trainer(), TRAIN, TARGETS)

    with pytest.raises(ValueError, match="layer='body' is no module of the model, which has: first, norm, dropout"):
        attribute(layer="body")
    twice = lambda module, batch: (module(batch[0]), module(batch[0]))  # noqa: E731
    with pytest.raises(ValueError, match="layer 'head' is called 2 times"):
        attribute(forward=twice)
    with pytest.raises(ValueError, match="layer 'head' is called 0 times"):
        attribute(forward=lambda module, batch: module.first(batch[0]))
    with pytest.raises(ValueError, match=r"expected the representation at .* of 2 rows, .* got shape \(4, 8\)"):
        attribute(forward=lambda module, batch: module(torch.cat([batch[0], batch[0]])))


def test_bad_options_and_inputs(checkpoints):
    model = make_model()
    with pytest.raises(ValueError, match="similarity must be one of 'dot', 'cosine', 'l2'; got 'l1'"):
        RepresentationSimilarity(model, checkpoints, similarity="l1")
    with pytest.raises(ValueError, match="Expected `k` to be a positive integer but got 0"):
        KNNShapley(model, checkpoints, k=0)
    with pytest.raises(ValueError, match=r"Expected `k` to be a positive integer but got 2\.5"):
        KNNShapley(model, checkpoints, k=2.5)
    with pytest.raises(TypeError, match=r"declares no model output.*pass forward="):
        RepresentationSimilarity(nn.Linear(2, 2), checkpoints)
    model.configure_model_output = lambda: ContrastiveMargin()
    with pytest.raises(ValueError, match="ContrastiveMargin depends on other training examples too; pass forward="):
        RepresentationSimilarity(model, checkpoints)
    with pytest.raises(ValueError, match="does not fit LitNet"):
        RepresentationSimilarity(make_model(), [{"other": torch.ones(1)}]).attribute(make_trainer(), TRAIN, TARGETS)
    inputs = TRAIN.tensors[0].clone()
    inputs[37, 2] = torch.nan
    bad = DataLoader(TensorDataset(inputs, TRAIN.tensors[1]), batch_size=8)
    with pytest.raises(ValueError, match=r"representation at state dict 0 of example 37 is not finite"):
        RepresentationSimilarity(make_model(), checkpoints).attribute(make_trainer(), bad, TARGETS)


def shapley(value, num_players):
    """By definition, over all subsets (Shapley 1953)."""
    values = torch.zeros(num_players, dtype=torch.float64)
    for player in range(num_players):
        others = [other for other in range(num_players) if other != player]
        for size in range(num_players):
            weight = 1 / (num_players * comb(num_players - 1, size))
            for subset in combinations(others, size):
                values[player] += weight * (value((*subset, player)) - value(subset))
    return values


@pytest.mark.parametrize("k", [1, 2, 3, 7, 10])
def test_knn_shapley_is_the_shapley_value_of_the_vote(k):
    generator = torch.Generator().manual_seed(k)
    nearness = torch.randn(3, 7, generator=generator)
    nearness[2, 4] = nearness[2, 1]  # a tie: the first comes first
    agrees = torch.rand(3, 7, generator=generator) < 0.5
    found = knn_shapley_values(nearness, agrees, k)
    for target in range(3):

        def vote(subset, target=target):
            nearest = sorted(subset, key=lambda i: (-float(nearness[target, i]), i))[:k]
            return sum(bool(agrees[target, i]) for i in nearest) / k

        torch.testing.assert_close(found[target], shapley(vote, 7))
        assert float(found[target].sum()) == pytest.approx(vote(range(7)))


def test_knn_shapley_on_the_models_representations(checkpoints):
    train, targets = make_data(7), make_data(4, seed=1)
    found = KNNShapley(make_model(), checkpoints, k=2).attribute(make_trainer(), train, targets)
    expected = torch.zeros(4, 7, dtype=torch.float64)
    for weights in checkpoints:
        distance = cdist(penultimate(weights, targets), penultimate(weights, train))
        for target in range(4):

            def vote(subset, target=target, distance=distance):
                nearest = sorted(subset, key=lambda i: distance[target, i])[:2]
                return sum(float(train.tensors[1][i] == targets.tensors[1][target]) for i in nearest) / 2

            expected[target] += shapley(vote, 7) / len(checkpoints)
    torch.testing.assert_close(found, expected.float())


def test_labels_under_a_key_of_their_own():
    rows = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    model = nn.Linear(3, 2)
    data = Items({"x": rows, "labels": torch.arange(6), "kind": torch.tensor([0, 1, 0, 1, 1, 0])})
    forward = lambda module, batch: module(batch["x"])  # noqa: E731
    method = KNNShapley(model, [model.state_dict()], k=3, labels_key="kind", forward=forward)
    same = data.batch["kind"][:, None] == data.batch["kind"]
    expected = knn_shapley_values(-torch.cdist(rows, rows), same, 3)
    torch.testing.assert_close(method.attribute(make_trainer(), data, data), expected.float())


def by_length(items):
    return default_collate(sorted(items, key=lambda item: float(item[0][0])) if len(items) > 2 else items)


@pytest.mark.parametrize("method", [RepresentationSimilarity, KNNShapley])
@pytest.mark.parametrize("which", ["train", "targets"])
def test_a_collate_function_that_changes_the_order_is_refused(method, which, checkpoints):
    data = {"train": TRAIN, "targets": TARGETS}
    data[which] = DataLoader(data[which], batch_size=8, collate_fn=by_length)
    with pytest.raises(ValueError, match=r"is not that of the example alone.* changes the order"):
        method(make_model(), checkpoints).attribute(make_trainer(), **data)


@pytest.mark.parametrize("kind", ["dot", "cosine", "l2"])
def test_more_training_examples_are_compared_with_fewer_targets_at_once(monkeypatch, kind):
    monkeypatch.setattr(similarity, "_EXAMPLES", 20)
    generator = torch.Generator().manual_seed(0)
    targets, train = (torch.randn(count, 3, generator=generator) for count in (9, 40))
    blocks = list(similarity.similarities(targets, train, kind, at_once=8))
    assert [(block.start, block.stop) for block, _ in blocks] == [(0, 4), (4, 8), (8, 9)]
    expected = matrix(targets.double(), train.double(), kind)
    torch.testing.assert_close(torch.cat([rows for _, rows in blocks]), expected)


def test_cosines_of_tiny_representations():
    vectors = torch.tensor([[3.0, 4.0], [4.0, 3.0], [0.0, 0.0]])
    for scale in (1.0, 1e-20):
        ((_, found),) = similarity.similarities(scale * vectors[:1], scale * vectors, "cosine", at_once=1)
        torch.testing.assert_close(found, torch.tensor([[1.0, 0.96, 0.0]]).double(), rtol=1e-6, atol=0)
