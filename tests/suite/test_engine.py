"""Training goes on from any batch as if it had not stopped, under every method."""

import io

import pytest
import torch

from condlr._support.errors import ConstraintBreach, Diverged, UserError
from condlr._support.seeds import derive_seed
from condlr.analysis.conditioning import conditioning
from condlr.factorization import Scheme, low_rank_layers
from condlr.methods.base import Method
from condlr.methods.condlr import CondLR
from condlr.methods.vanilla import Vanilla
from condlr.models.lenet5 import LeNet5
from condlr.suite.engine import Trainer
from condlr.suite.loading import load_data
from condlr.suite.runs import Run
from tests.helpers import configured
from tests.training import METHODS, Stop, protocol, trainer


@pytest.fixture(scope="module", params=METHODS)
def whole(request, data):
    """A run that nobody stopped, and how another like it is made."""

    def another():
        # Under the released code's scalar mu c > 1 and noisy gradients let the momentum run away.
        augmentation = "none" if request.param == "released" else "crop_flip"
        return trainer(METHODS[request.param], data, augmentation=augmentation)

    run = another()
    run.fit()
    return run, another


@pytest.mark.slow
@pytest.mark.parametrize(
    "stop_at", [4, pytest.param(1, marks=pytest.mark.long), pytest.param(10, marks=pytest.mark.long)]
)
def test_an_interrupted_run_ends_with_the_same_bits(whole, stop_at, tmp_path):
    whole, another = whole
    first = another()

    def stop(t):
        if t.step == stop_at:
            raise Stop

    with pytest.raises(Stop):
        first.fit(on_batch=stop)
    Run(tmp_path).save_checkpoint(first.state_dict(), "f")
    torch.manual_seed(99)
    second = another()
    state = Run(tmp_path).load_checkpoint("f")
    assert state is not None
    second.load_state_dict(state)
    second.fit()
    assert whole.step == second.step == 12
    for key, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[key]), key
    timing = {"seconds", "images_per_second"}
    for mine, other in ((whole.history, second.history), (whole.records, second.records)):
        for a, b in zip(mine, other, strict=True):
            assert {k: v for k, v in a.items() if k not in timing} == {
                k: v for k, v in b.items() if k not in timing
            }


@pytest.mark.slow
@pytest.mark.parametrize("method", ["baseline", "condlr"])
def test_operators_are_recorded_and_change_nothing(method, data):
    plain, recording = (trainer(METHODS[method], data, record_every=0, epochs=2) for _ in range(2))
    recording.record_operators = True
    for run in (plain, recording):
        run.fit()
    for a, b in zip(plain.model.parameters(), recording.model.parameters(), strict=True):
        assert torch.equal(a, b)
    rows = {row["layer"]: row["cond_circular"] for row in conditioning(recording.model, data.shape)}
    for name in ("conv1", "conv2"):
        assert recording.history[-1][f"operator_{name}"] == pytest.approx(rows[name], rel=1e-9)
    assert not any(key.startswith("operator_fc") for key in recording.history[-1])
    assert not any(key.startswith("operator_") for row in plain.history for key in row)


def test_a_checkpoint_from_before_there_were_records_is_gone_on_with(data):
    t = trainer(METHODS["vanilla"], data, epochs=1)
    t.fit()
    old = {key: value for key, value in t.state_dict().items() if not key.startswith("record")}
    second = trainer(METHODS["vanilla"], data, epochs=2)
    second.load_state_dict(old)
    second.fit()
    assert [row["step"] for row in second.records] == [6]


def test_checkpoints_hold_plain_values_only(data):
    t = trainer(METHODS["released"], data)
    t.fit()
    buffer = io.BytesIO()
    torch.save(t.state_dict(), buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=True)


