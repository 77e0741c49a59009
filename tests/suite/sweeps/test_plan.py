"""The plan of a study: a sweep, an estimate, the status and the provenance give one answer."""

import re
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pandas as pd
import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from condlr._support.files import read_csv
from condlr.report.provenance import provenance
from condlr.suite.config import CONF
from condlr.suite.sweeps import plan
from condlr.suite.sweeps.plan import experiments_of, of_experiment, of_experiments
from condlr.suite.sweeps.status import survey
from tests.helpers import ROOT, SMALL, complains, configured

# What an experiment sweeps over, the arguments given beside it, and how many runs that makes.
WAYS = {
    "lists": ("{row: 'baseline,vanilla-c0.5', seed: '0,1'}", [], 4),
    "ranges": ("{method: vanilla, seed: range(3)}", [], 3),
    "choices": ("{row: 'choice(baseline,vanilla-c0.5)', seed: 'choice(4,5)'}", [], 4),
    "globs": ("{row: 'glob(vanilla-c*)'}", [], 2),
    "one_run_for_all_compressions": ("{method: 'baseline,vanilla', compression: '0.5,0.8'}", [], 3),
    "a_list_in_a_value": ("{method: baseline, protocol.lr_milestones: '[1,2],[1,3]'}", [], 2),
    "interpolations": ("{method: baseline, seed: '1,2'}", ["protocol.epochs=${seed}"], 2),
    "interpolations_of_hydra": ("{method: 'baseline,vanilla'}", ["seed=${hydra:job.num}"], 2),
    "seeds_of_the_command_line": ("{row: 'baseline,vanilla-c0.5'}", ["seed=range(2)"], 4),
    "instead_of_its_own": ("{row: 'baseline,vanilla-c0.5', seed: '0,1'}", ["row=baseline", "seed=7"], 1),
    "in_every_combination": ("{method: baseline}", ["seed=0,1", "protocol.lr=0.1,0.2"], 4),
    "nothing": ("{}", ["method=baseline"], 1),
}


@pytest.fixture
def ask(script, tmp_path, monkeypatch):
    """The ids of the runs that a sweep makes, an estimate counts, status misses and provenance expects."""
    folder = tmp_path / "conf"
    folder.mkdir()
    for path in plan.CONF.iterdir():
        if path.name != "experiment":
            (folder / path.name).symlink_to(path)
    (folder / "experiment").mkdir()
    monkeypatch.setattr(plan, "CONF", folder)
    plan.of_experiment.cache_clear()

    def experiment(name, params, study=None):
        (folder / "experiment" / f"{name}.yaml").write_text(
            f"# @package _global_\ndefaults:\n  - override /dataset: digits\n  - override /protocol: demo\n"
            f"study: {study or name}\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params: {params}\n"
        )

    def answers(name, arguments):
        made, tried = [], []
        command = ["--config-dir", str(folder), f"experiment={name}", *arguments]
        monkeypatch.setattr("condlr.suite.sweeps.sweep.carry_out", made.append)
        script("train", "-m", *command)
        ids = [plan.check(values).run_id for values in made]
        monkeypatch.setattr(
            "condlr.suite.sweeps.estimate.Estimate._measure", lambda _, c, __: tried.append(c) or (1.0, 1.0)
        )
        status, out, err = script("estimate", "-m", *command)
        assert status == 0, err
        return ids, int(re.search(r": (\d+) runs?, 0 done", out)[1])

    yield SimpleNamespace(experiment=experiment, answers=answers, folder=folder / "experiment")
    plan.of_experiment.cache_clear()


# What differs in the grammar of a sweep alone is for make test-long
LONG = {"ranges", "choices", "a_list_in_a_value", "interpolations_of_hydra", "nothing"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.long] if way in LONG else []) for way in WAYS]
)
def test_all_who_ask_get_one_answer(ask, tmp_path, way):
    params, arguments, count = WAYS[way]
    ask.experiment("study", params)
    swept, estimated = ask.answers("study", arguments)
    jobs = of_experiment("study", *arguments)
    assert (len(swept), estimated) == (count, count)
    assert [job.config.run_id for job in jobs] == swept
    noted = read_csv(tmp_path / "runs" / "study" / "planned.csv")
    assert [line["run_id"] for line in noted] == swept
    assert [line["overrides"] for line in noted] == [" ".join(job.overrides) for job in jobs]
    found = survey(tmp_path / "runs" / "study", plan.wanted(jobs))
    assert sorted(run.name for run in found.runs) == sorted(swept), (
        "what a sweep noted covers what the experiment asks for"
    )
    assert {run.state for run in found.runs} == {"missing"}
    untouched = survey(tmp_path / "elsewhere", plan.wanted(jobs))
    assert len(untouched.runs) == count
    rows = [(run.label, run.compression, run.epochs) for run in found.runs]
    assert sorted(rows) == sorted((run.label, run.compression, run.epochs) for run in untouched.runs)


