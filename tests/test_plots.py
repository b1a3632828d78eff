import pytest
import torch
from matplotlib.image import imread

from lightning_trak.plots import plot_attributions


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (3, 8, 8)])
def test_a_row_holds_the_target_and_its_extremes(tmp_path, shape):
    train = torch.rand(20, *shape)
    scores = torch.stack([torch.arange(20.0), -torch.arange(20.0)])
    figure = plot_attributions(torch.rand(2, *shape), train, scores, k=3, target_names=["cat", "dog"])
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
        plot_attributions(torch.rand(2, 8, 8), torch.rand(5, 8, 8), torch.rand(5, 2))
