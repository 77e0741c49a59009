"""Parameter groups: what decays, and that no parameter is lost or twice."""

import pytest
import torch
from torch import nn

import condlr


def network():
    net = nn.Sequential(
        nn.Embedding(7, 16), nn.LayerNorm(16), nn.Linear(16, 16), nn.TransformerEncoderLayer(16, 2, 32),
        nn.Linear(16, 4),
    )  # fmt: skip
    return condlr.factorize(net, 0.5, exclude=["4"])


def names(model, group):
    known = {parameter: name for name, parameter in model.named_parameters()}
    return {known[parameter] for parameter in group["params"]}


def test_factors_biases_and_normalisations_do_not_decay():
    model = network()
    decayed, free = condlr.parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert names(model, decayed) == {"0.weight", "4.weight"}
    assert names(model, decayed) | names(model, free) == {name for name, _ in model.named_parameters()}
    with_core, _ = condlr.parameter_groups(model, 0.1, core=True)
    cores = {name for name in names(model, with_core) if name.endswith(".S")}
    assert names(model, with_core) == {"0.weight", "4.weight"} | cores and len(cores) == 7


def test_shared_parameters_are_in_one_group_and_empty_groups_are_left_out():
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    (group,) = condlr.parameter_groups(tied, 0.1)
    assert group["params"] == [tied[0].weight]
    assert not condlr.parameter_groups(nn.ReLU(), 0.1)


def test_under_adamw_the_constraint_holds_and_U_does_not_turn_by_decay():
    torch.manual_seed(0)
    model = condlr.factorize(nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3)), 0.5)
    optimizer = torch.optim.AdamW(condlr.parameter_groups(model, 0.5, core=True), lr=1e-2)
    constraint = condlr.constrain(optimizer, model, tau=0.1)
    x = torch.randn(8, 12)
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert constraint.check()["cond_S"] <= 1.1 * (1 + 1e-4)


def test_muon_trains_the_factors_of_convolutions():
    """PyTorch's Muon takes matrices alone; the factors are matrices."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
    model = condlr.factorize(net, 0.5)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0)
    adam = torch.optim.AdamW(others, lr=1e-3)
    constraint = condlr.constrain(muon, model, tau=0.1)
    x, y = torch.randn(16, 3, 8, 8), torch.randint(10, (16,))
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(x), y)
        for optimizer in (muon, adam):
            optimizer.zero_grad()
        loss.backward()
        for optimizer in (muon, adam):
            optimizer.step()
        losses.append(loss.item())
    assert constraint.check()["cond_S"] <= 1.1 * (1 + 1e-4)
    assert losses[-1] < losses[0] - 0.5


def test_the_biases_of_keys_and_values_do_not_decay_and_lazy_weights_are_named():
    decayed, free = condlr.parameter_groups(nn.MultiheadAttention(8, 2, add_bias_kv=True), 0.1)
    assert all(p.ndim == 2 for p in decayed["params"]) and len(free["params"]) == 4
    with pytest.raises(ValueError, match="weight of a LazyLinear has no shape yet"):
        condlr.parameter_groups(nn.LazyLinear(3), 0.1)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_normalisations_over_several_dimensions_do_not_decay(norm):
    (free,) = condlr.parameter_groups(nn.Sequential(norm([4, 8])), 0.1)
    assert free["weight_decay"] == 0


@pytest.mark.parametrize("call", [lambda x: condlr.parameter_groups(x, 0.1), condlr.summary, condlr.measure])
def test_what_is_no_network_is_one_line(call):
    with pytest.raises(ValueError, match=r"needs a network, an nn.Module; got list"):
        call([*nn.Linear(8, 8).parameters()])
