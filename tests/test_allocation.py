"""From a wish to ranks: by number, energy, error and budget, for all layers or by name."""

import itertools
import math

import pytest
import torch
from torch import nn

import condlr
from condlr import allocation
from condlr.factorization import low_rank_layers


def net():
    torch.manual_seed(0)
    layers = nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)
    made = nn.Sequential(*layers)
    with torch.no_grad():  # spectra that differ
        for layer, power in zip(made[::2], (0.2, 1.0, 3.0), strict=True):
            P, sigma, Qh = torch.linalg.svd(layer.weight, full_matrices=False)
            layer.weight.copy_((P * torch.arange(1, len(sigma) + 1) ** -power) @ Qh)
    return made


def ranks(**wish):
    return {name: layer.rank for name, layer in low_rank_layers(condlr.factorize(net(), **wish)).items()}


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ({"ranks": 8}, {"0": 8, "2": 8, "4": 8}),
        ({"ranks": 20}, {"0": 20, "2": 20, "4": 10}),
        ({"ranks": 0.25}, {"0": 8, "2": 12, "4": 2}),
        ({"ranks": 1.0}, {"0": 32, "2": 48, "4": 10}),
        ({"ranks": {"*": 4}}, {"0": 4, "2": 4, "4": 4}),
        ({"ranks": {"[02]": 0.25, "4": 3}}, {"0": 8, "2": 12, "4": 3}),
        ({"ranks": {"4": 2, "*": 5}}, {"0": 5, "2": 5, "4": 2}),
        ({"ranks": {"*": 20}}, {"0": 20, "2": 20, "4": 10}),
        ({"ranks": 8, "include": "[24]", "exclude": "4"}, {"2": 8}),
        ({"compression": 0.5, "include": ["0"]}, {"0": 9}),
        ({"compression": {"0": 0.5, "2": 0.2}}, {"0": 9, "2": 18}),
        ({"ranks": 3, "classifier": "dense"}, {"0": 3, "2": 3}),
        ({"ranks": 3, "classifier": "full_rank"}, {"0": 3, "2": 3, "4": 10}),
    ],
)  # fmt: skip
def test_numbers_fractions_and_patterns(wish, expected):
    assert ranks(**wish) == expected


def spectrum(layer):
    return torch.linalg.svdvals(layer.weight.detach().double()).square()


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1.0])
def test_the_smallest_rank_of_an_energy(energy):
    for name, rank in ranks(energy=energy).items():
        values = spectrum(net().get_submodule(name))
        kept = values.cumsum(0) / values.sum()
        assert kept[rank - 1] >= energy - 1e-9
        assert rank == 1 or kept[rank - 2] < energy


@pytest.mark.parametrize("error", [0.0, 1e-3, 0.1, 0.9])
def test_the_smallest_rank_of_an_error(error):
    for name, layer in low_rank_layers(condlr.factorize(net(), error=error)).items():
        assert layer.dense_error <= error + 1e-6
        values = spectrum(net().get_submodule(name))
        if layer.rank > 1:
            assert (values[layer.rank - 1 :].sum() / values.sum()).sqrt() > error - 1e-6


def test_energy_and_error_by_name():
    assert ranks(energy={"0": 0.9, "[24]": 0.5}) == {
        name: ranks(energy=energy)[name] for name, energy in (("0", 0.9), ("2", 0.5), ("4", 0.5))
    }
    assert [*ranks(error={"2": 0.2})] == ["2"]


def test_zero_and_large_matrices():
    zero = condlr.factorize(nn.Sequential(nn.Linear(8, 8)).requires_grad_(False), ranks=2)
    assert zero[0].rank == 2
    assert allocation.by_energy(torch.zeros(4), 0.9) == allocation.by_error(torch.zeros(4), 0.1) == 1
    W = torch.randn(allocation.SMALL + 1, allocation.SMALL + 6, dtype=torch.float64)
    torch.testing.assert_close(allocation.squares(W), torch.linalg.svdvals(W).square())