def test_history(data):
    t = trainer(METHODS["condlr"], data)
    t.fit()
    assert [row["epoch"] for row in t.history] == [0, 1, 2, 3]
    assert [row["step"] for row in t.history] == [0, 4, 8, 12]
    assert [row["lr"] for row in t.history[1:]] == [0.05, 0.025, 0.0125]
    assert t.history[0]["train_loss"] is None
    for row in t.history[1:]:
        assert row["audit_cond_S"] <= 1.1 * (1 + 1e-4)
        largest = max(row[f"cond_{layer}"] for layer in ("conv1", "conv2", "fc1"))
        assert largest == pytest.approx(row["audit_cond_S"], rel=1e-3)
        assert {"cond_conv1", "cond_fc1", "cond_fc2", "held_out_accuracy", "images_per_second"} <= row.keys()


def test_records_within_epochs(data):
    """Every third of 4 batches an epoch: a line's loss is the mean over the batches since the line before.

    These may be of two epochs.
    """
    losses = []
    method = METHODS["vanilla"]
    t = trainer(method, data, epochs=3)
    taken = t._take_step
    t._take_step = lambda *batch, **keys: taken(*batch, **keys) or losses.append(float(t.totals.loss))  # type: ignore[method-assign]
    t.fit()
    assert [row["step"] for row in t.records] == [0, 3, 6, 9, 12]
    assert [row["epoch"] for row in t.records] == [0, 0, 1, 2, 2]
    assert t.records[0]["train_loss"] is None
    assert t.records[0]["cond_conv1"] == t.history[0]["cond_conv1"]
    assert t.records[-1]["cond_fc1"] == t.history[-1]["cond_fc1"]
    # Of each batch, from sums that start anew with every epoch
    sums = torch.tensor(losses, dtype=torch.float64).view(3, 4)
    each = sums.diff(dim=1, prepend=torch.zeros(3, 1)).flatten()
    for row, first in zip(t.records[1:], (0, 3, 6, 9), strict=True):
        loss, images = each[first : first + 3].sum().item(), _images(t, first, first + 3)
        assert row["train_loss"] == pytest.approx(loss / images)
    assert all(0 <= row["train_accuracy"] <= 1 for row in t.records[1:])


def test_loss_and_accuracy_count_every_image_once(data):
    """With lr 0 the mean over an epoch of unequal batches is the mean over the images."""
    t = trainer(METHODS["baseline"], data, lr=0.0, epochs=1)
    t.model.forward = lambda images: LeNet5.forward(t.model, images)  # type: ignore[assignment]
    t.fit()
    x, y = data.train.pixels.float() / 255, data.train.labels
    expected = torch.nn.functional.cross_entropy(t.model(x), y).item()
    assert t.history[1]["train_loss"] == pytest.approx(expected, rel=1e-5)
    assert t.history[1]["train_accuracy"] == pytest.approx((t.model(x).argmax(1) == y).float().mean().item())


@pytest.mark.slow
def test_every_method_sees_the_images_in_the_same_order(data, monkeypatch):
    seen = {}
    for name, method in METHODS.items():
        t = trainer(method, data, record_every=0, epochs=2)
        labels, step = [], method.step
        with monkeypatch.context() as patch:
            patch.setattr(method, "step", lambda *a, to=labels, step=step: to.append(a[3]) or step(*a))
            t.fit()
        seen[name] = torch.cat(labels)
    first, second = seen["baseline"].chunk(2)
    assert all(torch.equal(labels, seen["baseline"]) for labels in seen.values())
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, data.train.labels.sort().values)


@pytest.mark.long
# The other forms of Cayley SGD take their time, and differ in rounding or in the first steps alone.
@pytest.mark.parametrize("name", [name for name in METHODS if name[:7] != "cayley_" or name == "cayley_sgd"])
def test_every_method_learns(name, data):
    t = trainer(METHODS[name], data, record_every=0, epochs=16, batch_size=8, lr_milestones=[])
    t.fit()
    assert t.history[-1]["held_out_accuracy"] >= 0.6


