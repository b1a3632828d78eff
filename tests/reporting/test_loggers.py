"""What reaches the trackers, read back from what they wrote: event files, CSVs, offline runs."""

import csv
import io

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.image import imread
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, Subset

from lightning_trak import TRAK, LinearDatamodelingScore, TRAKCallback
from lightning_trak.callbacks import AttributionEvaluation
from lightning_trak.methods import RandomScores
from lightning_trak.metrics.functional import mislabel_detection_curve
from lightning_trak.projections import SparseProjection
from lightning_trak.reporting.loggers import (
    CSVLoggerWriter,
    LoggerWriter,
    log_attributions,
    log_brittleness,
    log_lds,
    log_mislabel_curves,
    writers_for,
)
from lightning_trak.retraining import Retrained, random_subsets
from lightning_trak.scoring import BothEnds, TopK
from lightning_trak.texts.tables import Table
from tests.lit import TARGETS, TRAIN, LitNet, make_trainer
from tests.retraining.brittleness import make_brittleness

MASKS = random_subsets(len(TRAIN), 12)
SCORES = torch.randn(len(TARGETS), len(TRAIN), generator=torch.Generator().manual_seed(0))
OUTPUTS = (SCORES @ MASKS.float().T)[..., None] + 3 * torch.randn(
    len(TARGETS), 12, 2, generator=torch.Generator().manual_seed(1)
)


def describe(item):
    return f"class {int(item[1])}"


def image(item):
    return item[0].view(2, 3).sigmoid()


def make_lds(outputs=OUTPUTS):
    lds = LinearDatamodelingScore(MASKS)
    lds.update(SCORES, outputs)
    return lds


def log_everything(logger):
    log_lds([logger], make_lds(), "lds/mine", 7)
    log_attributions([logger], SCORES, TRAIN, TARGETS, k=2, shown=[3, 0], describe=describe, image=image, step=7)
    log_brittleness([logger], make_brittleness(), step=7)
    log_mislabel_curves([logger], {"loss": mislabel_detection_curve(torch.arange(9.0), torch.arange(9) > 6)}, step=7)


def expected_metrics():
    lds = make_lds()
    low, high = lds.interval()
    found = {"mean": lds.compute(), "low": low, "high": high, "noise_ceiling": lds.noise_ceiling()}
    return (
        {f"lds/mine/{name}": float(value) for name, value in found.items()}
        | {f"counterfactuals/{name}": value for name, value in make_brittleness().metrics().items()}
        | {"mislabelled/loss/area": 1 - 2 / 9 / 2}
    )


def expected_rows():
    for target in (3, 0):
        for group, largest in (("proponents", True), ("opponents", False)):
            values, indices = SCORES[target].topk(2, largest=largest)
            for rank, (value, index) in enumerate(zip(values.tolist(), indices.tolist(), strict=True), start=1):
                names = describe(TARGETS[target]), describe(TRAIN[index])
                yield (target, names[0], "", group, rank, index, value, names[1])


def read_events(directory):
    events = EventAccumulator(str(directory), size_guidance={"images": 0, "tensors": 0, "histograms": 0})
    events.Reload()
    return events


def scalars(events):
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def text(events, tag):
    (event,) = events.Tensors(f"{tag}/text_summary")
    assert events.SummaryMetadata(f"{tag}/text_summary").plugin_data.plugin_name == "text"
    return event.step, event.tensor_proto.string_val[0].decode()