@pytest.mark.parametrize("core", ["full", "diagonal", "none"])
@pytest.mark.parametrize("budget", [0.1, 0.3, 0.7, 1.0])
def test_a_budget_is_kept_and_used_up(budget, core):
    model = condlr.factorize(net(), budget=budget, core=core)
    total = sum(p.numel() for p in net().parameters())
    used = sum(p.numel() for p in model.parameters())
    assert used <= budget * total
    layers = low_rank_layers(model)
    costs = []
    for layer in layers.values():
        (n, m), r = layer.shape, layer.rank
        now, more = (allocation.weights(core, n, m, rank) for rank in (r, r + 1))
        assert now <= n * m
        if r < min(n, m) and more <= n * m:
            costs.append(more - now)
    assert not costs or used + min(costs) > budget * total
    assert len(layers) == 3


def test_a_budget_keeps_as_large_a_product_of_energies_as_any_allocation():
    """By trying all ranks; the greedy choice may miss what a last value that no longer fits leaves."""
    spectra = {"a": torch.tensor([9.0, 4, 1, 1]), "b": torch.tensor([5.0, 5, 4, 0.1])}
    shapes = {"a": (20, 30), "b": (25, 15)}
    for limit in (120, 180, 260, 330):
        found = allocation.by_budget(spectra, shapes, limit, "none")

        def kept(ranks):
            return math.prod((spectra[k][:r].sum() / spectra[k].sum()).item() for k, r in ranks.items())

        def cost(ranks):
            return sum(allocation.weights("none", *shapes[k], r) for k, r in ranks.items())

        every = [dict(zip("ab", r, strict=True)) for r in itertools.product(range(1, 5), repeat=2)]
        possible = [r for r in every if cost(r) <= limit]
        assert cost(found) <= limit
        assert kept(found) >= max(map(kept, possible)) - 0.1
        same = [kept(r) for r in possible if cost(r) <= cost(found)]
        assert kept(found) == pytest.approx(max(same)), "the best of what costs no more"


def test_a_budget_starves_no_layer():
    """Spectra of random matrices are flat: a sum of shares would leave the large layers rank 1."""
    torch.manual_seed(0)
    shapes = {"small": (16, 144), "middle": (64, 576), "large": (128, 1152), "also": (128, 1152)}
    spectra = {name: allocation.squares(torch.randn(shape)) for name, shape in shapes.items()}
    found = allocation.by_budget(spectra, shapes, 40_000, "none")
    taken = {name: allocation.weights("none", *shapes[name], rank) for name, rank in found.items()}
    assert found["small"] == 14, "the largest rank that saves weights"
    assert max(taken.values()) < 1.6 * min(weights for name, weights in taken.items() if name != "small")
    scaled = {name: values * 10**power for power, (name, values) in enumerate(spectra.items())}
    assert allocation.by_budget(scaled, shapes, 40_000, "none") == found, "scales mean nothing"
    nothing = spectra | {"middle": torch.zeros(64), "also": torch.tensor([1.0] + 127 * [0.0])}
    found = allocation.by_budget(nothing, shapes, 20_000, "none")
    assert found["middle"] == found["also"] == 1 < found["large"], "where there is no energy, no weights"


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"budget": 0.03}, "budget=0.03 cannot be kept: rank 1 in all 3 layers takes 220 weights too many"),
        ({"budget": 0.01}, "budget=0.01 cannot be kept: 2.13 % of the parameters"),
        ({"budget": 0.5, "exclude": "2"}, "budget=0.5 cannot be kept: 55.8 % of the parameters"),
        ({"budget": 1.5}, "budget must be in"),
        ({"ranks": {"4": 11}}, "4: the rank of a 10 x 48 matrix is 1 to 10; got 11"),
        ({"ranks": True}, "ranks must be a rank"),
        ({"ranks": {"0": "many"}}, r"ranks\['0'\] must be a rank"),
        ({"energy": {"9": 0.5}}, "no linear or convolution layer is named '9'"),
        ({"compression": {"0": 1.5}}, "compression must be in"),
        ({"energy": 0.5, "error": 0.5}, "exactly one of .*; got energy, error"),
    ],
)
def test_wishes_that_cannot_be_met_are_one_line(wish, message):
    with pytest.raises(ValueError, match=message):
        condlr.factorize(net(), **wish)
