"""Scores token by token: of target texts, and of training texts, against autograd in float64 by the formulas."""

import pytest
import torch
from torch import nn

from lightning_trak import TRAK, GradientCosine, GradientDot, TracIn, TrainingRecorder
from lightning_trak.methods import ExactKernel, Explicit, InfluenceFunction, Metagradient, token_scores
from lightning_trak.methods.tokens import text_tokens
from lightning_trak.outputs import CausalLMLogLikelihood, CausalLMMargin, NegativeLoss
from lightning_trak.projections import IdentityProjection, SparseProjection
from lightning_trak.scoring import TopK
from tests.causal_texts import CausalNet, gradients, loader, make_texts, margins, pad_left
from tests.lit import beyond_hooks, make_trainer

TRAIN, TARGETS = make_texts(24), make_texts(4, seed=1)
METHODS = {
    "TRAK": (TRAK, {}),
    "dual": (TRAK, {"projection": SparseProjection(200)}),
    "averaged": (TRAK, {"loss_gradients": "averaged"}),
    "dot": (GradientDot, {}),
    "cosine": (GradientCosine, {}),
    "TracIn": (TracIn, {"learning_rates": [0.3, 0.1]}),
    "exact": (ExactKernel, {"dtype": torch.float64}),
    "integers": (TRAK, {"dtype": "int4", "damping": 1.0}),
}


def models(count=2):
    found = [CausalNet(seed) for seed in range(count)]
    return found[0], [model.state_dict() for model in found]


def make(path, name="TRAK", data=None, **more):
    kind, options = METHODS[name]
    options = ({} if kind is ExactKernel else {"projection": SparseProjection(24)}) | options | more
    method = kind(*models(), path / name, **options)
    method.featurize(make_trainer(precision="64-true"), data or loader(TRAIN), shard_size=8)
    return method


def close(found, expected, relative=1e-5):
    atol = relative * float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=atol)


def in_double(seed=0):
    return CausalNet(seed).double()