@pytest.mark.slow
def test_training_ends_at_an_accuracy_on_held_out_images(data):
    """With the weights that a run which goes on has after that epoch; a resumed run has ended, too."""
    longer = {"epochs": 8, "batch_size": 16, "lr_milestones": [6]}
    weights = {}

    def keep(t):
        weights[t.epoch] = {name: tensor.clone() for name, tensor in t.model.state_dict().items()}

    whole = trainer(METHODS["baseline"], data, **longer)
    whole.fit(on_epoch=keep)
    reached = [row["held_out_accuracy"] for row in whole.history]
    target = max(reached[1:6])
    first = next(epoch for epoch, accuracy in enumerate(reached) if accuracy >= target)
    assert 1 <= first < 6
    t = trainer(METHODS["baseline"], data, **longer, stop_at=target)
    t.fit()
    assert t.epoch == first and t.finished and whole.epoch != first
    assert all(torch.equal(tensor, weights[first][name]) for name, tensor in t.model.state_dict().items())
    again = trainer(METHODS["baseline"], data, **longer, stop_at=target)
    again.load_state_dict(t.state_dict())
    again.fit(on_batch=lambda t: pytest.fail("it had ended"))
    with pytest.raises(ValueError, match="stop_at is an accuracy on held-out images"):
        protocol(held_out=0.0, stop_at=0.9)


def test_a_loss_that_is_not_finite_stops_the_run(data):
    t = trainer(METHODS["baseline"], data, lr=1e6)
    with pytest.raises(Diverged, match=r"diverged in epoch 1, batch \d+ of 4: .* smaller protocol.lr"):
        t.fit()


def test_weights_that_are_not_finite_stop_the_run(data):
    t = trainer(METHODS["vanilla"], data, epochs=1)

    def poison(t):
        if t.batch == t.batches:
            t.model.fc2.bias.data[0] = torch.inf

    with pytest.raises(Diverged):
        t.fit(on_batch=poison)


def test_a_broken_promise_stops_the_run(data):
    t = trainer(CondLR(0.1), data)

    def breach(t):
        t.model.conv1.U.data[0] += 0.01

    with pytest.raises(ConstraintBreach):
        t.fit(on_batch=breach)


