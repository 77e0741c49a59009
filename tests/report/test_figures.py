"""What is drawn of a study: every row a line of its own, from the tables that are there."""

import base64
import errno
import os
import pickle
import re
import shutil
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from condlr._support.errors import UserError
from condlr.analysis.theory.flows import Settings
from condlr.analysis.theory.theorem1 import errors
from condlr.report import (
    _style,
    accuracies,
    evolution,
    reconstruction,
    representations,
    results,
    spectra,
    titles,
    tradeoffs,
    verdicts,
)
from condlr.report.claims import by_title
from condlr.report.figures import drawings
from tests.helpers import ROOT, complains
from tests.report.study import PAPER, cells, draw_pictures_alone

pytestmark = pytest.mark.slow  # each draws

DECAY = "lr=0.1 lr_milestones=[7,9] decay=2.0"


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, in order, kept instead of closed."""
    kept = []
    draw_pictures_alone(monkeypatch)
    monkeypatch.setattr(_style.plt, "close", kept.append)
    yield kept
    monkeypatch.undo()
    plt.close("all")


@pytest.mark.parametrize("kind", ["png", "pdf"])
def test_a_figure_that_could_not_be_written_leaves_the_one_before(tmp_path, monkeypatch, kind):
    before = b"a figure of yesterday"
    (tmp_path / f"x.{kind}").write_bytes(before)
    save = Figure.savefig

    def full(figure, file, *, format, **keys):
        save(figure, file, format=format, **keys)
        if format == kind:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space"):
        [*_style.saved(plt.figure(), tmp_path, "x")]
    assert (tmp_path / f"x.{kind}").read_bytes() == before


def study(**changes):
    return cells(device="cpu, 1 threads", **changes)


def seventeen():
    """The rows of Table 2, one seed each."""
    dense = [(label, 0.0) for label in ("baseline", "cayley_sgd", "projected_sgd")]
    factored = (
        "condlr-tau0",
        "condlr-tau0.1",
        "condlr-tau0.5",
        "condlr-unit",
        "dlrt",
        "vanilla",
        "svd_prune",
    )
    one = study().query("label == 'vanilla' and seed == 0")
    rows = [*dense, *((label, each) for each in (0.5, 0.8) for label in factored)]
    return pd.concat(
        [
            one.assign(
                label=label, compression=c, train_compression=c, deploy_compression=c + 0.1,
                row_id=f"{label}{c}", run_id=f"{label}{c}", seconds=10 * number + 10,
            )
            for number, (label, c) in enumerate(rows)
        ]
    )  # fmt: skip


def history(frame):
    runs = frame.drop_duplicates("run_id")
    return pd.concat([runs.assign(step=step, cond=2.0**step) for step in range(4)])


def steps(frame):
    """Layers a and b: cond 10^4 and 10 at first, then 2 and 3; seed 1 has twice, and twice, of that."""
    runs = frame.drop_duplicates("run_id")[["run_id", "row_id", "seed", "label", "compression"]]
    twice = 1.0 + runs["seed"].eq(1)
    return pd.concat(
        runs.assign(
            step=step, train_loss=1.0 / step if step else None, train_accuracy=0.5 if step else None,
            cond_a=twice * (1e4 if step == 0 else 2.0), cond_b=twice * (10.0 if step == 0 else 3.0),
        )
        for step in (0, 5, 10)
    ).astype({"train_loss": float, "train_accuracy": float})  # fmt: skip


def values(frame):
    runs = frame.drop_duplicates("run_id")[["run_id", "row_id", "seed"]]
    return pd.concat(
        runs.assign(when=when, layer=layer, index=index, singular_value=(1 + runs["seed"]) * 0.5**index)
        for when in ("start", "end") for layer in ("conv1", "fc1") for index in range(1, 5)
    )  # fmt: skip


def write(directory, **tables):
    for name, frame in tables.items():
        frame.to_csv(directory / f"{name}.csv", index=False)


def lines(axes, **looks):
    return [line for line in axes.get_lines() if all(plt.getp(line, key) == x for key, x in looks.items())]


def texts(figure):
    words = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    return [word for word in words if word.strip()]


def test_the_files_are_a_picture_and_a_vector_drawing_with_its_fonts(tmp_path):
    (made,) = accuracies.robustness(study(), history(study()), PAPER, tmp_path)
    assert [made.png.name, made.pdf.name] == ["robustness.png", "robustness.pdf"]
    assert made.png.read_bytes().startswith(b"\x89PNG")
    first = made.pdf.read_bytes()
    assert first.startswith(b"%PDF")
    assert b"/FontFile2" in first
    assert b"/Subtype /Image" not in first
    assert made.caption.startswith(
        "LeNet5 on MNIST, protocol paper, 3 epochs: accuracy under FGSM on 100 images"
    )
    assert "lr=0.1" in made.caption
    list(accuracies.robustness(study(), history(study()), PAPER, tmp_path))
    assert made.pdf.read_bytes() == first, "the same results give the same file"
    assert not plt.get_fignums()


def test_published_values_are_dotted_in_the_colour_of_their_row(tmp_path, drawn):
    list(accuracies.robustness(study(), history(study()), PAPER, tmp_path))
    left, right = drawn[0].axes
    dotted = {line.get_color(): [*line.get_ydata()] for line in left.get_lines() if line.get_linewidth() < 1}
    assert dotted == {
        titles.colour("baseline"): [0.9908, 0.9328],
        titles.colour("condlr-tau0.1"): [0.9873, 0.9668],
        titles.colour("vanilla"): [0.9870, 0.9094],
    }
    assert len(right.get_lines()) == 5, "a line for each seed"
    assert texts(drawn[0]) == ["Baseline", "CondLR τ=0.1, 50 %", "Vanilla, 50 %", "published"]
    assert not lines(left, color="0.5")


def test_a_claim_in_settings_that_share_nothing_is_drawn(tmp_path, drawn):
    other = study(dataset="cifar10", model="vgg16")
    other[["run_id", "row_id"]] += "-vgg16"
    made = [*verdicts.verdicts(by_title(pd.concat([study(), other])), tmp_path)]
    assert made[0].caption.startswith("Accuracy is kept. Dots") and drawn[0].get_suptitle() == ""


def test_figures_are_of_attacks_with_a_curve(tmp_path):
    alone = study(attack="autoattack")
    both = pd.concat([study(), alone[alone["eps"].eq(0.06)]])
    names = [made.png.name for made in accuracies.robustness(both, history(study()), PAPER, tmp_path)]
    assert names == ["robustness.png"]
    (made,) = accuracies.attacks(both, tmp_path)
    assert made.png.name == "attacks.png"


def test_variants_have_colours_of_their_own():
    other = study(options="slope=0.5 tau=0.1")
    other["row_id"] += "other"
    styles = _style.styles(results.summarize(pd.concat([study(), other])), by_compression=True)
    assert len({(str(s["color"]), str(s["linestyle"])) for s in styles.values()}) == 6


def test_a_variant_has_one_colour_at_all_compressions():
    low = study().assign(variant="")
    low = low[low["label"].ne("baseline")]
    parts = [
        low.assign(options=f"slope={slope}", compression=each, row_id=low["label"] + f"{slope}{each}")
        for slope in (0.1, 0.5) for each in (0.5, 0.8)
    ]  # fmt: skip
    frame = results.summarize(pd.concat(parts))
    for by_compression in (False, True):
        styles = _style.styles(frame, by_compression)
        colours = {
            label: [[styles[f"{label}{slope}{each}"]["color"] for each in (0.5, 0.8)] for slope in (0.1, 0.5)]
            for label in low["label"].unique()
        }
        for (one, same), (other, alike) in colours.values():
            assert one == same != other == alike


def test_ten_rows_without_a_colour_of_their_own_take_none_that_a_row_has():
    labels = ["baseline", "snip", "srn", *(f"baseline+{name}" for name in "abcdefgh")]
    frames = [study().assign(label=label, row_id=label, compression=0.0) for label in labels]
    styles = _style.styles(results.summarize(pd.concat(frames)), by_compression=True)
    assert styles["snip"]["color"] == titles.colour("snip")
    assert len({s["color"] for s in styles.values()}) == len(labels)


def test_a_row_looks_alike_in_all_figures_and_no_two_rows_do():
    labels = ["baseline", *(f"baseline+{name}" for name in "abcdefghijklmnop")]
    frame = results.summarize(
        pd.concat(study().assign(label=name, row_id=name, compression=0.0) for name in labels)
    )
    whole = _style.styles(frame, by_compression=False)
    assert len({(look["color"], str(look["linestyle"])) for look in whole.values()}) == len(labels)
    some = frame[frame["label"].isin(labels[::3])].iloc[::-1]
    assert _style.styles(some, by_compression=False).items() <= whole.items()


def test_a_single_singular_value_is_seen(tmp_path, drawn):
    frame = study()
    values = pd.DataFrame(
        {
            "run_id": run,
            "row_id": row,
            "seed": 0,
            "when": "end",
            "layer": "a",
            "index": 1,
            "singular_value": 2.0,
        }
        for run, row in frame[["run_id", "row_id"]].drop_duplicates().itertuples(index=False)
    )
    list(spectra.spectra(frame, values, tmp_path))
    assert all(line.get_marker() == "o" for line in drawn[0].axes[0].get_lines())


def test_many_rows_get_panels_by_compression(tmp_path, drawn):
    frame = seventeen()
    parts = _style.groups(results.summarize(frame))
    assert [*parts] == ["compression 50 %", "compression 80 %"]
    assert all(part["row_id"].nunique() == 10 for part in parts.values())
    assert [*_style.groups(results.summarize(study()))] == [""]
    list(accuracies.robustness(frame, history(frame), PAPER, tmp_path))
    for left in drawn[0].axes[::2]:
        marked = lines(left, marker="o")
        assert len({line.get_color() for line in marked}) == len(marked) == 10
    assert len(texts(drawn[0])) == 11


def test_figure_1_has_a_panel_for_each_row_and_a_line_for_each_layer(tmp_path, drawn):
    (made,) = evolution.conditioning(study(), steps(study()), tmp_path)
    assert made.png.name == "conditioning.png"
    assert "1 to 2 seeds" in made.caption
    axes = drawn[0].axes
    assert [a.get_title() for a in axes] == ["Baseline", "CondLR τ=0.1, 50 %", "Vanilla, 50 %"]
    assert [len(a.get_lines()) for a in axes] == [2, 6, 6], "seeds faintly where there are several"
    thick = [line for line in axes[1].get_lines() if line.get_alpha() is None]
    np.testing.assert_allclose(thick[0].get_ydata(), [1e4 * 2**0.5, 2 * 2**0.5, 2 * 2**0.5])
    looks = [{(str(x.get_color()), x.get_linestyle()) for x in a.get_lines()} for a in axes]
    assert looks[0] == looks[1] == looks[2]
    assert texts(drawn[0]) == ["a", "b"]
    assert axes[0].get_yscale() == "log"
    assert axes[0].get_ylim() == axes[2].get_ylim()


def test_figure_1_of_seventeen_rows(tmp_path, drawn):
    list(evolution.conditioning(seventeen(), steps(seventeen()), tmp_path))
    titles = [axes.get_title() for axes in drawn[0].axes if axes.get_visible()]
    assert len({*titles}) == len(titles) == 17


def test_figure_2_is_of_ill_conditioned_starts(tmp_path, drawn):
    assert not [*evolution.start(study(), steps(study()), tmp_path)]
    frame = study(settings=DECAY)
    (made,) = evolution.start(frame, steps(frame), tmp_path)
    assert made.png.name == "start.png"
    assert "falling as 2⁻ⁱ" in drawn[0].get_suptitle()
    *_, last = drawn[0].axes
    colours = {line.get_color(): line.get_ydata() for line in last.get_lines()}
    assert {titles.colour(x) for x in ("baseline", "condlr-tau0.1", "vanilla")} < {*colours}
    # Seeds of 1e5 and 4e5, then 6 and 24: their geometric means
    np.testing.assert_allclose(colours[titles.colour("vanilla")], [2e5, 12, 12])
    np.testing.assert_allclose(colours[titles.colour("baseline")], [1e5, 6, 6])
    assert last.get_yscale() == "log"
    band = next(x for x in last.collections if x.get_facecolor()[0][0] > 0.8).get_paths()[0].vertices
    # ln 4 / sqrt 2 is the standard deviation of ln 6 and ln 24
    assert band[:, 1].min() == pytest.approx(12 * np.exp(-np.log(4) / 2**0.5))
    assert any("start" in text.get_text() for text in last.texts)


def test_operators_epoch_by_epoch(tmp_path, drawn):
    frame = study()
    assert not [*evolution.operators(frame, history(frame), tmp_path)], "no run recorded its operators"
    recorded = history(frame).assign(epoch=lambda table: table["step"])
    factor = (1 + 3 * recorded["seed"]) * 2.0 ** recorded["epoch"]
    recorded = recorded.assign(operator_a=3 * factor, operator_b=5 * factor, operator_c=9 * factor)
    recorded.loc[recorded["label"].eq("baseline"), ["operator_a", "operator_b", "operator_c"]] = None
    (made,) = evolution.operators(frame, recorded, tmp_path)
    assert made.png.name == "operators.png"
    middle, largest = drawn[0].axes
    assert [len(axes.get_lines()) for axes in drawn[0].axes] == [2, 2], "a row without them has no line"
    for axes, value in ((middle, 5), (largest, 9)):
        colours = {line.get_color(): line.get_ydata() for line in axes.get_lines()}
        # Two seeds of which one has four times the condition number: their geometric mean
        np.testing.assert_allclose(colours[titles.colour("vanilla")], 2 * value * 2.0 ** np.arange(4))


def test_reconstructed_images_are_drawn_beside_their_own(tmp_path, drawn):
    frame = study()
    runs = frame.drop_duplicates("run_id")[["run_id", "row_id", "seed"]]

    def told(level, shape=(3, 2, 2)):
        levels = np.full(shape, level, np.uint8)
        return {"shape": "x".join(map(str, shape)), "pixels": base64.b64encode(levels.tobytes()).decode()}

    pictures = pd.concat(
        runs.assign(layer=layer, image=image, iterations=iterations, error=error, **told(level))
        for image in (0, 1)
        for layer, iterations, error, level in (
            ("input", 9, 0.0, 200), ("conv1", 9, 0.00005, 100), ("conv1", 5, 7.0, 0), ("conv2", 9, 1.5, 50),
        )
    )  # fmt: skip
    pictures = pictures[pictures["row_id"].ne(runs["row_id"].iloc[0]) | pictures["layer"].ne("conv2")]
    (made,) = reconstruction.reconstructions(frame, pictures, tmp_path)
    assert made.png.name == "reconstruction.png" and "2 deep" in made.caption and "(9 steps" in made.caption
    shown = [
        [[int(image.get_array().max()) for image in axis.images] for axis in line]
        for line in grid(drawn[0], 4)
    ]
    assert shown == [
        [[200], [200], [], [200], [200]],
        [[100], [100], [], [], []],
        *[[[100], [100], [], [50], [50]]] * 2,
    ], "the first seed, the most iterations, and what a row has"
    words = {text.get_text() for axis in drawn[0].axes for text in axis.texts}
    assert {
        "the images",
        "through conv1",
        "through conv2",
        "< 0.01 %",
        "150 %",
        "Vanilla, 50\N{NO-BREAK SPACE}%",
    } <= words


def test_variance_ratios_of_each_layer(tmp_path, drawn):
    frame = study()
    runs = frame.drop_duplicates("run_id")[["run_id", "row_id", "seed"]]
    ratios = pd.concat(
        runs.assign(layer=layer, centred=centred, images=9, index=r, ratio=(1 + runs["seed"]) * r / 10)
        for layer in ("stage3", "fc.input") for centred in ("True", "False") for r in (1, 2, 3)
    )  # fmt: skip
    (made,) = representations.variance_ratios(frame, ratios, tmp_path)
    assert made.png.name == "variance_ratio.png"
    first, second = drawn[0].axes
    assert [first.get_title(), second.get_title()] == ["stage3", "fc.input"]
    solid = {line.get_color(): line.get_ydata() for line in lines(first, linestyle="-")}
    np.testing.assert_allclose(solid[titles.colour("vanilla")], 1.5 * np.arange(1, 4) / 10)
    assert len(lines(first, linestyle=":")) == len(solid) == 3


def test_images_in_the_plane_of_each_row(tmp_path, drawn):
    frame = study()
    runs = frame.drop_duplicates("run_id")[["run_id", "row_id", "seed"]]
    sign = runs["row_id"].map(lambda row: -1 if row == runs["row_id"].iloc[-1] else 1)
    points = pd.concat(
        runs.assign(layer=layer, image=x, images=3, class_=x % 2, first=sign * x, second=runs["seed"])
        for layer in ("fc.input", "stage3") for x in (0, 1, 2)
    )  # fmt: skip
    (made,) = representations.scatter(frame, points, tmp_path)
    assert made.png.name == "scatter.png" and "(fc.input)" in made.caption and "3 test images" in made.caption
    panels = [axes for axes in drawn[0].axes if axes.get_visible()]
    assert len(panels) == 3
    for axes in panels:
        (dots,) = axes.collections
        np.testing.assert_allclose(
            dots.get_offsets(), [[0, 0], [1, 0], [2, 0]], err_msg="of the first seed, none mirrored"
        )


def grid(figure, lines):
    axes = figure.axes
    across = len(axes) // lines
    return [axes[place : place + across] for place in range(0, len(axes), across)]


def test_the_product_is_over_all_layers():
    frame = pd.DataFrame({"cond_a": [2.0, 3.0], "cond_b": [5.0, None], "cond_c": [7.0, 1.0], "seed": [0, 0]})
    product = evolution.product(frame)
    assert product[0] == 70
    assert pd.isna(product[1]), "a layer that is missing makes no product smaller"


def test_spectra_at_start_and_end(tmp_path, drawn):
    (made,) = spectra.spectra(study(), values(study()), tmp_path)
    assert made.png.name == "spectra.png"
    first, second = drawn[0].axes
    assert [first.get_title(), second.get_title()] == ["conv1", "fc1"]
    solid = {line.get_color(): line.get_ydata() for line in lines(first, linestyle="-")}
    assert len(solid) == 3
    np.testing.assert_allclose(solid[titles.colour("vanilla")], 2**0.5 * 0.5 ** np.arange(1, 5))
    assert len(first.get_lines()) == 6
    list(spectra.spectra(seventeen(), values(seventeen()), tmp_path))
    assert len(drawn[1].axes) == 4, "a line of panels for each compression"
    assert all(len({x.get_color() for x in lines(a, linestyle="-")}) == 10 for a in drawn[1].axes)


def test_compression_is_what_was_measured(tmp_path, drawn):
    frame = study()
    frame.loc[frame["label"].eq("vanilla"), "train_compression"] = 0.3
    list(tradeoffs.compression(frame, tmp_path))
    clean, attacked = drawn[0].axes
    assert clean.get_title() == "no attack"
    assert "0.06" in attacked.get_title()
    at = {(x.get_color(), x.get_markerfacecolor()): x.get_xydata()[0] for x in attacked.get_lines()}
    vanilla = titles.colour("vanilla")
    assert at[vanilla, vanilla] == pytest.approx([0.3, 0.92])
    assert at[vanilla, "white"] == pytest.approx([0.5, 0.92])
    assert texts(drawn[0])[:3] == ["Baseline", "CondLR τ=0.1", "Vanilla"]
    assert not [*tradeoffs.compression(study(compression=0.0), tmp_path)], "dense rows alone"
    list(tradeoffs.compression(seventeen(), tmp_path))
    points = {(x.get_color(), x.get_marker(), x.get_markerfacecolor()) for x in drawn[1].axes[0].get_lines()}
    assert len({(colour, mark) for colour, mark, _ in points if mark in "Dos"}) == 17


def test_rows_of_one_compression_stand_one_below_the_other(tmp_path, drawn):
    frame = study()
    frame.loc[frame["label"].eq("condlr-tau0.1") & frame["eps"].eq(0.06), "accuracy"] += 0.04
    (drawing,) = tradeoffs.compression(frame, tmp_path)
    assert "accuracy of each row with some 50 % of the weights removed" in drawing.caption
    clean, attacked = drawn[0].axes
    assert [axis.get_title().split(",")[0] for axis in (clean, attacked)] == ["no attack", "FGSM"]
    names = [text.get_text() for text in clean.get_yticklabels()]
    wanted = frame[frame["eps"].eq(0.06)].groupby("label")["accuracy"].mean().sort_values()
    titles = {"baseline": "Baseline", "vanilla": "Vanilla", "condlr-tau0.1": "CondLR τ=0.1"}
    assert names == [titles[label] for label in wanted.index]
    at = {
        names[round(line.get_ydata()[0])]: line for line in attacked.get_lines() if line.get_marker() in "Do"
    }
    assert {name: line.get_xdata()[0] for name, line in at.items()} == pytest.approx(
        {titles[label]: accuracy for label, accuracy in wanted.items()}
    )
    assert [name for name, dot in at.items() if dot.get_marker() == "D"] == ["Baseline"]


def test_cost_in_seconds_and_where_counted_in_flops(tmp_path, drawn):
    list(tradeoffs.cost(study(), None, tmp_path))
    (axes,) = drawn[0].axes
    assert axes.get_xlabel() == "seconds of training, cpu, 1 thread"
    flops = study().drop_duplicates("run_id")[["row_id"]].assign(train_flops=2e6)
    list(tradeoffs.cost(study(), flops, tmp_path))
    seconds, counted = drawn[1].axes
    places = {line.get_color(): line.get_xydata()[0] for line in seconds.get_lines()}
    assert places[titles.colour("vanilla")] == pytest.approx([10.5, 0.92])
    assert {line.get_xdata()[0] for line in counted.get_lines()} == {2.0}
    list(tradeoffs.cost(seventeen(), flops.iloc[:1], tmp_path))
    assert len(drawn[2].axes) == 1, "FLOPs of some rows alone are no comparison"
    assert drawn[2].axes[0].get_xscale() == "log"


def budgets():
    """Two methods at three budgets, and a dense row; and what they keep."""
    dense = study()[lambda frame: frame["label"].eq("baseline")]
    low = study()[lambda frame: frame["label"].ne("baseline")]
    parts = [dense]
    for compression, less in ((0.5, 0.0), (0.8, 0.01), (0.9375, 0.03)):
        names = {"run_id": low["run_id"] + str(compression), "row_id": low["label"] + str(compression)}
        parts.append(low.assign(compression=compression, accuracy=low["accuracy"] - less, **names))
    frame = pd.concat(parts, ignore_index=True)
    rows = frame.drop_duplicates("run_id")[["run_id", "row_id", "compression"]]
    return frame, rows.assign(deploy_weights=430_500 * (1 - rows["compression"]))


def test_weights_are_those_kept_in_deployment(tmp_path, drawn):
    frame, counted = budgets()
    list(tradeoffs.weights(frame, counted, tmp_path))
    clean, attacked = drawn[0].axes
    assert clean.get_xscale() == "log" and attacked.get_xlabel() == "weights kept in deployment"
    lines = {
        line.get_color(): line.get_xydata() for line in attacked.get_lines() if len(line.get_xdata()) < 4
    }
    assert lines[titles.colour("vanilla")][:, 0] == pytest.approx([26906.25, 86100, 215250])
    assert lines[titles.colour("vanilla")][:, 1] == pytest.approx([0.89, 0.91, 0.92])
    assert lines[titles.colour("baseline")] == pytest.approx(np.array([[430_500, 0.90]]))
    assert not [*tradeoffs.weights(frame, None, tmp_path)], "nothing counted"
    assert not [*tradeoffs.weights(study(), counted, tmp_path)], "one budget alone"


TABLES = ("cells", "history", "steps", "spectra")


def make_figures(directory):
    frame = study(settings=DECAY)
    write(directory, cells=frame, history=history(frame), steps=steps(frame), spectra=values(frame))
    made = [*drawings(directory, PAPER, directory)]
    (directory / "made.pickle").write_bytes(pickle.dumps(made))


@pytest.fixture(scope="session")
def plain(once):
    """Tables of a study, and all their figures; what `drawings` said of them."""
    return once("figures", make_figures)


def copied(plain, directory, tables=TABLES):
    directory.mkdir(parents=True, exist_ok=True)
    for name in tables:
        shutil.copy(plain / f"{name}.csv", directory)


def test_all_figures_of_all_tables(plain, tmp_path, monkeypatch):
    made = pickle.loads((plain / "made.pickle").read_bytes())
    names = ["claims", "robustness", "conditioning", "start", "spectra", "compression", "cost"]
    assert [drawing.png.stem for drawing in made] == names
    assert all(drawing.pdf == drawing.png.with_suffix(".pdf") and drawing.pdf.exists() for drawing in made)
    assert all(re.search(r"Settings: .*decay=2\.0\.$", drawing.caption) for drawing in made[1:])
    copied(plain, tmp_path, ("cells", "history"))
    draw_pictures_alone(monkeypatch)
    names = ["claims", "robustness", "compression", "cost"]
    assert [d.png.stem for d in drawings(tmp_path, PAPER, tmp_path)] == names


def test_a_matrix_flow_needs_no_other_table(plain, tmp_path, monkeypatch):
    draw_pictures_alone(monkeypatch)
    settings = Settings(n=9, m=8, rank=3, steps=[1, 4], etas=[0.05], weak=[1.0], weak_steps=4)
    write(tmp_path, flow=pd.DataFrame(errors(settings)).assign(commit="a"))
    made = [*drawings(tmp_path, PAPER, tmp_path)]
    assert [(drawing.png.name, drawing.pdf.name) for drawing in made] == [
        ("theorem1.png", "theorem1.pdf"), ("theorem1-2.png", "theorem1-2.pdf"),
    ]  # fmt: skip
    # Beside networks it comes last: the report takes the first figures for those of the claims
    copied(plain, tmp_path, ("cells", "history"))
    names = [drawing.png.stem for drawing in drawings(tmp_path, PAPER, tmp_path)]
    assert names == ["claims", "robustness", "compression", "cost", "theorem1", "theorem1-2"]


def test_damaged_tables_are_named(tmp_path):
    frame = study()
    write(tmp_path, cells=frame, history=history(frame), steps=steps(frame).assign(cond_a="x"))
    with pytest.raises(UserError, match=r"steps\.csv has something else than numbers in the column cond_a"):
        list(drawings(tmp_path, PAPER, tmp_path))
    write(tmp_path, steps=steps(frame), spectra=values(frame).drop(columns="layer"))
    with pytest.raises(UserError, match=r"spectra\.csv lacks the columns layer"):
        list(drawings(tmp_path, PAPER, tmp_path))


def test_numbers_that_cannot_be_and_a_file_that_is_cut_off_are_named(tmp_path):
    for text, says in (
        (study().assign(accuracy=1.7).to_csv(index=False), "damaged in the column accuracy"),
        (study().to_csv(index=False).rstrip(), "is cut off: collect the runs again"),
    ):
        (tmp_path / "cells.csv").write_text(text)
        with pytest.raises(UserError, match=says):
            results.read(tmp_path)


def test_a_study_of_nothing_to_draw_says_so(script, tmp_path):
    results_of = tmp_path / "results" / "one"
    results_of.mkdir(parents=True)
    one = study().query("label == 'baseline' and eps == 0")
    write(results_of, cells=one, history=history(one))
    complains(script("figures", "study=one"), "nothing to draw in results/one")
    write(results_of, cells=one.assign(status="failed"))
    complains(script("figures", "study=one"), "no run of this study is done and evaluated yet")


HOSTILE = {
    "text.usetex": True, "font.size": 30, "savefig.dpi": 33, "lines.antialiased": False,
    "axes.prop_cycle": mpl.cycler(color="rgb"), "font.family": "serif", "savefig.transparent": True,
    "pdf.compression": 0, "axes.facecolor": "yellow", "figure.constrained_layout.w_pad": 0.9,
    "axes.formatter.limits": (-1, 1), "legend.loc": "upper left", "savefig.format": "svg",
}  # fmt: skip


@pytest.mark.long
def test_a_users_own_settings_change_no_figure(plain, tmp_path):
    copied(plain, tmp_path)
    with mpl.rc_context(HOSTILE):
        made = [
            path for drawing in drawings(tmp_path, PAPER, tmp_path) for path in (drawing.png, drawing.pdf)
        ]
    assert len(made) == 14
    for path in made:
        assert path.read_bytes() == (plain / path.name).read_bytes(), path.name


@pytest.mark.long
def test_a_notebooks_backend_and_a_matplotlibrc_are_in_nobodys_way(plain, tmp_path):
    """In a process of its own: they are read when matplotlib is imported."""
    results_of = tmp_path / "results" / "one"
    copied(plain, results_of, ("cells", "history"))
    (tmp_path / "matplotlibrc").write_text("backend: TkAgg\ntext.usetex: True\nno.such_key: 1\n")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "matplotlibrc").write_bytes("font.family: Größe".encode("latin-1"))
    kernel = {"MPLBACKEND": "module://no_such_module.backend_inline", "MPLCONFIGDIR": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "figures.py"), "study=one", f"paper={PAPER}"],
        cwd=tmp_path, env={**os.environ, **kernel}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = [path for path in results_of.iterdir() if path.suffix in (".png", ".pdf")]
    assert len(made) == 8
    for path in made:
        assert path.read_bytes() == (plain / path.name).read_bytes(), path.name
