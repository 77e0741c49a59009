"""The scripts, run as a user runs them. Wrong input ends in one clear line and exit status 1."""

import csv
import gzip
import io
import json
import locale
import os
import re
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError

import condlr.suite.cli  # registers the resolvers that conf/ uses
from condlr._support import files
from condlr._support.errors import UserError
from condlr.data import cifar10
from condlr.data.digits import Digits
from condlr.report import results
from condlr.suite import environment
from condlr.suite.cli import explain
from condlr.suite.config import CONF
from condlr.suite.runs import Run, _seal
from tests.helpers import ROOT, SMALL, complains, configured, run_script, write_idx
from tests.report.study import draw_pictures_alone

PAPER = ROOT / "results" / "paper"
FIGURES = ("claims", "claims-2", "robustness", "compression", "cost", "spectra")


def run_of(tmp_path, study="default"):
    (path,) = (tmp_path / "runs" / study).glob("lenet5-*")
    return path


def train_small(directory):
    with chdir(directory):
        assert run_script("train", *SMALL) == 0


@pytest.fixture(scope="session")
def small_run(once):
    """What training SMALL leaves, to be copied."""
    return run_of(once("small", train_small))


@pytest.fixture
def run(small_run, tmp_path):
    """The run of SMALL in this test's own directory."""
    return shutil.copytree(small_run, tmp_path / "runs" / "default" / small_run.name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["metod=condlr"], "Could not override 'metod'"),
        (["+metod=condlr"], "metod: there is no such key"),
        (["method=dropout"], "Could not find 'method/dropout'.*condlr"),
        (["model=vgg99"], "Could not find 'model/vgg99'"),
        (["dataset=imagenet"], "Could not find 'dataset/imagenet'"),
        (["protocol=best"], "Could not find 'protocol/best'"),
        (["attack=pray"], "Could not find 'attack/pray'"),
        (["row=big"], "Could not find 'row/big'"),
        (["method.name=dropout"], "methods: there is no 'dropout'; choose from baseline, cayley_sgd, condlr"),
        (["+method.rank=3"], "method.rank: there is no such key; the keys of method are tau"),
        (["precision=fp16"], "precision must be one of float32, tf32, bf16; got 'fp16'"),
        (["forms=fast"], "forms must be one of measured, factored, chained, multiplied; got 'fast'"),
        (["forms={conv1:fast}"], r"forms.conv1 must be one of factored, chained, multiplied"),
        (["compression=1.5"], r"compression must be in \[0, 1\); got 1.5"),
        (["compression=-0.5"], r"compression must be in \[0, 1\)"),
        (["compression=half"], "compression: Value 'half'.*Float"),
        (["compression=["], "no viable alternative at input"),
        (["method.tau=-1"], r"method.tau must be in \[0, inf\); got -1"),
        (["method.tau=nan"], "method.tau must be in"),
        (["method.tua=1"], "Could not override 'method.tua'. There is no such key; see --help."),
        (["method.centre=median"], "method.centre must be one of rms, mean, one"),
        (["method.preconditioner=no"], "method.preconditioner must be one of exact"),
        (["method=vanilla", "method.init=zero"], "method.init must be one of spectral, gaussian"),
        (["protocol.epochs=0"], "protocol.epochs must be in"),
        (["protocol.epochs=2.5"], "protocol.epochs: Value '2.5'.*Integer"),
        (["protocol.lr=-0.1"], "protocol.lr must be in"),
        (["protocol.momentum=1"], "protocol.momentum must be in"),
        (["protocol.batch_size=0"], "protocol.batch_size must be in"),
        (["protocol.held_out=1"], "protocol.held_out must be in"),
        (
            ["protocol.lr_milestones=[9,4]"],
            "protocol.lr_milestones must be different epochs in ascending order",
        ),
        (["protocol.lr_milestones=[4,4]"], "must be different epochs"),
        (["protocol.rank_rule=half"], "protocol.rank_rule must be one of params, released_code"),
        (["protocol.classifier=thin"], "protocol.classifier must be one of dense, full_rank, compressed"),
        (["protocol.init=zero"], "protocol.init must be one of spectral, released_code"),
        (["protocol=[1]"], "the command line makes no config"),
        (["method=null"], "the command line makes no config .*Config group override must be a string"),
        (["protocol.typo=3"], "Could not override 'protocol.typo'"),
        (
            ["protocol.adversarial=0.1"],
            r"protocol.adversarial is a group of keys, as in .*=\{key:value\}; got 0.1",
        ),
        (["protocol.adversarial=[1]"], r"protocol.adversarial is a group of keys.*got \[1\]"),
        (["protocol.adversarial.eps=0.1"], r"null, give it whole, as in protocol.adversarial=\{eps:...\}"),
        (["attack.eps=[]"], "attack.eps is empty"),
        (["attack.eps=[0,2]"], "attack.eps must be in"),
        (["model.slope=-1"], "model.slope must be in"),
        (
            ["model=vgg16"],
            "model=vgg16 with dataset=.*: vgg16 takes images of 32 x 32 pixels; these are 1 x 28 x 28",
        ),
        (["model=vgg16", "model.dropout=1"], "model.dropout must be in"),
        (["dataset.train_images=0"], "dataset.train_images must be in"),
        (["protocol.augmentation=mirror"], "protocol.augmentation must be one of none, crop, crop_flip"),
        (["protocol.batch_norm_momentum=2"], "protocol.batch_norm_momentum must be in"),
        (["attack.clamp=maybe"], "attack.clamp: Value 'maybe'"),
        (["attack.eps=[[0]]"], "attack.eps must be a number; got"),
        (
            ["dataset.name=_idx"],
            "data: there is no '_idx'; choose from cifar10, cifar100, digits, fashion_mnist",
        ),
        (["~protocol.lr"], "protocol.lr is missing"),
        (["+protocol.methods.dropout.p=1"], "protocol.methods.dropout: there is no such method"),
        (["+protocol.methods.condlr.p=1"], "protocol.methods.condlr.p: the method condlr has no such key"),
        (["method.projection=lq"], "method.projection must be one of svd, qr"),
        (["method=dlrt", "method.theta=1"], r"method.theta must be in \[0, 1\)"),
        (["method=vanilla", "method.update=both"], "method.update must be one of joint, alternating"),
        (["method=vanilla", "method.frobenius_decay=-1"], "method.frobenius_decay must be in"),
        (["method=cayley_sgd", "method.cap=two"], "method.cap must be one of none, frobenius, one"),
        (["method=cayley_sgd", "method.inner_iterations=-1"], "method.inner_iterations must be in"),
        (["method=projected_sgd", "method.tall=cut"], "method.tall must be one of transpose, free"),
        (["method=projected_sgd", "method.retraction=lu"], "method.retraction must be one of qr, polar"),
        (
            ["method=svd_prune", "method.sparsity=l0"],
            "method.sparsity must be one of hoyer, hoyer_square",
        ),
        (["method=svd_prune", "method.phases=[0.5]"], "method.phases must be two ascending fractions"),
        (["method=svd_prune", "method.phases=[0.9,0.1]"], "method.phases must be two ascending fractions"),
        (["method=svd_prune", "method.energy=1"], "method.energy must be in"),
        (["seed=-1"], "seed must be in"),
        (["seed=one"], "seed: Value 'one'.*Integer"),
        (["study=../elsewhere"], "study must be a plain name"),
        (["study=paper"], "that folder of the results has published numbers"),
        (["device=tpu"], "device must be one of auto, cpu, cuda"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_with_a_config_is_one_line(arguments, pattern):
    with pytest.raises(Exception) as caught:
        configured(*SMALL, *arguments)
    line = explain(caught.value)
    assert re.search(pattern, line)
    assert "\n" not in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        # One of each kind that a config itself shows, then what only the run finds
        (["metod=condlr"], "Could not override 'metod'"),
        (["method=dropout"], "Could not find 'method/dropout'.*condlr"),
        (["compression=1.5"], r"compression must be in \[0, 1\); got 1.5"),
        (["compression=["], "no viable alternative at input"),
        (["protocol=[1]"], "the command line makes no config"),
        (["~protocol.lr"], "protocol.lr is missing"),
        (["precision=tf32", "device=cpu"], "precision=tf32 is for CUDA devices"),
        (["forms={conv9:factored}"], "no low-rank layer is named 'conv9'; there are conv1, conv2, fc1"),
        (
            ["dataset=cifar10", "model=vgg16", "dataset.download=false"],
            "CIFAR10 is missing.*data_batch_1",
        ),
        (["runs_dir=file/runs"], "Not a directory: .*file"),
        (["dataset=mnist", "dataset.download=false"], "MNIST is missing.*put train-images-idx3-ubyte"),
        (["dataset=fashion_mnist", "dataset.download=false"], "put .* into data/FashionMNIST/raw"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line(script, tmp_path, arguments, pattern):
    (tmp_path / "file").touch()
    complains(script("train", *SMALL, *arguments), pattern)
    assert not list(tmp_path.rglob("model.safetensors"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_one_line(script):
    complains(script("train", *SMALL, "device=cuda"), "finds no CUDA device")


def test_a_config_that_is_refused_leaves_no_directory(script, tmp_path):
    script("train", *SMALL, "compression=1.5")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_mnist(tmp_path):
    """Files in MNIST's layout with scikit-learn's digits in them."""
    from condlr.data.digits import Digits

    data = Digits().load(tmp_path)
    raw = tmp_path / "data" / "MNIST" / "raw"
    for stem, part in (("train", data.train.take(slice(300))), ("t10k", data.test.take(slice(100)))):
        write_idx(raw / f"{stem}-images-idx3-ubyte", part.pixels.squeeze(1).numpy())
        write_idx(raw / f"{stem}-labels-idx1-ubyte", part.labels.numpy())
    return raw


def damage_truncate(raw):
    path = raw / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1000])


def damage_empty(raw):
    (raw / "t10k-labels-idx1-ubyte").write_bytes(b"")


def damage_swap(raw):
    images, labels = raw / "train-images-idx3-ubyte", raw / "train-labels-idx1-ubyte"
    images.rename(raw / "x")
    labels.rename(images)
    (raw / "x").rename(labels)


def damage_counts(raw):
    write_idx(raw / "t10k-labels-idx1-ubyte", np.zeros(7))


def damage_labels(raw):
    write_idx(raw / "t10k-labels-idx1-ubyte", np.full(100, 11))


def damage_size(raw):
    write_idx(raw / "t10k-images-idx3-ubyte", np.zeros((100, 32, 32)))


def damage_gzip(raw):
    path = raw / "train-images-idx3-ubyte"
    packed = gzip.compress(path.read_bytes())
    path.unlink()
    path.with_suffix(".gz").write_bytes(packed[: len(packed) // 2])


def damage_missing(raw):
    (raw / "t10k-images-idx3-ubyte").unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "pattern"),
    [
        (damage_truncate, r"train-images-idx3-ubyte is truncated: \d+ bytes; expected 235216 for 300 items"),
        (damage_empty, "t10k-labels-idx1-ubyte is truncated: 0 bytes, expected an IDX file of labels"),
        (damage_swap, "train-images-idx3-ubyte holds labels .*expected images"),
        (damage_counts, "t10k has 100 images.* 7 labels"),
        (damage_labels, "a label for t10k-images-idx3-ubyte is 11; expected 0 to 9"),
        (damage_size, "images of 32 x 32; expected 28 x 28"),
        (damage_gzip, "train-images-idx3-ubyte.gz is damaged or truncated"),
        (damage_missing, "put t10k-images-idx3-ubyte .plain or .gz. into"),
    ],
)
def test_damaged_data_is_named(script, small_mnist, damage, pattern):
    damage(small_mnist)
    arguments = ["dataset=mnist", "dataset.download=false", "protocol.epochs=1"]
    status, out, err = script("train", *arguments)
    complains((status, out, err), pattern)
    assert json.loads(next(Path("runs").rglob("run.json")).read_text())["status"] == "failed"


@pytest.mark.slow
def test_the_contract(script, small_mnist):
    """The call that others may rely on; small files in the place of MNIST."""
    arguments = [
        "dataset=mnist", "model=lenet5", "method=condlr", "method.tau=0.1", "compression=0.5",
        "protocol=paper", "protocol.epochs=2", "seed=0", "study=first",
    ]  # fmt: skip
    status, out, _ = script("train", *arguments)
    assert status == 0
    assert "is not the official file" in out
    run = run_of(small_mnist.parent.parent.parent, "first")
    assert re.fullmatch(r"lenet5-mnist-condlr-tau0\.1-c0\.5-s0-[0-9a-f]{8}", run.name)
    assert {path.name for path in run.iterdir()} >= {
        "config.yaml", "run.json", "history.csv", "checkpoint.pt", "model.safetensors", "evaluation.csv",
    }  # fmt: skip
    info = json.loads((run / "run.json").read_text())
    assert info["status"] == "done"
    assert info["ranks"] == {"conv1": 5, "conv2": 21, "fc1": 138}
    assert info["images"] | {"digest": ""} == {
        "train": 300, "held_out": 0, "test": 100, "official": False, "digest": "",
    }  # fmt: skip
    assert info["weights"]["train_compression"] == pytest.approx(0.499, abs=1e-3)
    rows = list(csv.DictReader((run / "evaluation.csv").open()))
    assert [float(row["eps"]) for row in rows] == [0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06]
    assert {row["n"] for row in rows} == {"100"}
    history = list(csv.DictReader((run / "history.csv").open()))
    assert [row["epoch"] for row in history] == ["0", "1", "2"]
    for row in history[1:]:
        assert float(row["audit_cond_S"]) <= 1.1 * (1 + 1e-4)
        assert all(float(row[f"cond_{layer}"]) <= 1.1 * (1 + 1e-4) for layer in info["ranks"])
    again, out, _ = script("train", *arguments)
    assert again == 0
    assert "is done already" in out


@pytest.mark.parametrize(("launcher", "extra"), [("joblib", "several"), ("ray", "ray")])
def test_a_launcher_that_is_not_installed_says_how_it_is(launcher, extra):
    error = MissingConfigException(f"In 'hydra/launcher/x': Could not load 'hydra/launcher/{launcher}'.")
    assert condlr.suite.cli.explain(error) == f"this launcher is an extra: pip install 'condlr[{extra}]'"
    other = MissingConfigException("In 'hydra/launcher/x': Could not load 'hydra/launcher/mine'.")
    assert condlr.suite.cli.explain(other) == str(other)


@pytest.mark.slow
def test_a_sweep_runs_a_method_without_compression_once_and_goes_on_after_a_failure(script, tmp_path):
    sweep = ["-m", *SMALL, "method=baseline,vanilla", "compression=0.5,0.8", "study=sweep"]
    status, out, _ = script("train", *sweep)
    assert status == 0
    names = sorted(path.name.rsplit("-", 1)[0] for path in (tmp_path / "runs" / "sweep").glob("lenet5-*"))
    assert names == [
        "lenet5-digits-baseline-s0", "lenet5-digits-vanilla-c0.5-s0", "lenet5-digits-vanilla-c0.8-s0",
    ]  # fmt: skip
    assert "runs/sweep: 3 runs: 3 done" in out
    broken = next((tmp_path / "runs" / "sweep").glob("*baseline*"))
    (broken / "run.json").write_text("{")
    (next((tmp_path / "runs" / "sweep").glob("*vanilla*c0.8*")) / "run.json").unlink()
    status, out, err = script("train", *sweep)
    assert status == 1
    assert "3 runs, 2 to do" in out, "what is done is not launched"
    assert "3 runs: 1 done, 1 skipped, 1 failed" in out
    assert re.search(r"failed  Baseline, seed 0: \S+run.json cannot be read.*log: \S+/train.log", out)
    assert "run.json cannot be read" in (broken / "train.log").read_text()
    assert err == "error: 1 of 3 runs are not done; the same command tries those again that did not diverge\n"
    assert "Traceback" not in out


@pytest.mark.slow
def test_several_runs_at_once_end_as_one_by_one(script, tmp_path):
    """In processes of their own; one that fails does not stop the other, and is told of."""
    sweep = ["train", "-m", *SMALL, "method=baseline,vanilla"]
    together = ["hydra/launcher=several", "hydra.launcher.n_jobs=2"]
    assert script(*sweep, "study=one_by_one")[0] == 0
    status, out, err = script(*sweep, "study=at_once", "protocol.lr=0.1,1e9", *together)
    assert status == 1
    assert "Traceback" not in out + err
    assert "2 done, 2 diverged" in out
    assert "2 of 4 runs are not done" in err
    weights = [
        {
            path.parent.name: path.read_bytes()
            for path in (tmp_path / "runs" / study).glob("*/model.safetensors")
        }
        for study in ("one_by_one", "at_once")
    ]
    assert len(weights[0]) == 2
    assert weights[0] == weights[1]
    statuses = [
        json.loads(path.read_text())["status"] for path in (tmp_path / "runs" / "at_once").glob("*/run.json")
    ]
    assert sorted(statuses) == ["diverged", "diverged", "done", "done"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "paper"),
    [("table_mnist", "table2_lenet5_mnist"), ("table_cifar10", "table3_vgg16_cifar10")],
)
def test_the_tables_have_the_rows_of_the_papers(experiment, paper):
    """Each row of the published table is a row file, and sets what the paper's row is."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [f"experiment={experiment}"], return_hydra_config=True)
    rows = config.hydra.sweeper.params.row.split(",")
    checked = [configured(f"experiment={experiment}", f"row={row}") for row in rows]
    found = {(run.label, run.scheme.compression or 0.0, eps) for run in checked for eps in run.attack.eps}
    model, dataset = paper.split("_")[1:]
    published = results.published(ROOT / "results" / "paper", dataset, model)
    assert (len(rows), len({run.run_id for run in checked})) == (17, 17)
    assert found == published.keys()
    assert {run.run_id.split("-")[0] for run in checked} == {model}


@pytest.fixture
def small_cifar(tmp_path):
    """40 training images and 20 test images of real digits, as CIFAR-10's binary files have them."""
    data = Digits().load(tmp_path)
    folder = tmp_path / "data" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for number, name in enumerate((*cifar10.TRAIN, cifar10.TEST)):
        part = data.train.take(slice(8 * number, 8 * number + (20 if name == cifar10.TEST else 8)))
        colour = torch.nn.functional.pad(part.pixels, [2] * 4).expand(-1, 3, -1, -1).flatten(1)
        records = torch.cat([part.labels[:, None].to(torch.uint8), colour], 1)
        (folder / f"{name}.bin").write_bytes(records.contiguous().numpy().tobytes())


@pytest.mark.slow
def test_vgg16_on_cifar10(script, small_cifar, tmp_path):
    arguments = [
        "dataset=cifar10", "model=vgg16", "protocol=released_code", "method=condlr", "compression=0.8",
        "protocol.epochs=1", "protocol.batch_size=16", "attack.eps=[0,0.1]", "forms=factored",
    ]  # fmt: skip
    status, out, _ = script("train", *arguments)
    assert status == 0, out
    (run,) = (tmp_path / "runs" / "default").glob("vgg16-cifar10-*")
    info = json.loads((run / "run.json").read_text())
    assert (info["images"]["train"], info["images"]["held_out"]) == (30, 10)
    assert list(info["ranks"])[-1] == "network.fc2"
    assert info["ranks"]["network.conv13"] == 103
    attacks = {row["attack"] for row in csv.DictReader((run / "evaluation.csv").open())}
    assert attacks == {"fgsm-unclamped"}


@pytest.mark.slow
def test_an_attack_with_another_clamp_than_the_protocols_stands_beside_that_of_the_run(script, tmp_path):
    assert script("train", *SMALL, "protocol.clamp=false")[0] == 0
    run = run_of(tmp_path)
    assert script("evaluate", f"run={run}", "attack.eps=[0.1]", "attack.clamp=true")[0] == 0
    assert script("evaluate", f"run={run}", "attack.eps=[0.2]")[0] == 0
    assert script("evaluate", f"run={run}", "attack.clamp=true")[0] == 0, "at the strengths of the run"
    rows = {(row["attack"], float(row["eps"])) for row in csv.DictReader((run / "evaluation.csv").open())}
    unclamped = {("fgsm-unclamped", eps) for eps in (0, 0.1, 0.2)}
    assert rows == unclamped | {("fgsm", 0), ("fgsm", 0.1)}


@pytest.mark.long
@pytest.mark.parametrize(
    "method",
    [
        ["method=dlrt", "method.theta=0.3"],
        ["method=svd_prune", "method.pipeline=full", "method.energy=0.1", "method.phases=[0,0.5]"],
    ],
    ids=["dlrt", "svd_prune"],
)
def test_ranks_that_change_in_training_are_recorded_and_loaded(script, tmp_path, method):
    assert script("train", *SMALL, "protocol.epochs=2", *method)[0] == 0
    run = run_of(tmp_path)
    info = json.loads((run / "run.json").read_text())
    start = (
        {"conv1": 20, "conv2": 50, "fc1": 500}
        if "full" in method[1]
        else {"conv1": 5, "conv2": 21, "fc1": 138}
    )
    assert all(info["ranks"][name] <= rank for name, rank in start.items())
    assert info["ranks"]["fc1"] < start["fc1"]
    last = list(csv.DictReader((run / "history.csv").open()))[-1]
    assert {name: float(last[f"audit_rank_{name}"]) for name in start} == {n: info["ranks"][n] for n in start}
    n, m, r = 500, 800, info["ranks"]["fc1"]
    assert info["weights"]["trained"] >= r * (n + m)
    assert script("evaluate", f"run={run}", "attack.eps=[0.2]")[0] == 0
    undone(run)
    assert script("train", *SMALL, "protocol.epochs=2", *method)[0] == 0


def test_a_rank_adaptive_run_that_diverges_says_so(script, tmp_path):
    arguments = ["method=dlrt", "method.theta=0.1", "protocol.lr=1e4", "protocol.epochs=3"]
    complains(script("train", *SMALL, *arguments), "diverged in epoch .*try a smaller protocol.lr")
    assert json.loads((run_of(tmp_path) / "run.json").read_text())["status"] == "diverged"


@pytest.mark.slow
def test_another_attack_on_a_finished_run_trains_nothing(script, run):
    weights = (run / "model.safetensors").stat().st_mtime_ns
    status, _, _ = script("train", *SMALL, "attack.eps=[0.2]")
    assert status == 0
    assert (run / "model.safetensors").stat().st_mtime_ns == weights
    status, out, _ = script("evaluate", f"run={run}", "attack.eps=[0.1,0.3]")
    assert status == 0
    rows = list(csv.DictReader((run / "evaluation.csv").open()))
    assert [float(row["eps"]) for row in rows] == [0, 0.1, 0.2, 0.3]
    assert "fgsm 0.3" in out


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def undone(run):
    """As if the run had been killed after its last epoch."""
    info = json.loads((run / "run.json").read_text()) | {"status": "running"}
    (run / "run.json").write_text(json.dumps(info))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "damage", "pattern"),
    [
        ("checkpoint.pt", truncate, "checkpoint.pt is damaged or not a checkpoint.*remove it"),
        ("checkpoint.pt", flip, "checkpoint.pt is damaged .*remove it"),
        (
            "checkpoint.pt",
            lambda path: path.write_text("hello"),
            "checkpoint.pt is damaged or not a checkpoint",
        ),
        ("run.json", truncate, "run.json cannot be read"),
        ("run.json", lambda path: path.write_text("[]"), "run.json is not a run's record"),
    ],
)
def test_damaged_runs_are_named_and_left_alone(script, run, name, damage, pattern):
    undone(run)
    damage(run / name)
    before = (run / name).read_bytes()
    complains(script("train", *SMALL), pattern)
    assert (run / name).read_bytes() == before
    (run / name).unlink()
    assert script("train", *SMALL)[0] == 0, "the advice works"