def test_a_method_may_add_a_penalty():
    """With the penalty ||W||^2 / 2 a step is one of weight decay."""

    class Decay(Method):
        def penalty(self, model):
            return model.weight.square().sum() / 2

    x, y = torch.randn(8, 4), torch.arange(8) % 3
    nets = [torch.nn.Linear(4, 3) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    plain = torch.nn.functional.cross_entropy(nets[0](x), y).item()
    size = nets[0].weight.square().sum().item() / 2
    loss, _ = Decay().step(nets[0], Decay().optimizer(nets[0], 0.1, 0.0), x, y)
    assert loss.item() == pytest.approx(plain + size)
    decayed = torch.optim.SGD(
        [{"params": nets[1].weight, "weight_decay": 1.0}, {"params": nets[1].bias}], lr=0.1
    )
    Method().step(nets[1], decayed, x, y)
    torch.testing.assert_close(nets[0].weight, nets[1].weight)


def test_seeds_for_different_purposes_differ():
    seeds = {
        derive_seed(s, *p) for s in range(50) for p in (("init",), ("held_out",), ("epoch", 0), ("epoch", 1))
    }
    assert len(seeds) == 200
    assert derive_seed(0, "init") == derive_seed(0, "init") < 2**63


@pytest.mark.gpu
@pytest.mark.parametrize("name", METHODS)
def test_on_a_gpu(name, data):
    torch.manual_seed(5)
    method = METHODS[name]
    model = method.apply(LeNet5(), Scheme(0.5 if method.compresses else None, classifier="dense")).cuda()
    t = Trainer(model, method, data.to(torch.device("cuda")), protocol(epochs=2), seed=0)
    t.fit()
    assert torch.isfinite(torch.tensor(t.history[-1]["train_loss"]))


@pytest.mark.parametrize("name", ["baseline", "condlr", "dlrt", "projected_sgd"])
def test_weight_decay_is_that_of_sgd(name, data):
    """It pulls each weight towards 0 that a method does not keep orthonormal."""
    ends, rate, decay = {}, 0.01, 0.5

    def stop(t):
        raise Stop

    for weight_decay in (None, decay):
        run = trainer(METHODS[name], data, lr=rate, momentum=0.0, weight_decay=weight_decay)
        start = {key: value.clone() for key, value in run.model.state_dict().items()}
        with pytest.raises(Stop):
            run.fit(on_batch=stop)
        ends[weight_decay] = run.model.state_dict()
    # fc2 is dense and free in all of them but the last, where its weight is kept orthonormal
    free = "fc2.bias" if name == "projected_sgd" else "fc2.weight"
    torch.testing.assert_close(ends[decay][free], ends[None][free] - rate * decay * start[free])
    if name == "projected_sgd":
        torch.testing.assert_close(ends[decay]["fc1.weight"], ends[None]["fc1.weight"])
    if name == "condlr":
        for factor in ("U", "Vt"):
            torch.testing.assert_close(ends[decay][f"fc1.{factor}"], ends[None][f"fc1.{factor}"])


@pytest.mark.parametrize("name", ["condlr", "spectral_cap"])
@pytest.mark.parametrize("optimizer", [None, "adamw"])
def test_weight_decay_turns_no_basis(name, optimizer, data):
    """Not by way of the momentum either: the moments of U have nothing of the decay."""
    keys = {"optimizer": optimizer} if optimizer else {}
    run = trainer(METHODS[name], data, momentum=0.9, weight_decay=0.5, epochs=1, **keys)
    run.fit()
    layers = low_rank_layers(run.model).values()
    bases = {id(factor) for layer in layers for factor in (layer.U, layer.Vt)}
    decays = {group["weight_decay"]: {id(p) for p in group["params"]} for group in run.optimizer.param_groups}
    assert decays[0.0] == bases and {*map(id, run.model.parameters())} == bases | decays[0.5]
    for layer in layers if optimizer is None else ():
        moment = run.optimizer.state[layer.U]["momentum_buffer"]
        along = layer.U.mT @ moment
        assert along.norm() < 0.5 * moment.norm(), "most of it is horizontal"


def test_no_batch_is_missing_from_the_records(data):
    """An epoch may end between two rows."""
    run = trainer(METHODS["baseline"], data, record_every=3, epochs=3)
    run.fit()
    rows = run.records[1:]
    assert run.batches == 4 and [row["step"] for row in rows] == [3, 6, 9, 12]
    correct = sum(
        row["train_accuracy"] * _images(run, rows[place - 1]["step"] if place else 0, row["step"])
        for place, row in enumerate(rows)
    )
    images = len(data.train)
    assert correct == pytest.approx(sum(row["train_accuracy"] * images for row in run.history[1:]))


def _images(run, first, last):
    """How many images these batches have; the last of an epoch has fewer."""
    size, images = run.protocol.batch_size, len(run.data.train)
    return sum(min(size, images - size * (batch % run.batches)) for batch in range(first, last))


def test_a_method_that_moves_nothing_in_some_batches_needs_others(data):
    with pytest.raises(
        ValueError, match="moves no weight in an epoch of one batch: use a smaller batch_size"
    ):
        trainer(METHODS["robust_dlrt"], data, batch_size=1000)
    with pytest.raises(UserError, match="penalty.every=10: this method moves no weight in some batches"):
        configured("method=robust_dlrt", "penalty=condition", "penalty.acts_on=S", "penalty.every=10")
    assert (Vanilla().passes, Vanilla("alternating").passes) == (1, 2)


def test_a_threshold_needs_held_out_images(tmp_path):
    few = ["dataset=digits", "dataset.train_images=40", "protocol.held_out=0.01", "protocol.stop_at=0.5"]
    with pytest.raises(UserError, match=r"protocol.held_out=0.01 of 40 images is none, and protocol.stop_at"):
        load_data(configured(*few), torch.device("cpu"))
