import sys
from itertools import pairwise

import pytest
import torch
from matplotlib.image import imread

from lightning_trak.metrics.functional import mislabel_detection_curve
from lightning_trak.reporting.plots import (
    Picture,
    plot_attributions,
    plot_brittleness,
    plot_histogram,
    plot_mislabel_curves,
    plot_outcomes,
    plot_pictures,
)
from lightning_trak.reporting.showing import kind_of_file
from tests.retraining.brittleness import make_brittleness


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (3, 8, 8)])
def test_a_row_holds_the_target_and_its_extremes(tmp_path, shape):
    generator = torch.Generator().manual_seed(0)
    train = torch.rand(20, *shape, generator=generator)
    targets = torch.rand(2, *shape, generator=generator)
    scores = torch.stack([torch.arange(20.0), -torch.arange(20.0)])
    figure = plot_attributions(targets, train, scores, k=3, target_names=["cat", "dog"])
    titles = [axis.get_title() for part in figure.subfigs for axis in part.axes]
    assert titles == [
        *["cat", "dog"],
        *["#19\n+19", "#18\n+18", "#17\n+17", "#0\n-0", "#1\n-1", "#2\n-2"],
        *["#0\n+0", "#1\n+1", "#2\n+2", "#19\n-19", "#18\n-18", "#17\n-17"],
    ]
    shown = figure.subfigs[1].axes[0].images[0].get_array()
    expected = train[19] if len(shape) == 2 else train[19].permute(1, 2, 0).squeeze(2)
    torch.testing.assert_close(torch.tensor(shown.data), expected)
    figure.savefig(tmp_path / "picture.png")
    assert imread(tmp_path / "picture.png").std() > 0


def test_shapes_must_belong_together():
    with pytest.raises(ValueError, match=r"expected scores of shape \(2, 5\), got \(5, 2\)"):
        plot_attributions(torch.zeros(2, 8, 8), torch.zeros(5, 8, 8), torch.zeros(5, 2))


@pytest.mark.parametrize("k", [1, 2])
def test_titles_do_not_overlap(k):
    """Neither those of images beside each other nor those of groups, however few and however long."""
    long = Picture(
        torch.zeros(8, 8), "a long title of many words, which would not have stood in one line above an image"
    )
    rows = {name: [[long] * k] * 2 for name in ("proponents", "opponents", "what another method names")}
    figure = plot_pictures([long, long], rows)
    figure.draw_without_rendering()
    for texts in (
        [part._suptitle for part in figure.subfigs],
        [axis.title for part in figure.subfigs for axis in part.axes[: 1 if part is figure.subfigs[0] else k]],
    ):
        boxes = [text.get_window_extent() for text in texts]
        assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    tops = [part.axes[0].get_window_extent().y1 for part in figure.subfigs[1:]]
    assert max(tops) - min(tops) < 1  # pixels: images of a row are level


def test_a_title_holds_prediction_and_label():
    picture = Picture(torch.zeros(8, 8), "a car\npredicted automobile (36.9%), labelled truck (20.4%)")
    figure = plot_pictures([picture], {"proponents": [[picture]]})
    assert figure.subfigs[0].axes[0].get_title().endswith("labelled truck\n(20.4%)")


def test_outcomes_are_bars_of_means_with_a_dot_for_each_model():
    outcomes = {"traced": torch.tensor([[0.9, 1.0], [0.1, 0.3]]), "others": torch.tensor([[0.8, 0.8], [0.6, 0.9]])}
    figure = plot_outcomes(["nothing", "TRAK"], outcomes, "share answered")
    (axis,) = figure.axes
    for bars, values in zip(axis.containers, outcomes.values(), strict=True):
        assert [bar.get_width() for bar in bars] == pytest.approx(values.mean(1).tolist())
        for place, (bar, row) in enumerate(zip(bars, values, strict=True)):
            middle = bar.get_y() + bar.get_height() / 2
            (dots,) = [line for line in axis.lines if line.get_ydata()[0] == pytest.approx(middle)]
            assert list(dots.get_xdata()) == pytest.approx(row.tolist())
            assert abs(middle - place) < 0.4
    assert [text.get_text() for text in axis.get_yticklabels()] == ["nothing", "TRAK"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["traced", "others"]


@pytest.mark.slow
def test_brittleness_is_drawn_as_it_is(tmp_path):
    found = make_brittleness()
    figure = plot_brittleness(found)
    left, right = figure.axes
    for axis, estimate in ((left, found.drop()), (right, found.flips())):
        for row, container in enumerate(axis.containers):
            line, _, (bars,) = container
            torch.testing.assert_close(
                torch.tensor([float(y) for y in line.get_ydata()], dtype=torch.float64), estimate.mean[row]
            )
            ends = torch.stack([torch.tensor(segment[:, 1]).double() for segment in bars.get_segments()])
            torch.testing.assert_close(ends, torch.stack([estimate.low[row], estimate.high[row]], dim=1))
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["trained again on everything", "good", "bad"]
    figure.savefig(tmp_path / "picture.png")
    assert imread(tmp_path / "picture.png").std() > 0


def test_detection_curves_are_drawn_with_their_areas():
    curve = mislabel_detection_curve(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([True, False, False]))
    figure = plot_mislabel_curves({"loss": curve})
    for axis in figure.axes:
        assert list(axis.lines[0].get_xdata()) == curve.inspected.tolist()
        assert list(axis.lines[0].get_ydata()) == curve.found.tolist()
        assert axis.get_legend() is None  # it would cover curves
    assert figure.legends[0].get_texts()[0].get_text() == "loss: area 0.833"


def test_many_detection_curves_differ_in_their_style():
    curve = mislabel_detection_curve(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([True, False, False]))
    figure = plot_mislabel_curves({f"method {number}": curve for number in range(11)})
    assert len(figure.legends[0].get_texts()) == 13  # with what is random, and what is best
    for axis in figure.axes:
        assert len({(line.get_color(), line.get_linestyle()) for line in axis.lines}) == 13
    with pytest.raises(ValueError, match="there are no curves to draw"):
        plot_mislabel_curves({})


def test_detection_curves_are_enlarged_where_good_ones_differ():
    wrong = torch.arange(100) < 5
    curve = mislabel_detection_curve(wrong.float(), wrong)
    whole, enlarged = plot_mislabel_curves({"loss": curve}).axes
    assert whole.get_xlim()[1] >= 1
    assert enlarged.get_xlim() == pytest.approx((0.025, 0.1))
    assert enlarged.get_ylim()[0] == 0.5
    assert plot_mislabel_curves({"more": curve._replace(share=torch.tensor(0.6))}).axes[1].get_xlim()[1] == 1


def test_histograms_leave_nans_out():
    axis = plot_histogram(torch.tensor([0.1, 0.2, torch.nan, 0.6]), "score").axes[0]
    assert sum(bar.get_height() for bar in axis.patches) == 3
    assert axis.get_legend().get_texts()[0].get_text() == "mean 0.300"


@pytest.mark.parametrize("draw", [lambda: plot_histogram(torch.arange(6.0), "score"), lambda: kind_of_file("a.png")])
def test_missing_package(monkeypatch, draw):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r'^pictures need matplotlib: pip install "lightning-trak\[plots\]"$'):
        draw()


def test_what_can_be_no_file_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "a.html").mkdir()
    for path, error in (("file/a.html", NotADirectoryError), ("a.html", IsADirectoryError)):
        with pytest.raises(error, match="use another path"):
            kind_of_file(tmp_path / path)