@pytest.mark.slow
def test_provenance_asks_for_the_same_runs(ask, monkeypatch):
    ask.experiment("first", "{row: 'glob(vanilla-c*)', seed: range(3)}", study="study")
    ask.experiment("second", "{method: baseline, seed: 'choice(0,1)'}", study="study")
    ask.experiment("again", "{method: baseline, seed: 1}", study="study")
    monkeypatch.setattr(
        "condlr.report.provenance.experiments_of", lambda study: experiments_of(study, ask.folder)
    )
    jobs, troubles = of_experiments(experiments_of("study", ask.folder))
    assert not troubles
    assert len(jobs) == 2 * 3 + 2, "a run that two experiments name is one"
    cells = pd.DataFrame([{"run_id": job.config.run_id, **job.config.row} for job in jobs[:5]])
    cells = cells.assign(official_data=True, seconds=1.0, attack="fgsm", norm="linf", n=1, status="done")
    assert (provenance(cells, None, "study").planned, provenance(cells, None, "study").missing) == (8, 3)
    assert provenance(cells, None, "nobody's").planned is None


@pytest.mark.slow
def test_several_experiments_are_the_runs_of_each(ask):
    ask.experiment("first", "{row: 'baseline,vanilla-c0.5'}")
    ask.experiment("second", "{method: vanilla, seed: range(3)}")
    swept, estimated = ask.answers("first,second", [])
    whole = [job.config.run_id for name in ("first", "second") for job in of_experiment(name)]
    assert swept == whole, "a run of each study, also where they are alike"
    assert (estimated, len(whole)) == (5, 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["seed=1,2", "budget=40e3,null", "protocol.lr=0.1,1e-2"],
        ["compression=0.3,0.6", "protocol.lr_milestones=[1],[1,2]", "study=a,b"],
        ["attack.eps=0.3,[0.1,0.2]", "seed=1,2"],
        ["protocol.adversarial=null,{eps:0.1},{eps:0.1,attack:fgsm}", "seed=1,2"],
        ["penalty=so,mhe", "++penalty.every=1,2", "seed=3"],
        ["seed=1,2", "study=${method.name}-${seed},plain", "protocol.epochs=${seed}"],
        ["seed=1,2", "study=plain,a${hydra:job.num}"],
        # Whose order counts
        ["compression=0.3,0.6", "++compression=0.4", "seed=1,2"],
        ["seed=1,2", "protocol.adversarial=null", "++protocol.adversarial={eps:0.3}"],
        ["protocol.lr=0.1,0.01", "protocol={lr:0.05}", "seed=1,2"],
        ["seed=1,2", "protocol.momentum=0.5", "~protocol.momentum", "+protocol.momentum=0.4"],
    ],
)
def test_each_config_is_the_one_that_is_composed_alone(arguments):
    jobs = of_experiment("demo", "row=condlr-tau0.1-c0.8,vanilla-c0.8", *arguments)
    assert len({(job.config.run_id, job.study, repr(job.config.attack)) for job in jobs}) == len(jobs) > 3
    for job in jobs:
        alone = configured(*job.overrides)
        assert (alone.run_id, alone.study) == (job.config.run_id, job.config.study)
        assert alone.identity == job.config.identity
        assert alone.attack == job.config.attack


@pytest.mark.parametrize("begun", [False, True])
def test_a_plan_leaves_hydra_as_it_was(ask, begun):
    ask.experiment("study", "{method: baseline, seed: '0,1'}")
    with initialize_config_dir(str(CONF), version_base="1.3") if begun else nullcontext():
        before = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
        assert (before[0] is not None) == begun
        assert len(of_experiment("study")) == 2
        assert (GlobalHydra.instance().hydra, HydraConfig.instance().cfg) == before


@pytest.mark.slow
def test_a_program_of_hydra_may_ask_for_a_plan(script):
    of_experiment.cache_clear()
    assert "4 runs: 4 missing" in script("status", "study=demo")[1]


def test_an_interval_has_no_single_values(script):
    complains(
        script("train", "-m", *SMALL, "protocol.lr=interval(0,1)"), r"lr=interval\(0,1\): a sweep needs"
    )


@pytest.mark.slow
def test_the_sweeper_needs_no_other_plugin_of_hydra(tmp_path):
    """Where none is installed the package hydra_plugins does not exist."""
    program = (
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "class Hidden(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        return None if name == 'hydra_plugins' else super().find_spec(name, path, target)\n"
        "sys.meta_path[sys.meta_path.index(PathFinder)] = Hidden\n"
        "sys.argv = ['train', '-m', 'dataset=digits', 'model=lenet5', 'protocol=demo', 'protocol.epochs=1',\n"
        "            'attack.eps=[0]', 'dataset.train_images=50', 'forms=factored', 'seed=0,1']\n"
        f"import runpy; runpy.run_path({str(ROOT / 'scripts' / 'train.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 runs: 2 done" in done.stdout + done.stderr