def test_tensorboard_event_file_holds_everything(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    log_everything(logger)
    events = read_events(tmp_path / "run")
    found = scalars(events)
    expected = expected_metrics()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == [(7, pytest.approx(value, rel=1e-6))]
    (histogram,) = events.Histograms("lds/mine/per_target")
    per_target = make_lds().per_target()
    assert histogram.histogram_value.num == len(TARGETS)
    assert histogram.histogram_value.sum == pytest.approx(float(per_target.sum()))
    assert histogram.histogram_value.min == pytest.approx(float(per_target.min()))
    assert set(events.Tags()["images"]) == {"attributions/images", "counterfactuals/curves", "mislabelled/curves"}
    for tag in events.Tags()["images"]:
        (picture,) = events.Images(tag)
        pixels = np.asarray(Image.open(io.BytesIO(picture.encoded_image_string)).convert("L"))
        assert picture.step == 7
        assert pixels.shape == (picture.height, picture.width)
        assert pixels.std() > 5
    step, table = text(events, "attributions/table")
    assert step == 7
    lines = table.splitlines()
    assert lines[0] == "| target | target\\_text | prediction | group | rank | position | score | text |"
    assert len(lines) == 2 + 2 * 2 * 2
    for line, row in zip(lines[2:], expected_rows(), strict=True):
        assert line == "| " + " | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row) + " |"
    assert text(events, "counterfactuals/table")[1] == make_brittleness().table().markdown()


def test_csv_logger_has_files_beside_its_numbers(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="run")
    log_everything(logger)
    with (tmp_path / "run/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {name: float(value) for row in rows for name, value in row.items() if value and name != "step"}
    assert {row["step"] for row in rows} == {"7"}
    assert found == pytest.approx(expected_metrics())
    pictures = {str(path.relative_to(tmp_path / "run")) for path in tmp_path.rglob("*.png")}
    names = ["attributions/images", "counterfactuals/curves", "lds/mine/per_target", "mislabelled/curves"]
    assert pictures == {f"{name}-step-7.png" for name in names}
    for picture in pictures:
        assert imread(tmp_path / "run" / picture).std() > 0.02
    with (tmp_path / "run/attributions/table-step-7.csv").open() as file:
        header, *lines = csv.reader(file)
    assert header[0] == "target"
    assert lines == [list(map(str, row)) for row in expected_rows()]
    assert (tmp_path / "run/counterfactuals/table-step-7.csv").read_text() == make_brittleness().table().csv()


def test_wandb_offline_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, project="tests", offline=True)
    try:
        log_everything(logger)
        summary = dict(logger.experiment.summary)
        folder = logger.experiment.dir
    finally:
        wandb.finish()
    for name, value in expected_metrics().items():
        assert summary[name] == pytest.approx(value)
    assert summary["trainer/global_step"] == 7
    assert summary["lds/mine/per_target"]["_type"] == "histogram"
    assert summary["attributions/table"]["_type"] == "table-file"
    assert summary["attributions/table"]["nrows"] == 8
    assert summary["attributions/images"]["_type"] == "images/separated"
    assert any("attributions/images" in str(path) for path in type(tmp_path)(folder).rglob("*.png"))


def test_mlflow_run(tmp_path):
    for needed in ("mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(needed)
    logger = MLFlowLogger("tests", tracking_uri=f"sqlite:///{tmp_path}/runs.db", artifact_location=tmp_path.as_uri())
    log_everything(logger)
    found = logger.experiment.get_run(logger.run_id).data.metrics
    assert found == pytest.approx(expected_metrics())
    folder = tmp_path / logger.run_id / "artifacts"
    with (folder / "attributions/table-step-7.csv").open() as file:
        assert len(list(csv.reader(file))) == 9
    for name in ("attributions/images", "lds/mine/per_target", "counterfactuals/curves", "mislabelled/curves"):
        assert imread(folder / f"{name}-step-7.png").std() > 0.02


class Remembering(Logger):
    """A user's own logger."""

    name, version = "remembering", 0

    def __init__(self):
        super().__init__()
        self.metrics = {}

    def log_metrics(self, metrics, step=None):
        self.metrics |= metrics

    def log_hyperparams(self, params, *args, **kwargs):
        pass


def test_other_loggers_get_the_numbers_and_say_so():
    logger = Remembering()
    with pytest.warns(UserWarning, match="Remembering gets numbers alone, no pictures or tables: derive"):
        log_everything(logger)
    assert logger.metrics == pytest.approx(expected_metrics())


def test_a_class_makes_another_logger_known(tmp_path):
    class Own(CSVLogger):
        pass

    class Unknown(CSVLogger):
        pass

    assert type(writers_for([Own(tmp_path)])[0]) is CSVLoggerWriter

    class OwnWriter(LoggerWriter, logger=Own):
        def figure(self, name, figure, step):
            pass

        def table(self, name, table, step):
            pass

    class Unfinished(LoggerWriter, logger=Unknown):
        def figure(self, name, figure, step):
            pass

    with pytest.raises(TypeError, match="table"):
        Unfinished(Unknown(tmp_path))
    try:
        assert type(writers_for([Own(tmp_path)])[0]) is OwnWriter
        assert type(writers_for([CSVLogger(tmp_path)])[0]) is CSVLoggerWriter
    finally:
        del LoggerWriter.kinds[Own], LoggerWriter.kinds[Unknown]


def test_only_rank_zero_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_utilities.core.rank_zero.rank_zero_only.rank", 1)
    log_everything(CSVLogger(tmp_path))
    assert not list(tmp_path.rglob("*.*"))


def test_one_seed_has_no_noise_ceiling_and_names_are_positions(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="run")
    log_lds([logger], make_lds(OUTPUTS[..., 0]))
    log_attributions([logger], SCORES, TRAIN, TARGETS, k=60)
    header = (tmp_path / "run/metrics.csv").read_text().splitlines()[0].split(",")
    assert set(header) == {"step", "lds/mean", "lds/low", "lds/high"}
    with (tmp_path / "run/attributions/table-step-0.csv").open() as file:
        rows = list(csv.reader(file))[1:]
    assert len(rows) == 8 * 2 * 50  # all examples there are
    assert all(row[1] == f"#{row[0]}" and row[7] == f"#{row[5]}" for row in rows)
    with pytest.raises(ValueError, match="the scores are of 13 training examples, not 50"):
        log_attributions([logger], SCORES.T, TRAIN, TARGETS)


@pytest.mark.parametrize(("largest", "group"), [(True, "proponents"), (False, "opponents")])
def test_the_best_scores_alone_give_the_same_rows(tmp_path, largest, group):
    logger = CSVLogger(tmp_path, name="", version="run")
    best = TopK(*SCORES.topk(5, largest=largest))
    options = {"k": 2, "shown": [3, 0], "describe": describe, "image": image, "largest": largest}
    log_attributions([logger], best, TRAIN, TARGETS, **options)
    with (tmp_path / "run/attributions/table-step-0.csv").open() as file:
        rows = list(csv.reader(file))[1:]
    assert rows == [list(map(str, row)) for row in expected_rows() if row[3] == group]
    assert imread(tmp_path / "run/attributions/images-step-0.png").std() > 0.02
    log_attributions([logger], best, TRAIN, TARGETS, largest=largest, name="all")
    with (tmp_path / "run/all/table-step-0.csv").open() as file:
        assert len(list(csv.reader(file))) == 1 + 8 * 5


def test_both_ends_give_the_rows_of_all_scores(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="run")
    ends = BothEnds(*(TopK(*SCORES.topk(5, largest=largest)) for largest in (True, False)))
    log_attributions([logger], ends, TRAIN, TARGETS, k=2, shown=[3, 0], describe=describe)
    with (tmp_path / "run/attributions/table-step-0.csv").open() as file:
        assert list(csv.reader(file))[1:] == [list(map(str, row)) for row in expected_rows()]
    with pytest.raises(ValueError, match="do not have the highest first, as largest=True says"):
        log_attributions([logger], BothEnds(*ends[::-1]), TRAIN, TARGETS)


def test_tables_survive_awkward_cells():
    table = Table(("a", "b"), [("x|y\nz", 1 / 3), (5, 'one, "two"')])
    assert table.markdown().splitlines() == ["| a | b |", "| --- | --- |", "| x\\|y z | 0.3333 |", '| 5 | one, "two" |']
    assert list(csv.reader(io.StringIO(table.csv()))) == [["a", "b"], ["x|y\nz", str(1 / 3)], ["5", 'one, "two"']]


class Ended(L.Callback):
    """Notes the state that hooks after `on_fit_end` find."""

    def teardown(self, trainer, pl_module, stage):
        self.found = stage, trainer.state.fn.value


@pytest.mark.slow
def test_callback_evaluates_when_fit_has_ended(tmp_path):
    def make_trak(model):
        store = tmp_path / f"features-{model.global_step}"
        return TRAK(model, tmp_path / "snapshots", store, projection=SparseProjection(32))

    evaluation = AttributionEvaluation(
        {"TRAK": make_trak, "random": lambda model: RandomScores()},
        DataLoader(TRAIN, batch_size=8),
        TARGETS,
        Retrained(MASKS, OUTPUTS),
        describe=describe,
        image=image,
        k=2,
        shown=[4],
    )
    ended = Ended()
    trainer = make_trainer(
        max_epochs=2,
        logger=[TensorBoardLogger(tmp_path, name="", version="board"), CSVLogger(tmp_path, name="", version="table")],
        callbacks=[evaluation, TRAKCallback(tmp_path / "snapshots"), ended],
        log_every_n_steps=1,
    )
    model = LitNet()
    trainer.fit(model, DataLoader(TRAIN, batch_size=8, shuffle=True))
    assert ended.found == ("fit", "fit")
    assert trainer.state.finished
    assert trainer.lightning_module is model
    assert evaluation in trainer.callbacks
    scores = make_trak(model).score(make_trainer(), TARGETS)
    assert torch.equal(evaluation.scores["TRAK"], scores)
    expected = LinearDatamodelingScore(MASKS)
    expected.update(scores, OUTPUTS)
    events = read_events(tmp_path / "board")
    assert scalars(events)["lds/TRAK/mean"] == [(14, pytest.approx(float(expected.compute()), rel=1e-6))]
    assert {"attributions/TRAK/images", "attributions/random/images"} <= set(events.Tags()["images"])
    assert len(text(events, "attributions/TRAK/table")[1].splitlines()) == 2 + 2 * 2
    assert (tmp_path / "table/lds/random/per_target-step-14.png").exists()
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, DataLoader(TRAIN, batch_size=8))  # the Trainer goes on as ever
    assert trainer.global_step == 21


TRUTH = Retrained(MASKS, OUTPUTS)


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        (({"random": RandomScores()}, TRAIN, TARGETS), {}, r"methods\['random'\] must be a function .* got a RandomSc"),
        (([RandomScores], TRAIN, TARGETS), {}, "methods must be a dict of functions .* got a list"),
        (({}, TRAIN, TARGETS, (MASKS, OUTPUTS)), {}, "retrained must be the result of read_fleet .* got a tuple"),
        (({}, TRAIN, TARGETS), {"imgae": image}, "AttributionEvaluation got .* 'imgae': did you mean 'image'"),
    ],
)
def test_what_the_callback_refuses_when_it_is_made(arguments, options, match):
    with pytest.raises(TypeError, match=match):
        AttributionEvaluation(*arguments, **options)


