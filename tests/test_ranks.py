import pytest

from condlr.ranks import RANK_RULES, rank_for

LENET5 = [(20, 25), (50, 500), (500, 800)]


@pytest.mark.parametrize(
    ("rule", "compression", "expected"),
    [
        ("params", 0.5, [5, 21, 138]),
        ("params", 0.8, [2, 8, 58]),
        ("released_code", 0.5, [10, 25, 250]),
        ("released_code", 0.8, [4, 10, 100]),
    ],
)
def test_lenet5(rule, compression, expected):
    assert [rank_for(rule, compression, n, m) for n, m in LENET5] == expected


@pytest.mark.parametrize("compression", [0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (10, 500), (512, 4608), (64, 27), (7, 7)])
def test_params_is_the_largest_rank_within_the_budget(compression, n, m):
    r = rank_for("params", compression, n, m)
    budget = (1 - compression) * n * m + 1e-6
    assert r == 1 or r * (n + m + r) <= budget
    assert r == min(n, m) or (r + 1) * (n + m + r + 1) > budget


def test_ceiling_does_not_turn_on_the_last_bit():
    assert rank_for("released_code", 0.7, 10, 10) == 3  # (1 - 0.7) * 10 is 3.0000000000000004


@pytest.mark.parametrize("rule", RANK_RULES)
@pytest.mark.parametrize("compression", [-0.1, 1.0, 1.5, float("nan")])
def test_a_compression_that_is_none_is_refused(rule, compression):
    with pytest.raises(ValueError, match="compression must be in"):
        rank_for(rule, compression, 5, 5)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="rank_rule must be one of params, released_code"):
        rank_for("energy", 0.5, 5, 5)
