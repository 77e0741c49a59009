"""The progress of a study's runs, for the terminal: problems first, then a line for each row."""

import math
import time
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import suppress
from statistics import median

import pandas as pd
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from condlr.report.numbers import counted, duration
from condlr.report.titles import place, row_title, run_title, told_apart
from condlr.suite.sweeps.status import Progress, RowKey, RunStatus, Study

# States whose reason is shown. The words say the same as the colours.
_TROUBLE = ("stalled", "failed", "damaged", "diverged", "interrupted")
_STYLES = {
    "done": "green", "running": "cyan", "stalled": "yellow", "interrupted": "yellow", "failed": "red",
    "diverged": "magenta", "damaged": "red", "missing": "dim",
}  # fmt: skip
_MANY = 4  # from this number on, runs with the same problem share a line
# Limits for a low terminal: the number of running runs, and of problems, that have their own line
_LEVELS = ((None, None), (None, 8), (None, 4), (12, 4), (6, 2), (3, 1), (1, 1))


def print_status(study: Study, console: Console) -> None:
    """Print the whole status once."""
    console.print(*_blocks(study), sep="\n", highlight=False)


def watch(look: Callable[[], Study], console: Console, every: float) -> None:
    """Show the result of `look` every `every` seconds, until no run is left or Ctrl-C is pressed."""
    study = look()
    with (
        suppress(KeyboardInterrupt),
        Live(console=console, auto_refresh=False, vertical_overflow="crop") as live,
    ):
        while True:
            live.update(fitting(study, console), refresh=True)
            if study.at_rest:
                return
            time.sleep(every)
            study = look()


def fitting(study: Study, console: Console) -> Group:
    """As much as fits the terminal's height.

    First, each problem is cut to one line, and rows whose runs are all done or all missing share a line.
    Then fewer runs get their own line.
    """
    shown = Group(*_blocks(study))
    for level in _LEVELS:
        if _height(shown, console) < console.height:
            break
        shown = Group(*_blocks(study, *level, fold=True))
    return shown


def _height(shown: RenderableType, console: Console) -> int:
    return len(console.render_lines(shown, pad=False))


def _blocks(
    study: Study, working: int | None = None, wrong: int | None = None, fold: bool = False
) -> Sequence[RenderableType]:
    """The parts, separated by empty lines; `working` and `wrong` limit the runs with a line of their own."""
    parts = [_summary(study), _working(study, working), _troubles(study, wrong, fold), _rows(study, fold)]
    return [each for part in parts if part is not None for each in (Text(""), part)][1:]


def _summary(study: Study) -> Text:
    text = Text(f"{study.directory}: {counted(len(study.runs), 'run')}: ")
    counts = (Text(f"{count} {state}", _STYLES[state]) for state, count in study.counts.items())
    text.append_text(Text(", ").join(counts))
    if left := _time_left(study):
        text.append(f"\n{left}")
    for note in study.notes:
        text.append(f"\n{note}", "red")
    return text


def _time_left(study: Study) -> str:
    left = study.time_left
    if left is None:
        return ""
    known = "" if not left.uncounted else (
        f" for {left.counted} of the {left.counted + left.uncounted} left, of the others nothing is known"
    )  # fmt: skip
    rate = f"{left.at_once} at once, as now" if left.at_once > 1 else "one run after the other"
    return f"about {duration(left.seconds)} to go{known} ({rate})"


def _working(study: Study, limit: int | None) -> RenderableType | None:
    """A line for each running run."""
    running = [run for run in study.runs if run.state == "running"]
    if not running:
        return None
    names = ("running", "epoch", "batch", "left", "heard of", "process, host")
    lines = _view(names, right=("epoch", "batch", "left", "heard of"))
    lines.columns[0].style = _STYLES["running"]
    for run in running[:limit]:
        progress = run.progress or Progress()
        batch = f"{progress.batch}/{progress.batches}" if progress.batch and not progress.trained else ""
        owner = Text(f"{run.owner.pid}, {run.owner.host}" if run.owner else "")
        lines.add_row(Text(_title(run)), _epoch(progress), batch, _left(progress), _heard(run), owner)
    return Group(lines, *_rest(len(running), limit))


def _epoch(progress: Progress) -> str:
    """The current epoch, counted from 1; the number of epochs once all are done."""
    if progress.epochs is None:
        return ""
    return f"{min(progress.epoch + 1, progress.epochs)}/{progress.epochs}"


def _left(progress: Progress) -> str:
    if progress.trained:
        return "attacking"
    return "unknown" if progress.seconds_left is None else duration(progress.seconds_left)


def _heard(run: RunStatus) -> str:
    return "" if math.isinf(run.silence) else f"{duration(round(run.silence))} ago".replace(".0 s", " s")


def _troubles(study: Study, limit: int | None, terse: bool) -> RenderableType | None:
    """Each problem with its reason and log; with `terse`, one line for each problem."""
    found = [(state, *trouble) for state in _TROUBLE for trouble in _alike(study.runs, state)]
    if not found:
        return None
    width = max(len(state) for state, *_ in found)
    parts: list[RenderableType] = []
    for state, runs, reason in found[:limit]:
        which = _several(runs) if len(runs) > 1 else f"{_title(runs[0])}{_how_far(runs[0])}"
        text = f"{which}: {reason}" if reason else which
        line = Table.grid(padding=(0, 2, 0, 0))
        line.add_column(min_width=width, no_wrap=True)
        line.add_column()
        overflow = "ellipsis" if terse else "fold"
        line.add_row(Text(state, _STYLES[state]), Text(text, no_wrap=terse, overflow=overflow))
        parts.append(line)
        # The log of the first run, if it says more than the reason
        if runs[0].log and state != "interrupted" and not terse:
            log = Text(str(runs[0].log), "dim", overflow="fold")
            parts.append(Padding(log, (0, 0, 0, 2), expand=False))
    return Group(*parts, *_rest(len(found), limit))


