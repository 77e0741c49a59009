"""The cost of a training step: dense, low-rank, constrained, and constrained as in the first public program.

All forms take turns in one process, so that their ratios hold on a machine with other work. The median of
the turns is reported.
"""

import math
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from condlr._support import machine
from condlr._support.memory import keep_freed_memory
from condlr._support.precision import products, training
from condlr.analysis.conditioning import spectra
from condlr.analysis.cost import flops, peak_bytes, state
from condlr.constraint import constrain
from condlr.data.base import Data, Images
from condlr.factorization import Scheme
from condlr.forms import choose_forms, forms
from condlr.methods.base import Method
from condlr.methods.baseline import Baseline
from condlr.methods.cayley_sgd import CayleySgd
from condlr.methods.condlr import CondLR
from condlr.methods.projected_sgd import ProjectedSgd
from condlr.models.base import Architecture
from condlr.models.lenet5 import LeNet5Options
from condlr.models.vgg16 import Vgg16
from condlr.suite.collecting import collect
from condlr.suite.engine import Trainer
from condlr.suite.graphs import GraphedStep
from condlr.suite.naive import constrain_naively, naive
from condlr.suite.programs import Benchmark
from condlr.suite.protocol import Protocol
from condlr.suite.runs import Run

NETWORKS: dict[str, tuple[type[Architecture], tuple[int, int, int]]] = {
    "lenet5": (LeNet5Options, (1, 28, 28)),
    "vgg16": (Vgg16, (3, 32, 32)),
}
# With these options our form does the same arithmetic as the first public program.
OPTIONS: dict[str, dict[str, Any]] = {
    "params": {},
    "released_code": {"centre": "mean", "preconditioner": "released_code", "momentum": "before_projection"},
}
# As the first public program trains orthonormal weights.
STIEFEL: dict[str, Any] = {
    "momentum": "inactive", "cap": "one", "tall": "free", "start": "as_is", "unit_rows": True,
    "qr_period": 101,
}  # fmt: skip
PARTS = ("forward_backward", "constraint", "step")

_CAPTURABLE = ("dense", "unconstrained", "condlr")
# Seconds of steps of one form in a turn.
_TURN = 0.1
_PRODUCT = 2048
# Epochs in the papers' tables.
_LONG = 120


@dataclass
class Program:
    """One way to train one network, with timed steps.

    Attributes:
        row: network, rank_rule, compression, tau and form, for the table.
        constrained: whether its optimiser has hooks that constrain it.
        capturable: whether its step can be recorded as a CUDA graph.
        seconds: measured, by part.
        flops: of products and convolutions in a step; factorisations are not counted.
        peak_mb: weights, buffers, momenta and the peak of a step's temporary memory, in 1e6 bytes.
    """

    row: dict[str, Any]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    images: Tensor
    labels: Tensor
    precision: str
    constrained: bool = False
    capturable: bool = False
    seconds: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})
    flops: float = math.nan
    peak_mb: float = math.nan

    def __post_init__(self) -> None:
        self.ticks: list[float] | None = None  # None outside timed steps: a graph must not synchronise
        self.graph = GraphedStep(self._plain_step) if self.images.is_cuda and self.capturable else None

    def tick(self, *_: object) -> None:
        """Record the time."""
        if self.ticks is None:
            return
        if self.images.is_cuda:
            torch.cuda.synchronize(self.images.device)
        self.ticks.append(time.perf_counter())

    def _forward_backward(self, images: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(images), labels).backward()

    def _plain_step(self, images: Tensor, labels: Tensor) -> None:
        self._forward_backward(images, labels)
        self.optimizer.step()

    def turn(self) -> None:
        """Take steps for `_TURN` seconds and record the times of their parts."""
        known = self.seconds["forward_backward"]
        if not known or known[-1] < _TURN:  # the first step finds another form's data in the caches
            self._timed_step(count=False)
        started = time.perf_counter()
        while time.perf_counter() - started < _TURN:
            self._timed_step(count=True)
        if self.graph:  # timed as a whole: when parts are timed, the device waits for Python
            steps = 20
            with training(self.model, self.precision, self.images.device):
                for number in range(-5, steps):
                    if number == 0:
                        torch.cuda.synchronize(self.images.device)
                        started = time.perf_counter()
                    self.graph(self.images, self.labels)
                torch.cuda.synchronize(self.images.device)
            self.seconds["step"].append((time.perf_counter() - started) / steps)

    def _timed_step(self, count: bool) -> None:
        self.ticks = []
        with training(self.model, self.precision, self.images.device):
            self.tick()
            self._forward_backward(self.images, self.labels)
            self.tick()
            self.optimizer.step()
            self.tick()
        (first, done, *hooks, last), self.ticks = self.ticks, None
        if not count:
            return
        self.seconds["forward_backward"].append(done - first)
        if self.constrained:
            before, directed, moved, settled = hooks
            self.seconds["constraint"].append(directed - before + settled - moved)
        if not self.graph:
            self.seconds["step"].append(last - first)

    def weigh(self) -> None:
        """Count the operations and the memory of a step."""

        def step() -> None:
            self._plain_step(self.images, self.labels)

        with training(self.model, self.precision, self.images.device):
            self.flops = flops(step)
            self.optimizer.zero_grad()
            held = [*state(self.model, self.optimizer), self.images]
            self.peak_mb = peak_bytes(step, held, self.images.device) / 1e6

    def rows(self, peak: float) -> Iterator[dict[str, Any]]:
        """A row of the CSV for each part; `peak` is the machine's operations per second."""
        for part in PARTS:
            if not self.seconds[part]:
                continue
            seconds = statistics.median(self.seconds[part])
            step = part == "step"
            yield self.row | {
                "part": part,
                "milliseconds": round(1e3 * seconds, 4),
                "images_per_s": round(len(self.images) / seconds, 1) if step else None,
                "peak_mb": round(self.peak_mb, 1) if step else None,
                "share_of_peak": round(self.flops / seconds / peak, 4) if step else None,
            }