@pytest.mark.slow
@pytest.mark.parametrize("text", ["a: [b", "[]", None])
def test_a_damaged_config_of_a_finished_run_is_named_and_written_again(script, run, text):
    path = run / "config.yaml"
    before = path.read_text()

    def damage():
        path.unlink() if text is None else path.write_text(text)

    damage()
    for name in ("collect", "archive"):
        complains(
            script(name, "study=default"),
            "config.yaml( cannot be read .*| is not a run's config|): the command that trained the run "
            "writes it again",
        )
    for pattern in (run, f"{run}*"):
        complains(script("evaluate", f"run={pattern}", "attack.eps=[0.3]"), "writes it again")
    status, _, _ = script("train", *SMALL)
    assert status == 0 and path.read_text() == before
    damage()
    assert script("train", *SMALL, "attack.eps=[0.2]")[0] == 0
    assert OmegaConf.load(path).method == OmegaConf.create(before).method
    damage()
    assert script("train", "-m", *SMALL)[0] == 0 and path.read_text() == before, "a sweep mends it, too"


@pytest.mark.slow
def test_a_checkpoint_that_runs_code_is_refused(script, run):
    class Evil:
        def __reduce__(self):
            return Path("pwned").touch, ()

    undone(run)
    archive = io.BytesIO()
    torch.save({"fingerprint": "x", "state": Evil()}, archive)
    (run / "checkpoint.pt").write_bytes(archive.getvalue())
    complains(script("train", *SMALL), "checkpoint.pt is damaged or not a checkpoint .*digest")
    _seal(archive)
    (run / "checkpoint.pt").write_bytes(archive.getvalue())
    complains(script("train", *SMALL), "checkpoint.pt is damaged or not a checkpoint .*UnpicklingError")
    assert not Path("pwned").exists()


