"""Small training that tests of the engine share: each method, and a trainer that can be stopped."""

import torch
from torch import nn

from condlr.factorization import Scheme
from condlr.methods.baseline import Baseline
from condlr.methods.cayley_sgd import CayleySgd
from condlr.methods.condlr import CondLR
from condlr.methods.dlrt import Dlrt
from condlr.methods.low_rank_spel import LowRankSpel
from condlr.methods.projected_sgd import ProjectedSgd
from condlr.methods.robust_dlrt import RobustDlrt
from condlr.methods.snip import Snip
from condlr.methods.spectral_cap import SpectralCap
from condlr.methods.spel import Spel
from condlr.methods.srn import Srn
from condlr.methods.svd_prune import SvdPrune
from condlr.methods.vanilla import Vanilla
from condlr.models.lenet5 import LeNet5
from condlr.suite.engine import Trainer
from condlr.suite.protocol import Protocol

METHODS = {
    "baseline": Baseline(),
    "vanilla": Vanilla(),
    "gaussian": Vanilla(init="gaussian", frobenius_decay=1e-3),
    "alternating": Vanilla("alternating"),
    "condlr": CondLR(0.1),
    "unit": CondLR(0.0, "one", projection="qr", transport=True),
    "geometric": CondLR(0.1, momentum="transported"),
    "energy": CondLR(0.1, ranks="energy"),
    "adaptive": CondLR(0.1, ranks="adaptive", period=1),
    "released": CondLR(0.0, "mean", "released_code", "before_projection"),
    "cayley_sgd": CayleySgd(),
    "cayley_exact": CayleySgd(transform="exact"),
    "cayley_released": CayleySgd(
        "inactive", "free", "one", "as_is", True, 3, inner_iterations=4, first="momentum"
    ),
    "projected_sgd": ProjectedSgd(),
    "dlrt": Dlrt(),
    "dlrt_adaptive": Dlrt(theta=0.1),
    "low_rank_spel": LowRankSpel(),
    "robust_dlrt": RobustDlrt(period=3, clip=float("inf")),
    "snip": Snip(),
    "spectral_cap": SpectralCap(1.5),
    "spel": Spel(),
    "srn": Srn(),
    "svd_prune": SvdPrune(),
    "svd_prune_full": SvdPrune("full", energy=0.05, phases=[0.3, 0.6]),
}


def protocol(**changes):
    keys = {
        "name": "test", "epochs": 3, "batch_size": 64, "lr": 0.05, "momentum": 0.3, "lr_milestones": [1, 2],
        "lr_factor": 0.5, "held_out": 0.2, "rank_rule": "params", "classifier": "dense", "init": "spectral",
        "augmentation": "none", "batch_norm_momentum": 0.1, "clamp": True, "methods": {},
    }  # fmt: skip
    return Protocol(**(keys | changes))


class Noisy(LeNet5):
    """Narrow, to be quick, and with dropout, so that the random state matters."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 10, 5), nn.Conv2d(10, 25, 5)
        self.fc1, self.fc2 = nn.Linear(25 * 4 * 4, 120), nn.Linear(120, 10)

    def forward(self, images):
        return super().forward(torch.nn.functional.dropout(images, 0.1, self.training))


def trainer(method, data, record_every=3, **changes):
    torch.manual_seed(5)
    scheme = Scheme(0.5 if method.compresses else None, classifier="dense")
    model = method.apply(Noisy(), scheme)
    return Trainer(model, method, data, protocol(**changes), seed=0, record_every=record_every)


class Stop(Exception):
    pass
