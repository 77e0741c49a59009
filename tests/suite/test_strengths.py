"""The strengths of each attack on each dataset, as a config composes them."""

import pytest

from condlr._support.errors import UserError
from condlr.suite.config import CONF, check
from tests.helpers import composed, configured

PIXELS = [0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06]
FINER = [0, 0.001, 0.002, 0.003, 0.004, 0.005, 0.006]
RELATIVE = [0, 0.02, 0.04, 0.06, 0.08, 0.1]
SMALL_IMAGES = {
    "fgsm": PIXELS, "pgd": PIXELS, "square": PIXELS, "transfer": PIXELS, "autoattack": [0.06],
    "pgd_l2": [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5],
}  # fmt: skip
COLOUR = {
    "fgsm": FINER, "pgd": FINER, "square": FINER, "transfer": FINER, "autoattack": [0.006],
    "pgd_l2": [0, 0.1, 0.13, 0.16, 0.2, 0.23, 0.26, 0.3],
}  # fmt: skip
WANTED = {
    "mnist": SMALL_IMAGES,
    "fashion_mnist": SMALL_IMAGES,
    "digits": SMALL_IMAGES,
    "cifar10": COLOUR,
    "cifar100": COLOUR,
    "svhn": COLOUR,
}
WHATEVER_THE_DATASET = {
    "fgm_l2_relative": RELATIVE, "pgd_l2_relative": RELATIVE,
    "noise": [0, 0.05, 0.1, 0.2, 0.4], "simba": [0, 0.2],
    "deepfool": [0, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.2, 1],
}  # fmt: skip


def of(dataset):
    return [f"dataset={dataset}", *(["model=vgg16"] if WANTED[dataset] is COLOUR else [])]


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["mnist", "svhn"])
def test_each_dataset_has_its_strengths(dataset):
    attacks = WANTED[dataset] | WHATEVER_THE_DATASET
    assert {*attacks} == {path.stem for path in (CONF / "attack").glob("*.yaml")}
    found = {attack: configured(*of(dataset), f"attack={attack}").attack.eps for attack in attacks}
    assert found == attacks
    strengths = composed(*of(dataset))["dataset"]["strengths"]
    for other in (name for name in WANTED if WANTED[name] is WANTED[dataset]):
        assert composed(*of(other))["dataset"]["strengths"] == strengths


def test_every_dataset_is_in_the_table():
    assert {*WANTED} == {path.stem for path in (CONF / "dataset").glob("*.yaml")}


@pytest.mark.parametrize("dataset", WANTED)
def test_strengths_are_no_part_of_what_a_run_is(dataset):
    usual = configured(*of(dataset))
    other = configured(*of(dataset), "dataset.strengths.linf=[0,0.5]")
    assert other.attack.eps == [0, 0.5]
    assert (other.run_id, other.row, other.identity) == (usual.run_id, usual.row, usual.identity)
    assert "strengths" not in str([usual.row, usual.identity])


def test_a_config_from_before_datasets_had_strengths_is_the_same_run():
    config = composed("dataset=mnist")
    before = config | {"dataset": {k: v for k, v in config["dataset"].items() if k != "strengths"}}
    assert check(before).run_id == check(config).run_id


def test_strengths_that_are_asked_for_come_first():
    assert configured("attack.eps=[0.2]").attack.eps == [0.2]
    assert configured("experiment=demo").attack.eps == RELATIVE


@pytest.mark.parametrize("eps", ["8/255", "0.03137254901960784"])
def test_the_strength_of_adversarial_training_is_one_number(eps):
    config = configured(f"protocol.adversarial={{eps:{eps},step_size:1/4}}")
    assert config.protocol.attack.eps == pytest.approx(8 / 255) and config.protocol.attack.step_size == 0.25


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ("protocol.adversarial={eps:[0.1,0.2]}", r"protocol.adversarial.eps is one number, .*\[0.1, 0.2\]"),
        ("protocol.adversarial={eps:null}", "protocol.adversarial.eps is one number"),
        ("protocol.adversarial={eps:[]}", "protocol.adversarial.eps is one number"),
        ("protocol.adversarial={eps:{a:1}}", "protocol.adversarial.eps is one number"),
        ("protocol.adversarial={eps:much}", "protocol.adversarial.eps"),
        ("protocol.adversarial={eps:0.1,step_size:0}", "step_size must be above 0"),
        ("budget=nan", "budget must be in"),
        ("budget=inf", "budget must be in"),
        ("protocol.optimizer=''", "optimizer must be one of"),
        ("protocol.schedule=''", "schedule must be one of"),
        ("method.ranks=''", "ranks must be one of"),
        ("protocol.adversarial={eps:0.1,step_size:much}", "protocol.adversarial.step_size must be"),
    ],
)
def test_what_is_no_such_value_is_one_line(keys, says):
    with pytest.raises(UserError, match=says):
        configured("method=condlr", "compression=0.5", keys)


def test_a_training_too_short_for_an_allocation_is_refused_before_it_begins():
    for epochs, says in ((3, "in the first half"), (1, "between epochs: train for two at least")):
        with pytest.raises(UserError, match=f"method.ranks=adaptive allocates {says}"):
            keys = [f"protocol.epochs={epochs}", "protocol.lr_milestones=[]"]
            configured("method=condlr", "compression=0.5", "method.ranks=adaptive", *keys)


def test_the_options_in_a_label_keep_their_order():
    """A run's id holds its label: another order would make finished runs new ones."""
    wanted = {
        ("condlr", "momentum=transported", "ranks=energy"): "condlr-tau0.1-momentum=transported-ranks=energy",
        ("condlr", "ranks=adaptive", "period=1"): "condlr-tau0.1-ranks=adaptive-period=1",
        ("dlrt", "theta=0.1", "ranks=energy"): "dlrt-theta=0.1-ranks=energy",
        ("vanilla", "update=alternating", "ranks=energy"): "vanilla-update=alternating-ranks=energy",
    }
    for (method, *options), label in wanted.items():
        asked = [f"method.{option}" for option in options]
        assert configured(f"method={method}", "compression=0.5", *asked).label == label