def test_a_checkpoint_of_which_any_bit_differs_is_refused(tmp_path):
    run, random = Run(tmp_path), np.random.default_rng(0)
    run.save_checkpoint({"weights": torch.arange(40.0), "epoch": 3}, "f")
    assert run.load_checkpoint("f")["epoch"] == 3
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["state"]["epoch"] == 3, "by torch too"
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    for place in [*random.integers(0, len(whole), 300), *range(len(whole) - 70, len(whole))]:
        content = bytearray(whole)
        content[place] ^= 1 << int(random.integers(8))
        path.write_bytes(content)
        with pytest.raises(UserError, match="is damaged"):
            run.load_checkpoint("f")
    for length in [0, 1, 63, 64, 65, 66, len(whole) - 66, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="is damaged"):
            run.load_checkpoint("f")
    path.write_bytes(whole + b"\0")
    with pytest.raises(UserError, match="is damaged"):
        run.load_checkpoint("f")


@pytest.mark.slow
def test_a_checkpoint_of_another_config_is_refused(script, run, tmp_path):
    script("train", *SMALL, "study=two", "seed=1")
    two = run_of(tmp_path, "two")
    (two / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes())
    undone(two)
    complains(script("train", *SMALL, "study=two", "seed=1"), "checkpoint.pt belongs to another config")


