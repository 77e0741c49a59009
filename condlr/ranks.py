"""From a compression to a rank, by the rule of the paper or the rule of the authors' code."""

import math

from condlr._support.errors import in_range, one_of

RANK_RULES = ("params", "released_code")

# 1 - 0.8 is 0.19999999999999996; rounding must not depend on the last bit.
_SLACK = 1e-9


def rank_for(rule: str, compression: float, n: int, m: int) -> int:
    """The rank of an n x m matrix under a compression, at least 1 and at most min(n, m).

    `params`: the largest r with r (n + m + r) <= (1 - compression) n m, so that U, S and V have at most
    that share of the weights of W (CondLR, arXiv 2306.01485, end of section 4.2).
    `released_code`: ceil((1 - compression) min(n, m)). This is not a compression ratio: LeNet5 at "50 %"
    keeps 94.7 % of its weights (`condlr.measure`).

    Args:
        rule: one of `RANK_RULES`.
        compression: the fraction of weights to remove, in [0, 1).
        n, m: rows and columns of the matrix.
    """
    one_of("rank_rule", rule, RANK_RULES)
    in_range("compression", compression, 0, 1, half_open=True)
    keep = 1 - compression
    if rule == "params":
        exact = (math.sqrt((n + m) ** 2 + 4 * keep * n * m) - (n + m)) / 2
        rank = math.floor(exact + _SLACK)
    else:
        rank = math.ceil(keep * min(n, m) - _SLACK)
    return min(max(rank, 1), min(n, m))
