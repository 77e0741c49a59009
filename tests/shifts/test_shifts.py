"""Shifts: sets of labelled images, the same at every call."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from condlr._support.rooms import available
from condlr.data.base import Data, Images
from condlr.data.digits import Digits
from condlr.shifts.base import Shift, ShiftedSet
from condlr.shifts.corruptions import PARAMETERS, Corruptions
from condlr.suite.values import choose

ROOT = Path()


@pytest.fixture(scope="module")
def test_images():
    return Digits().load(ROOT).test


def distance(shifted, images):
    return (shifted.pixels.double() - images.pixels[: len(shifted)]).square().mean().item()


def made(shift, test):
    """Each of its sets, and its images."""
    return {which: shift.make(which, Data(test, test, 10), ROOT) for which in shift.sets(len(test), ROOT)}


@pytest.mark.parametrize("kind", PARAMETERS)
def test_a_corruption_grows_with_its_severity_and_keeps_what_images_are(kind, test_images):
    sets = made(Corruptions(kinds=[kind]), test_images)
    assert [*sets] == [(kind, severity, len(test_images)) for severity in (1, 2, 3, 4, 5)]
    for images in sets.values():
        assert images.pixels.dtype == torch.uint8
        assert images.pixels.shape == test_images.pixels.shape
        assert torch.equal(images.labels, test_images.labels)
    distances = [distance(images, test_images) for images in sets.values()]
    assert distances[0] > 0
    assert sorted({*distances}) == distances


@pytest.mark.parametrize("channels", [1, 3])
def test_each_set_is_the_same_at_every_call_whatever_else_is_asked_for(channels):
    pixels = torch.randint(0, 256, (12, channels, 32, 32), dtype=torch.uint8)
    images = Images(pixels.clone(), torch.arange(12))
    torch.manual_seed(1)
    whole = made(Corruptions(seed=3), images)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    for kind in PARAMETERS:
        ((which, alone),) = made(Corruptions(kinds=[kind], severities=[4], seed=3), images).items()
        assert torch.equal(alone.pixels, whole[which].pixels)
    assert torch.equal(torch.get_rng_state(), state), "a shift draws from a seed of its own"
    assert torch.equal(images.pixels, pixels), "the test images stay as they are"
    ((which, other),) = made(Corruptions(kinds=["gaussian_noise"], severities=[4], seed=4), images).items()
    assert not torch.equal(other.pixels, whole[which].pixels)


def test_noise_has_the_deviation_it_says():
    images = Images(torch.full((40, 1, 28, 28), 128, dtype=torch.uint8), torch.zeros(40, dtype=torch.long))
    for which, noisy in made(Corruptions(kinds=["gaussian_noise"]), images).items():
        assert which.severity is not None
        deviation = noisy.pixels.double().std().item() / 255
        assert deviation == pytest.approx(PARAMETERS["gaussian_noise"][which.severity - 1], rel=0.02)


def test_only_the_first_images(test_images):
    for which, images in made(Corruptions(images=7, severities=[2]), test_images).items():
        assert which.n == 7
        assert torch.equal(images.labels, test_images.labels[:7])
        assert distance(images, test_images) < 3000
    with pytest.raises(ValueError, match="images=1000, but there are only 360"):
        Corruptions(images=1000).sets(360, ROOT)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kinds": ["fog"]}, "kinds must be one of gaussian_noise, gaussian_blur"),
        ({"kinds": []}, "kinds must name at least one"),
        ({"kinds": ["jpeg", "jpeg"]}, "each once"),
        ({"severities": [0]}, "severities must be one of 1, 2, 3, 4, 5"),
        ({"images": 0}, "images must be in"),
        ({"seed": -1}, "seed must be in"),
    ],
)
def test_wrong_keys_are_named(keys, message):
    with pytest.raises(ValueError, match=message):
        Corruptions(**keys)


def test_a_config_names_it():
    shift, keys = choose("shift", "shifts", {"name": "corruptions", "kinds": ["jpeg"]}, Shift)
    assert isinstance(shift, Corruptions)
    assert shift.kinds == ["jpeg"]
    assert keys["severities"] == [1, 2, 3, 4, 5]
    assert "corruptions" in available("shifts")


def test_a_shift_is_one_class(test_images):
    """What `adding a shift` asks for: a dataclass with a title, a legend, `sets` and `make`."""

    @dataclass
    class Flipped(Shift):
        title: ClassVar[str] = "Mirrored"
        legend: ClassVar[str] = "Accuracy on mirror images."

        def sets(self, test_images, root):
            return [ShiftedSet("mirror", None, test_images)]

        def make(self, which, data, root):
            return Images(data.test.pixels.flip(3), data.test.labels)

    (mirrored,) = made(Flipped(), test_images).values()
    assert torch.equal(mirrored.pixels.flip(3), test_images.pixels)