def test_a_finished_run_without_its_history_is_named(script, run):
    history = run / "history.csv"
    for damage in (Path.unlink, lambda path: path.write_text("garbage\n")):
        damage(history)
        complains(
            script("collect", "study=default"),
            r"history.csv is missing or empty: remove run.json beside it and start the run again",
        )
    (run / "run.json").unlink()
    assert script("train", *SMALL)[0] == 0
    assert script("collect", "study=default")[0] == 0, "the advice works"


def test_tables_of_a_finished_run_that_lack_lines_are_named_and_repeated_lines_count_once(script, run):
    history, evaluation = run / "history.csv", run / "evaluation.csv"
    whole = history.read_text()
    history.write_text("".join(whole.splitlines(keepends=True)[:2]))
    complains(
        script("collect", "study=default"), r"history.csv is cut off after epoch 0 of \d+: remove run.json"
    )
    history.write_text(whole.replace("epoch", "era", 1))
    complains(script("collect", "study=default"), "history.csv is damaged .no column 'epoch'.: remove")
    history.write_text("\ufeff" + whole + whole.partition("\n")[2])
    assert script("evaluate", f"run={run}", "shift=corruptions", "shift.kinds=[contrast]")[0] == 0
    (run / "shift.csv").open("a").write((run / "shift.csv").read_text().partition("\n")[2])
    evaluation.open("a").write(evaluation.read_text().partition("\n")[2])
    assert script("collect", "study=default")[0] == 0
    for name, keys in (("shift", ["name", "severity"]), ("cells", ["eps"]), ("history", ["epoch"])):
        assert not pd.read_csv(f"results/default/{name}.csv").duplicated(keys).any()