def random_batch(shape: tuple[int, int, int], size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random images of ten classes, as training gets them."""
    pixels = torch.randint(256, (size, *shape), dtype=torch.uint8)
    return next(Images(pixels, torch.randint(10, (size,))).to(device).batches(size))


def programs(asked: Benchmark, network: str, device: torch.device) -> list[Program]:
    """All requested forms of a network, with a batch of random images."""
    kind, shape = NETWORKS[network]
    torch.manual_seed(0)
    batch = random_batch(shape, asked.batch_size, device)
    made = []

    def add(form: str, method: Method, scheme: Scheme, tau: float | None = None) -> None:
        torch.manual_seed(1)
        model = method.apply(kind().build(shape, 10), scheme)
        model = (naive(model) if form == "naive" else model).to(device).train()
        if form in ("unconstrained", "condlr"):
            with training(model, asked.precision, device):
                choose_forms(model, batch[0])
        rank_rule = scheme.rank_rule if scheme.compression is not None else None
        row = {
            "network": network,
            "rank_rule": rank_rule,
            "compression": scheme.compression,
            "tau": tau,
            "form": form,
        }
        # Small steps: hundreds of them on one batch must not change the amount of work.
        kind_of = type(method) if form in ("cayley_sgd", "projected_sgd") else Method
        optimizer = kind_of.optimizer(method, model, lr=1e-3, momentum=0.3)
        released = scheme.rank_rule == "released_code" and form == "condlr"
        program = Program(
            row, model, optimizer, *batch, asked.precision,
            constrained=form in ("condlr", "naive"), capturable=form in _CAPTURABLE and not released,
        )  # fmt: skip
        if program.constrained:
            assert tau is not None
            optimizer.register_step_pre_hook(program.tick)
            optimizer.register_step_post_hook(program.tick)
            if form == "condlr":
                constrain(optimizer, model, tau, **OPTIONS[scheme.rank_rule])
            else:
                constrain_naively(optimizer, model, tau)
            optimizer.register_step_pre_hook(program.tick)
            optimizer.register_step_post_hook(program.tick)
        made.append(program)

    dense = Scheme(None, classifier="dense")
    add("dense", Baseline(), dense)
    add("cayley_sgd", CayleySgd(inner_iterations=4, first="momentum", **STIEFEL), dense)
    add("projected_sgd", ProjectedSgd(**STIEFEL), dense)
    for rank_rule in asked.rank_rules:
        for compression in asked.compressions:
            scheme = Scheme(compression, rank_rule, "dense")
            add("unconstrained", Method(), scheme)
            add("condlr", CondLR(), scheme, asked.tau)
            add("naive", CondLR(), scheme, asked.tau)
    return made


def product_rate(device: torch.device, precision: str) -> float:
    """Operations per second in a product of large matrices."""
    A = torch.randn(_PRODUCT, _PRODUCT, device=device)
    A = A.bfloat16() if precision == "bf16" else A
    seconds = []
    with products("tf32" if precision == "tf32" else "ieee"):
        for _ in range(3):
            started = time.perf_counter()
            torch.mm(A, A)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
    return 2 * _PRODUCT**3 / min(seconds)


def epoch_against_steps(data: Data, device: torch.device, precision: str, scratch: Path) -> dict[str, float]:
    """Seconds of an epoch of LeNet5 on the real MNIST (CondLR, 80 %), and of as many steps on one batch.

    The difference is the time to shuffle, gather and convert images, and to make the history. The time of
    the run store is measured separately, with files in `scratch`.
    """
    data = data.to(device)
    protocol = Protocol(
        "benchmark", 2, 128, 0.1, 0.3, [], 1.0, 0.0, "params", "dense", "spectral", "none", 0.1, True, {}
    )
    torch.manual_seed(0)
    method = CondLR()
    model = method.apply(LeNet5Options().build(data.shape, data.classes), Scheme(0.8, classifier="dense"))
    trainer = Trainer(model.to(device), method, data, protocol, 0, precision)
    batch = next(data.train.batches(protocol.batch_size))
    choose_forms(model, batch[0])
    steps: list[float] = []
    epochs: list[float] = []
    marks = [0.0]

    def probe(trainer: Trainer) -> None:
        epochs.append(time.perf_counter() - marks[0])
        take_step = trainer._graphs.get(False, trainer._take_step)
        with training(model, precision, device):
            for _ in range(trainer.batches // 4):
                started = time.perf_counter()
                take_step(*batch)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                steps.append(time.perf_counter() - started)
        trainer.totals.clear()
        marks[0] = time.perf_counter()

    trainer.history.append(trainer._row(None))
    probe(trainer)
    epochs.clear()
    trainer.fit(on_epoch=probe)
    alone = statistics.median(steps) * trainer.batches
    facts = {"epoch_seconds": statistics.median(epochs), "steps_seconds": alone}
    return facts | _store_seconds(trainer, Run(scratch))


def _store_seconds(trainer: Trainer, run: Run) -> dict[str, float]:
    """Seconds to write a run's history and checkpoint (once an epoch), and its spectra (once a run)."""
    run.directory.mkdir(parents=True)

    def history() -> None:
        trainer.method.audit(trainer.model)
        run.write_table("history.csv", [trainer._row(None)] * _LONG)

    def checkpoint() -> None:
        run.save_checkpoint(trainer.state_dict(), "benchmark")

    def spectrum() -> None:
        found = spectra(trainer.model)
        lines = [{"layer": name, "value": v} for name, part in found.items() for v in part.tolist()]
        run.write_table("spectra.csv", lines * 2)

    return {f"{part.__name__}_seconds": _median_seconds(part) for part in (history, checkpoint, spectrum)}


def _median_seconds(work: Callable[[], None], repeats: int = 9) -> float:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def collect_many(count: int, study: Path) -> dict[str, float]:
    """Seconds to collect `count` artificial runs of LeNet5 of the usual size, written to `study`."""
    row = {"label": "condlr", "compression": 0.8, "compresses": True, "seed": 0, "row_id": "0"}
    layers = {"conv1": 20, "conv2": 50, "fc1": 500, "fc2": 10}
    conditions = {f"cond_{name}": 1.1 for name in layers}
    history = [{"epoch": n, "train_loss": 0.1, "seconds": 8.0} | conditions for n in range(_LONG)]
    cells = [
        {"attack": "fgsm", "norm": "linf", "eps": n / 100, "accuracy": 0.9, "n": 10000} for n in range(10)
    ]
    values = [
        {"when": when, "layer": name, "index": index, "singular_value": 1.0}
        for when in ("start", "end") for name, width in layers.items() for index in range(width)
    ]  # fmt: skip
    for number in range(count):
        run = Run(study / f"run-{number}")
        run.directory.mkdir(parents=True)
        run.note(run_id=run.directory.name, status="done", row=row, ranks=dict.fromkeys(layers, 1))
        for name, lines in (("history", history), ("evaluation", cells), ("spectra", values)):
            run.write_table(f"{name}.csv", lines)
    started = time.perf_counter()
    collect(study)
    return {
        "collected_runs": count,
        "collected_epochs": _LONG,
        "collect_seconds": time.perf_counter() - started,
    }


def file_name(device: torch.device) -> str:
    """The device as a file name: `amd-epyc-family-26-model-2-2-threads`, `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", machine.name(device).lower()).strip("-")


def measure(
    asked: Benchmark, device: torch.device, progress: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run a benchmark.

    Args:
        asked: see `conf/benchmark.yaml`.
        device: to run on.
        progress: called with the network, the turns done and all turns.

    Returns:
        The rows of the CSV, and facts about the benchmark.
    """
    keep_freed_memory()
    rows: list[dict[str, Any]] = []
    chosen: dict[str, dict[str, str]] = {}
    operations: dict[str, float] = {}
    rates: list[float] = []
    for network in asked.networks:
        made = programs(asked, network, device)
        for number in range(asked.repeats):
            rates.append(product_rate(device, asked.precision))
            for place, program in enumerate(made):
                progress(network, number * len(made) + place, asked.repeats * len(made))
                program.turn()
        for program in made:
            program.weigh()
            row = program.row
            name = (
                network
                if row["compression"] is None
                else f"{network} {row['rank_rule']} {row['compression']:g}"
            )
            operations[f"{name} {row['form']}"] = program.flops / 1e9
            if row["form"] == "condlr":
                chosen[name] = forms(program.model)
        rows += [row for program in made for row in program.rows(max(rates))]
    facts = {
        "device": file_name(device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "precision": asked.precision,
        "batch_size": asked.batch_size,
        "repeats": asked.repeats,
        "peak_gflops": round(max(rates) / 1e9, 1),
        "gflop_per_step": {name: round(value, 4) for name, value in operations.items()},
        "forms": chosen,
    }
    return rows, facts
