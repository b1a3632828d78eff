"""Choosing scores by a fleet: the choice, and that what is reported is not what was chosen for."""

import pytest
import torch

from lightning_trak import LinearDatamodelingScore
from lightning_trak.retraining import random_subsets, tune

TARGETS, TRAIN, SUBSETS = 12, 40, 30


def made(seed=0, noise=1.0):
    generator = torch.Generator().manual_seed(seed)
    masks = random_subsets(TRAIN, SUBSETS, seed=seed)
    truth = torch.randn(TARGETS, TRAIN, generator=generator)
    outputs = truth @ masks.float().T
    outputs = outputs[..., None] + noise * torch.randn(TARGETS, SUBSETS, 2, generator=generator)
    return truth, masks, outputs


def test_the_best_candidate_is_chosen_and_measured():
    truth, masks, outputs = made()
    noise = torch.randn(TARGETS, TRAIN, generator=torch.Generator().manual_seed(5))
    before = torch.get_rng_state()
    tuning = tune({"worse": truth + noise, "best": truth, "worst": noise}, masks, outputs)
    assert torch.equal(before, torch.get_rng_state())
    assert tuning.best == "best"
    assert tuning.choices == ("best",) * 5
    for name, scores in {"worse": truth + noise, "best": truth, "worst": noise}.items():
        lds = LinearDatamodelingScore(masks)
        lds.update(scores, outputs)
        assert tuning.candidates[name].lds == pytest.approx(float(lds.compute()))
        assert tuning.candidates[name][1:] == pytest.approx(lds.interval().tolist())
    assert tuning.held_out.low < tuning.held_out.lds < tuning.held_out.high
    assert tuning.held_out.lds == pytest.approx(tuning.candidates["best"].lds)


def test_held_out_lds_is_that_on_the_folds_that_the_choice_did_not_see():
    truth, masks, outputs = made(noise=3.0)
    half = torch.randn(TARGETS, TRAIN, generator=torch.Generator().manual_seed(8))
    candidates = {"a": truth + half, "b": truth - half}
    tuning = tune(candidates, masks, outputs, folds=2, seed=4)
    order = torch.randperm(SUBSETS, generator=torch.Generator().manual_seed(4)) % 2
    folds = []
    for fold, choice in enumerate(tuning.choices):
        halves = {}
        for side in (order != fold, order == fold):
            for name, scores in candidates.items():
                lds = LinearDatamodelingScore(masks[side])
                lds.update(scores, outputs[:, side])
                halves.setdefault(name, []).append(float(lds.compute()))
        assert choice == max(halves, key=lambda name: halves[name][0])
        folds.append(halves[choice][1])
    assert tuning.held_out.lds == pytest.approx(sum(folds) / 2, abs=0.03)


def test_subsets_that_scores_were_made_from_are_refused():
    truth, masks, outputs = made()
    measured = []

    def candidate():
        measured.append(True)
        return truth

    with pytest.raises(ValueError, match=r"2 of 30 were: rows 4, 9 of `masks`.*`split`"):
        tune({"a": candidate}, masks, outputs, used_masks=masks[[9, 4]])
    assert not measured  # refused before any scores are made
    rest = tune({"a": candidate}, masks[5:], outputs[:, 5:], used_masks=masks[:5])
    assert rest == tune({"a": truth}, masks[5:], outputs[:, 5:])


def test_the_best_of_meaningless_scores_is_not_reported_as_good():
    best, held_out = [], []
    for seed in range(12):
        _, masks, outputs = made(seed)
        generator = torch.Generator().manual_seed(100 + seed)
        tuning = tune({n: torch.randn(TARGETS, TRAIN, generator=generator) for n in range(8)}, masks, outputs)
        best.append(tuning.candidates[tuning.best].lds)
        assert best[-1] == max(measured.lds for measured in tuning.candidates.values())
        held_out.append(tuning.held_out.lds)
    assert torch.tensor(best).mean() > 0.07
    assert torch.tensor(held_out).mean().abs() < 0.04


def test_functions_are_called_once_and_give_the_same():
    truth, masks, outputs = made()
    calls = []
    lazy = {sign: lambda sign=sign: calls.append(sign) or sign * truth for sign in (-1, 1)}
    assert tune(lazy, masks, outputs) == tune({-1: -truth, 1: truth}, masks, outputs)
    assert calls == [-1, 1]


def test_constant_scores_count_as_zero_and_ties_go_to_the_first():
    truth, masks, outputs = made()
    tuning = tune({"nothing": torch.zeros_like(truth), "same": torch.zeros_like(truth)}, masks, outputs)
    assert tuning.best == "nothing"
    assert tuning.held_out.lds == 0
    assert tune({"nothing": torch.zeros_like(truth), "right": truth}, masks, outputs).best == "right"


def test_it_is_told_in_a_table():
    truth, masks, outputs = made()
    tuning = tune({"auto": truth, 0.1: -truth}, masks, outputs)
    lines = str(tuning).splitlines()
    assert lines[0] == "| candidate | LDS | low | high |"
    assert lines[2].startswith(f"| auto (best) | {tuning.candidates['auto'].lds:.4g} |")
    assert lines[3].startswith("| 0.1 | -")
    assert lines[4].startswith(f"| chosen, held out | {tuning.held_out.lds:.4g} |")
    assert str(tuning.held_out).startswith(f"{tuning.held_out.lds:.3f} (")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s, m, o: ({}, m, o), "at least one candidate"),
        (lambda s, m, o: ({"a": s[:, 1:]}, m, o), "candidate 'a' cannot be measured: Expected `scores` of shape"),
        (lambda s, m, o: ({"a": s, "b": s[1:]}, m, o), "candidate 'b' cannot be measured: Expected `outputs`"),
        (lambda s, m, o: ({"a": s * float("nan")}, m, o), "candidate 'a' cannot be measured: Expected finite `scores`"),
        (lambda s, m, o: ({"a": s}, m, o / 0), "Expected finite `outputs`"),
        (lambda s, m, o: ({"a": s}, m[:14], o[:, :14]), "at least 3 subsets in each of 5 folds, which is 15, got 14"),
        (lambda s, m, o: ({"a": s}, m[[0, *range(SUBSETS - 1)]], o), "rows 0 and 1 of `masks` are equal"),
        (lambda s, m, o: ({"a": s}, m.float(), o), "Expected `masks` of dtype torch.bool"),
        (lambda s, m, o: ({"a": s[:1]}, m, o[:1]), "at least 2 targets"),
    ],
)
def test_what_cannot_be_measured_is_refused(change, match):
    with pytest.raises(ValueError, match=match):
        tune(*change(*made()))


@pytest.mark.parametrize("folds", [1, 0, -3, 2.5, float("nan"), "3", True])
def test_folds_that_are_none(folds):
    truth, masks, outputs = made()
    with pytest.raises(ValueError, match="folds must be a whole number from 2 on"):
        tune({"a": truth}, masks, outputs, folds=folds)


def test_candidates_that_are_no_scores():
    _, masks, outputs = made()
    with pytest.raises(TypeError, match="for candidate 'top', or a function that returns one, got tuple"):
        tune({"top": (1, 2)}, masks, outputs)
    with pytest.raises(TypeError, match="candidates as a mapping from names to scores, got a list"):
        tune([torch.zeros(2, 3)], masks, outputs)
