"""All measures of a row side by side: each from its own table, for the rows that have it."""

import pandas as pd

from condlr.report.glance import glances

RUNS = [("baseline", 0.0, 0), ("baseline", 0.0, 1), ("condlr-tau0.1", 0.5, 0)]


OUTPUTS = {"conv1": [8.0, 8.0, 4.0], "conv2": [10.0, 20.0, 5.0], "fc": [90.0, 90.0, 90.0]}


def cells(*attacks):
    """Of each run at eps 0 and at these (attack, eps, n, accuracy)."""
    return pd.DataFrame(
        {
            "run_id": f"{label}-{seed}", "row_id": label, "dataset": "mnist", "model": "lenet5",
            "protocol": "paper", "epochs": 3, "settings": "lr=0.1", "attack": attack, "norm": "linf", "n": n,
            "label": label, "compression": compression, "options": "", "seed": seed, "status": "done",
            "eps": at, "accuracy": (reached if at else 0.99) + 0.02 * seed, "cond": 1.0, "cond_all": 1.0,
            "seconds": 1.0, "train_compression": 0.5, "deploy_compression": 0.5,
        }
        for attack, eps, n, reached in attacks
        for label, compression, seed in RUNS
        for at in (0.0, eps / 2, eps)
    )  # fmt: skip


def table(**columns):
    return pd.DataFrame({"run_id": [f"{label}-{seed}" for label, _, seed in RUNS], **columns})


def shown(sheet):
    names = [column.heading for column in sheet.columns]
    rows = {row.name: [value.text for value in row.values] for group in sheet.groups for row in group}
    return names, rows


def test_each_measure_of_each_row():
    attacked = cells(("fgsm", 0.1, 1000, 0.8), ("noise", 0.2, 1000, 0.9))
    same = {"n": 1000, "shift_seed": 0}
    origins = table(shift="cinic10", name="imagenet", severity=float("nan"), accuracy=[0.4, 0.6, 0.3], **same)
    shifted = pd.concat(
        table(shift="corruptions", name="jpeg", severity=severity, accuracy=[a, b, 0.5], **same)
        for severity, a, b in ((1, 0.6, 0.7), (5, 0.8, 0.9))
    )
    layers = pd.concat(
        table(kind=kind, cond_circular=values)
        for kind, values in (("conv", [1.0, 3.0, 5.0]), ("conv", [9.0, 5.0, 7.0]), ("linear", [1e9] * 3))
    )
    cost = table(deploy_weights_ratio=[1, 1, 0.45], train_flops_ratio=[1, 1, 0.5])
    shifted = pd.concat([shifted, origins])
    ranks = pd.concat(table(layer=name, effective_outputs=values) for name, values in OUTPUTS.items())
    analysed = {"conditioning": layers, "cost": cost, "effective_rank": ranks}
    (sheet,) = glances(attacked, shifted, analysed)
    assert any(note.startswith("Rank of outputs") for note in sheet.notes)
    names, rows = shown(sheet)
    assert names == [
        "requested", "clean", "FGSM ε=0.1", "noise ε=0.2", "Corruptions", "CINIC-10: imagenet",
        "operator cond", "rank of outputs", "weights", "training FLOPs",
    ]  # fmt: skip
    assert rows["Baseline"] == ["0", "100.00", "81.00", "91.00", "75.00", "50.00", "4.50", "15.0", "1", "1"]
    assert rows["CondLR τ=0.1"] == [
        "50",
        "99.00",
        "80.00",
        "90.00",
        "50.00",
        "30.00",
        "6.00",
        "5.0",
        "0.45",
        "0.5",
    ]


def test_what_a_row_does_not_have_is_empty_and_one_attack_alone_has_its_table():
    assert not [*glances(cells(("fgsm", 0.1, 1000, 0.8)), None, {})]
    cost = table(deploy_weights_ratio=[1, 1, 0.45], train_flops_ratio=[1, 1, 0.5]).iloc[2:]
    (sheet,) = glances(cells(("fgsm", 0.1, 1000, 0.8)), None, {"cost": cost})
    _, rows = shown(sheet)
    assert rows["Baseline"][-2:] == ["", ""] and rows["CondLR τ=0.1"][-2:] == ["0.45", "0.5"]


def test_of_an_attack_on_more_and_fewer_images_the_more_count():
    (sheet,) = glances(
        cells(("fgsm", 0.1, 100, 0.5), ("fgsm", 0.1, 1000, 0.8), ("noise", 0.2, 100, 0.9)), None, {}
    )
    _, rows = shown(sheet)
    assert rows["CondLR τ=0.1"] == ["50", "99.00", "80.00", "90.00"]
