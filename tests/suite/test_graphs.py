"""When a step is recorded, replayed, and recorded anew. An actor plays CUDA's part; the gpu test is real."""

from contextlib import contextmanager

import pytest
import torch

from condlr.factorization import Scheme
from condlr.methods.condlr import CondLR
from condlr.models.lenet5 import LeNet5
from condlr.suite import engine, graphs
from condlr.suite.engine import Trainer
from condlr.suite.graphs import GraphedStep
from tests.training import METHODS, protocol


class Stage:
    """A device that records what `step` does with its images, and does it again at each replay."""

    def __init__(self, monkeypatch):
        self.recording = None
        self.recorded = 0
        self.seen = []
        self.fails = False
        stage = self

        class Graph:
            def replay(self):
                self.actions()

        @contextmanager
        def record(graph, **options):
            stage.recording, stage.recorded = graph, stage.recorded + 1
            try:
                yield
                if stage.fails:
                    raise RuntimeError("operation not permitted when stream is capturing\nmore")
            finally:
                stage.recording = None

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", record)
        monkeypatch.setattr(GraphedStep, "_aside", lambda graphed, *batch: graphed._step(*batch))

    def step(self, images, labels):
        def action():
            self.seen.append((images.sum().item(), labels.sum().item()))

        if self.recording is None:
            action()
        else:
            self.recording.actions = action


@pytest.fixture
def stage(monkeypatch):
    return Stage(monkeypatch)


def batch(value, size=4):
    return torch.full((size, 2), float(value)), torch.full((size,), value)


def test_every_batch_is_seen_once_whatever_the_way(stage):
    step = GraphedStep(stage.step)
    for value in range(10):
        step(*batch(value))
    assert stage.recorded == 1
    assert stage.seen == [(8.0 * value, 4 * value) for value in range(10)]


def test_another_size_of_batch_has_a_graph_of_its_own(stage):
    step = GraphedStep(stage.step)
    for value in range(12):
        step(*batch(value, 4 if value % 3 else 2))
    assert stage.recorded == 2
    assert [labels for _, labels in stage.seen] == [value * (4 if value % 3 else 2) for value in range(12)]


def test_new_settings_are_recorded_anew(stage):
    step = GraphedStep(stage.step)
    for lr in (0.1, 0.1, 0.04):
        step.renew(("lr", lr))
        for value in range(5):
            step(*batch(value))
    assert stage.recorded == 2
    assert len(stage.seen) == 15


def test_a_step_that_cannot_be_recorded_is_taken_as_it_is(stage, caplog):
    stage.fails = True
    step = GraphedStep(stage.step)
    for value in range(10):
        step(*batch(value))
    assert stage.recorded == 1
    assert stage.seen == [(8.0 * value, 4 * value) for value in range(10)]
    (line,) = [record.getMessage() for record in caplog.records if record.name == graphs.__name__]
    assert line.endswith("it runs without: operation not permitted when stream is capturing")
    assert step.reason == "operation not permitted when stream is capturing"


@pytest.mark.slow
def test_an_epoch_that_a_graph_spoils_is_taken_again(data, monkeypatch):
    """NaN is all a graph can say where a fast map does not hold; the run ends as if it had had none."""
    taken = []

    class Spoiling:
        def __init__(self, step):
            self.step = step

        def renew(self, settings):
            pass

        def __call__(self, images, labels):
            self.step(images, labels)
            taken.append(len(labels))
            if len(taken) == 6:  # in the second epoch
                spoiled.model.fc1.U.data[0] = torch.nan

    def make():
        torch.manual_seed(5)
        model = METHODS["condlr"].apply(LeNet5(), Scheme(0.5, classifier="dense"))
        return Trainer(model, METHODS["condlr"], data, protocol(), seed=0)

    monkeypatch.setattr(engine, "GraphedStep", Spoiling)
    plain, spoiled = make(), make()
    spoiled._graphs = {False: Spoiling(spoiled._take_step)}
    plain.fit()
    spoiled.fit()
    assert len(taken) == 4 + 3 + 4, "the second epoch stops at the NaN; the third has a graph again"
    assert (plain.repeated, spoiled.repeated) == (0, 1)
    resumed = make()
    resumed.load_state_dict(spoiled.state_dict())
    assert resumed.repeated == 1
    for a, b in zip(plain.model.parameters(), spoiled.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [row["train_loss"] for row in plain.history] == [row["train_loss"] for row in spoiled.history]


def test_methods_that_look_at_the_device_are_not_recorded():
    capturable = {name for name, method in METHODS.items() if method.capturable}
    assert capturable == {
        "baseline", "vanilla", "gaussian", "alternating", "condlr", "geometric", "energy", "cayley_sgd",
        "projected_sgd",
        "snip", "srn", "svd_prune",
    }  # fmt: skip
    assert not CondLR(0.1, preconditioner="released_code").capturable
    assert CondLR(0.0, "one").capturable
    assert not CondLR(float("inf")).capturable, "its S may become ill-conditioned"


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.capturable])
def test_a_graph_trains_as_single_steps_do(name, data):
    device = torch.device("cuda")
    runs = []
    for graphed in (True, False):
        torch.manual_seed(5)
        method = METHODS[name]
        scheme = Scheme(0.5 if method.compresses else None, classifier="dense")
        model = method.apply(LeNet5(), scheme).to(device)
        t = Trainer(model, method, data.to(device), protocol(batch_size=20), seed=0)
        if not graphed:
            t._graphs = {}
        t.fit()
        assert not graphed or t._graphs[False].reason is None
        runs.append(t)
    for a, b in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