@pytest.mark.slow
def test_jobs_of_other_scripts_fail_after_the_others_and_in_the_exit_status(script, run, tmp_path):
    assert script("collect", "study=default")[0] == 0
    status, out, err = script("tables", "-m", "study=nowhere,default")
    assert status == 1
    assert "Traceback" not in out + err
    assert "nowhere/cells.csv is missing" in out + err
    assert err.splitlines()[-1] == "error: see above: 1 of the jobs failed (study=nowhere)"
    assert (tmp_path / "results" / "default" / "table.md").exists()
    assert script("tables", "-m", "study=default")[0] == 0


def test_published_numbers_that_are_not_there(script, run):
    script("collect", "study=default")
    complains(script("tables", "study=default", "paper=nowhere"), "paper=nowhere is not a directory")


def test_a_sweep_does_not_begin_if_a_model_takes_no_such_images(script, tmp_path):
    result = script("train", "-m", *SMALL, "dataset=digits,cifar10")
    complains(
        result, "model=lenet5 with dataset=cifar10: lenet5 takes images of 1 x 28 x 28; these are 3 x 32 x 32"
    )
    assert not (tmp_path / "runs").exists()


def test_memory_that_is_refused_is_one_line():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert explain(caught.value) == "there is not enough memory for this: a smaller batch needs less"
    assert explain(RuntimeError("shapes cannot be multiplied")) is None


@pytest.mark.slow
def test_evaluate_says_what_it_cannot_evaluate(script, run, tmp_path):
    complains(script("evaluate", "run=nowhere"), "nowhere is not a run: it has no config.yaml")
    complains(script("evaluate", "run=nowhere/*"), r"run=nowhere/\*: nothing matches this pattern")
    complains(script("evaluate"), "run")
    complains(script("evaluate", f"run={run}", "attack.eps=[7]"), "attack.eps must be in")
    complains(script("evaluate", "run=null"), "run: ")
    complains(script("evaluate", f"run={run}", "attack=null"), "Config group override must be a string")
    script("train", *SMALL, "seed=1", "study=other")
    weights = run / "model.safetensors"
    for damage in (
        truncate, flip, lambda path: path.write_bytes((run_of(tmp_path, "other") / path.name).read_bytes()),
    ):  # fmt: skip
        intact = weights.read_bytes()
        damage(weights)
        evaluated = script("evaluate", f"run={run}", "again=true")
        complains(evaluated, "model.safetensors is damaged or belongs to another run")
        weights.write_bytes(intact)
    weights.unlink()
    complains(script("evaluate", f"run={run}", "again=true"), "model.safetensors is missing: remove run.json")
    (run / "run.json").unlink()
    assert "goes on from epoch 1" in script("train", *SMALL)[1], "the advice works"
    assert weights.read_bytes() == intact
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"status": "interrupted", "device": "cpu, 99 threads"}))
    out = script("train", *SMALL)[1]
    assert "began on cpu, 99 threads: on cpu" in out and "it ends with other bits" in out
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("slope: 0.01", "slope: 0.9"))
    complains(script("evaluate", f"run={run}"), "config.yaml was changed")
    (run / "config.yaml").write_text(config)
    undone(run)
    complains(script("evaluate", f"run={run}"), "is running: only a run that is done")
    (run / "config.yaml").write_text("a: [")
    complains(script("evaluate", f"run={run}"), "config.yaml cannot be read")


@pytest.mark.slow
def test_evaluation_wants_the_images_of_the_training(script, small_mnist):
    arguments = ["dataset=mnist", "dataset.download=false", "protocol.epochs=1"]
    script("train", *arguments)
    run = run_of(Path.cwd())
    pixels = small_mnist / "t10k-images-idx3-ubyte"
    content = pixels.read_bytes()
    pixels.write_bytes(content[:-1] + bytes([content[-1] ^ 255]))
    evaluated = script("evaluate", f"run={run}", "again=true")
    complains(evaluated, "holds other images than the run was trained on")


@pytest.mark.slow
def test_training_afresh_forgets_the_old_evaluation(script, run):
    script("evaluate", f"run={run}", "attack.eps=[0.3]")
    for name in ("run.json", "checkpoint.pt"):
        (run / name).unlink()
    script("train", *SMALL)
    assert [float(row["eps"]) for row in csv.DictReader((run / "evaluation.csv").open())] == [0, 0.1]


@pytest.mark.long
def test_rows_with_unusual_options_have_names_of_their_own(script, tmp_path):
    script("train", "-m", *SMALL, "method.retraction=qr,polar", "study=variants")
    names = sorted(path.name.split("-s0-")[0] for path in (tmp_path / "runs" / "variants").glob("lenet5-*"))
    assert names == ["lenet5-digits-condlr-tau0.1-c0.5", "lenet5-digits-condlr-tau0.1-retraction_polar-c0.5"]


