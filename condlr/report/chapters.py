"""The results of a study as a document."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from condlr._support.rooms import find
from condlr.analysis.sceptic.masking import CHECKS
from condlr.report import (
    analysis,
    audit,
    comparisons,
    content,
    frames,
    glance,
    lr_layers,
    results,
    shifts,
    tables,
    theorem,
    titles,
    verdicts,
)
from condlr.report._style import Drawing
from condlr.report.claims import TABLES, by_title
from condlr.report.evidence import RULE, Claim
from condlr.report.figures import drawings
from condlr.report.numbers import accuracy, counted, duration, shown
from condlr.report.provenance import Provenance, of_flow, provenance
from condlr.report.training import training
from condlr.shifts.base import Shift
from condlr.suite.registry import analyses
from condlr.suite.sweeps.plan import experiments_of, names_seed, of_experiments

_TRAINING = "Losses, condition numbers and constraints of each run"
_STATUSES = ("pass", "note", "warning", "not done")


def document(study: Path, paper: Path, runs_dir: Path) -> content.Document:
    """The report of a study.

    Args:
        study: the directory of its collected results, in which the report will lie.
        runs_dir: where the folders of runs lie, by study.
    """
    flow = results.read_if_there(study, "flow")
    if flow is not None and not (study / "cells.csv").exists():
        first, *others = drawings(study, paper, study)
        sections = _sections(_of_flow(study, flow, others))
        return content.Document(f"{study.name}: a matrix flow", [first, theorem.LEAD], sections)
    cells, history = results.read(study), results.read(study, "history")
    beside = results.read_those(study, [*TABLES, "audit", "runs"])
    audits, shifted = beside.get("audit"), beside.get("shift")
    analysed = [*analysis.found(study)]
    origin = provenance(cells, beside.get("runs"), study.name)
    evaluated = not results.done_runs(cells).empty
    found = by_title(cells, beside) if evaluated else []
    drawn = [*drawings(study, paper, study)] if evaluated else []
    pictures, others = drawn[: len(found)], drawn[len(found) :]
    sections = {
        "Claims of the paper": _claims(found, pictures),
        "Accuracy": _accuracy(cells, paper, audits, shifted, analysed) if evaluated else (),
        "Theorem 1": () if flow is None else [theorem.LEAD, content.Fragment(theorem.markdown(flow))],
        "Figures": others[1:],
        "Audit of the attacks": () if audits is None else _audits(audits),
        "Shifts": () if shifted is None else _shifted(shifted, cells),
        "Analyses": _analyses(analysed),
        "Training": [content.Folded(_TRAINING, [training(history)])] if history["epoch"].gt(0).any() else (),
        "Runs": [_runs(cells, origin, history, study, runs_dir / study.name)],
        "Provenance": [content.Facts([*origin.facts()])],
        "To make it again": _commands(study, cells, origin),
    }
    contexts = cells[["dataset", "model"]].drop_duplicates().to_dict("records")
    networks = " and ".join(map(titles.network, contexts))
    lead = [*_lead(cells, origin, study, evaluated)]
    lead = [*others[:1], *([content.Overview(found)] if found else []), *lead]
    return content.Document(f"{study.name}: {networks}", lead, _sections(sections))


def _sections(blocks: Mapping[str, Iterable[content.Block]]) -> list[content.Section]:
    """The sections that are not empty."""
    return [content.Section(heading, made) for heading, each in blocks.items() if (made := [*each])]


def _of_flow(study: Path, flow: pd.DataFrame, drawn: Iterable[Drawing]) -> dict[str, Iterable[content.Block]]:
    """The sections of a study that follows a matrix flow and trains no network."""
    own = "" if study.name == "theorem1" else f" study={study.name}"
    return {
        "Theorem 1": [content.Fragment(theorem.markdown(flow))],
        "Figures": drawn,
        "Provenance": [content.Facts([*of_flow(flow)])],
        "To make it again": [content.Commands([f"python scripts/theorem1.py{own}", *_pages(study)])],
    }


def _lead(cells: pd.DataFrame, origin: Provenance, study: Path, evaluated: bool) -> Iterator[content.Block]:
    """One paragraph: what was run, and the accuracy at the largest strength."""
    rows, seeds, runs = cells["row_id"].nunique(), len(origin.seeds), len(origin.runs)
    statuses = ", ".join(f"{count} {status}" for status, count in origin.statuses.items())
    text = f"{counted(rows, 'row')}, {counted(seeds, 'seed')}: {counted(runs, 'run')} ({statuses})."
    if origin.missing:
        text += f" **{origin.missing} of the {origin.planned} runs of the experiment are missing.**"
    yield " ".join([text, *(_outcomes(cells) if evaluated else ["No run is done and evaluated yet."])])
    if (study / "README.md").exists():
        yield content.Link("Notes on this study", "README.md")


def _outcomes(cells: pd.DataFrame) -> Iterator[str]:
    """For each setting, the dense row and the best row of each compression under its first attack."""
    frame = results.summarize(cells)
    frame = frame[frame["eps"] > 0]
    for known, part in results.contexts(frame, results.BESIDE):
        under = _usual(part)
        n, attack = under.iloc[0][["n", "attack"]]
        # Where an attack leaves nothing of any row, a smaller strength tells more
        telling = under.loc[under["accuracy"].gt(0), "eps"]
        under = under[under["eps"].eq((under["eps"] if telling.empty else telling).max())]
        parts = []
        for compression, alike in under.groupby("compression"):
            best = alike[alike["accuracy"].round(9).eq(alike["accuracy"].round(9).max())]
            row = best.iloc[0]
            name = titles.title(row["label"], row["variant"]) if len(best) == 1 else f"{len(best)} rows"
            where = f"at {100 * float(str(compression)):g} % compression" if compression else "uncompressed"
            parts.append(f"{name} {accuracy(row['accuracy'], row['std'])} % {where}")
        strength = f"ε={under['eps'].max():g} ({titles.norm_title(known['norm'])})"
        yield (
            f"{titles.setting(known)}: the most accurate rows under {titles.attack_title(attack)} "
            f"at {strength}, {n:,} images, are {', '.join(parts)}."
        )


def _usual(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells with the most images under the attack that most rows have, usually FGSM."""
    if "attack" not in cells or cells["attack"].isna().all():
        return cells.iloc[:0]
    counts = cells.groupby(["n", "attack"])["row_id"].nunique()
    n, attack = max(counts.index, key=lambda key: (counts[key], key[0]))
    return cells.loc[cells["attack"].eq(attack) & cells["n"].eq(n)]


