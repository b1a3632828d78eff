"""Datasets of Hugging Face as data. They need the package datasets, which brings pyarrow and pandas."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_trak import TRAK, GradientDot
from lightning_trak.methods import BM25
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.projections import IdentityProjection, SparseProjection
from tests.lit import make_trainer

transformers = pytest.importorskip("transformers")

LENGTHS = (3, 7, 5, 2, 6, 4, 8, 3, 5)


class Words(nn.Module):
    """A mean of word vectors; the padding has no part in it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(20, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, input_ids, attention_mask):
        mask = attention_mask.unsqueeze(-1).to(self.head.weight)
        return self.head((self.embedding(input_ids) * mask).sum(1) / mask.sum(1))


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 20, (length,), generator=generator).tolist() for length in LENGTHS]
    return [{"input_ids": row, "attention_mask": [1] * len(row), "label": i % 3} for i, row in enumerate(ids)]


@pytest.fixture(scope="module")
def datasets():
    return pytest.importorskip("datasets", reason="needs the package datasets")


@pytest.fixture(scope="module")
def dataset(datasets, rows):
    return datasets.Dataset.from_list(rows)


@pytest.fixture(scope="module")
def collator():
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[PAD]": 0} | {str(i): i for i in range(1, 20)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[PAD]"))
    return transformers.DataCollatorWithPadding(
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")
    )


def pad(rows):
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
    return {
        "input_ids": ids, "attention_mask": (ids != 0).long(), "label": torch.tensor([row["label"] for row in rows])
    }  # fmt: skip


def score(directory, data, targets):
    model = Words()
    options = {"output": ClassificationMargin(), "projection": IdentityProjection(), "dtype": torch.float64}
    return GradientDot(model, [model.state_dict()], directory, **options).attribute(make_trainer(), data, targets)


@pytest.fixture(scope="module")
def expected(rows, tmp_path_factory):
    loader = DataLoader(rows, batch_size=1, collate_fn=pad)
    return score(tmp_path_factory.mktemp("expected"), loader, loader)


@pytest.mark.parametrize("form", ["dataset", "rows"])
@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_a_collator_pads(tmp_path, request, form, collator, expected, batch_size):
    data = request.getfixturevalue(form)
    loader = DataLoader(data, batch_size=batch_size, shuffle=True, collate_fn=collator)
    torch.testing.assert_close(score(tmp_path, loader, loader), expected)


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_items_of_one_length_need_no_collator(tmp_path, datasets, rows, expected, kind):
    padded = pad(rows)
    dataset = datasets.Dataset.from_dict({name: column.tolist() for name, column in padded.items()})
    torch.testing.assert_close(score(tmp_path, dataset.with_format(kind), dataset.with_format(kind)), expected)


def test_positions_are_those_of_the_selection(tmp_path, dataset, collator, expected):
    chosen = [5, 0, 8, 3]
    part = DataLoader(dataset.select(chosen), batch_size=3, collate_fn=collator)
    whole = DataLoader(dataset, batch_size=3, collate_fn=collator)
    torch.testing.assert_close(score(tmp_path, part, whole), expected[:, chosen])


def test_other_data_of_the_same_size_are_refused(tmp_path, dataset, collator):
    model = Words()
    loaders = [DataLoader(data, batch_size=4, collate_fn=collator) for data in (dataset, dataset.shuffle(seed=1))]
    trak = TRAK(model, [model.state_dict()], tmp_path, output=ClassificationMargin(), projection=SparseProjection(8))
    trak.featurize(make_trainer(), loaders[0])
    with pytest.raises(ValueError, match="other training data of this size"):
        trak.featurize(make_trainer(), loaders[1])


def test_texts_for_bm25(dataset):
    scores = BM25("input_ids").attribute(make_trainer(), dataset, dataset)
    assert scores.argmax(1).tolist() == list(range(len(dataset)))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda data: data, ValueError, "'input_ids' of an example is a list of 3 ints, .* data collator"),
        (lambda data: data.to_iterable_dataset(), TypeError, "to a IterableDataset: an iterable .* streaming=True"),
        (lambda data: DataLoader(data.to_iterable_dataset()), TypeError, "to a IterableDataset: an iterable"),
        (lambda data: data.train_test_split(3), TypeError, "one of them: 'train', 'test'"),
        (lambda data: data.select([]), ValueError, "the dataset is empty"),
    ],
)
def test_what_has_no_positions_or_batches_is_refused(tmp_path, dataset, make, error, match):
    with pytest.raises(error, match=match):
        score(tmp_path / "store", make(dataset), dataset)
    assert not (tmp_path / "store").exists()