@pytest.mark.slow
def test_collect_refuses_what_would_count_twice_or_cannot_be_read(script, run):
    shutil.copytree(run, run.parent / "backup")
    complains(script("collect", "study=default"), "backup/run.json belongs to the run .* count twice")
    shutil.rmtree(run.parent / "backup")
    for name, text in (("history.csv", "epoch,cond_a\n1,2,3\n"), ("history.csv", "epoch,cond_a\n1,x\n")):
        intact = (run / name).read_bytes()
        (run / name).write_text(text)
        complains(script("collect", "study=default"), "history.csv is damaged")
        (run / name).write_bytes(intact)
    (run / "evaluation.csv").write_text("x,y\n1,2\n")
    complains(script("collect", "study=default"), "evaluation.csv is damaged")
    complains(script("collect", "study=null"), "study: ")
    complains(script("tables", "study=[a]"), "study: ")
    complains(script("tables", "study=../default"), "study must be a plain name")


@pytest.mark.slow
def test_a_run_lies_where_it_should_even_if_hydra_changes_directory(script, tmp_path):
    assert script("train", *SMALL, "hydra.job.chdir=true")[0] == 0
    assert (run_of(tmp_path) / "model.safetensors").exists()


@pytest.mark.slow
def test_collect_tables_and_figures_end_to_end(script, tmp_path, monkeypatch):
    complains(script("collect", "study=none"), "there is no run in runs/none")
    complains(script("tables", "study=none"), "cells.csv is missing: collect the study's runs first")
    complains(script("figures", "study=none"), "cells.csv is missing")
    script("train", "-m", *SMALL, "method=baseline,condlr", "seed=0,1", "study=two")
    status, out, _ = script("collect", "study=two")
    assert status == 0
    assert "8 cells of 4 done runs" in out
    status, out, _ = script("tables", "study=two")
    assert status == 0
    assert "LeNet5 on digits, protocol demo, 1 epoch" in out
    assert "±" in out
    assert script("figures", "study=two")[0] == 0
    results = tmp_path / "results" / "two"
    assert {path.name for path in results.iterdir()} == {
        "cells.csv", "runs.csv", "history.csv", "spectra.csv", "training.md",
        *(f"table.{kind}" for kind in ("csv", "md", "tex", "html")),
        *(f"{name}.{kind}" for name in FIGURES for kind in ("png", "pdf")),
    }  # fmt: skip
    draw_pictures_alone(monkeypatch)
    assert script("report", "study=two")[0] == 0
    assert "CondLR" in (results / "report.html").read_text()
    assert "](robustness.png)" in (results / "report.md").read_text()
    cells = (results / "cells.csv").read_text()
    (results / "cells.csv").write_text("a,b\n1,2\n")
    complains(script("tables", "study=two"), "cells.csv lacks the columns")
    (results / "cells.csv").write_text(cells.replace(",0.0,360,", ",zero,360,").replace("0.1", "x"))
    complains(script("tables", "study=two"), "cells.csv has something else than numbers")
    (results / "cells.csv").write_bytes(bytes(range(256)))
    complains(script("tables", "study=two"), "cells.csv is not a table of results .*: collect the runs again")
    (results / "cells.csv").write_text(cells.partition("\n")[0] + "\n")
    complains(script("tables", "study=two"), "cells.csv has no rows: collect the runs again")


@pytest.mark.slow
def test_theorem_1_end_to_end(script, tmp_path, monkeypatch):
    draw_pictures_alone(monkeypatch)
    small = ["flow.steps=[4,64]", "flow.etas=[0.01]", "flow.flows=[rotation]", "flow.weak=[]"]
    complains(script("theorem1", *small, "flow.tau=-1"), r"flow.tau must be")
    complains(script("theorem1", "flow=3"), r"flow")
    complains(
        script("theorem1", *small, "flow.rank=half"), r"flow.rank: Value 'half'.*could not be converted"
    )
    complains(script("theorem1", *small, "study=a/b"), "study must be a plain name")
    assert not (tmp_path / "results").exists()
    status, out, err = script("theorem1", *small)
    assert status == 0, out + err
    assert out.endswith("results/theorem1/flow.csv\n")
    for name in ("tables", "figures", "report"):
        status, out, err = script(name, "study=theorem1")
        assert status == 0, out + err
    written = {path.name for path in (tmp_path / "results" / "theorem1").iterdir()}
    assert written == {
        "flow.csv", "theorem1.md", "theorem1.png", "theorem1.pdf", "report.html", "report.md",
    }  # fmt: skip
    assert "scripts/theorem1.py\n" in (tmp_path / "results" / "theorem1" / "report.md").read_text()
    before = (tmp_path / "results" / "theorem1" / "flow.csv").read_bytes()
    script("theorem1", *small, "flow.speed=2")
    assert (tmp_path / "results" / "theorem1" / "flow.csv").read_bytes() != before
    assert not (tmp_path / "runs").exists()


@pytest.mark.long
def test_an_ill_conditioned_start_through_the_command_line(script, tmp_path):
    start = [
        *SMALL,
        "compression=0.8",
        "protocol.rank_rule=released_code",
        "protocol.decay=2",
        "record_every=2",
    ]
    complains(script("train", *start, "protocol.decay=0.5"), r"protocol.decay must be in \[1, inf")
    complains(script("train", *start, "method=baseline", "study=lost"), "this method makes none")
    complains(script("train", *start, "record_every=-1"), r"record_every must be in \[0, inf")
    complains(
        script("train", *start, "protocol.decay=10", "study=lost"),
        r"decay=10 over the 100 singular values of fc1 ends",
    )
    status, out, err = script("train", *start)
    assert status == 0, out + err
    run = run_of(tmp_path)
    steps = list(csv.DictReader((run / "steps.csv").open()))
    assert [int(row["step"]) for row in steps] == [0, 2, 4]
    assert float(steps[0]["cond_fc1"]) == pytest.approx(2.0**99, rel=1e-3)
    assert float(steps[1]["cond_fc1"]) <= 1.1001
    spectra = list(csv.DictReader((run / "spectra.csv").open()))
    ends = {(row["when"], row["layer"]) for row in spectra}
    assert ends == {(when, layer) for when in ("start", "end") for layer in ("conv1", "conv2", "fc1", "fc2")}
    values = [
        float(row["singular_value"]) for row in spectra if (row["when"], row["layer"]) == ("start", "fc1")
    ]
    assert len(values) == 100
    assert values[0] / values[1] == pytest.approx(2, rel=1e-5)
    assert "has no steps.csv" not in "".join(map(str, script("train", *start)))
    # The spectra of a run from before they were kept are found when it is asked for again
    (run / "spectra.csv").unlink()
    assert script("train", *start)[0] == 0
    assert list(csv.DictReader((run / "spectra.csv").open())) == spectra