def _claims(claims: Sequence[Sequence[Claim]], drawn: Sequence[Drawing]) -> Iterator[content.Block]:
    if claims:
        yield verdicts.LEGEND
        for claim, picture in zip(claims, drawn, strict=True):
            yield content.Verdicts(claim, picture)
        yield content.Folded("How rows are told apart, and what the verdicts mean", [RULE])


def _accuracy(
    cells: pd.DataFrame,
    paper: Path,
    audits: pd.DataFrame | None,
    shifted: pd.DataFrame | None,
    analysed: Sequence[analysis.Found],
) -> Iterator[content.Block]:
    yield from glance.glances(cells, shifted, {name: frame for name, _, frame in analysed})
    yield from (sheet.run for sheet in frames.sheets(cells, shifted, paper))
    yield from lr_layers.sheets(cells, paper)
    made = list(tables.tables(cells, paper, audit.Marks(audits)))
    sheets = [*comparisons.by_protocol(made), *tables.table1(made, paper)]
    sheets += [table.sheet for table in made]
    sheets += [comparison.sheet for comparison in comparisons.by_attack(made)]
    yield from (sheet.run for sheet in sheets)
    if absent := results.left_out(cells):
        yield f"Not in the tables: {absent}."


def _audits(audits: pd.DataFrame) -> Iterator[content.Block]:
    """The number of passed checks and the names of the others, with the findings folded."""
    header = ["row", "ε", "images", "passed", "notes", "warnings", "not done"]
    rows = []
    keys = ["compression", "label", "seed", "run_id", "norm", "eps", "n", "attack_seed"]
    names = titles.run_titles(audits)
    for _, part in results.ordered(audits, keys).groupby(keys, sort=False):
        first = part.iloc[0]
        found = {status: part.loc[part["status"].eq(status), "check"] for status in _STATUSES}
        strength = f"{first['eps']:g} ({titles.norm_title(first['norm'])})"
        row = [names[first["run_id"]], strength, f"{first['n']:,}", str(len(found["pass"]))]
        found["not done"] = [*found["not done"], *(c for c in CHECKS if c not in {*part["check"]})]
        rows.append([*row, *(", ".join(found[status]) or "–" for status in _STATUSES[1:])])
    decide = audit.deciding(audits)
    warned = decide.loc[decide["status"].eq("warning"), "row_id"].nunique()
    yield (
        f"{counted(len(rows), 'audit')} of {len(CHECKS)} checks each: "
        + (f"**the audit warns of {counted(warned, 'row')}**." if warned else "no row is warned of.")
    )
    yield content.Grid(header, rows).filled
    summary = "What each check found, and what notes and warnings mean"
    yield content.Folded(summary, [content.Fragment(audit.markdown(audits))])


