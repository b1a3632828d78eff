"""BM25: training texts that share rare words with the target."""

import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_trak.checks import needs_extra
from lightning_trak.methods.base import MatrixMethod
from lightning_trak.methods.examples import Examples
from lightning_trak.running.data.loading import batch_size_of, load, num_examples
from lightning_trak.running.data.ranges import batch_ranges
from lightning_trak.running.random_states import isolated_random_states
from lightning_trak.texts.messages import listed

Text = str | Tensor | Iterable[Hashable]


class BM25(MatrixMethod):
    r"""How many words, and how rare ones, does the training text share with the target?

    A positive score says that they share at least one word; there are no negative scores. The unit is that of Okapi
    BM25: a sum of logarithms, comparable between the training texts of one target, not between targets. A score says
    nothing about the effect of training, and no model takes part. This is BM25 with each target as the query
    (Robertson and Zaragoza 2009, section 3), as Lucene computes it.

    For a training text i of length :math:`|i|` in which the token t occurs :math:`\mathrm{tf}_{ti}` times, and a target
    x in which it occurs :math:`q_{tx}` times,

    .. math:: \tau(x)_i = \sum_t q_{tx} \ln\left(1 + \frac{N - n_t + 1/2}{n_t + 1/2}\right)
                          \frac{\mathrm{tf}_{ti}}{\mathrm{tf}_{ti} + k_1 (1 - b + b |i| / \overline{|i|})},

    with N training texts, of which :math:`n_t` hold t. The 1 in the logarithm keeps it positive for tokens that most
    texts hold. The package bm25s computes the scores, in float64. Needs the extra ``text``.

    If JAX is installed, bm25s imports it, and JAX reserves most of a GPU's memory. Set the environment variable
    ``XLA_PYTHON_CLIENT_PREALLOCATE=false`` to prevent this.

    Args:
        text: what makes an item of the datasets, before collation, a string or a sequence of tokens (ids, or anything
            hashable): a function, or a key or index of the item. A string's tokens are its words in lower case
            (``\w+``). Leave padding tokens out.
        k1: the larger it is, the more the repetitions of a token count; at least 0.
        b: how much the scores of long texts are reduced, from 0 to 1.

    Raises:
        ValueError: if ``k1`` or ``b`` is out of range.

    Example::

        scores = BM25("text").attribute(trainer, train_texts, target_texts)
    """

    _shown = ("k1", "b")

    def __init__(self, text: Callable[[Any], Text] | str | int, *, k1: float = 1.2, b: float = 0.75) -> None:
        if not k1 >= 0 or not 0 <= b <= 1:
            raise ValueError(f"expected k1 of at least 0 and b from 0 to 1, got k1={k1} and b={b}")
        self.text = text
        self.k1 = k1
        self.b = b

    @property
    @override
    def meaning(self) -> str:
        return "A score says how many words the two texts share, and how rare ones, and nothing about training."

    def matrix(self, trainer: L.Trainer, train: Examples, targets: Examples) -> Tensor:
        """BM25 of each training text for each target; see :class:`~lightning_trak.methods.base.MatrixMethod`.

        Raises:
            ModuleNotFoundError: if bm25s is not installed.
            TypeError: if ``text`` gives neither a string nor tokens.
        """
        with needs_extra("text", "BM25 needs bm25s"):
            import bm25s
        documents, queries = self._tokenize(train.loader), self._tokenize(targets.loader)
        numbers: dict[Hashable, int] = {}
        documents_as_numbers = [[numbers.setdefault(token, len(numbers)) for token in text] for text in documents]
        scores = torch.zeros(len(queries), len(documents))
        if not numbers:
            return scores
        index = bm25s.BM25(k1=self.k1, b=self.b, method="lucene", dtype="float64")
        index.index((documents_as_numbers, numbers), create_empty_token=False, show_progress=False)
        for row, query in enumerate(queries):
            known = [numbers[token] for token in query if token in numbers]
            scores[row] = torch.from_numpy(index.get_scores_from_ids(known))
        return scores

    def _tokenize(self, loader: DataLoader[Any]) -> list[list[Hashable]]:
        ranges = batch_ranges(range(num_examples(loader)), batch_size_of(loader))
        with isolated_random_states():
            batches = load(loader, (part.examples for part in ranges), collate_fn=list)
            return [list(_tokens(self._text_of(item))) for batch in batches for item in batch]

    def _text_of(self, item: Any) -> Any:
        if callable(self.text):
            return self.text(item)
        try:
            return item[self.text]
        except (IndexError, KeyError, TypeError) as error:
            keys = f" with {listed(list(map(repr, item)))}" if isinstance(item, Mapping) else ""
            raise TypeError(
                f"text={self.text!r:.80} names nothing in an item of the data, which is a {type(item).__name__}{keys}:"
                " give a key or an index of the items, or a function of an item"
            ) from error


def _tokens(text: Any) -> Iterable[Hashable]:
    if isinstance(text, str):
        return re.findall(r"\w+", text.lower())
    if isinstance(text, Tensor):
        return cast(list[int], text.flatten().tolist())
    if isinstance(text, Iterable) and not isinstance(text, bytes):
        return text
    raise TypeError(f"expected a string or a sequence of tokens from text=, got {type(text).__name__}")
