"""Frame regularisation and its rivals beside their published numbers.

The published numbers are of other networks and of longer trainings, so the gains over the network without a
penalty are what can be compared.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from condlr.report.numbers import accuracy
from condlr.report.results import TRAINING, contexts, summarize, unharmed
from condlr.report.sheet import Column, Row, Sheet, Value
from condlr.report.shifts import shared, shift_names
from condlr.report.titles import Known, model_title, row_title, setting

SOURCE = (
    "Published: A. D. Grigoriev's slides on frame regularisation (MIPT, 2022), of networks of full width; ± "
    "as printed, its meaning is not stated. In parentheses: the gain over the row without a penalty, in "
    "points."
)
_MATCHED = (
    "The published networks stopped at an epoch at which their accuracy on CIFAR-10 is that of the first."
)
_SUCCESS = (
    "Of the images that are classified right without an attack, those that are misclassified after so many "
    "directions; all seeds together, with the 95 % interval of Wilson."
)
# The columns of the published domain shift, by our titles.
_SHIFTS = {"clean": "cifar10", "CIFAR-10-C": "cifar10c", "CINIC-10": "cinic10"}
_PREFIX = "iterations_"


def sheets(cells: pd.DataFrame, shifted: pd.DataFrame | None, paper: Path) -> Iterator[Sheet]:
    """Accuracy, accuracy on shifted images, and success of SimBA, of each setting that has such rows.

    It has them if it has the dense network without a penalty and with others, each of one weight.
    """
    runs = cells.drop_duplicates("run_id").set_index("run_id")["row_id"]
    for known, frame in contexts(summarize(cells), TRAINING):
        rows = _penalised(frame)
        if len(rows) > 1 and "none" in rows:
            beside = _Beside(known, frame, rows, paper)
            yield beside.accuracy()
            if shifted is not None and known["dataset"] == "cifar10":
                yield from beside.shifts(shifted.assign(row_id=shifted["run_id"].map(runs)))
            yield from beside.simba(cells)


def _penalised(frame: pd.DataFrame) -> dict[str, str]:
    """By its penalty, or `none`, the row_id of the dense network; empty if a penalty has several weights."""
    found: dict[str, str] = {}
    for row in frame.drop_duplicates("row_id").itertuples():
        method, _, penalty = row.label.partition("+")
        name = penalty.partition("-")[0] or "none"
        if method == "baseline":
            if name in found:
                return {}
            found[name] = row.row_id
    return found


@dataclass(frozen=True)
class _Beside:
    """The rows of one setting, and what is published beside them.

    Attributes:
        rows: the row_id of the dense network with each penalty, see `_penalised`.
    """

    known: Known
    frame: pd.DataFrame
    rows: Mapping[str, str]
    paper: Path

    def accuracy(self) -> Sheet:
        clean, published, column = unharmed(self.frame), self._published("accuracy"), self.known["dataset"]
        lines = []
        for penalty, row_id in self.rows.items():
            text = _gained(clean, row_id, self.rows["none"], "accuracy", "std")
            lines.append(Row(self._title(row_id), [Value(text)]))
            for model, part in published.groupby("model", sort=False) if column in published else ():
                table = part.set_index("method")
                if penalty in table.index:
                    text = _gained(table, penalty, "none", column, f"{column}_std")
                    lines.append(Row(f"  published, {model_title(model)}", [Value(text)], "published"))
        caption = f"{setting(self.known)}: accuracy (%) with each penalty"
        return Sheet(caption, [Column("accuracy")], [lines], rules=[SOURCE])

    def shifts(self, shifted: pd.DataFrame) -> Iterator[Sheet]:
        named = shifted.assign(title=shift_names(shifted))
        named = named[named["row_id"].isin([*self.rows.values()])]
        if named.empty:
            return
        named = pd.concat([shared(part) for _, part in named.groupby("title", sort=False)])
        by_run = named.groupby(["row_id", "run_id", "title"], sort=False)["accuracy"].mean().reset_index()
        ours = by_run.pivot_table("accuracy", "row_id", "title", sort=False)
        ours.insert(0, "clean", unharmed(self.frame)["accuracy"])
        published = self._published("domain_shift").set_index("method")
        lines = []
        for penalty, row_id in self.rows.items():
            if row_id in ours.index:
                texts = [_gained(ours, row_id, self.rows["none"], name) for name in ours]
                lines.append(Row(self._title(row_id), [*map(Value, texts)]))
                if penalty in published.index:
                    texts = [_gained(published, penalty, "none", _SHIFTS.get(name, "")) for name in ours]
                    lines.append(Row("  published", [*map(Value, texts)], "published"))
        caption = f"{setting(self.known)}: accuracy (%) on shifted images with each penalty"
        yield Sheet(caption, [*map(Column, ours)], [lines], [_MATCHED], rules=[SOURCE])

    def simba(self, cells: pd.DataFrame) -> Iterator[Sheet]:
        found = successes(cells[cells["row_id"].isin(self.frame["row_id"])])
        published = self._published("simba_success_rate").set_index("method")
        printed = {int(name.removeprefix(_PREFIX)): name for name in published if name.startswith(_PREFIX)}
        notes = [*_one_step(found[found["row_id"].eq(self.rows["none"])], published), *_doubts(published)]
        penalties = {row_id: penalty for penalty, row_id in self.rows.items()}
        for (basis, eps, n), part in found.groupby(["basis", "eps", "n"], sort=False):
            if part["directions"].max() == 1:
                continue  # such strengths are in the notes
            counts = sorted({*part["directions"]})
            lines = []
            for row_id in self.frame["row_id"].unique():
                row = part[part["row_id"].eq(row_id)]
                if row.empty:
                    continue
                shares = {mine.directions: _share(mine.fooled, mine.right) for mine in row.itertuples()}
                lines.append(Row(self._title(row_id), [Value(shares.get(count, "")) for count in counts]))
                if (penalty := penalties.get(row_id)) in published.index:
                    told = published.loc[penalty]
                    texts = [accuracy(told[printed[count]]) if count in printed else "" for count in counts]
                    lines.append(Row("  published", [*map(Value, texts)], "published"))
            attack = f"success of SimBA ({basis}) in steps of {eps:g}, {n:,} images (%)"
            columns = [Column(f"{count:,}", "directions") for count in counts]
            yield Sheet(f"{setting(self.known)}: {attack}", columns, [lines], notes, rules=[_SUCCESS, SOURCE])

    def _title(self, row_id: str) -> str:
        row = self.frame[self.frame["row_id"].eq(row_id)].iloc[0]
        return row_title(row["label"], row["compression"], row["variant"])

    def _published(self, name: str) -> pd.DataFrame:
        """A table of the slides, as fractions; empty if there is none."""
        path = self.paper / f"frame_{name}.csv"
        table = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["method", "model"])
        return table.assign(**{column: table[column] / 100 for column in table.select_dtypes("number")})


def successes(cells: pd.DataFrame) -> pd.DataFrame:
    """How often SimBA succeeds, with a line for each row, basis, step, number of images and of directions.

    Runs without an accuracy at eps 0 are left out.

    Returns:
        The columns row_id, basis, eps, n, directions, right (images that are classified right without an
        attack) and fooled (those of them that are misclassified afterwards), sums over seeds.
    """
    simba = cells[cells["attack"].astype(str).str.startswith("simba-") & cells["status"].eq("done")]
    keys = ["run_id", "attack", "n"]
    start = simba.loc[simba["eps"].eq(0), [*keys, "accuracy"]].rename(columns={"accuracy": "start"})
    struck = simba[simba["eps"].gt(0)].merge(start, on=keys)
    names = struck["attack"].str.extract(r"simba-(?P<basis>.*)-(?P<directions>\d+)$")
    struck = struck.assign(
        basis=names["basis"], n=struck["n"].astype(int), directions=names["directions"].astype(int),
        right=(struck["n"] * struck["start"]).round(),
        fooled=(struck["n"] * (struck["start"] - struck["accuracy"])).round(),
    )  # fmt: skip
    by = ["row_id", "basis", "eps", "n", "directions"]
    summed = struck.groupby(by, sort=False)[["right", "fooled"]].sum().reset_index()
    return summed.loc[summed["right"].gt(0)]


def wilson(hits: float, trials: float, z: float = 1.959964) -> tuple[float, float]:
    """The interval of Wilson (1927) for a share of `hits` in `trials`; of 95 % with the default z."""
    share, more = hits / trials, z * z / trials
    middle, spread = share + more / 2, z * math.sqrt(share * (1 - share) / trials + more / trials / 4)
    return (middle - spread) / (1 + more), (middle + spread) / (1 + more)


def sample(shares: Sequence[float]) -> tuple[int, list[float]]:
    """The smallest number of images, from 20 to 200, that explains the most of these printed shares.

    Returns:
        The number, and the shares that it cannot give, neither rounded to four digits nor cut off.
    """
    misfits = {n: [share for share in shares if not _possible(share, n)] for n in range(20, 201)}
    images = min(misfits, key=lambda n: len(misfits[n]))
    return images, misfits[images]


def _possible(share: float, images: int) -> bool:
    near = round(share * images)
    exact = [1e4 * count / images for count in (near - 1, near, near + 1)]
    return any(round(1e4 * share) in (round(value), math.floor(value)) for value in exact)


def _one_step(found: pd.DataFrame, published: pd.DataFrame) -> Iterator[str]:
    """What one step does to the network without a penalty, beside what is published."""
    one = found[found["directions"].eq(1)].sort_values("eps")
    if len(one) and "none" in published.index:
        told = ", ".join(f"{_share(row.fooled, row.right)} % at {row.eps:g}" for row in one.itertuples())
        printed = accuracy(published.loc["none", f"{_PREFIX}1"])
        yield (
            f"One direction fools the network without a penalty, by the length of the step: {told}. "
            f"Published for one iteration: {printed} %, for a length that is not stated."
        )


def _doubts(published: pd.DataFrame) -> Iterator[str]:
    """What the published shares cannot be, and what they cannot tell apart."""
    if not {"none", "frame"} <= {*published.index}:
        return
    found = {name: sample([*row]) for name, row in published.iterrows()}
    sizes = (
        f"{images} ({name}{''.join(f', but for {accuracy(share)}' for share in odd)})"
        for name, (images, odd) in found.items()
    )
    images = pd.Series({name: images for name, (images, _) in found.items()})
    variances = (published * (1 - published)).div(images, axis=0)
    error = (variances.loc["none"] + variances.loc["frame"]) ** 0.5
    scores = (published.loc["none"] - published.loc["frame"]).abs() / error
    yield (
        f"The published shares are percentages of few images: {', '.join(sizes)}. So the rows none and frame "
        f"differ by {scores.min():.1f} to {scores.max():.1f} standard errors."
    )


def _share(fooled: float, right: float) -> str:
    low, high = wilson(fooled, right)
    return f"{100 * fooled / right:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _gained(table: pd.DataFrame, row: str, start: str, column: str, std: str = "") -> str:
    """A value of the table and what it is above that of the row `start`; empty without a value."""
    if column not in table or row not in table.index or pd.isna(value := table.loc[row, column]):
        return ""
    text = accuracy(value, table.loc[row, std] if std else math.nan)
    above = table.loc[start, column] if start in table.index else math.nan
    return text if row == start or pd.isna(above) else f"{text} ({100 * (value - above):+.2f})"