@pytest.mark.slow
def test_help_and_mistakes_answer_without_torch():
    code = (
        "import sys, runpy; sys.argv = ['train.py', 'compression=1.5']\n"
        "try: runpy.run_path('scripts/train.py', run_name='__main__')\n"
        "except SystemExit as stop: status = stop.code\n"
        "sys.exit(10 if 'torch' in sys.modules else status)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr == "error: compression must be in [0, 1); got 1.5\n"


@pytest.mark.slow
def test_the_library_imports_without_hydra_pandas_and_matplotlib():
    code = (
        "import sys, condlr; condlr.factorize, condlr.constrain, condlr.export, condlr.LowRankConv2d\n"
        "unwanted = 'hydra', 'omegaconf', 'pandas', 'matplotlib', 'rich'\n"
        "print([name for name in unwanted if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def git(directory, *arguments):
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=main")
    done = subprocess.run(
        ["git", *who, *arguments], cwd=directory, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def unpacked(directory):
    """A source tree as an archive leaves it; the file of it that asks for its commit."""
    for name in ("condlr/suite/environment.py", "conf/train.yaml", "scripts/train.py"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("")
    return directory / "condlr" / "suite" / "environment.py"


@pytest.fixture
def no_repository_around(monkeypatch):
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("place", ["condlr-main", "lib/python3.11/site-packages", "a/b ü", "."])
@pytest.mark.parametrize("tracked", [False, True])
def test_the_commit_of_an_outer_repository_is_not_ours(
    tmp_path, monkeypatch, no_repository_around, place, tracked
):
    git(tmp_path, "init", "-q")
    source = unpacked(tmp_path / place)
    monkeypatch.setattr(environment, "__file__", str(source))
    assert environment.commit() is None, "a repository without a commit"
    if tracked:
        git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "thesis")
    ours = git(tmp_path, "rev-parse", "--short=12", "HEAD") if tracked and place == "." else None
    assert environment.commit() == ours


def test_the_commit_is_that_of_our_own_repository(tmp_path, monkeypatch, no_repository_around):
    """Inside another, as a submodule or a clone is, through a link, and whatever a hook of another set."""
    outer, own = tmp_path / "outer", tmp_path / "outer" / "own"
    source = unpacked(own)
    for place in (own, outer):
        git(place, "init", "-q")
        git(place, "add", "-A")
        git(place, "commit", "-q", "--allow-empty", "-m", place.name)
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "condlr").symlink_to(own / "condlr")
    head = git(own, "rev-parse", "--short=12", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(outer / ".git"))
    for path in (source, tmp_path / "link" / "condlr" / "suite" / "environment.py"):
        monkeypatch.setattr(environment, "__file__", str(path))
        assert environment.commit() == head
    (own / "conf" / "train.yaml").write_text("seed: 1")
    assert environment.commit() == f"{head}+"


@pytest.mark.long
def test_no_script_needs_a_terminal_that_can_show_all_it_says(script, tmp_path, monkeypatch):
    """Files are UTF-8 all the same, also where the locale is not."""

    def said(encoding, name, *arguments):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        status, *_ = script(name, *arguments)
        out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)
        assert status == 0, out + err
        assert err == ""
        return out

    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    try:
        (tmp_path / "Größe ∞").mkdir()
        where, to = "runs_dir='Größe ∞'", "results_dir='Größe ∞/x'"
        assert "Gr??e ?/default" in said("ascii", "train", *SMALL, where)
        said("latin-1", "evaluate", "run='Größe ∞/default/*'", "analysis=cost")
        assert "CondLR ?=0.1" in said("latin-1", "status", "study=default", where)
        assert "Größe ?" in said("latin-1", "collect", "study=default", where, to)
        for encoding in ("euc_jp", "gb2312", "ascii"):
            assert "?" in said(encoding, "tables", "study=default", to, f"paper={PAPER}")
        draw_pictures_alone(monkeypatch)
        said("ascii", "report", "study=default", to, where, f"paper={PAPER}")
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    results = tmp_path / "Größe ∞" / "x" / "default"
    for name in ("table.md", "table.html", "report.html", "training.md"):
        assert "CondLR τ=0.1" in (results / name).read_text("utf-8")
    (log,) = (tmp_path / "Größe ∞").rglob("train.log")
    assert "Größe ∞" in log.read_text("utf-8")


@pytest.mark.long
def test_files_are_written_before_their_reader_has_had_enough(script, tmp_path, monkeypatch):
    """As in `tables.py study=two | head -1`."""
    for method in ("baseline", "condlr"):
        script("train", *SMALL, f"method={method}", "study=two")
    script("collect", "study=two")

    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

        def fileno(self):
            return os.open(os.devnull, os.O_WRONLY)

    monkeypatch.setattr(sys, "stdout", Closed())
    for name, written in (("tables", ["table.md", "table.csv"]), ("figures", ["robustness.png", "cost.pdf"])):
        script(name, "study=two")
        assert all((tmp_path / "results" / "two" / file).stat().st_size for file in written)


def test_a_path_that_is_in_no_encoding_is_written(tmp_path):
    files.write_csv(tmp_path / "planned.csv", [{"a": "r\udcc3\udcff", "b": "τ"}])
    assert (tmp_path / "planned.csv").read_text("utf-8") == "a,b\nr\\udcc3\\udcff,τ\n"
    assert files.read_csv(tmp_path / "planned.csv") == [{"a": "r\\udcc3\\udcff", "b": "τ"}]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statuses", "said"),
    [
        (["diverged", "diverged"], "2 diverged .a smaller protocol.lr may help.;"),
        (["failed"], "1 failed .the same command tries again.;"),
        (["running", "running", "running"], "3 running .wait.;"),
        (["interrupted", "failed", "diverged"], "1 interrupted .*, 1 failed .*, 1 diverged"),
    ],
)
@pytest.mark.parametrize("attacked", [False, True])
def test_a_study_of_which_no_run_is_done_says_so(script, run, tmp_path, statuses, said, attacked):
    """And does not ask to collect it again."""
    for number, status in enumerate(statuses):
        bad = shutil.copytree(run, tmp_path / "runs" / "bad" / f"run{number}")
        info = json.loads((bad / "run.json").read_text())
        (bad / "run.json").write_text(json.dumps(info | {"run_id": bad.name, "status": status}))
        if not attacked:
            for name in ("evaluation.csv", "history.csv", "spectra.csv"):
                (bad / name).unlink()
    for name in ("collect", "tables", "figures", "report"):
        result = script(name, "study=bad")
        complains(result, f"no run of this study is done and evaluated yet: {said}.* condlr status says")
        assert "collect" not in result[2]


UNRESOLVED = {
    "${oc.env:NO_SUCH_VARIABLE}": "Environment variable 'NO_SUCH_VARIABLE' not found",
    "${nobody:1}": "Unsupported interpolation type nobody",
    "${no.such.key}": "Interpolation key 'no.such.key' not found",
    "${oc.env:}": "missing 1 required positional argument",
}


