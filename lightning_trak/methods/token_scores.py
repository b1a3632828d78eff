"""Which tokens of a training text made its score: the score, split into the terms of its tokens."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning_trak.features.checks.same_function import output_tolerance
from lightning_trak.features.passes.pipeline import FeaturePipeline
from lightning_trak.features.passes.target_features import TargetFeatures
from lightning_trak.features.rows import Features
from lightning_trak.features.store import FeatureStore
from lightning_trak.methods.base import Method
from lightning_trak.methods.stored_data import require_stored_data
from lightning_trak.methods.tokens import TextTokens, find_tokens, require_tokens, target_loader, token_loader
from lightning_trak.outputs import ModelOutput
from lightning_trak.outputs.language.tokens import TokenOutput
from lightning_trak.outputs.mixin import target_output
from lightning_trak.running.chunks import chunked
from lightning_trak.running.data.loaders import like
from lightning_trak.running.data.loading import batch_size_of, num_examples
from lightning_trak.running.data.sources import Data, datamodule_of, single_loader
from lightning_trak.running.ranks import Ranks
from lightning_trak.running.strategies import require_whole_parameters
from lightning_trak.running.trainers import trainer_of
from lightning_trak.scoring.base import Scorer, full_precision
from lightning_trak.scoring.topk import BothEnds, TopK, all_indices

Pairs = TopK | BothEnds | Sequence[tuple[int, int]] | Tensor

_BYTES = 1 << 28  # of features of tokens at a time


class TokenScores(NamedTuple):
    """The score of a training text for a target, split over the tokens of the training text.

    Attributes:
        target: position of the target.
        train: position of the training text.
        positions: of its tokens that count, int64, shape ``(num_tokens,)``, from 0; see
            :class:`~lightning_trak.methods.tokens.TextTokens`.
        ids: these tokens.
        scores: of these tokens, float64; they sum to the score of the text.
    """

    target: int
    train: int
    positions: Tensor
    ids: Tensor
    scores: Tensor


class TokenMethod(Method):
    """Methods over stored features: they can say which tokens of a training text made its score."""

    output: ModelOutput
    _train: Data | None  # what featurize got last

    @abstractmethod
    def make_scorer(self, store: FeatureStore) -> Scorer:
        """Make the scorer of this method for a complete store."""

    @abstractmethod
    def _pipeline(self) -> FeaturePipeline:
        """What makes features."""

    def _training_data(self, train: Data | None, user: str) -> Data:
        """The training data that are given, or those that featurize got last.

        Raises:
            ValueError: if there are neither.
        """
        data = self._train if train is None else train
        if data is None:
            raise ValueError(
                f"{user} needs the training data: pass train=, the same data as to featurize, or call featurize of this"
                " object first, which does nothing if the store is complete"
            )
        return data

    def score_tokens(
        self,
        trainer: L.Trainer | None,
        targets: Data,
        pairs: Pairs,
        train: Data | None = None,
        output: ModelOutput | None = None,
    ) -> list[TokenScores]:
        """Which tokens of training texts made their scores for chosen targets.

        The output of a text is a sum over its tokens, so that its gradient and its score are sums, too: the part of a
        token comes from the term of its own prediction, given the tokens before it. What these tokens contribute as
        context is in the parts of the tokens that they help to predict. The gradients of the chosen training texts are
        computed again, token by token, at each checkpoint; the curvature is that of the store.

        Parts sum to the score of ``score``. Of a store in few bits, they share out what its rounding adds to the score,
        by their inner products with the stored feature.

        Args:
            trainer: as for ``score``, with a strategy that keeps the model whole on each rank.
            targets: one set of targets, as for ``score``.
            pairs: which training texts to split for which targets: pairs ``(target, training text)`` of positions, or
                what ``score(..., top_k=)`` returned, for all of its pairs: of each target proponents, then opponents.
                With an output of tokens, targets are rows, see :func:`~lightning_trak.methods.tokens.text_tokens`.
            train: the training data; default: the data that this object's last ``featurize`` got.
            output: of the targets, as for ``score``.

        Returns:
            On every rank, the parts of each pair, in the order of the pairs.

        Raises:
            TypeError: if the output of the training texts is not known to be a sum over tokens, or ``pairs`` are not
                pairs of integers.
            ValueError: if a pair is out of range, the data are not those of the store, scores are moved towards zero,
                or a text has another output than in the store.
        """
        trainer, trained = trainer_of(trainer), require_tokens(self.output)
        data = self._training_data(train, "score_tokens")
        require_whole_parameters(trainer)
        output, features = target_output(output, self.output), TargetFeatures(self._pipeline(), trainer)
        store, texts = features.store, single_loader(data, "fit", trainer)
        scorer = self.make_scorer(store)
        if not scorer.additive:
            raise ValueError("soft_threshold moves scores towards zero, so that they are no sums: use soft_threshold=0")
        require_stored_data(texts, store, "score_tokens")
        asked = target_loader(single_loader(targets, "predict", trainer), output)
        chosen = _as_pairs(pairs, num_examples(asked), store.num_examples)
        rows, target_numbers = torch.unique(chosen[:, 0], return_inverse=True)
        union = torch.unique(chosen[:, 1])
        tokens = find_tokens(texts, trained, union.tolist())
        splits = _Splits(features, scorer, trained, tokens)
        subset = like(asked, Subset(asked.dataset, rows.tolist()), batch_size=batch_size_of(asked))
        (directions,) = features.make(subset, [range(len(rows))], datamodule_of(targets), output)
        parts = splits.parts(list(directions), texts, data)
        found = []
        for (target, text), number in zip(chosen.tolist(), target_numbers.tolist(), strict=True):
            own = tokens.of(text)
            found.append(TokenScores(target, text, tokens.positions[own], tokens.ids[own], parts[number, own]))
        return found


class _Terms(NamedTuple):
    """Of all tokens at a checkpoint, in float64.

    Attributes:
        products: what their features score for each target, shape ``(num_targets, num_tokens)``.
        alike: their inner products with the stored features of their texts, shape ``(num_tokens,)``.
        outputs: their outputs, shape ``(num_tokens,)``.
    """

    products: Tensor
    alike: Tensor
    outputs: Tensor


class _Splits:
    """Splits the scores of training texts.

    Args:
        features: makes features of targets and tokens.
        scorer: the scorer of the method.
        output: of the training texts.
        tokens: of the training texts.
    """

    def __init__(self, features: TargetFeatures, scorer: Scorer, output: TokenOutput, tokens: TextTokens) -> None:
        self._features, self._store = features, features.store
        self._scorer, self._output = scorer, output
        self._tokens = tokens
        self._texts, self._numbers, counts = torch.unique(tokens.texts, return_inverse=True, return_counts=True)
        self._weights = output.weight(counts.double())  # of a token in each text

    def parts(self, targets: list[Features], loader: DataLoader[Any], data: Data) -> Tensor:
        """The part of each token in the score of its text for each target.

        Args:
            targets: their features at each checkpoint.
            loader: of the training texts.
            data: what it was made from.

        Returns:
            float64, shape ``(num_targets, num_tokens)``, on the CPU.
        """
        ranks, device = Ranks.of(self._features.trainer), self._features.trainer.strategy.root_device
        self._scorer.fit(device, ranks)
        stored = [self._stored(checkpoint) for checkpoint in range(self._store.num_checkpoints)]
        with full_precision(device):
            directions = [self._scorer.directions(number, rows) for number, rows in enumerate(targets)]
            prepared = list(enumerate(self._scorer.prepare_others(directions, ranks)))
            products = [partial(self._scorer.products_with_others, *each) for each in prepared]
            weights = [self._scorer.example_weights(number, rows).double().cpu() for number, rows in enumerate(stored)]
            whole = [scores(rows.features).double().cpu() for scores, rows in zip(products, stored, strict=True)]
        found: list[list[_Terms]] = [[] for _ in stored]
        rows, blocks = token_loader(loader, self._tokens), self._blocks(targets[0].features)
        made = self._features.make(rows, blocks, datamodule_of(data), self._output.of_tokens())
        for block, features in zip(blocks, made, strict=True):
            numbers = self._numbers[block.start : block.stop]
            for checkpoint, (own, scores) in enumerate(zip(features, products, strict=True)):
                with full_precision(device):
                    alike = self._scorer.paired(checkpoint, stored[checkpoint].features[numbers], own.features)
                    terms = _Terms(scores(own.features).double().cpu(), alike.cpu(), own.outputs.double())
                found[checkpoint].append(terms)
        columns = [_Terms(*(torch.cat(part, -1) for part in zip(*parts, strict=True))) for parts in found]
        self._require_outputs(stored, torch.stack([terms.outputs for terms in columns]))
        sums = sum(
            self._shared(terms, total) * weight[self._numbers]
            for terms, total, weight in zip(columns, whole, weights, strict=True)
        )
        ones = torch.ones(1, len(self._texts), dtype=torch.float64)
        factors = self._scorer.finish(ones, lambda: torch.stack([rows.loss_gradients for rows in stored]).mean(0))[0]
        return cast(Tensor, sums) * factors[self._numbers]

    def _blocks(self, features: Tensor) -> list[range]:
        """Tokens whose features at all checkpoints fit in memory together."""
        step = max(1, _BYTES // (features.shape[1] * features.element_size() * self._store.num_checkpoints))
        return chunked(range(len(self._tokens.texts)), step)

    def _shared(self, terms: _Terms, whole: Tensor) -> Tensor:
        """The part of each token in the score of the stored feature of its text, shape ``(num_targets, num_tokens)``.

        The stored feature of a text is the sum of its tokens' and what it was rounded by. The score of the latter is
        shared out like the stored feature itself, by the inner products with it.
        """
        parts, count = terms.products * self._weights[self._numbers], len(self._texts)
        alike = torch.zeros(count, dtype=torch.float64).index_add_(0, self._numbers, terms.alike)[self._numbers]
        even = 1 / self._numbers.bincount()[self._numbers].double()
        shares = torch.where(alike > 0, terms.alike / alike, even)
        rest = whole - torch.zeros_like(whole).index_add_(1, self._numbers, parts)
        return parts + shares * rest[:, self._numbers]

    def _shards(self) -> Iterator[tuple[int, Tensor]]:
        """The shards that hold the training texts, with a mask of those."""
        for shard in range(self._store.num_shards):
            span = self._store.shard(shard)
            mine = self._texts[(self._texts >= span.start) & (self._texts < span.stop)]
            if len(mine):
                mask = torch.zeros(len(span), dtype=torch.bool)
                mask[mine - span.start] = True
                yield shard, mask

    def _stored(self, checkpoint: int) -> Features:
        """The rows of the training texts in the store."""
        return Features.cat(
            [self._store.read_stored(checkpoint, shard)[mask].decode() for shard, mask in self._shards()]
        )

    def _require_outputs(self, stored: list[Features], outputs: Tensor) -> None:
        """Check that the outputs of tokens add up to those of the texts in the store.

        Raises:
            ValueError: if they do not.
        """
        tolerance = output_tolerance(self._store)
        kept = torch.stack([rows.outputs for rows in stored]).double()
        sums = torch.zeros_like(kept).index_add_(1, self._numbers, outputs) * self._weights
        wrong = (~torch.isclose(sums, kept, rtol=tolerance, atol=tolerance)).nonzero()
        if len(wrong):
            checkpoint, text = wrong[0].tolist()
            raise ValueError(
                f"the tokens of training text {int(self._texts[text])} add up to an output of"
                f" {float(sums[checkpoint, text]):.6g} {self._features.model.places[checkpoint]}, and in store"
                f' "{self._store.directory}" it is {float(kept[checkpoint, text]):.6g}: score_tokens needs the data and'
                " the model that the store was made of"
            )


def _as_pairs(pairs: Any, num_targets: int, num_train: int) -> Tensor:
    """Pairs of positions, int64, shape ``(num_pairs, 2)``.

    Raises:
        TypeError: if they are not pairs of integers.
        ValueError: if there is none, or a position is out of range.
    """
    if isinstance(pairs, (TopK, BothEnds)):
        best = all_indices(pairs)  # of few texts, one may be at both ends
        if len(best) != num_targets:
            raise ValueError(
                f"the best scores are those of {len(best)} rows, and there are {num_targets} targets: score each"
                " target, without aggregate=, or name pairs (target, training text)"
            )
        pairs = [(target, text) for target, row in enumerate(best.tolist()) for text in dict.fromkeys(row)]
    try:
        found = [(operator.index(target), operator.index(text)) for target, text in pairs]
    except (TypeError, ValueError) as error:
        raise TypeError(
            "pairs must be pairs (target, training text) of positions as integers, or what score(..., top_k=) returned,"
            f" got {pairs!r:.80}"
        ) from error
    if not found:
        raise ValueError("pairs is empty; name at least one (target, training text)")
    for target, text in found:
        for what, position, count in (("target", target, num_targets), ("training text", text, num_train)):
            if not 0 <= position < count:
                raise ValueError(f"pairs name {what} {position}, and there are {count}, from 0 to {count - 1}")
    return torch.tensor(found, dtype=torch.int64)
