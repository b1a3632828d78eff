"""One more step: in closed form, as the user's own optimizer takes it, and without a trace."""

import lightning as L
import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import AttributionMixin
from lightning_trak.outputs import ContrastiveMargin, NegativeLoss, RegressionOutput
from lightning_trak.retraining import TailPatch, tail_patch
from lightning_trak.scoring import TopK
from tests.lit import TARGETS, TRAIN, LitNet, make_model, make_trainer

RATE = 0.05


class LitLinear(AttributionMixin, L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64))

    def forward(self, inputs):
        return inputs @ self.weights

    def configure_model_output(self):
        return RegressionOutput()

    def training_step(self, batch, batch_idx):
        loss = F.mse_loss(self(batch[0]), batch[1])
        self.log("loss", loss)
        return {"loss": loss}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=RATE)


def numbers(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, Y, ASKED = numbers(7, 3, seed=0), numbers(7, seed=1), numbers(4, 3, seed=2)
POINTS, QUESTIONS = TensorDataset(X, Y), TensorDataset(ASKED, torch.zeros(4, dtype=torch.float64))
SCORES = {"one": numbers(4, 7, seed=3), "other": numbers(4, 7, seed=4)}


def test_the_step_is_at_the_end_of_training():
    places = []

    class Annealed(LitLinear):
        def training_step(self, batch, batch_idx):
            places.append((self.current_epoch, self.global_step))
            return super().training_step(batch, batch_idx)

    module, trainer = Annealed(), make_trainer(max_epochs=3)
    trainer.fit(module, DataLoader(POINTS, batch_size=2))
    places.clear()
    tail_patch(module, trainer.optimizers[0], POINTS, QUESTIONS, SCORES, k=1)
    assert set(places) == {(3, 12)}


@pytest.mark.parametrize("together", [False, True])
def test_a_step_of_least_squares_is_known(together):
    model = LitLinear()
    found = tail_patch(
        model, model.configure_optimizers(), POINTS, QUESTIONS, SCORES, 3, jointly=together, progress_bar=False
    )
    residuals = Y - X @ model.weights.detach()
    each = 2 * RATE * (ASKED @ X.T) * residuals  # by how much a step on each point alone raises each output
    for row, values in enumerate(SCORES.values()):
        # The gradient of a mean is the mean of the gradients, so that here both kinds of step come to the same.
        expected = each.gather(1, values.topk(3).indices).mean(1)
        torch.testing.assert_close(found.rises[row], expected, rtol=1e-6, atol=1e-6)


def test_steps_that_are_not_linear_are_taken_alone_or_together():
    model = LitLinear()
    output = NegativeLoss(lambda module, batch: (module(batch[0]) - batch[1]) ** 2)
    residuals, before = Y - X @ model.weights.detach(), (ASKED @ model.weights.detach()) ** 2
    steps = 2 * RATE * residuals[:, None] * X  # of the weights
    for together in (False, True):
        found = tail_patch(
            *(model, model.configure_optimizers(), DataLoader(POINTS, batch_size=2), QUESTIONS, SCORES, 2),
            jointly=together,
            output=output,
            progress_bar=False,
        )
        taken = steps[SCORES["one"].topk(2).indices]  # (targets, proponents, weights)
        weights = model.weights.detach() + (taken.mean(1, keepdim=True) if together else taken)
        after = (ASKED[:, None] * weights).sum(-1) ** 2
        torch.testing.assert_close(found.rises[0], before - after.mean(1), rtol=1e-6, atol=1e-6)


def test_the_step_is_the_users_optimizers_and_leaves_no_trace():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    batch = TRAIN[:16]
    for _ in range(3):  # moments, as training leaves them
        optimizer.zero_grad()
        model.training_step(batch).backward()
        optimizer.step()
    model.train()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
    random = torch.get_rng_state()
    scores = {"any": torch.randn(13, 50, generator=torch.Generator().manual_seed(0))}
    found = tail_patch(model, optimizer, TRAIN, TARGETS, scores, 4, jointly=True, progress_bar=False)

    assert model.training
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(state["exp_avg"], old) for state, old in zip(optimizer.state.values(), moments, strict=True))
    assert torch.equal(torch.get_rng_state(), random)

    model.eval()
    output = model.configure_model_output()
    with torch.no_grad():
        before = output.output(model, TARGETS[:])[5]
    optimizer.zero_grad()
    model.training_step(TRAIN[scores["any"][5].topk(4).indices.tolist()]).backward()
    optimizer.step()
    with torch.no_grad():
        rise = output.output(model, TARGETS[:])[5] - before
    assert float(found.rises[0, 5]) == pytest.approx(float(rise), abs=1e-5)


