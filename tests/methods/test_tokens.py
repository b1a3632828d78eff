"""Scores token by token: of target texts, and of training texts, against autograd in float64 by the formulas."""

import pytest
import torch

from lightning_trak import TRAK, GradientCosine, GradientDot, TracIn
from lightning_trak.methods import ExactKernel, Explicit, InfluenceFunction, token_scores
from lightning_trak.methods.tokens import text_tokens
from lightning_trak.outputs import CausalLMLogLikelihood, CausalLMMargin
from lightning_trak.projections import IdentityProjection, SparseProjection
from tests.lit import beyond_hooks, make_trainer
from tests.texts import CausalNet, gradients, loader, make_texts, margins, pad_left

TRAIN, TARGETS = make_texts(24), make_texts(4, seed=1)
METHODS = {
    "TRAK": (TRAK, {}),
    "dual": (TRAK, {"projection": SparseProjection(200)}),
    "averaged": (TRAK, {"loss_gradients": "averaged"}),
    "dot": (GradientDot, {}),
    "cosine": (GradientCosine, {}),
    "TracIn": (TracIn, {"learning_rates": [0.3, 0.1]}),
    "exact": (ExactKernel, {"dtype": torch.float64}),
    "integers": (TRAK, {"dtype": "int8", "projection": SparseProjection(24)}),
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
    close(method.score(trainer, loader(TARGETS), output=output, aggregate="mean", groups=tokens.texts), whole)


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
    tolerance = 0.05 if name == "integers" else 1e-5  # integers are rounded features, their tokens are not
    close(torch.stack([each.scores.sum() for each in found]), expected, tolerance)
    for (target, text), each in zip(PAIRS, found, strict=True):
        assert (each.target, each.train) == (target, text)
        places = [place for place, label in enumerate(TRAIN[text]["labels"].tolist()) if place and label >= 0]
        assert each.positions.tolist() == places
        assert torch.equal(each.ids, TRAIN[text]["input_ids"][places])


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


def test_parts_do_not_depend_on_batches_or_blocks(tmp_path, monkeypatch):
    method, trainer = make(tmp_path), make_trainer(precision="64-true")
    first = method.score_tokens(trainer, loader(TARGETS), PAIRS)
    monkeypatch.setattr(token_scores, "_BYTES", 2000)
    again = method.score_tokens(trainer, loader(TARGETS, 1), PAIRS[::-1], loader(TRAIN, 3))
    for one, other in zip(first, again[::-1], strict=True):
        close(other.scores, one.scores)
    top = method.score(trainer, loader(TARGETS), top_k=2)
    best = method.score_tokens(trainer, loader(TARGETS), top)
    assert [(each.target, each.train) for each in best] == [
        (target, text) for target in range(4) for text in top.indices[target].tolist()
    ]
    close(torch.stack([each.scores.sum() for each in best]).view(4, 2), top.values)


def test_influence_of_tokens():
    method = InfluenceFunction(*models(1), solver=Explicit(), damping=0.1)
    trainer = make_trainer(precision="64-true")
    output = CausalLMMargin(per_token=True)
    tokens = text_tokens(trainer, loader(TARGETS), output)
    rows = method.attribute(trainer, loader(TRAIN), loader(TARGETS), output=output)
    whole = method.attribute(trainer, loader(TRAIN), loader(TARGETS))
    close(torch.stack([rows[tokens.of(text)].mean(0) for text in range(4)]), whole)
