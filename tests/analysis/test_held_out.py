"""Accuracy on the images that were held out from training."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from condlr.analysis.held_out import HeldOut
from condlr.attacks.fgsm import Fgsm
from condlr.attacks.pgd import Pgd
from condlr.evaluation import evaluate


def trained(data, attack=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(data.train.pixels[0].numel(), 10))
    return SimpleNamespace(
        model=model,
        data=data,
        attack=attack or Fgsm([0.0, 0.1, 0.05]),
        held_out_images=len(data.held_out or ()),
    )


def test_they_are_attacked_as_test_images_are(data):
    here = trained(data)
    rows = list(HeldOut(eps=[0, 0.1], steps=3).rows(here))
    found = [(row["attack"], row["eps"], row["n"], row["percent"]) for row in rows]
    wanted = [
        (row["attack"], row["eps"], len(data.held_out), pytest.approx(100 * row["accuracy"], abs=1e-5))
        for attack in (Fgsm([0, 0.1]), Pgd([0, 0.1], steps=3))
        for row in evaluate(here.model, data.held_out, attack)
    ]
    assert found == wanted
    (row, *_) = HeldOut(images=7).rows(here)
    hits = here.model(data.held_out.take(slice(7)).pixels.float() / 255).argmax(1) == data.held_out.labels[:7]
    assert row["n"] == 7 and row["percent"] == pytest.approx(100 * hits.float().mean().item(), abs=1e-4)


def test_without_strengths_it_takes_the_largest_of_the_run(data):
    rows = list(HeldOut(steps=2).rows(trained(data)))
    assert [(row["attack"], row["eps"]) for row in rows] == [("fgsm", 0), ("fgsm", 0.1), ("pgd2-margin", 0.1)]
    with pytest.raises(ValueError, match="another norm than the maximum norm: name eps"):
        HeldOut().require(trained(data, Pgd([1.0], norm="l2")))


def test_what_is_there_is_not_done_again(data):
    here = trained(data)
    analysis = HeldOut(eps=[0.1], steps=2)
    there = [{key: str(value) for key, value in row.items()} for row in analysis.rows(here)]
    assert analysis.lacks([], here) and not analysis.lacks(there, here)
    assert HeldOut(eps=[0.1, 0.2], steps=2).lacks(there, here)
    assert HeldOut(eps=[0.1], steps=3).lacks(there, here)
    few = HeldOut(eps=[0.1], steps=2, images=5)
    assert few.lacks(there, here)
    there = [{key: str(value) for key, value in row.items()} for row in few.rows(here)]
    assert not few.lacks(there, here) and analysis.lacks(there, here), "all images are more than five"


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"eps": []}, "eps is empty"),
        ({"eps": [2]}, "eps"),
        ({"steps": 0}, "steps"),
        ({"images": 0}, "images"),
    ],
)
def test_wrong_keys_are_named(keys, says):
    with pytest.raises(ValueError, match=says):
        HeldOut(**keys)


def test_a_run_without_such_images_says_so(data):
    with pytest.raises(ValueError, match=r"train with protocol.held_out=0.1"):
        HeldOut().require(trained(data.__class__(data.train, data.test, 10)))
    with pytest.raises(ValueError, match=f"only {len(data.held_out)} were held out"):
        HeldOut(images=10_000).require(trained(data))