def test_after_a_fit_with_a_scheduler():
    class Decaying(LitNet):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, total_iters=2)]

    model, trainer = Decaying(), make_trainer(max_epochs=2)
    trainer.fit(model, DataLoader(TRAIN, batch_size=10))
    scores = {"any": torch.zeros(13, 50)}
    with pytest.raises(ValueError, match="learning rate is 0"):
        tail_patch(model, trainer.optimizers[0], TRAIN, TARGETS, scores)
    trainer.optimizers[0].param_groups[0]["lr"] = 0.1
    found = tail_patch(model, model.optimizers(), TRAIN, TARGETS, scores, progress_bar=False)
    assert found.rises.shape == (1, 13)
    assert (found.rises != 0).all()


def test_means_and_leads_over_targets():
    generator = torch.Generator().manual_seed(0)
    rises = torch.tensor([[3.0], [0.2]]) + torch.randn(2, 30, generator=generator)
    found = TailPatch(("good", "bad"), rises.double())
    for estimate, row, values in ((found.rise(), 0, rises[0]), (found.lead("good"), 1, rises[0] - rises[1])):
        expected = scipy.stats.bootstrap((values.double().numpy(),), np.mean, method="percentile", rng=1)
        low, high = expected.confidence_interval
        assert float(estimate.mean[row]) == pytest.approx(float(values.mean()), abs=1e-6)
        assert float(estimate.low[row]) == pytest.approx(low, abs=0.06 * (high - low))
        assert float(estimate.high[row]) == pytest.approx(high, abs=0.06 * (high - low))
    assert found.lead("good").mean[0] == 0
    assert [len(row) for row in found.table().rows] == [2, 2]
    table = found.table("good")
    assert table.columns == ("method", "output rises by", "that of good minus this")
    assert table.rows[0][2] == ""
    small = TailPatch(("a", "b"), torch.tensor([[0.0321, 0.0321], [0.0, 0.0]])).table().rows
    assert [row[1] for row in small] == ["+0.0321", "+0.0000"]
    assert table.rows[1][2] == found.lead("good").written("+.2f", 1)


class ByHand(LitNet):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"scores": {"mine": torch.zeros(50, 13)}}, ValueError, r'scores of "mine" must have shape .* \(13, 50\)'),
        ({"scores": {}}, ValueError, "got 0 methods and k = 10"),
        ({"scores": torch.zeros(13, 50)}, TypeError, "scores must be a dict of the scores .* got a Tensor"),
        ({"scores": {"mine": TopK(*torch.zeros(2, 13, 3))}}, TypeError, "scores of mine.* as a .*Tensor, .* a TopK"),
        ({"scores": {"mine": torch.full((13, 50), torch.nan)}}, ValueError, 'scores of "mine" are not finite in 650'),
        ({"train": [DataLoader(TRAIN)] * 50}, TypeError, "a list: it holds several sets of data; pass one of them"),
        ({"targets": L.LightningDataModule()}, TypeError, "a data module is not taken here; .* transfer hooks"),
        ({"k": 1.5}, ValueError, "`k` to be a positive integer but got 1.5"),
        ({"jointly": "no"}, TypeError, "jointly must be True or False; got 'no'"),
        ({"optimizer": None}, TypeError, r"such as trainer\.optimizers\[0\], got a NoneType"),
        ({"optimizer": torch.optim.SGD}, TypeError, "the optimizer that trained .*, got the class SGD"),
        ({"k": 51}, ValueError, "k of 1 to 50, got 1 methods and k = 51"),
        ({"output": ContrastiveMargin()}, TypeError, "ContrastiveMargin compares with training examples"),
        ({"module": ByHand()}, TypeError, "ByHand uses manual optimization"),
        ({"module": LitNet()}, ValueError, "the SGD has parameters that are not in this LitNet"),
        ({"output": NegativeLoss(lambda module, batch: batch[0].sum(1) * torch.nan)}, ValueError, "target 0 is nan"),
    ],
)
def test_what_cannot_be(changes, error, match):
    model = make_model()
    given = {
        "module": model,
        "optimizer": model.configure_optimizers(),
        "train": TRAIN,
        "targets": TARGETS,
        "scores": {"zeros": torch.zeros(13, 50)},
    }
    with pytest.raises(error, match=match):
        tail_patch(**(given | changes))


def test_one_target_has_a_mean_and_no_interval():
    patch = TailPatch(("one",), torch.tensor([[1.5]], dtype=torch.float64))
    rise = patch.rise()
    assert rise.low.isnan().all()
    assert rise.high.isnan().all()
    assert rise.written(".1f", 0) == "1.5"