@pytest.mark.parametrize(
    ("train", "targets", "retrained", "match"),
    [
        (TARGETS, TRAIN, TRUTH, r"at \d+ targets of models of \d+ training examples, but there are \d+ targets and"),
        (TRAIN, Subset(TARGETS, [0]), Retrained(MASKS, OUTPUTS[:1]), "needs at least 2 targets, got 1"),
    ],
)
def test_what_the_callback_refuses_before_training(train, targets, retrained, match):
    evaluation = AttributionEvaluation({"random": lambda model: RandomScores()}, train, targets, retrained)
    trainer = make_trainer(max_epochs=1, callbacks=[evaluation])
    with pytest.raises(ValueError, match=match):
        trainer.fit(LitNet(), DataLoader(TRAIN, batch_size=8))
    assert trainer.global_step == 0


def test_callback_leaves_a_trial_run_alone(tmp_path):
    evaluation = AttributionEvaluation({"random": lambda model: RandomScores()}, TRAIN, TARGETS)
    make_trainer(fast_dev_run=True, callbacks=[evaluation]).fit(LitNet(), DataLoader(TRAIN, batch_size=8))
    assert not evaluation.scores
    trainer = make_trainer(max_epochs=1, callbacks=[evaluation])
    trainer.fit(LitNet(), DataLoader(TRAIN, batch_size=8))  # no logger, nothing to log
    assert evaluation.scores["random"].shape == (13, 50)
    assert not evaluation.lds
