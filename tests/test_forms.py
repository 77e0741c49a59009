"""The two forms of a low-rank layer, and how one is chosen."""

import copy

import pytest
import torch
from torch import nn

import condlr
from condlr import forms
from condlr.factorization import low_rank_layers
from condlr.layers import FORMS
from condlr.suite import config


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(forms.machine, "busy", lambda: False)
    return tmp_path / "condlr" / "forms.json"


def network(core="full"):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8), nn.Dropout(0.5),
        nn.Conv2d(8, 9, 3, padding="same", dilation=2, bias=False), nn.Flatten(), nn.Linear(9 * 16, 7),
    )  # fmt: skip
    return condlr.factorize(net, 0.3, core=core)


@pytest.mark.parametrize("core", ["full", "diagonal", "none"])
def test_both_forms_compute_the_same(core):
    factored = network(core).double().eval()
    multiplied = copy.deepcopy(factored)
    condlr.set_forms(multiplied, "multiplied")
    assert forms.forms(multiplied) == dict.fromkeys(("0", "3", "5"), "multiplied")
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    results = []
    for net in (factored, multiplied):
        images = x.clone().requires_grad_()
        y = net(images)
        y.square().sum().backward()
        results.append([y.detach(), images.grad, *(p.grad for p in net.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_the_filters_of_a_convolution_are_no_copy():
    """From the start, and whatever is done to the layer."""
    net = condlr.factorize(nn.Sequential(nn.Conv2d(4, 8, 3)), ranks={"0": 3})
    layer = net[0]

    def shares():
        return layer.filters.data_ptr() == layer.Vt.data_ptr() and layer.Vt.is_contiguous()

    assert shares()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.3)
    condlr.constrain(optimizer, net)
    net(torch.randn(2, 4, 6, 6)).square().sum().backward()
    assert layer.Vt.grad.is_contiguous()
    optimizer.step()
    assert shares()
    assert layer.Vt.grad.is_contiguous() and optimizer.state[layer.Vt]["momentum_buffer"].is_contiguous()
    net.load_state_dict(condlr.factorize(nn.Sequential(nn.Conv2d(4, 8, 3)), ranks={"0": 5}).state_dict())
    assert shares()
    assert copy.deepcopy(layer).Vt.is_contiguous()


def pretend(monkeypatch, slow):
    """Let a pass in the form `slow` take longer."""
    monkeypatch.setattr(forms, "_seconds", lambda layer, form, x: 3.0 if form == slow else 1.0)


@pytest.mark.parametrize(
    ("slow", "convolution", "linear"),
    [
        ("factored", "multiplied", "chained"),
        ("multiplied", "factored", "chained"),
        ("chained", "factored", "factored"),
    ],
)
def test_the_fastest_form_is_chosen_and_remembered(slow, convolution, linear, cache, monkeypatch):
    """Of equal ones the one that needs no U S, where the batch has fewer rows than U."""
    pretend(monkeypatch, slow)
    net, images = network(), torch.randn(4, 3, 8, 8)
    expected = {"0": convolution, "3": convolution, "5": linear}
    assert condlr.choose_forms(net, images) == forms.forms(net) == expected
    monkeypatch.setattr(forms, "_fastest", None)  # nothing is timed again
    again = network()
    condlr.choose_forms(again, images)
    assert forms.forms(again) == forms.forms(net)
    with pytest.raises(TypeError):
        condlr.choose_forms(network(), torch.randn(5, 3, 8, 8))  # another batch is another question


def test_what_was_found_on_a_busy_machine_is_not_remembered(cache, monkeypatch):
    monkeypatch.setattr(forms.machine, "busy", lambda: True)
    assert condlr.choose_forms(network(), torch.randn(4, 3, 8, 8)).keys() == {"0", "3", "5"}
    assert not cache.exists()


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": 1}'])
def test_a_damaged_cache_is_made_again(content, cache):
    cache.parent.mkdir()
    cache.write_text(content)
    condlr.choose_forms(network(), torch.randn(4, 3, 8, 8))
    assert "factored" in cache.read_text() or "multiplied" in cache.read_text()
    assert [*cache.parent.iterdir()] == [cache]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert condlr.choose_forms(network(), torch.randn(4, 3, 8, 8)).keys() == {"0", "3", "5"}


def test_choosing_changes_nothing_else(cache):
    net, images = network().train(), torch.randn(4, 3, 8, 8)
    net[3].eval()
    net[0].U.requires_grad_(False)
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    modes = [module.training for module in net.modules()]
    condlr.choose_forms(net, images)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert not any(layer._forward_pre_hooks for layer in low_rank_layers(net).values())


def test_the_command_line_knows_the_forms():
    assert ("measured", *FORMS) == config.FORMS


def test_bad_forms_are_refused():
    net = network()
    with pytest.raises(ValueError, match="forms must be one of factored, chained, multiplied; got 'fast'"):
        condlr.set_forms(net, "fast")
    with pytest.raises(ValueError, match=r"forms\.3 must be one of"):
        condlr.set_forms(net, {"0": "multiplied", "3": "fast"})
    with pytest.raises(ValueError, match="no low-rank layer is named '1'; there are 0, 3, 5"):
        condlr.set_forms(net, {"0": "multiplied", "1": "factored"})
    assert forms.forms(net)["0"] == "factored", "all or nothing"


@pytest.mark.parametrize("value", ["~/cache", "relative", ""])
def test_a_cache_that_is_no_absolute_path_is_not_used(tmp_path, monkeypatch, value):
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert forms._path() == tmp_path / ".cache" / "condlr" / "forms.json"


def test_forms_are_chosen_in_inference_mode_and_for_keywords(cache):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 24)

        def forward(self, x):
            return self.fc(input=x)

    net = condlr.factorize(Named(), 0.5)
    with torch.inference_mode():
        assert condlr.choose_forms(net, torch.randn(4, 16)).keys() == {"fc"}


def test_an_example_may_have_a_history_of_gradients(cache):
    x = nn.Linear(12, 16)(torch.randn(3, 12))
    assert condlr.choose_forms(condlr.factorize(nn.Sequential(nn.Linear(16, 24)), 0.5), x).keys() == {"0"}
