"""Runs that begin with the weights of a trained dense network: `start=<run>`."""

import shutil
from pathlib import Path

import pytest
import torch

from condlr._support.errors import UserError
from condlr.factorization import low_rank_layers
from condlr.suite.loading import build, load_data, load_network, pick_device
from condlr.suite.runs import Run
from tests.helpers import configured

SHORT = ["dataset=digits", "protocol=demo", "protocol.epochs=2", "dataset.train_images=300"]


def checked(*overrides):
    return configured(*SHORT, *overrides)


@pytest.fixture
def dense(once, script):
    """A folder with the dense network of two seeds."""

    def make(directory):
        for seed in (0, 1):
            arguments = ["method=baseline", f"seed={seed}", f"runs_dir={directory}", "study=dense"]
            assert script("train", "dataset=digits", "protocol=demo", "protocol.epochs=5", *arguments)[0] == 0

    shutil.copytree(once("dense", make) / "dense", "dense")
    return Path("dense")


def only(folder, seed=0):
    (found,) = folder.glob(f"*-s{seed}-*")
    return found


@pytest.mark.slow
def test_a_run_begins_with_the_nearest_weights_of_its_rank(dense):
    config = checked("method=condlr", "method.tau=0.5", f"start={only(dense)}")
    data = load_data(config, pick_device("cpu"))
    trained = load_network(Run(only(dense)), checked("method=baseline"), data)
    layers = low_rank_layers(build(config, data))
    assert layers
    for name, layer in layers.items():
        weight = trained.get_submodule(name).weight.detach().flatten(1).double()
        tail = torch.linalg.svdvals(weight)[layer.rank :].norm()
        error = (layer.U @ layer.S @ layer.Vt).detach().double().sub(weight).norm()
        assert error <= (1 + 1e-4) * tail + 1e-6 * weight.norm()


@pytest.mark.slow
def test_the_name_of_a_start_is_its_row_wherever_it_lies(dense, tmp_path):
    here = checked("method=condlr", f"start={only(dense)}")
    from_folder = checked("method=condlr", f"start={dense}")
    shutil.copytree(only(dense), tmp_path / "elsewhere" / only(dense).name)
    moved = checked("method=condlr", f"start={tmp_path / 'elsewhere'}")
    assert here.run_id == from_folder.run_id == moved.run_id != checked("method=condlr").run_id
    other = checked("method=condlr", "seed=1", f"start={dense}")
    assert other.row["row_id"] == here.row["row_id"], "each seed begins with the network of its own"
    crossed = checked("method=condlr", "seed=1", f"start={only(dense)}")
    assert crossed.origin.name == here.origin.name.replace("baseline-", "baseline-s0-")
    assert f"start={here.origin.name}" in here.row["settings"]


@pytest.mark.slow
def test_a_finished_run_needs_its_start_no_more(dense, script):
    asked = [*SHORT, "method=vanilla", "compression=0.5", f"start={dense}", "study=later", "attack=fgsm"]
    status, _, error = script("train", *asked)
    assert status == 0, error
    fresh = script("train", *SHORT, "method=vanilla", "compression=0.5", "study=later")
    assert fresh[0] == 0
    runs = sorted(Path("runs/later").iterdir())
    started, scratch = sorted(
        runs, key=lambda run: "name: baseline-" not in (run / "config.yaml").read_text()
    )
    first = [float(Run(run).read_table("history.csv")[1]["train_loss"]) for run in (started, scratch)]
    assert first[0] < 0.7 * first[1], "it begins with what the dense network knows"
    shutil.rmtree(dense)
    assert script("evaluate", f"run={started}", "attack=noise", "analysis=cost")[0] == 0
    assert script("collect", "study=later")[0] == 0
    assert script("tables", "study=later")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (["start=nowhere"], "start=nowhere: no finished run of the dense lenet5 on digits with seed 0"),
        (["start=dense", "seed=7"], "with seed 7 is there"),
        (["start=''"], "start is empty: name a finished run's directory, or say start=null"),
        (["start=dense", "model=resnet18"], "no finished run of the dense resnet18"),
        (["start=[1]"], "start must be"),
        (["start={run:a}"], "start must be a run's directory"),
        (["start=dense", "protocol.init=released_code"], "with start, set protocol.init=spectral"),
        (["start=dense", "method=vanilla", "method.init=gaussian"], "set method.init=spectral"),
        (["start=dense", "protocol.decay=2"], "with start, set protocol.decay=null"),
        (["start=dense", "protocol.held_out=0.2"], "it has learned images that this run holds out"),
        (["start=dense", "model.slope=0.5"], "it has model.slope="),
        (["start=file"], "start=file is a file: name a run's directory"),
    ],
)
def test_a_start_that_will_not_do_is_one_line(dense, asked, says):
    Path("file").touch()
    with pytest.raises(UserError, match=says.replace("[", r"\[")):
        checked("method=condlr", *asked)


@pytest.mark.slow
def test_a_run_of_another_kind_is_no_start(dense):
    run = Run(only(dense))
    with pytest.raises(UserError, match="it has model=lenet5, and this run resnet18"):
        checked("model=resnet18", f"start={run.directory}")
    shutil.copytree(only(dense), "dense/again-s0-00000000")
    with pytest.raises(UserError, match="more than one"):
        checked("start=dense")
    run.note(status="running")
    with pytest.raises(UserError, match="this run is running; a start must be done"):
        checked(f"start={run.directory}")
    run.note(status="done", row=run.info["row"] | {"method": "condlr"})
    with pytest.raises(UserError, match="a start is a dense network"):
        checked(f"start={run.directory}")


@pytest.mark.slow
def test_a_baseline_that_began_with_a_start_is_none_itself(dense, script):
    """So the same command, and a sweep with that baseline in the folder, find the one they found before."""
    first = only(dense)
    asked = [*SHORT, "method=baseline", "study=dense", "runs_dir=.", f"start={dense}"]
    assert script("train", *asked)[0] == 0
    status, out, error = script("train", *asked)
    assert status == 0 and "is done already" in out + error
    assert Path(checked("method=condlr", f"start={dense}").origin.run) == first


@pytest.mark.slow
def test_a_start_without_weights_is_said_before_the_first_run(dense, script):
    for name in ("model.safetensors", "checkpoint.pt"):
        (only(dense) / name).unlink()
    status, out, error = script("train", "-m", *SHORT, "method=condlr,vanilla", "study=z", f"start={dense}")
    assert status == 1 and "start: " in out + error and "is missing" in out + error, out + error
    assert not [*Path("runs/z").glob("*/run.json")]