def _analyses(analysed: Sequence[analysis.Found]) -> Iterator[content.Block]:
    for _, kind, frame in analysed:
        if kind.layout != "checks":  # checks have their own chapter
            yield content.Folded(kind.title, [content.Fragment(analysis.markdown(kind, frame))])


def _shifted(shifted: pd.DataFrame, cells: pd.DataFrame) -> Iterator[content.Block]:
    yield content.Fragment(shifts.markdown(shifted, cells))
    if grids := shifts.by_severity(shifted):
        yield content.Folded("Accuracy by change and severity", [content.Fragment(grids)])


def _runs(
    cells: pd.DataFrame, origin: Provenance, history: pd.DataFrame, study: Path, folders: Path
) -> content.Folded:
    """A line for each run, with its final numbers and a link to its folder if that exists."""
    runs = results.ordered(origin.runs, ["protocol", "epochs", "compression", "label", "seed", "run_id"])
    usual = _usual(cells)
    attack, strongest = ("", 0.0) if usual.empty else (usual["attack"].iloc[0], usual["eps"].max())
    accuracies = usual.set_index(["run_id", "eps"])["accuracy"].to_dict()
    cond = cells.drop_duplicates("run_id").set_index("run_id")["cond"]
    losses = history.groupby("run_id")["train_loss"].last().to_dict()
    names, why = titles.run_titles(runs), bool(runs["reason"].notna().any())
    under = [f"{titles.attack_title(attack)} ε={strongest:g}"] if strongest else []
    header = ["row", "status", *["reason"] * why, "trained", "last loss", "cond", "clean", *under, "folder"]
    rows = []
    for run in runs.to_dict("records"):
        name = run["run_id"]
        known = [accuracies.get((name, eps)) for eps in (0.0, strongest)[: 1 + len(under)]]
        folder = folders / name
        here = content.Link(name, f"{quote(os.fsencode(os.path.relpath(folder, study)))}/")
        rows.append([
            names[name], run["status"], *[shown(run["reason"])] * why,
            "–" if pd.isna(run["train_seconds"]) else duration(run["train_seconds"]),
            shown(losses.get(name)), shown(cond.get(name)), *map(accuracy, known),
            here if folder.is_dir() else name,
        ])  # fmt: skip
    summary = f"{len(rows)} runs: status, time, last figures and folder"
    return content.Folded(summary, [content.Grid(header, rows).filled])


def _commands(study: Path, cells: pd.DataFrame, origin: Provenance) -> Iterator[content.Block]:
    """The commands that train, evaluate and report the study, as its results record them."""
    attacks = {*cells["attack"].dropna()} - {*_usual(cells)["attack"]} if "attack" in cells else ()
    others = [titles.attack_title(attack) for attack in sorted(attacks)]
    seeds = f" seed={','.join(map(str, origin.seeds))}"
    lines = [
        f"python scripts/train.py experiment={name}"
        f"{'' if all(map(names_seed, of_experiments([name])[0])) else seeds}"
        for name in experiments_of(study.name)
    ]
    if not lines:
        yield "The runs were trained one by one: `config.yaml` in the folder of each says how."
    if others:
        yield f"Attacked afterwards, too, with `scripts/evaluate.py attack=...`: {'; '.join(others)}."
    kinds = analyses().items()
    keys = [*dict.fromkeys(_shifts(study))]
    if made := [name for name, kind in kinds if not kind.always and (study / f"{name}.csv").exists()]:
        keys.append(f"'analysis=[{','.join(made)}]'" if len(made) > 1 else f"analysis={made[0]}")
    lines += [f"python scripts/evaluate.py run='runs/{study.name}/*' {key}" for key in keys]
    yield content.Commands([*lines, *_pages(study)])


def _shifts(study: Path) -> Iterator[str]:
    """The keys of the programs that made the shifted images; fewer images than attacked are asked for."""
    shifted = results.read_if_there(study, "shift")
    if shifted is None:
        return
    whole = results.read(study)["n"].max()
    for (name, n), sets in shifted.groupby(["shift", "n"], sort=False):
        kind = find("shifts", name, Shift)
        images = f" shift.images={n}" if n < whole else ""
        yield from (f"shift={name}{key}{images}" for key in kind.options_of(sets["name"].unique()))


def _pages(study: Path) -> list[str]:
    return [f"make {target} STUDY={study.name}" for target in ("tables", "figures", "report")]
