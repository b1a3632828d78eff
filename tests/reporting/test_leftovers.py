"""What a killed process was writing is removed by the next one that writes a file there."""

import os

import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_trak.cleaning import Ranking
from lightning_trak.methods import RandomScores
from lightning_trak.reporting.scores import SavedScores

DATA = TensorDataset(torch.zeros(3, 2))
SCORES = torch.zeros(3, 3)
RANKING = Ranking("wrong labels", "suspicion", torch.arange(3), torch.zeros(3), DATA)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("scores", SavedScores(SCORES, 3, "TRAK").save),
        ("shown.csv", lambda path: RandomScores().show(SCORES, DATA, DATA, out=path)),
        ("shown.html", lambda path: RandomScores().show(SCORES, DATA, DATA, out=path)),
        ("ranking.csv", RANKING.to_csv),
    ],
)
def test_of_each_kind_of_file(tmp_path, name, write):
    leftover = tmp_path / f".shown.csv.{'0' * 12}-1-00000000.tmp"
    leftover.mkdir()
    (leftover / "half").write_text("")
    os.utime(leftover, (0, 0))  # of another host, long ago
    write(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