def token_rows(texts, values=margins):
    """The gradients of all tokens of texts, and the text of each."""
    model = in_double()
    found = [gradients(model, values(model, text)) for text in texts]
    return torch.cat(found), torch.cat([torch.full((len(rows),), number) for number, rows in enumerate(found)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TRAK", "dual", "dot", "exact"])
def test_the_rows_of_tokens_make_the_row_of_the_text(tmp_path, name):
    more = {"effect_on": "output"} if name == "dot" else {}
    method, trainer = make(tmp_path, name, **more), make_trainer(precision="64-true")
    whole = method.score(trainer, loader(TARGETS))
    output = CausalLMMargin(per_token=True)
    rows = method.score(trainer, loader(TARGETS, 3), output=output)
    tokens = text_tokens(trainer, loader(TARGETS), output)
    assert len(rows) == len(tokens.texts) == sum(int((text["labels"][1:] >= 0).sum()) for text in TARGETS)
    close(torch.stack([rows[tokens.of(text)].mean(0) for text in range(4)]), whole)
    question = {"output": output, "aggregate": "mean", "groups": tokens.texts}
    close(method.score(trainer, loader(TARGETS), **question), whole)
    close(method.attribute(trainer, loader(TRAIN), loader(TARGETS), **question), whole)


@pytest.mark.slow
def test_rows_of_log_probabilities_add_up_by_the_reduction(tmp_path):
    method, trainer = make(tmp_path), make_trainer(precision="64-true")
    output = CausalLMLogLikelihood(per_token=True)
    tokens, rows = text_tokens(trainer, loader(TARGETS), output), method.score(trainer, loader(TARGETS), output=output)
    sums = torch.stack([rows[tokens.of(text)].sum(0) for text in range(4)])
    counts = tokens.texts.bincount().unsqueeze(1)
    for kind, factor in (("sum", 1), ("mean", 1 / counts), ("sqrt", counts.rsqrt())):
        close(method.score(trainer, loader(TARGETS), output=CausalLMLogLikelihood(reduction=kind)), sums * factor)


@pytest.mark.parametrize("engine", ["hooks", "functional", "loop"])
@pytest.mark.parametrize("collate", [None, pad_left])
def test_rows_of_tokens_by_the_formula(tmp_path, engine, collate):
    """TRAK and GradientDot with whole gradients, at any padding and by any engine."""
    more = {} if collate is None else {"collate": collate}
    options = {"engine": engine, "projection": IdentityProjection(), "dtype": "float64"}
    model, checkpoints = models(1)
    if engine != "hooks":
        beyond_hooks(model)
    trainer, asked = make_trainer(precision="64-true"), CausalLMMargin(per_token=True)
    trak = TRAK(model, checkpoints, tmp_path, damping=0.5, curvature="identity", **options)
    trak.featurize(trainer, loader(TRAIN, **more))
    tokens, _ = token_rows(TARGETS)
    terms, texts = token_rows(TRAIN)
    rows = torch.stack([terms[texts == text].mean(0) for text in range(24)])
    with torch.no_grad():
        slopes = torch.stack([1 - margins(in_double(), text).mean().sigmoid() for text in TRAIN])
        chances = torch.cat([1 - margins(in_double(), text).sigmoid() for text in TARGETS])
    gram = rows.T @ rows
    gram += 0.5 * gram.diagonal().mean() * torch.eye(len(gram))
    expected = tokens @ torch.linalg.solve(gram, rows.T) * slopes
    close(trak.score(trainer, loader(TARGETS, **more), output=asked), expected)
    dot = GradientDot(model, checkpoints, tmp_path, **options)
    found = dot.score(trainer, loader(TARGETS, **more), output=asked)
    close(found, chances.unsqueeze(1) * (tokens @ rows.T) * slopes)  # the fall of -log p of each token


PAIRS = [(0, 3), (3, 3), (2, 23), (0, 12)]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_the_parts_of_a_training_text_sum_to_its_score(tmp_path, name):
    """For texts with and without a prompt, at several checkpoints, and also for a target that is a token."""
    method, trainer = make(tmp_path, name), make_trainer(precision="64-true")
    whole = method.score(trainer, loader(TARGETS))
    found = method.score_tokens(trainer, loader(TARGETS, 2), PAIRS)
    expected = torch.stack([whole[pair] for pair in PAIRS])

    close(torch.stack([each.scores.sum() for each in found]), expected)
    for (target, text), each in zip(PAIRS, found, strict=True):
        assert (each.target, each.train) == (target, text)
        places = [place for place, label in enumerate(TRAIN[text]["labels"].tolist()) if place and label >= 0]
        assert each.positions.tolist() == places
        assert torch.equal(each.ids, TRAIN[text]["input_ids"][places])


@pytest.mark.slow
def test_the_tokens_of_a_training_text_for_each_token_of_a_target(tmp_path):
    method, trainer = make(tmp_path), make_trainer(precision="64-true")
    output = CausalLMMargin(per_token=True)
    tokens = text_tokens(trainer, loader(TARGETS), output)
    pairs = [(row, 3) for row in range(len(tokens.texts))[tokens.of(2)]]
    rows = method.score_tokens(trainer, loader(TARGETS), pairs, loader(TRAIN, 7), output=output)
    (whole,) = method.score_tokens(trainer, loader(TARGETS), [(2, 3)])
    close(torch.stack([each.scores for each in rows]).mean(0), whole.scores)


@pytest.mark.parametrize("curvature", ["identity", "gauss_newton"])
def test_the_parts_of_a_training_text_by_the_formula(tmp_path, curvature):
    options = {"damping": 0.5, "curvature": curvature, "projection": IdentityProjection(), "dtype": "float64"}
    model, checkpoints = models(1)
    trainer = make_trainer(precision="64-true")
    trak = TRAK(model, checkpoints, tmp_path, **options)  # fewer texts than parameters: the dual
    trak.featurize(trainer, loader(TRAIN, collate=pad_left))
    terms, texts = token_rows(TRAIN)
    rows = torch.stack([terms[texts == text].mean(0) for text in range(24)])
    targets, of = token_rows(TARGETS)
    with torch.no_grad():
        chances = torch.stack([1 - margins(in_double(), text).mean().sigmoid() for text in TRAIN])
    weights = chances * (1 - chances) if curvature == "gauss_newton" else torch.ones(24)
    gram = rows.T @ (rows * weights.unsqueeze(1))
    gram += 0.5 * gram.diagonal().mean() * torch.eye(len(gram))
    for each in trak.score_tokens(trainer, TARGETS_LEFT, PAIRS):
        direction = torch.linalg.solve(gram, targets[of == each.target].mean(0))
        own = terms[texts == each.train]
        close(each.scores, own @ direction * chances[each.train] / len(own))


TARGETS_LEFT = loader(TARGETS, collate=pad_left)


@pytest.mark.slow
def test_parts_do_not_depend_on_batches_or_blocks(tmp_path, monkeypatch):
    method, trainer = make(tmp_path), make_trainer(precision="64-true")
    first = method.score_tokens(trainer, loader(TARGETS), PAIRS)
    monkeypatch.setattr(token_scores, "_BYTES", 2000)
    again = method.score_tokens(trainer, loader(TARGETS, 1), PAIRS[::-1], loader(TRAIN, 3))
    for one, other in zip(first, again[::-1], strict=True):
        close(other.scores, one.scores)
    top = method.score(trainer, loader(TARGETS), top_k=2)
    ends = method.score_tokens(trainer, loader(TARGETS), top)
    assert [(each.target, each.train) for each in ends] == [
        (target, text) for target in range(4) for end in top for text in end.indices[target].tolist()
    ]
    best = method.score_tokens(trainer, loader(TARGETS), top.proponents)
    assert [(each.target, each.train) for each in best] == [
        (target, text) for target in range(4) for text in top.indices[target].tolist()
    ]
    close(torch.stack([each.scores.sum() for each in best]).view(4, 2), top.values)


@pytest.mark.slow
def test_influence_of_tokens():
    method = InfluenceFunction(*models(1), solver=Explicit(), damping=0.1)
    trainer = make_trainer(precision="64-true")
    output = CausalLMMargin(per_token=True)
    tokens = text_tokens(None, loader(TARGETS), output)
    rows = method.attribute(trainer, loader(TRAIN), loader(TARGETS), output=output)
    whole = method.attribute(trainer, loader(TRAIN), loader(TARGETS))
    close(torch.stack([rows[tokens.of(text)].mean(0) for text in range(4)]), whole)


class Trained(CausalNet):
    def training_step(self, batch):
        return torch.nn.functional.softplus(-CausalLMMargin().output(self, batch)).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.slow
def test_metagradient_of_tokens(tmp_path):
    trainer = make_trainer(max_epochs=1, precision="64-true", callbacks=[TrainingRecorder(tmp_path / "recording")])
    model = Trained()
    trainer.fit(model, loader(TRAIN, 8))
    method = Metagradient(model, tmp_path / "recording", progress_bar=False, check_smooth=False)
    output = CausalLMMargin(per_token=True)
    tokens = text_tokens(trainer, loader(TARGETS), output)
    rows = method.attribute(make_trainer(), loader(TRAIN, 8), loader(TARGETS), output=output)
    whole = method.attribute(make_trainer(), loader(TRAIN, 8), loader(TARGETS))
    close(torch.stack([rows[tokens.of(text)].mean(0) for text in range(4)]), whole)


class Hooked(CausalNet):
    """Its transfer hooks know nothing but its own batches."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return dict(batch)

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return {name: part.to(device) for name, part in batch.items()}

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch | {"labels": batch["labels"].clone()}


class Shortened(CausalNet):
    """Takes a label away when the batch is on the device."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        labels = nn.functional.pad(batch["labels"], (0, 1), value=-100)
        labels[:, 1] = torch.where(labels[:, 2] >= 0, -100, labels[:, 1])
        return batch | {"labels": labels[:, :-1]}


def featurized(path, model=None, **options):
    model = model or CausalNet()
    options = {"projection": SparseProjection(16)} | options
    method = GradientDot(model, [model.state_dict()], path, **options)
    method.featurize(make_trainer(), loader(TRAIN))
    return method


@pytest.mark.slow
def test_the_users_hooks_see_the_users_batches(tmp_path):
    plain, hooked = featurized(tmp_path / "plain"), featurized(tmp_path / "hooked", Hooked())
    output, trainer = CausalLMMargin(per_token=True), make_trainer()
    close(hooked.score(trainer, loader(TARGETS), output=output), plain.score(trainer, loader(TARGETS), output=output))
    first, second = (method.score_tokens(trainer, loader(TARGETS), [(0, 3)]) for method in (plain, hooked))
    close(first[0].scores, second[0].scores)
    shortened = featurized(tmp_path / "shortened", Shortened())
    with pytest.raises(ValueError, match="another number of tokens in a batch with others, or after on_after_batch"):
        shortened.score(trainer, loader(TARGETS), output=output)


@pytest.mark.slow
def test_gpt2_padded_on_the_left(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 9}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(bos_token_id=8, eos_token_id=8, **sizes))
    trainer = make_trainer(precision="64-true")
    trak = TRAK(model, [model.state_dict()], tmp_path, output=CausalLMMargin(), projection=SparseProjection(16))
    trak.featurize(trainer, loader(TRAIN, 8, collate=positioned))
    output = CausalLMMargin(per_token=True)
    whole = trak.score(trainer, loader(TARGETS, 2, collate=positioned))
    rows = trak.score(trainer, loader(TARGETS, collate=positioned), output=output)
    tokens = text_tokens(trainer, loader(TARGETS, collate=positioned), output)
    close(torch.stack([rows[tokens.of(text)].mean(0) for text in range(4)]), whole)
    parts = trak.score_tokens(trainer, loader(TARGETS, collate=positioned), PAIRS)
    close(torch.stack([each.scores.sum() for each in parts]), torch.stack([whole[pair] for pair in PAIRS]))
    for each in parts:
        assert torch.equal(each.ids, TRAIN[each.train]["input_ids"][each.positions])


def positioned(texts):
    """Positions as ``generate`` makes them: GPT-2 counts padding on the left otherwise."""
    batch = pad_left(texts)
    return batch | {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}


@pytest.fixture(scope="module")
def refusing(tmp_path_factory):
    return featurized(tmp_path_factory.mktemp("refusing"))


@pytest.mark.parametrize(
    ("pairs", "options", "error"),
    [
        ([], {}, "pairs is empty"),
        ([(0, 24)], {}, "pairs name training text 24, and there are 24, from 0 to 23"),
        ([(-1, 0)], {}, "pairs name target -1, and there are 4"),
        ([0, 1], {}, r"pairs must be pairs \(target, training text\)"),
        ([(0.5, 1)], {}, "of positions as integers"),
        (torch.rand(2, 2), {}, "of positions as integers"),
        (torch.zeros(2, 3, dtype=torch.int64), {}, "pairs must be pairs"),
        (TopK(torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.int64)), {}, "those of 1 rows, and there are 4 targets"),
        ([(0, 1)], {"train": loader(TRAIN[:5])}, "which has 24 examples; the data given have 5"),
        ([(0, 1)], {"train": loader(TRAIN[::-1])}, "some items of the data given are others"),
        ([(0, 1)], {"output": "loss"}, "output must be a ModelOutput"),
    ],
)
def test_pairs_that_are_refused(refusing, pairs, options, error):
    with pytest.raises((ValueError, TypeError), match=error):
        refusing.score_tokens(make_trainer(), loader(TARGETS), pairs, **options)


