"""Low-rank activations beside their published numbers."""

import pandas as pd

from condlr.report.lr_layers import sheets
from tests.report.study import PAPER
from tests.report.test_claims import study

LR = "baseline+lr_layer"
ROWS = {("baseline", 0.0): 0.4, ("snip", 0.5): 0.3, ("baseline+so", 0.0): 0.5, (LR, 0.0): 0.8}
RADII = [8 / 255, 10 / 255, 16 / 255, 20 / 255]


def made(radii=RADII, **changes):
    keys = {"dataset": "cifar10", "model": "resnet18", "attack": "pgd-steps=20-loss=ce"} | changes
    struck = [study(ROWS, **keys).query("eps > 0").assign(eps=float(f"{radius:.6g}")) for radius in radii]
    return pd.concat([study(ROWS, **keys).query("eps == 0"), *struck])


def test_each_row_beside_the_published_one():
    (sheet,) = sheets(made(), PAPER)
    assert [column.heading for column in sheet.columns] == ["ε 8/255", "ε 10/255", "ε 16/255", "ε 20/255"]
    rows = [(row.kind, row.name, row.values[0].text, row.values[-1].text) for row in sheet.groups[0]]
    assert rows == [
        ("ours", "Baseline", "40.00 ±0.14", "40.00 ±0.14"),
        ("published", "  published, 7 steps", "43.10", "28.90"),
        ("published", "  published, 20 steps", "31.00", "4.50"),
        ("ours", "Baseline + LR", "80.00 ±0.14", "80.00 ±0.14"),
        ("published", "  published, 7 steps", "79.10", "77.10"),
        ("published", "  published, 20 steps", "78.50", "76.60"),
        ("ours", "Baseline + SO", "50.00 ±0.14", "50.00 ±0.14"),
        ("ours", "SNIP, 50 %", "30.00 ±0.14", "30.00 ±0.14"),
        ("published", "  published, 7 steps", "29.40", "16.20"),
        ("published", "  published, 20 steps", "14.50", "0.40"),
    ]
    (doubt,) = sheet.notes
    assert "loses 26.5 points, the one with them 1.9" in doubt


def test_other_settings_have_no_such_sheet(tmp_path):
    assert not [*sheets(made(dataset="mnist"), PAPER)]
    assert not [*sheets(made(norm="l2"), PAPER)]
    assert not [*sheets(made(attack="fgsm"), PAPER)]
    assert not [*sheets(made(radii=RADII[:3]), PAPER)], "without one of the radii"
    cells = made()
    assert not [*sheets(cells[cells["label"] != LR], PAPER)]
    assert not [*sheets(cells, tmp_path)], "nothing is published"
