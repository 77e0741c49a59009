#!/usr/bin/env python3
"""Measure the cost of a training step: dense, low-rank, and constrained."""

import json
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from omegaconf import DictConfig

from condlr._support.errors import UserError
from condlr.suite.cli import command
from condlr.suite.programs import Benchmark
from condlr.suite.values import typed


@command("benchmark")
def main(config: DictConfig) -> None:
    """Write <results_dir>/benchmark/<device>.csv, .json, .md, .png and .pdf; print the table."""
    asked = typed(Benchmark, config)
    if asked.peers:
        return compare(asked)

    import pandas as pd
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from condlr._support.files import write, write_csv, write_text
    from condlr._support.precision import require
    from condlr.data.mnist import Mnist
    from condlr.report import speed as report
    from condlr.suite import benchmark
    from condlr.suite.environment import environment
    from condlr.suite.loading import pick_device
    from condlr.suite.penalty_cost import priced

    device = pick_device(asked.device)
    try:
        require(asked.precision, device)
    except ValueError as error:
        raise UserError(str(error)) from error
    mnist = Mnist(download=False).load(Path(asked.data_root)) if asked.epoch else None
    out = Path(asked.results_dir) / "benchmark"
    out.mkdir(parents=True, exist_ok=True)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("benchmark")

        def show(text: str, done: int, total: int) -> None:
            progress.update(task, description=text, completed=done, total=total)

        rows, facts = benchmark.measure(asked, device, show)
        facts |= environment()
        name = facts["device"]

        def write_facts() -> None:
            write(out / f"{name}.json", json.dumps(facts, indent=2).encode() + b"\n")

        write_csv(out / f"{name}.csv", rows)  # now, in case a later part fails
        write_facts()
        with TemporaryDirectory(dir=out) as scratch:  # beside the results: on a disk as runs use it
            if mnist is not None:
                progress.update(task, description="epoch", total=None)
                facts |= benchmark.epoch_against_steps(mnist, device, asked.precision, Path(scratch) / "run")
            if asked.collect:
                progress.update(task, description="collect", total=None)
                facts |= benchmark.collect_many(asked.collect, Path(scratch) / "study")
        write_facts()
        if asked.penalties:
            found = priced(asked.penalties, asked.batch_size, asked.repeats, asked.precision, device, show)
            facts |= {"penalties_width": asked.penalties, "penalties": [line._asdict() for line in found]}
            write_facts()
    frame = pd.read_csv(out / f"{name}.csv")
    lines = report.table(frame)
    console = Console()
    console = console if console.is_terminal else Console(width=170)

    def shown(header: Sequence[str], lines: Iterable[Sequence[str]], left: Container[int]) -> Table:
        view = Table(title=name, box=None, header_style="bold")
        for number, title in enumerate(header):
            view.add_column(title, justify="left" if number in left else "right")
        for line in lines:
            view.add_row(*line, end_section="CondLR, naive" in line)
        return view

    write_text(out / f"{name}.md", report.markdown(lines, facts))
    figures = [*report.figure(frame, facts, out)]  # write all files first: printing may fail on a closed pipe
    console.print(shown(report.HEADER, lines, report.LEFT))
    console.print(report.legend(facts))
    if asked.penalties:
        console.print(shown(report.PENALTIES, report.penalties(facts), (0,)))
        console.print(report.penalties_legend(facts))
    console.print(*map(str, figures), sep="\n")


def compare(asked: Benchmark) -> None:
    """Write <results_dir>/benchmark_peers/<device>.csv and .md; print the table."""
    import torch
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from condlr._support.files import write_csv, write_text
    from condlr.report import peers as report
    from condlr.suite.benchmark import file_name
    from condlr.suite.environment import environment
    from condlr.suite.loading import pick_device
    from condlr.suite.peers import peers

    device = pick_device(asked.device)
    name, out = file_name(device), Path(asked.results_dir) / "benchmark_peers"
    out.mkdir(parents=True, exist_ok=True)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("benchmark")

        def show(text: str, done: int, total: int) -> None:
            progress.update(task, description=text, completed=done, total=total)

        found = [*peers(asked.repeats, device, show)]
    write_csv(out / f"{name}.csv", [line._asdict() for line in found])
    facts = environment() | {"device": name, "threads": torch.get_num_threads()}
    write_text(out / f"{name}.md", report.markdown(found, facts))
    view = Table(title=name, box=None, header_style="bold")
    for number, title in enumerate(report.HEADER):
        view.add_column(title, justify="left" if number in report.LEFT else "right")
    for line in found:
        view.add_row(*report.cells(line))
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(view)


if __name__ == "__main__":
    main()
