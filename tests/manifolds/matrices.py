"""Matrices of given singular values, and those that are hard."""

import numpy as np
import torch


def with_spectrum(n, m, sigma, dtype=torch.float64):
    """A random n x m matrix with the given singular values."""
    r = len(sigma)
    P, Q = (torch.linalg.qr(torch.randn(k, r, dtype=torch.float64)).Q for k in (n, m))
    return (P @ torch.diag(torch.as_tensor(sigma, dtype=torch.float64)) @ Q.mT).to(dtype)


# Tall matrices that are hard in one way each: (n, singular values).
HARD = {
    "random": (30, np.linspace(0.5, 2, 7)),
    "repeated": (30, [2.0] * 4 + [0.5] * 3),
    "all equal": (12, [1.0] * 12),
    "rank one": (20, [3.0] + [0.0] * 4),
    "ill-conditioned": (40, np.logspace(0, -6, 9)),
    "one column": (17, [0.3]),
    "tiny": (20, np.linspace(1e-12, 2e-12, 5)),
    "huge": (20, np.linspace(1e12, 2e12, 5)),
}