@pytest.mark.slow
def test_what_has_no_tokens_is_refused(refusing, tmp_path):
    trainer, output = make_trainer(), CausalLMMargin(per_token=True)
    loss = NegativeLoss(lambda module, batch: -CausalLMMargin().output(module, batch))
    method = featurized(tmp_path / "loss", output=loss)
    with pytest.raises(TypeError, match="NegativeLoss is not known to be a sum over tokens"):
        method.score_tokens(trainer, loader(TARGETS), [(0, 1)])
    with pytest.raises(ValueError, match="make it with per_token=True"):
        text_tokens(trainer, loader(TARGETS), CausalLMMargin())
    with pytest.raises(TypeError, match="is an output of targets alone"):
        featurized(tmp_path / "alone", output=output)
    unlabelled = [*TARGETS, {"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([1, -100])}]
    with pytest.raises(ValueError, match="no token of text 4 counts"):
        refusing.score(trainer, loader(unlabelled), output=output)
    other = GradientDot(refusing.model, [refusing.model.state_dict()], refusing.store, projection=SparseProjection(16))
    with pytest.raises(ValueError, match="score_tokens needs the training data: pass train="):
        other.score_tokens(trainer, loader(TARGETS), [(0, 1)])
    sparse = TRAK(
        CausalNet(),
        [CausalNet().state_dict()],
        refusing.store,
        curvature="gauss_newton",
        soft_threshold=1e-3,
        projection=SparseProjection(16),
    )
    with pytest.raises(ValueError, match="use soft_threshold=0"):
        sparse.score_tokens(trainer, loader(TARGETS), [(0, 1)], loader(TRAIN))
    with pytest.raises(ValueError, match="there are no tokens of text 7"):
        text_tokens(trainer, loader(TARGETS), output).of(7)
    batches = trainer.predict(refusing.scorer(), loader(TARGETS))
    assert len(batches) == 1


@pytest.mark.slow
def test_other_texts_than_those_of_the_store_are_refused(tmp_path):
    """Those that no sampled item shows have other outputs."""
    method = featurized(tmp_path)
    changed = list(TRAIN)
    changed[1] = {"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([1, 2, 3])}
    with pytest.raises(ValueError, match="the tokens of training text 1 add up to an output of"):
        method.score_tokens(make_trainer(), loader(TARGETS), [(0, 1)], loader(changed))
    method.score_tokens(make_trainer(), loader(TARGETS), [(0, 2)], loader(changed))
