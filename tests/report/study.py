"""A small study as it is collected, made by hand; and the published numbers."""

import pandas as pd
from matplotlib.figure import Figure

from tests.helpers import ROOT

PAPER = ROOT / "results" / "paper"


def draw_pictures_alone(patch):
    """A drawing's PDF, which takes longer than its picture, is an empty file."""
    save = Figure.savefig

    def picture(figure, file, *, format, **keys):
        if format != "pdf":
            save(figure, file, format=format, **keys)

    patch.setattr(Figure, "savefig", picture)


def cells(**changes):
    """Two seeds of two rows at 50 % and one of the baseline, under two strengths."""
    rows = []
    for label, compression, seed, values in [
        ("baseline", 0.0, 0, (0.99, 0.90)),
        ("condlr-tau0.1", 0.5, 0, (0.98, 0.94)),
        ("condlr-tau0.1", 0.5, 1, (0.96, 0.92)),
        ("vanilla", 0.5, 0, (0.99, 0.91)),
        ("vanilla", 0.5, 1, (0.97, 0.93)),
    ]:
        for eps, accuracy in zip((0.0, 0.06), values, strict=True):
            rows.append(
                {
                    "study": "s", "run_id": f"{label}-{compression}-{seed}", "dataset": "mnist",
                    "model": "lenet5", "method": label.split("-")[0], "label": label, "tau": None,
                    "compression": compression, "protocol": "paper", "epochs": 3, "seed": seed,
                    "row_id": f"{label}{compression}", "status": "done", "official_data": True,
                    "train_compression": compression,
                    "deploy_compression": compression, "settings": "lr=0.1 lr_milestones=[7,9]",
                    "options": "slope=0.01 tau=0.1", "cond": 2.0, "cond_all": 12.3, "seconds": 10 + seed,
                    "attack": "fgsm", "norm": "linf", "eps": eps, "accuracy": accuracy, "n": 100,
                }
                | changes
            )  # fmt: skip
    return pd.DataFrame(rows)
