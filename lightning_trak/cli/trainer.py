"""What each subcommand of ``lightning-trak`` does."""

from collections.abc import Sequence

import lightning as L
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_trak.cleaning.inspected import read_positions
from lightning_trak.cli.clean import Find, find_examples, require_options, write_ranking
from lightning_trak.features.passes.options import OnNan
from lightning_trak.features.store import FeatureStore
from lightning_trak.methods import FeatureMethod, LabelStatistic
from lightning_trak.methods.showing import OTHER_DATA
from lightning_trak.metrics import LinearDatamodelingScore
from lightning_trak.reporting.explanations import describe_of, explain
from lightning_trak.reporting.scores import SavedScores
from lightning_trak.reporting.showing import kind_of_file, show
from lightning_trak.retraining.fleets.ground_truth import load_ground_truth
from lightning_trak.running.data.content import sample_digest
from lightning_trak.running.data.sources import single_loader
from lightning_trak.storage.paths import local_file
from lightning_trak.texts.printable import counted, printable

DEFAULT_SCORES = "run/scores.safetensors"


class AttributionTrainer(L.Trainer):
    """A Trainer with a method for each subcommand that Lightning does not have."""

    def featurize(
        self,
        method: FeatureMethod,
        datamodule: L.LightningDataModule,
        shard_size: int | None = None,
        overwrite: bool = False,
        on_nan: OnNan | None = None,
        part: str | None = None,
    ) -> None:
        """Store the features of the training data at every checkpoint. An interrupted call is continued.

        Args:
            method: the method that featurizes.
            datamodule: its ``train_dataloader`` has the training data.
            shard_size: examples per file if the store is new.
            overwrite: delete a store of other settings or data, and features at other checkpoints.
            on_nan: raise an error for examples whose gradients are not finite, or skip them.
            part: such as 3/16, to compute only the third of sixteen parts; default: all.
        """
        method.featurize(self, datamodule, shard_size, overwrite=overwrite, on_nan=on_nan, part=part)
        if self.is_global_zero:
            print(f"{type(method).__name__}: features in {printable(str(method.store))}")

    def score(
        self,
        method: FeatureMethod,
        datamodule: L.LightningDataModule,
        scores: str = DEFAULT_SCORES,
        top_k: int | None = None,
        largest: bool | None = None,
        rescore: int | None = None,
    ) -> None:
        """Score the data module's predict data against its training data, and write the scores to a file.

        Args:
            method: the method that scores.
            datamodule: its ``predict_dataloader`` has the targets.
            scores: safetensors file to write.
            top_k: keep only this many training examples with the highest scores of each target, and with the lowest.
            largest: whether top_k keeps only the highest scores, or only the lowest; default: both.
            rescore: score this many candidates at each end exactly, and keep the best top_k of them.
        """
        local_file(scores, "file of scores")  # raises before the work
        single_loader(datamodule, "predict", self)  # as does this, if there are several loaders
        found = method.score(self, datamodule, top_k, largest, rescore, None if rescore is None else datamodule)
        num_train = FeatureStore.size_of(method.store)
        saved = SavedScores(
            found,
            num_train,
            type(method).__name__,
            largest is not False,
            method.used_masks,
            method.meaning,
            FeatureStore.data_of(method.store),
        )
        if self.is_global_zero:
            saved.save(scores)
            print(f"{_heading(saved)}, {counted(num_train, 'training example')}, in {printable(scores)}")

    def evaluate(self, ground_truth: str, scores: str = DEFAULT_SCORES, confidence: float = 0.95) -> None:
        """Compare saved scores with retrained models: linear datamodeling score, interval and noise ceiling.

        Args:
            ground_truth: directory of a fleet, or safetensors file with masks, bool (num_subsets, num_train), and
                outputs, (num_targets, num_subsets) or (num_targets, num_subsets, num_seeds).
            scores: file that score has written.
            confidence: confidence level of the bootstrap interval.
        """
        if not self.is_global_zero:
            return
        saved = SavedScores.load(scores)
        if not isinstance(saved.scores, Tensor):
            raise ValueError(f'"{scores}" holds only the best scores, but all are needed; score without --top_k')
        masks, outputs = load_ground_truth(ground_truth)
        lds = LinearDatamodelingScore(masks, used_masks=saved.used_masks)
        lds.update(saved.scores, outputs)
        low, high = lds.interval(confidence).tolist()
        measured = {"lds": float(lds.compute()), "lds_low": low, "lds_high": high}
        of_all = f"of {counted(saved.num_train, 'training example')}"
        print(f"{_heading(saved)}, {counted(len(masks), 'subset')} {of_all}")
        print(f"LDS            {measured['lds']:.3f}  ({confidence:.0%} interval {low:.3f} to {high:.3f})")
        if outputs.ndim == 3 and outputs.shape[2] > 1:
            measured["lds_noise_ceiling"] = float(lds.noise_ceiling())
            print(f"noise ceiling  {measured['lds_noise_ceiling']:.3f}")
        for logger in self.loggers:
            logger.log_metrics(measured, step=0)
            logger.save()

    def clean(
        self,
        method: LabelStatistic,
        datamodule: L.LightningDataModule,
        find: Find = "wrong_labels",
        k: int | None = None,
        out: str | None = None,
        balanced: bool = False,
        threshold: float = 0.97,
        wrong: str | None = None,
        plot: str | None = None,
    ) -> None:
        """Find training examples to look at, remove or keep: wrong labels, harmful or useful examples, duplicates.

        Args:
            method: what finds them: for wrong labels and for harmful or useful examples any method of a model, for
                duplicates one over features or representations. Features are made if they are not there.
            datamodule: its ``train_dataloader`` has the training data, its ``predict_dataloader`` the examples that
                others harm or help. Its ``describe(item) -> str``, or that of the model, makes the texts.
            find: which examples to find.
            k: list only so many; default: all in a file, 20 in the terminal.
            out: file to write, .csv or .parquet; default: a table in the terminal.
            balanced: whether to take as many useful examples of each label.
            threshold: the least cosine of duplicates.
            wrong: CSV file with a column `position` of the examples that are known to be wrong, to count how many are
                found.
            plot: picture to draw of wrong examples found against examples inspected, .png; it needs `wrong`.
        """
        require_options(find, k, out, balanced, wrong, plot)
        known = None if wrong is None else read_positions(wrong)
        ranking = find_examples(self, method, datamodule, find, balanced, threshold)
        if not self.is_global_zero:
            return
        describe = describe_of(datamodule, getattr(method, "model", None))
        write_ranking(ranking, type(method).__name__, describe, k, out, known, plot)

    def show(
        self,
        datamodule: L.LightningDataModule,
        model: L.LightningModule | None,
        scores: str = DEFAULT_SCORES,
        targets: Sequence[int] = (0,),
        k: int = 5,
        out: str | None = None,
        predictions: bool = False,
        method: FeatureMethod | None = None,
    ) -> None:
        """Show targets with their strongest proponents and opponents: as a table, a picture or a web page.

        Args:
            datamodule: the data that were scored. Its ``describe(item) -> str``, or that of the model, makes the texts.
            model: used only for its ``describe``, if the data module has none.
            scores: file that score has written.
            targets: positions of the targets.
            k: number of proponents, and of opponents, for each target.
            out: file to write, .png, .html or .csv; default: a table in the terminal.
            predictions: whether to run the trained model, and show what it predicts.
            method: the method that has the checkpoints.
        """
        kind_of_file(out)  # raises before the work
        saved = SavedScores.load(scores)
        train, shown = (single_loader(datamodule, stage, self) for stage in ("fit", "predict"))
        describe = describe_of(datamodule, model)
        explanations = explain(saved, targets, k, train.dataset, shown.dataset, describe)
        if saved.data is not None and sample_digest(train) != saved.data:
            rank_zero_warn(OTHER_DATA)
        if predictions and method is not None:
            texts = method.describe_predictions(self, datamodule, targets)
            explanations = [each._replace(prediction=text) for each, text in zip(explanations, texts, strict=True)]
        show(explanations, f"{saved.method}: {counted(saved.num_train, 'training example')}", out, saved.meaning)
        if out is not None and self.is_global_zero:
            print(f"{printable(saved.method)}: {counted(len(explanations), 'target')} in {printable(out)}")


def _heading(saved: SavedScores) -> str:
    return f"{printable(saved.method)}: {counted(saved.num_targets, 'target')}"