def _alike(runs: Sequence[RunStatus], state: str) -> Iterator[tuple[list[RunStatus], str]]:
    """The runs with a problem, each alone or many together for one reason, such as a full disk."""
    by_reason: dict[str, list[RunStatus]] = {}
    for run in runs:
        damaged = state == "damaged" and run.damage
        if run.state == state or damaged:
            reason = run.damage if damaged else run.reason
            if state == "stalled" and not math.isinf(run.silence):
                reason += f", last heard of {_heard(run)}"
            by_reason.setdefault(reason, []).append(run)
    for reason, alike in by_reason.items():
        together = len(alike) >= _MANY and all(run.label for run in alike)
        yield from [(alike, reason)] if together else (([run], reason) for run in alike)


def _several(runs: Sequence[RunStatus]) -> str:
    """`20 runs, DLRT, 50 % (seeds 0-9); Vanilla, 50 % (seeds 0-9)`."""
    rows = _by_row(runs).items()
    names = (f"{row_title(row.label, row.compression)}{_seeds(alike)}" for row, alike in rows)
    return f"{len(runs)} runs, {'; '.join(names)}"


def _how_far(run: RunStatus) -> str:
    progress = run.progress
    if progress is None or not progress.epoch or not progress.epochs:
        return ""
    return f" ({progress.epoch} of {progress.epochs} epochs done)"


def _view(names: Sequence[str], right: Container[str]) -> Table:
    """A table with these columns: those in `right` are aligned so and do not wrap."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        if name in right:
            table.add_column(name, justify="right", no_wrap=True)
        else:
            table.add_column(name, overflow="fold")
    return table


def _rest(count: int, limit: int | None) -> list[Text]:
    return [] if limit is None or count <= limit else [Text(f"and {count - limit} more", "dim")]


def _rows(study: Study, fold: bool) -> RenderableType | None:
    """A line for each row; with `fold`, rows whose runs are all done or all missing share one."""
    rows = _by_row(study.runs)
    if not rows:
        return None
    lengths = Counter(row[:2] for row in {row._replace(row_id="") for row in rows})
    told = _told_apart(rows)
    lines = _view(("row", "done", "per run", "else"), right=("done", "per run"))
    alike: dict[str, list[str]] = {}
    for row, runs in rows.items():
        name = row_title(row.label, row.compression)
        if lengths[row[:2]] > 1 and row.epochs is not None:
            name += f", {counted(row.epochs, 'epoch')}"
        name += f" ({told[row]})" if told.get(row) else ""
        states = {run.state for run in runs}
        if fold and len(states) == 1 and states <= {"done", "missing"}:
            alike.setdefault(runs[0].state, []).append(f"{name} ({len(runs)})")
            continue
        done = [run for run in runs if run.state == "done"]
        known = [run.seconds for run in done if run.seconds is not None]
        per_run = duration(median(known)) if known else ""
        lines.add_row(Text(name), f"{len(done)}/{len(runs)}", per_run, _others(runs))
    folded = [Text(f"all {state}: {'; '.join(names)}", _STYLES[state]) for state, names in alike.items()]
    return Group(*([lines] if lines.row_count else []), *folded)


def _told_apart(rows: Mapping[RowKey, Sequence[RunStatus]]) -> dict[RowKey, str]:
    """What tells rows of one name and length apart."""
    known = {row: runs[0].about for row, runs in rows.items() if runs[0].about}
    if not known:
        return {}
    facts = [{**about, **row._asdict(), "run_id": row, "seed": 0} for row, about in known.items()]
    told = told_apart(pd.DataFrame(facts).assign(run_id=range(len(facts))), ["epochs"])
    return dict(zip(known, told.values(), strict=True))


def _by_row(runs: Sequence[RunStatus]) -> dict[RowKey, list[RunStatus]]:
    """In the order of the paper's tables."""
    rows: dict[RowKey, list[RunStatus]] = {}
    for run in runs:
        if run.label:
            rows.setdefault(run.row, []).append(run)
    return dict(
        sorted(rows.items(), key=lambda row: (row[0][1], place(row[0][0]), row[0][0], row[0].epochs or 0))
    )


def _others(runs: Sequence[RunStatus]) -> Text:
    """`1 running, 2 missing (seeds 3, 4)`."""
    by_state = {state: [run for run in runs if run.state == state] for state in _STYLES if state != "done"}
    return Text(", ").join(
        Text(f"{len(alike)} {state}{_seeds(alike)}", _STYLES[state])
        for state, alike in by_state.items()
        if alike
    )


def _seeds(runs: Sequence[RunStatus]) -> str:
    """` (seeds 0-2, 4)`; empty if no seed is known."""
    seeds = sorted({run.seed for run in runs if run.seed is not None})
    if not seeds:
        return ""
    spans: list[list[int]] = []
    for seed in seeds:
        if spans and seed == spans[-1][1] + 1:
            spans[-1][1] = seed
        else:
            spans.append([seed, seed])
    parts = [f"{first}" if first == last else f"{first}-{last}" for first, last in spans]
    return f" (seed{'' if len(seeds) == 1 else 's'} {', '.join(parts)})"


def _title(run: RunStatus) -> str:
    if not run.label:
        return run.name
    if run.seed is None:
        return row_title(run.label, run.compression)
    return run_title({"label": run.label, "compression": run.compression, "seed": run.seed})