@pytest.mark.slow
@pytest.mark.parametrize("multirun", [[], ["-m"]], ids=["", "-m"])
@pytest.mark.parametrize(
    ("key", "value"),
    # Each value where Hydra makes a directory of it, where we do, and in a group; the other keys are as these
    [(key, value) for key in ("study", "hydra.run.dir", "method.tau") for value in UNRESOLVED]
    + [(key, "${no.such.key}") for key in ("runs_dir", "seed", "attack.source")],
)
def test_what_cannot_be_resolved_is_one_line(script, multirun, key, value):
    if multirun and key == "hydra.run.dir":
        pytest.skip("a sweep does not ask for it")
    said = UNRESOLVED[value]
    complains(script("train", *multirun, *SMALL, f"{key}={value}"), re.escape(said))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("collect", ["study=${oc.env:NO_SUCH_VARIABLE}"]),
        ("evaluate", ["run=x", "attack.eps=${oc.env:NO_SUCH_VARIABLE}"]),
        ("status", ["study=x", "runs_dir=${oc.env:NO_SUCH_VARIABLE}"]),
        ("estimate", ["runs_dir=${oc.env:NO_SUCH_VARIABLE}"]),
        ("benchmark", ["results_dir=${oc.env:NO_SUCH_VARIABLE}"]),
    ],
)
def test_what_cannot_be_resolved_is_one_line_in_every_script(script, name, arguments):
    complains(script(name, *arguments), "Environment variable 'NO_SUCH_VARIABLE' not found")


def test_a_bug_of_ours_in_a_resolver_is_none_of_the_users(monkeypatch):
    monkeypatch.setattr(condlr.suite.cli, "check", lambda _: {}["a bug"])
    with pytest.raises(InterpolationResolutionError) as caught:
        OmegaConf.create({"a": "${condlr.run_id:}"})["a"]
    assert explain(caught.value) is None


@pytest.mark.slow
def test_a_home_directory_is_expanded_and_nothing_is_called_tilde(script, tmp_path, monkeypatch):
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    assert script("train", *SMALL, "method=baseline", 'runs_dir="~/runs"')[0] == 0
    assert script("train", "-m", *SMALL, "method=vanilla", 'runs_dir="~/runs"')[0] == 0
    dense, run = sorted((home / "runs" / "default").glob("lenet5-*"))
    source = f'attack.source="~/runs/default/{dense.name}"'
    few = ["attack.images=20", "attack.eps=[0.1]", "attack.steps=1"]
    arguments = [f'run="~/runs/default/{run.name}"', "attack=transfer", source, *few]
    assert script("evaluate", *arguments)[0] == 0
    assert "transfer-pgd1" in (run / "evaluation.csv").read_text()
    assert script("collect", "study=default", 'runs_dir="~/runs"', 'results_dir="~/results"')[0] == 0
    assert script("tables", "study=default", 'results_dir="~/results"')[0] == 0
    assert (home / "results" / "default" / "table.md").exists()
    assert script("status", "study=default", 'runs_dir="~/runs"')[0] == 0
    complains(script("train", *SMALL, 'runs_dir="~nobody-here/runs"'), "there is no such home directory")
    complains(script("train", *SMALL, 'hydra.run.dir="~/x"'), "Hydra does not expand ~ here")
    complains(script("tables", "-m", "study=a", 'hydra.sweep.dir="~/x"'), "Hydra does not expand ~ here")
    complains(script("train", *SMALL, "runs_dir=~/runs"), r"quote it: 'runs_dir=\"~/runs\"'")
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith("~")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["~/MNIST files", "[a]", "a: b", "${x}", "'q' \"r\"", "x=1, {y}", "- a"])
def test_any_directory_can_be_in_the_variable(script, small_mnist, tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    target = tmp_path / Path(name).expanduser()
    target.parent.mkdir(exist_ok=True)
    (tmp_path / "data").rename(target)
    monkeypatch.setenv("CONDLR_DATA", name)
    few = ["dataset=mnist", "dataset.download=false", "protocol=demo", "protocol.epochs=1", "attack.eps=[0]"]
    status, _, err = script("train", *few, "method=baseline")
    assert status == 0, err
    status, _, err = script("evaluate", f"run={run_of(tmp_path)}", "attack.eps=[0.1]")
    assert status == 0, err


@pytest.mark.slow
@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_variable_is_none(script, small_mnist, monkeypatch, empty):
    monkeypatch.setenv("CONDLR_DATA", empty)
    few = ["dataset=mnist", "dataset.download=false", "protocol=demo", "protocol.epochs=1", "attack.eps=[0]"]
    assert script("train", *few, "method=baseline")[0] == 0


@pytest.mark.parametrize(
    ("argument", "quoted"),
    [
        ("run=runs [a]/b", "'run=\"runs [a]/b\"'"),
        ("run=a]b", "'run=\"a]b\"'"),
        ("run={a}/it's", "'run=\"{a}/it'\"'\"'s\"'"),
    ],
)
def test_an_argument_that_cannot_be_read_is_shown_quoted(script, argument, quoted):
    for name in ("evaluate", "collect"):
        complains(script(name, argument), re.escape(f"if that is text, quote it: {quoted}"))


@pytest.mark.slow
def test_logs_may_be_set_as_hydra_has_it(script, tmp_path):
    few = [*SMALL, "method=baseline"]
    assert script("train", *few, "hydra/job_logging=none", "seed=1")[0] == 0
    status, out, _ = script("train", *few, "hydra/job_logging=stdout", "seed=2")
    assert (status, "fgsm 0.1" in out) == (0, True)
    status, out, _ = script("train", *few, "hydra.job_logging.root.level=WARNING", "seed=3")
    assert (status, out) == (0, "")
    complains(script("train", *few, "hydra.job_logging.root.level=LOUD"), "Unable to configure root logger")
    complains(script("train", *few, "hydra/job_logging=colorlog"), "Could not find 'hydra/job_logging/colorl")
    status, out, _ = script("train", "-m", *few, "hydra/job_logging=none", "seed=1,4", "hydra.sweep.dir=logs")
    assert (status, "2 runs: 1 done, 1 skipped" in out) == (0, True)
    assert list((tmp_path / "logs").glob("lenet5-*/.hydra"))
    assert script("collect", "study=default", "hydra/job_logging=none")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], ["hydra/launcher=several"]], ids=["one by one", "several"])
def test_jobs_that_fail_are_in_the_exit_status_under_every_sweeper(script, launcher):
    sweep = ["-m", *SMALL, "hydra/sweeper=basic", "method=baseline", "protocol.lr=0.1,1e30", *launcher]
    status, out, err = script("train", *sweep)
    assert status == 1
    assert "diverged" in out
    assert err.splitlines()[-1].startswith("error: see above:")
    assert "protocol.lr=1e+30" in err
    assert "Traceback" not in out + err
