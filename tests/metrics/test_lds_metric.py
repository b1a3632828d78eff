"""The life of the linear datamodeling score as a metric: batches, copies, casts, collections, a Trainer's logger."""

from __future__ import annotations

import csv
import pickle
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric, MetricCollection
from torchmetrics.wrappers import Running

from lightning_trak.metrics import LinearDatamodelingScore
from lightning_trak.metrics.functional import linear_datamodeling_interval, linear_datamodeling_score, noise_ceiling

NUM_SUBSETS, NUM_TRAIN = 16, 30
merges = pytest.mark.skipif(not hasattr(Metric, "merge_state"), reason="this torchmetrics does not merge states")


def draw_masks(generator):
    return torch.rand(NUM_SUBSETS, NUM_TRAIN, generator=generator) < 0.5


@pytest.fixture
def task():
    """Scores, noisy outputs with three seeds, masks."""
    generator = torch.Generator().manual_seed(0)
    masks = draw_masks(generator)
    scores = torch.randn(12, NUM_TRAIN, generator=generator)
    noise = torch.randn(12, NUM_SUBSETS, 3, generator=generator)
    return scores, (scores @ masks.float().T)[..., None] + 2 * noise, masks


class TestMetric:
    def test_batches_add_up_to_the_functional(self, task):
        scores, outputs, masks = task
        metric = LinearDatamodelingScore(masks)
        for batch in (slice(0, 5), slice(5, 5), slice(5, 12)):
            metric.update(scores[batch], outputs[batch])
        values = linear_datamodeling_score(*task, reduction="none")
        torch.testing.assert_close(metric.compute(), values.mean())
        torch.testing.assert_close(metric.per_target(), values)
        torch.testing.assert_close(
            metric.interval(0.9, 500, 3), linear_datamodeling_interval(*task, "zero", 0.9, 500, 3)
        )
        torch.testing.assert_close(metric.noise_ceiling(), noise_ceiling(outputs).mean())

    def test_never_keeps_a_number_per_training_example(self, task):
        metric = LinearDatamodelingScore(task[2])
        metric.update(*task[:2])
        for states in metric.metric_state.values():
            assert all(s.shape[1:] in ((), (NUM_SUBSETS,)) and s.dtype == torch.float64 for s in states)

    def test_forward_gives_the_batch_and_keeps_the_rest(self, task):
        scores, outputs, masks = task
        metric = LinearDatamodelingScore(masks)
        metric.update(scores[:5], outputs[:5])
        torch.testing.assert_close(
            metric(scores[5:], outputs[5:]), linear_datamodeling_score(scores[5:], outputs[5:], masks)
        )
        torch.testing.assert_close(metric.compute(), linear_datamodeling_score(*task))

    def test_reset(self, task):
        metric = LinearDatamodelingScore(task[2])
        metric.update(-task[0], task[1])
        metric.reset()
        metric.update(*task[:2])
        torch.testing.assert_close(metric.compute(), linear_datamodeling_score(*task))

    @pytest.mark.filterwarnings("ignore:The ``compute`` method")
    @pytest.mark.parametrize("method", ["compute", "per_target", "interval", "noise_ceiling"])
    def test_without_targets(self, task, method):
        with pytest.raises((RuntimeError, ValueError), match="none were seen: call `update"):
            getattr(LinearDatamodelingScore(task[2]), method)()

    def test_refused_batch_is_not_counted(self, task):
        scores, outputs, masks = task
        metric = LinearDatamodelingScore(masks, constant_rows="error")
        metric.update(scores, outputs)
        with pytest.raises(ValueError, match="row 0, whose predicted outputs are constant"):
            metric.update(torch.zeros_like(scores), outputs)
        torch.testing.assert_close(metric.compute(), linear_datamodeling_score(*task))

    def test_ignored_targets(self, task):
        scores, outputs, masks = task
        metric = LinearDatamodelingScore(masks, constant_rows="ignore")
        metric.update(torch.cat([scores, torch.zeros(1, NUM_TRAIN)]), torch.cat([outputs, outputs[:1]]))
        torch.testing.assert_close(metric.compute(), linear_datamodeling_score(*task))
        torch.testing.assert_close(metric.noise_ceiling(), noise_ceiling(outputs).mean())
        assert metric.per_target().isnan().tolist() == [False] * 12 + [True]

    def test_noise_ceiling_needs_seeds(self, task):
        scores, outputs, masks = task
        metric = LinearDatamodelingScore(masks)
        metric.update(scores, outputs)
        metric.update(scores[:4], outputs[:4, :, :1])
        with pytest.raises(RuntimeError, match="at least 2 seeds in every update, but 4 of 16 targets"):
            metric.noise_ceiling()

    def test_copies_and_state_dict(self, task):
        metric = LinearDatamodelingScore(task[2])
        metric.update(*task[:2])
        for copy in (metric.clone(), pickle.loads(pickle.dumps(metric))):
            metric_before = copy.compute()
            copy.update(-task[0], task[1])
            assert copy.compute() < metric_before == metric.compute()
        assert metric.state_dict() == {}
        metric.persistent(True)
        restored = LinearDatamodelingScore(task[2])
        restored.load_state_dict(metric.state_dict())
        torch.testing.assert_close(restored.per_target(), metric.per_target())

    @pytest.mark.parametrize(
        "cast",
        [
            lambda m: m.half(),
            lambda m: m.to(torch.bfloat16),
            lambda m: m.set_dtype(torch.float16),
            lambda m: torch.nn.Sequential(m).to(torch.bfloat16)[0],
        ],
    )
    def test_casts_do_not_touch_the_ranks(self, task, cast):
        scores, outputs, masks = task
        metric = LinearDatamodelingScore(masks)
        metric.update(scores[:6], 1e4 + outputs[:6])  # bfloat16 would round all outputs to one value
        metric = cast(metric)
        metric.update(scores[6:], 1e4 + outputs[6:])
        torch.testing.assert_close(metric.compute(), linear_datamodeling_score(scores, 1e4 + outputs, masks))
        assert metric.masks.dtype == torch.bool

    def test_follows_a_device_move(self, task):
        metric = LinearDatamodelingScore(task[2])
        metric.update(*task[:2])
        metric.to("meta")
        assert {metric.masks.device.type, metric.predictions[0].device.type, metric.device.type} == {"meta"}

    def test_collection(self, task):
        scores, outputs, masks = task
        other = draw_masks(torch.Generator().manual_seed(9))
        collection = MetricCollection({"a": LinearDatamodelingScore(masks), "b": LinearDatamodelingScore(other)})
        for batch in (slice(0, 5), slice(5, 12)):
            collection.update(scores[batch], outputs[batch])
        result = collection.compute()
        torch.testing.assert_close(result["a"], linear_datamodeling_score(*task))
        torch.testing.assert_close(result["b"], linear_datamodeling_score(scores, outputs, other))

    @pytest.mark.parametrize("size", [0, 3])
    def test_collection_shares_no_states_of_other_masks(self, task, size):
        scores, outputs, masks = task
        collection = MetricCollection({"a": LinearDatamodelingScore(masks), "b": LinearDatamodelingScore(~masks)})
        zeros = torch.zeros(size, NUM_TRAIN)  # of which both metrics make the same predictions
        collection.update(zeros, outputs[:size])
        collection.update(scores, outputs)
        everything = torch.cat([zeros, scores]), torch.cat([outputs[:size], outputs])
        for name, subsets in (("a", masks), ("b", ~masks)):
            torch.testing.assert_close(collection.compute()[name], linear_datamodeling_score(*everything, subsets))

    def test_running_window(self, task):
        scores, outputs, masks = task
        metric = Running(LinearDatamodelingScore(masks), window=2)
        for batch in (slice(0, 4), slice(4, 8), slice(8, 12)):
            metric.update(scores[batch], outputs[batch])
        torch.testing.assert_close(metric.compute(), linear_datamodeling_score(scores[4:], outputs[4:], masks))

    @pytest.mark.parametrize("batch", ["not finite", "empty"])
    def test_refused_forward_loses_nothing(self, task, batch):
        scores, outputs, masks = task
        metric = LinearDatamodelingScore(masks)
        metric.update(scores, outputs)
        bad = (scores[:0], outputs[:0]) if batch == "empty" else (scores / 0, outputs)
        with pytest.raises((ValueError, RuntimeError), match=r"finite|none were seen"):
            metric(*bad)
        torch.testing.assert_close(metric.compute(), linear_datamodeling_score(*task))
        assert metric._to_sync  # compute still asks the other processes

    def test_what_was_passed_may_be_overwritten(self, task):
        scores, outputs, masks = task
        given = masks.clone()
        outputs, metric = outputs[..., 0].double(), LinearDatamodelingScore(given)
        given.logical_not_()
        buffer = torch.empty(6, NUM_SUBSETS, dtype=torch.float64)
        for batch in (slice(0, 6), slice(6, 12)):
            buffer.copy_(outputs[batch])
            metric.update(scores[batch], buffer)
        torch.testing.assert_close(metric.compute(), linear_datamodeling_score(scores, outputs, masks))

    @merges
    def test_merged_and_loaded_targets_count_after_compute(self, task):
        scores, outputs, masks = task
        first, second = LinearDatamodelingScore(masks), LinearDatamodelingScore(masks)
        first.update(scores[:5], outputs[:5])
        second.update(scores[5:], outputs[5:])
        first.compute()
        first.merge_state(second)
        torch.testing.assert_close(first.compute(), linear_datamodeling_score(*task))
        second.persistent(True)
        first.load_state_dict(second.state_dict())
        torch.testing.assert_close(first.compute(), second.compute())

    @merges
    def test_targets_of_other_masks_are_refused(self, task):
        scores, outputs, masks = task
        metric, other = LinearDatamodelingScore(masks), LinearDatamodelingScore(masks.flip(0))
        for each in (metric, other):
            each.update(scores, outputs)
        other.persistent(True)
        with pytest.raises(ValueError, match="the same `masks`, but theirs differ"):
            metric.merge_state(other)
        with pytest.raises(RuntimeError, match="the same `masks`, but theirs differ"):
            metric.load_state_dict(other.state_dict())
        torch.testing.assert_close(metric.compute(), linear_datamodeling_score(*task))

    def test_gradients_are_not_followed(self, task):
        scores = task[0].clone().requires_grad_()
        metric = LinearDatamodelingScore(task[2])
        assert not metric(scores, task[1]).requires_grad

    def test_plot(self, task):
        pyplot = pytest.importorskip("matplotlib.pyplot")
        pyplot.switch_backend("agg")
        metric = LinearDatamodelingScore(task[2])
        metric.update(*task[:2])
        figure, axis = metric.plot()
        assert axis.get_ylim()[0] <= -1
        assert axis.get_ylim()[1] >= 1
        pyplot.close(figure)


class LitAttributed(L.LightningModule):
    """Logs the metric as users do."""

    def __init__(self, masks):
        super().__init__()
        self.lds = LinearDatamodelingScore(masks)

    def test_step(self, batch, batch_idx):
        self.lds.update(*batch)
        self.log("lds", self.lds)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_log_in_test_step(task, tmp_path, precision):
    scores, outputs, masks = task
    trainer = L.Trainer(
        accelerator="cpu",
        precision=precision,
        logger=CSVLogger(tmp_path),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = LitAttributed(masks)
    for _ in range(2):  # the second run starts from nothing
        (result,) = trainer.test(model, DataLoader(TensorDataset(scores, outputs), batch_size=5), verbose=False)
    if precision == "bf16-true":  # Lightning rounds the batch, not the metric
        scores, outputs = scores.bfloat16(), outputs.bfloat16()
    expected = linear_datamodeling_score(scores, outputs, masks).item()
    assert result["lds"] == pytest.approx(expected, abs=1e-6)
    with Path(trainer.logger.log_dir, "metrics.csv").open() as file:
        assert float(list(csv.DictReader(file))[-1]["lds"]) == pytest.approx(expected, abs=1e-6)
