"""CondLR in Lightning: with `constrain` alone, and with the callback."""

import logging
import math
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import condlr
from condlr.factorization import low_rank_layers

L = pytest.importorskip("lightning")
from condlr.integrations.lightning import CondLR  # noqa: E402

LIMIT = 1.1 * (1 + 1e-4)


class Module(L.LightningModule):
    def __init__(self, automatic=True, constrained=False):
        super().__init__()
        self.automatic_optimization, self.constrained = automatic, constrained
        self.net = condlr.factorize(nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5)), 0.5)

    def training_step(self, batch, _):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(condlr.parameter_groups(self, 0.01), lr=0.05)
        if self.constrained:
            self.constraint = condlr.constrain(optimizer, self, tau=0.1)
        return optimizer


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def fit(module, epochs=1, checkpoint=None, **options):
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(64, 20, generator=generator), torch.randint(5, (64,), generator=generator)
    silent = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"logger": False, "accelerator": "cpu"} | silent | options
    trainer = L.Trainer(max_epochs=epochs, **options)
    trainer.fit(module, DataLoader(TensorDataset(*data), 16), ckpt_path=checkpoint)
    return trainer


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("automatic", [True, False])
def test_constrain_alone(automatic, precision):
    module = Module(automatic, constrained=True)
    before = module.net[0].S.detach().clone()
    fit(module, precision=precision)
    assert module.constraint.check()["cond_S"] <= LIMIT
    assert not torch.equal(module.net[0].S, before)


@pytest.mark.parametrize("automatic", [True, False])
def test_the_callback_constrains_logs_and_exports(automatic, tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    module, callback = Module(automatic), CondLR(tau=0.1, every=2, exports=True)
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    fit(module, callbacks=[callback], logger=logger, log_every_n_steps=1)
    assert condlr.audit(module)["cond_S"] <= LIMIT
    text = next(tmp_path.rglob("metrics.csv")).read_text()
    assert "condlr/cond_S" in text and "condlr/orthonormality_error" in text
    x = torch.randn(3, 20)
    assert not low_rank_layers(callback.exported)
    torch.testing.assert_close(callback.exported.net(x), module.net(x))
    assert low_rank_layers(module), "the module itself is left as it is"


def test_the_tolerance_may_follow_the_epochs():
    seen = []

    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer, module):
            seen.append(condlr.audit(module)["cond_S"])

    module = Module()
    with torch.no_grad():
        for layer in low_rank_layers(module).values():
            layer.S.copy_(torch.diag(2.0 ** -torch.arange(layer.rank)))
    fit(module, 3, callbacks=[CondLR(tau=lambda epoch: (math.inf, 1.0, 0.1)[epoch]), Watch()])
    assert seen[0] > 2 >= seen[1] / (1 + 1e-4) and seen[2] <= LIMIT


def test_a_resumed_training_ends_with_the_same_bits(tmp_path):
    def trained(epochs, start=None):
        L.seed_everything(3)
        module = Module()
        trainer = fit(module, epochs, start, callbacks=[CondLR(tau=0.1)])
        return module, trainer

    whole, _ = trained(4)
    half, trainer = trained(2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = trained(4, tmp_path / "half.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert not torch.equal(half.net[0].S, whole.net[0].S)


def test_a_module_without_low_rank_layers_says_what_is_missing():
    module = Module()
    module.net = nn.Linear(20, 5)
    with pytest.raises(ValueError, match="factorize the model first"):
        fit(module, callbacks=[CondLR()])


class Two(L.LightningModule):
    """Two networks with an optimiser each, as a GAN has them."""

    def __init__(self, second=None):
        super().__init__()
        self.automatic_optimization, self.second = False, second or (lambda p: torch.optim.AdamW(p, lr=0.05))
        self.a, self.b = (condlr.factorize(nn.Sequential(nn.Linear(20, 12)), 0.5) for _ in range(2))

    def training_step(self, batch, _):
        for optimizer, net in zip(self.optimizers(), (self.a, self.b), strict=True):
            optimizer.zero_grad()
            self.manual_backward(net(batch[0]).square().mean())
            optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.a.parameters(), lr=0.05), self.second(self.b.parameters())


def test_every_optimiser_with_low_rank_layers_is_constrained():
    module = Two()
    fit(module, callbacks=[CondLR()])
    assert condlr.audit(module)["cond_S"] <= LIMIT
    module = Two()
    module.b = nn.Linear(20, 12)
    fit(module, callbacks=[CondLR()])  # the second has none of them
    assert condlr.audit(module)["cond_S"] <= LIMIT


def test_an_optimiser_that_cannot_be_constrained_is_no_secret():
    with pytest.raises(ValueError, match="before_projection needs torch.optim.SGD"):
        fit(Two(), callbacks=[CondLR(momentum="before_projection")])


def test_wrong_options_are_named_before_the_training():
    for options, message in (
        ({"tau": -1}, "tau must be in"),
        ({"tau": "0.1"}, "tau must be a number"),
        ({"tua": 1}, "no option tua"),
    ):
        with pytest.raises(ValueError, match=message):
            CondLR(**options)


def test_weights_outside_of_the_constraint_at_the_end_are_said():
    class Average(L.Callback):
        def on_train_end(self, trainer, module):
            with torch.no_grad():
                module.net[0].U.mul_(0.5)

    with pytest.warns(UserWarning, match="were the weights averaged"):
        warnings.simplefilter("always")
        fit(Module(), callbacks=[Average(), CondLR()])


def test_a_module_that_keeps_its_constraint_says_that_it_is_in_the_way_of_an_export():
    module = Module(constrained=True)
    module.configure_optimizers()
    with pytest.raises(ValueError, match="constraint is of the training: export the network without it"):
        condlr.export(module)
    torch.testing.assert_close(condlr.export(module.net)(torch.ones(1, 20)), module.net(torch.ones(1, 20)))


@pytest.mark.parametrize("first", [True, False])
def test_an_average_is_what_is_exported_whatever_the_order_of_callbacks(first):
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    torch.manual_seed(0)
    module, callback = Module(), CondLR(tau=0.1, every=0, exports=True)
    both = [callback, StochasticWeightAveraging(1e-2, swa_epoch_start=1)]
    with pytest.warns(UserWarning, match="were the weights averaged"):
        warnings.simplefilter("always")
        fit(module, 4, callbacks=both if first else both[::-1])
    x = torch.randn(4, 20)
    torch.testing.assert_close(callback.exported.net(x), module.net(x))


def test_figures_are_of_steps_and_not_of_batches(monkeypatch):
    from condlr.integrations._constraints import Constraints

    logged, figures = [], Constraints.figures
    module = Module()

    def counted(constraints):
        logged.append(module.trainer.global_step)
        return figures(constraints)

    monkeypatch.setattr(Constraints, "figures", counted)
    fit(module, epochs=6, callbacks=[CondLR(every=2)], accumulate_grad_batches=2)
    assert logged == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("every", ["x", -1, 0.5])
def test_a_number_of_steps_that_is_none_is_refused(every):
    with pytest.raises(ValueError, match="every is a number of steps"):
        CondLR(every=every)
