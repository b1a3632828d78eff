"""BM25: training texts that share rare words with the target."""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_trak.methods.base import Method
from lightning_trak.methods.examples import Examples
from lightning_trak.running.data import Data, batch_ranges, batch_size_of, load

Text = str | Tensor | Iterable[Hashable]

# Targets are scored in blocks, dense over the vocabulary.
_TARGETS = 128


class BM25(Method):
    r"""How many words, and how rare ones, does the training text share with the target?

    A positive score says that they share at least one word; there are no negative scores. The unit is that of Okapi
    BM25: a sum of logarithms, comparable between the training texts of one target, not between targets. A score says
    nothing about the effect of training, and no model takes part. This is BM25 with each target as the query
    (Robertson and Zaragoza 2009, section 3), as Lucene computes it.

    For a training text i of length :math:`|i|` in which the token t occurs :math:`\mathrm{tf}_{ti}` times, and a target
    x in which it occurs :math:`q_{tx}` times,

    .. math:: \tau(x)_i = \sum_t q_{tx} \ln\left(1 + \frac{N - n_t + 1/2}{n_t + 1/2}\right)
                          \frac{\mathrm{tf}_{ti}}{\mathrm{tf}_{ti} + k_1 (1 - b + b |i| / \overline{|i|})},

    with N training texts, of which :math:`n_t` hold t. The one in the logarithm keeps it positive for tokens that most
    texts hold.

    Args:
        text: what makes an item of the datasets, before collation, a string or a sequence of tokens (ids, or anything
            hashable): a function, or a key or index of the item. A string's tokens are its words in lower case
            (``\w+``). Tokens that pad should be left out.
        k1: how soon repetitions of a token stop counting: the smaller, the sooner.
        b: how much the scores of long texts are lowered, from 0 to 1.

    Example::

        scores = BM25("text").attribute(trainer, train_texts, target_texts)
    """

    def __init__(self, text: Callable[[Any], Text] | str | int, *, k1: float = 1.2, b: float = 0.75) -> None:
        if not k1 >= 0 or not 0 <= b <= 1:
            raise ValueError(f"expected k1 of at least 0 and b from 0 to 1, got k1={k1} and b={b}")
        self.text = text if callable(text) else lambda item: item[text]
        self.k1 = k1
        self.b = b

    def attribute(self, trainer: L.Trainer, train: Data, targets: Data) -> Tensor:
        """BM25 of each training text for each target; see :class:`~lightning_trak.methods.base.Method`.

        Raises:
            TypeError: if ``text`` gives something else than a string or tokens.
        """
        documents = self._count(Examples(train, "fit", trainer).loader)
        queries = self._count(Examples(targets, "predict", trainer).loader)
        numbers = {token: number for number, token in enumerate(dict.fromkeys(t for text in documents for t in text))}
        weights = self._weights(documents, numbers)
        scores = torch.empty(len(queries), len(documents))
        for start in range(0, len(queries), _TARGETS):
            block = queries[start : start + _TARGETS]
            counts = torch.zeros(len(numbers), len(block), dtype=torch.float64)
            for column, query in enumerate(block):
                for token, count in query.items():
                    if token in numbers:
                        counts[numbers[token], column] = count
            scores[start : start + len(block)] = torch.sparse.mm(weights, counts).T.float()
        return scores

    def _weights(self, documents: list[Counter[Hashable]], numbers: dict[Hashable, int]) -> Tensor:
        """What one occurrence of a token in a query adds to the score: sparse, ``(num_train, vocabulary)``."""
        rows = torch.tensor([row for row, text in enumerate(documents) for _ in text], dtype=torch.int64)
        columns = torch.tensor([numbers[token] for text in documents for token in text], dtype=torch.int64)
        counts = torch.tensor([count for text in documents for count in text.values()], dtype=torch.float64)
        lengths = torch.tensor([text.total() for text in documents], dtype=torch.float64)
        holding = torch.bincount(columns, minlength=len(numbers)).double()
        rarity = torch.log1p((len(documents) - holding + 0.5) / (holding + 0.5))
        saturation = self.k1 * (1 - self.b + self.b * lengths / lengths.mean())
        values = rarity[columns] * counts / (counts + saturation[rows])
        places, shape = torch.stack([rows, columns]), (len(documents), len(numbers))
        return torch.sparse_coo_tensor(places, values, shape, check_invariants=True).coalesce()

    def _count(self, loader: DataLoader[Any]) -> list[Counter[Hashable]]:
        ranges = batch_ranges(range(len(cast(Any, loader.dataset))), batch_size_of(loader))
        with isolate_rng():
            batches = load(loader, (part.examples for part in ranges), collate_fn=list)
            return [Counter(_tokens(self.text(item))) for batch in batches for item in batch]


def _tokens(text: Any) -> Iterable[Hashable]:
    if isinstance(text, str):
        return re.findall(r"\w+", text.lower())
    if isinstance(text, Tensor):
        return cast(list[int], text.flatten().tolist())
    if isinstance(text, Iterable) and not isinstance(text, bytes):
        return text
    raise TypeError(f"expected a string or a sequence of tokens from text=, got {type(text).__name__}")
