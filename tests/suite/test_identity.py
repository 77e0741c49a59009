"""What a run is called: the ids of all committed studies, made again; what changes and renames no run."""

import csv
import sys
import tarfile
from dataclasses import field, make_dataclass

import pytest
from omegaconf import OmegaConf

from condlr.suite.config import check, fingerprint
from condlr.suite.sweeps.plan import of_experiment
from tests.helpers import ROOT, composed, configured

RESULTS = ROOT / "results"
# How each study's README says that it is made, but for the places where things lie.
STUDIES = {
    "mnist_rows": [
        ["table_mnist", "protocol.epochs=3"],
        ["table_mnist", "protocol.epochs=3", "protocol=released_code"],
    ],
    "cifar10_first_steps": [["cifar10_first_steps"]],
    "mnist_attacks": [["mnist_attacks", "seed=0,1"]],
    "reproduce_mnist": [["reproduce_mnist"], ["figure2"]],
    "frame_cifar10": [
        ["frame_cifar10"],
        ["frame_without_decay"],
        ["frame_matched"],
        [
            "frame_cifar10",
            "seed=0",
            "row=condlr-operator-tau0.1-c0.5",
            "penalty.weight=1e-2,1e-3",
        ],
    ],
    "lr_cifar10": [
        ["lr_cifar10"],
        ["lr_cifar10", "row=lr1", "penalty.weight=1e-1", "seed=0"],
    ],
    "rivals_mnist": [
        [
            "rivals_mnist",
            "budget=85e3",
            "seed=0,1",
            "row=baseline,condlr-energy-c0.5,condlr-tau0.1-c0.5,condlr-soft-c0.5,dlrt-R-c0.5,spectral_cap-c0.5,"
            "spectral_cap-energy-c0.5,low_rank_spel-energy-c0.5",
        ],
        [
            "rivals_mnist",
            "budget=85e3",
            "seed=0",
            "row=condlr-energy-tau0-c0.5,dlrt-energy-c0.5,robust_dlrt-c0.5,spel,so,condition,nenov",
        ],
        [
            "rivals_mnist",
            "budget=30e3",
            "seed=0",
            "row=condlr-energy-c0.5,condlr-tau0.1-c0.5,spectral_cap-energy-c0.5,dlrt-energy-c0.5,"
            "low_rank_spel-energy-c0.5",
        ],
        [
            "rivals_mnist",
            "budget=200e3",
            "seed=0",
            "row=condlr-energy-c0.5,spectral_cap-energy-c0.5,low_rank_spel-energy-c0.5",
        ],
    ],
    "rivals_mnist_adversarial": [
        [
            "rivals_mnist_adversarial",
            "row=baseline,condlr-energy-c0.5,condlr-tau0.1-c0.5,spectral_cap-energy-c0.5,dlrt-energy-c0.5",
        ]
    ],
    "lr_weights": [
        ["lr_weights", "penalty=none"],
        ["lr_weights", "penalty.weight=1e-3,1e-2,1e-1,1"],
        [
            "lr_weights",
            "penalty.layers=[stage3,fc.input]",
            "penalty.ranks=[100,10]",
            "penalty.weight=1e-3,1e-2",
        ],
    ],
    "frame_weights": [
        ["frame_weights", "penalty=none"],
        *(
            ["frame_weights", f"penalty={name}", "penalty.weight=1e-5,1e-4,1e-3,1e-2"]
            for name in ("ocnn", "frame", "so")
        ),
        *(
            ["frame_weights", f"penalty={name}", "penalty.weight=1e-3,1e-2,1e-1,1"]
            for name in ("srip", "mhe")
        ),
        [
            "frame_weights",
            "penalty=frame_eigen",
            "penalty.every=10",
            "penalty.weight=1e-2,1e-1,1",
        ],
        ["frame_weights", "method=condlr", "penalty=none"],
        [
            "frame_weights",
            "method=condlr",
            "penalty=ocnn",
            "penalty.acts_on=V",
            "penalty.weight=1e-4,1e-3,1e-2,1e-1",
        ],
    ],
}
# Runs from before `precision` was a key. In mnist_rows the two rows that were run again since are not.
WITHOUT_PRECISION = {"mnist_rows": 32, "cifar10_first_steps": 17}


def collected(study, name="cells"):
    with (RESULTS / study / f"{name}.csv").open() as file:
        return {row["run_id"]: row["row_id"] for row in csv.DictReader(file)}


def without_precision(config):
    kept = {key: value for key, value in config.identity.items() if key != "precision"}
    return config.run_id.removesuffix(config.fingerprint) + fingerprint(kept)


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES)
def test_committed_studies_have_the_ids_that_their_configs_have_today(study):
    plans = [of_experiment(name, *arguments) for name, *arguments in STUDIES[study]]
    runs = [job.config for plan in plans for job in plan]
    committed = collected(study)
    today = {config.run_id: config.row["row_id"] for config in runs if config.run_id in committed}
    before = {name for config in runs if (name := without_precision(config)) in committed}
    assert today.keys() | before == committed.keys()
    assert len(before) == WITHOUT_PRECISION.get(study, 0) == len(committed) - len(today)
    assert today.items() <= committed.items()
    assert len({config.run_id for config in runs}) == len(committed), "and there are no others"


def test_all_committed_studies_of_networks_are_looked_at():
    assert {path.parent.name for path in RESULTS.glob("*/cells.csv")} == {*STUDIES}


@pytest.mark.slow
@pytest.mark.parametrize("study", ["table2", "rivals_weights"])
def test_archived_runs_have_the_ids_of_their_configs(study):
    with tarfile.open(RESULTS / study / "runs.tar.gz") as archive:
        configs = [member for member in archive if member.name.endswith("/config.yaml")]
        assert configs
        for member in configs:
            config = check(OmegaConf.create(archive.extractfile(member).read().decode()))
            assert config.run_id == member.name.split("/")[1]


def test_a_key_that_counts_though_it_is_null_is_one_of_the_old_ones():
    config = configured("dataset=mnist", "method=vanilla")
    nulls = {
        key
        for keys in (config.identity, *(v for v in config.identity.values() if isinstance(v, dict)))
        for key, value in keys.items()
        if value is None
    }
    assert nulls == {"train_images", "test_images"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name", "group"),
    [
        ("condlr.methods.vanilla", "Vanilla", "method"),
        ("condlr.models.lenet5", "LeNet5Options", "model"),
        ("condlr.data.digits", "Digits", "dataset"),
    ],
)
def test_a_new_key_that_is_null_renames_no_run(module, name, group, monkeypatch):
    def run(**keys):
        plain = composed("dataset=digits", "method=vanilla")
        return check(plain | {group: plain[group] | keys})

    before = run()
    old = getattr(sys.modules[module], name)
    new = make_dataclass(name, [("later", int | None, field(default=None))], bases=(old,))
    new.__module__ = module
    monkeypatch.setattr(sys.modules[module], name, new)
    assert run().identity == run(later=None).identity == before.identity
    assert run().row == before.row
    other = run(later=3)
    assert other.run_id != before.run_id
    assert "later=3" in other.row["settings" if group == "dataset" else "options"]


def test_a_config_without_the_keys_that_came_later_is_the_same_run():
    plain = composed("dataset=digits")
    config = check(plain)
    del plain["record_every"], plain["penalty"], plain["protocol"]["decay"]
    assert check(plain).run_id == config.run_id
    assert check(plain | {"flow": None}).run_id == config.run_id  # as config.yaml of before had it
