"""CondLR in Hugging Face's Trainer, accelerate and skorch."""

import pytest
import torch
from torch import nn

import condlr
from condlr.factorization import low_rank_layers

transformers = pytest.importorskip("transformers")
from condlr.integrations.transformers import CondLR  # noqa: E402

LIMIT = 1.1 * (1 + 1e-4)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = condlr.factorize(nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2)), 0.5)

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def data():
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(20, generator=generator), "labels": i % 2} for i in range(32)]


def trainer(model, folder, epochs=1, **options):
    arguments = transformers.TrainingArguments(
        str(folder), use_cpu=True, num_train_epochs=epochs, report_to=[], disable_tqdm=True, logging_steps=1,
        save_strategy="epoch", per_device_train_batch_size=8, learning_rate=0.01, seed=3,
        logging_strategy="steps", lr_scheduler_type="constant",
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=data(), **options)


def test_constrain_alone_also_saves_checkpoints(tmp_path):
    model = Net()
    optimizer = torch.optim.AdamW(condlr.parameter_groups(model, 0.01), lr=0.05)
    constraint = condlr.constrain(optimizer, model, tau=0.1)
    trainer(model, tmp_path, optimizers=(optimizer, None)).train()
    assert constraint.check()["cond_S"] <= LIMIT
    assert [*tmp_path.glob("checkpoint-*/optimizer.pt")]


def test_the_callback_constrains_logs_and_exports(tmp_path):
    reported = []

    class Report(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            reported.append(logs)

    model = Net()
    made = trainer(model, tmp_path, callbacks=[Report()])
    callback = CondLR(tau=0.1, exports=True).add_to(made)
    made.train()
    assert all("condlr/cond_S" in logs for logs in reported if "loss" in logs)
    assert condlr.audit(model)["cond_S"] <= LIMIT
    logged = [line["condlr/cond_S"] for line in made.state.log_history if "condlr/cond_S" in line]
    assert len(logged) >= 4 and logged[-1] <= LIMIT
    assert not low_rank_layers(callback.exported) and low_rank_layers(model)
    x, y = torch.randn(3, 20), torch.tensor([0, 1, 0])
    torch.testing.assert_close(callback.exported(x, y)["logits"], model(x, y)["logits"])


def test_a_resumed_training_ends_with_the_same_bits(tmp_path):
    def trained(folder, epochs, resume=None):
        torch.manual_seed(3)
        model = Net()
        trainer(model, folder, epochs, callbacks=[CondLR(tau=0.1)]).train(resume_from_checkpoint=resume)
        return model.state_dict()

    whole = trained(tmp_path / "whole", 4)
    trained(tmp_path / "half", 2)
    (last,) = (tmp_path / "half").glob("checkpoint-8")
    resumed = trained(tmp_path / "more", 4, str(last))
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


def test_the_tolerance_may_follow_the_epochs(tmp_path):
    model, taus = Net(), []

    class Watch(transformers.TrainerCallback):
        def on_epoch_end(self, args, state, control, **_):
            taus.append(condlr.audit(model)["cond_S"])

    with torch.no_grad():
        for layer in low_rank_layers(model).values():
            layer.S.copy_(torch.diag(2.0 ** -torch.arange(layer.rank)))
    callbacks = [CondLR(tau=lambda epoch: (3.0, 0.1)[epoch]), Watch()]
    trainer(model, tmp_path, 2, callbacks=callbacks).train()
    assert taus[0] <= 4 * (1 + 1e-4) and taus[1] <= LIMIT


def test_accelerates_optimiser():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = condlr.factorize(nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2)), 0.5)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.05))
    constraint = condlr.constrain(optimizer, model, tau=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        accelerator.backward(model(torch.randn(8, 20)).square().sum())
        optimizer.step()
    assert constraint.check()["cond_S"] <= LIMIT


def test_skorch():
    skorch = pytest.importorskip("skorch")
    held = []

    class Constrained(skorch.callbacks.Callback):
        def on_train_begin(self, net, **_):
            held.append(condlr.constrain(net.optimizer_, net.module_, tau=0.1))

    model = condlr.factorize(nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2)), 0.5)
    net = skorch.NeuralNetClassifier(
        model, criterion=nn.CrossEntropyLoss, optimizer=torch.optim.AdamW, lr=0.05, max_epochs=2,
        batch_size=8, callbacks=[Constrained()], train_split=None, verbose=0,
    )  # fmt: skip
    X = torch.stack([line["x"] for line in data()])
    net.fit(X, torch.tensor([line["labels"] for line in data()]))
    assert held[0].check()["cond_S"] <= LIMIT


def test_the_tolerance_follows_the_epochs_of_data_without_a_length(tmp_path):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from data()

    seen = []

    def tau(epoch):
        seen.append(epoch)
        return 1 / (1 + epoch)

    made = trainer(Net(), tmp_path)
    made.train_dataset, made.args.max_steps = Endless(), 12
    CondLR(tau).add_to(made)
    made.train()
    assert seen == [0, 0, 1, 2]
