"""A budget of weights sets the compression of every method, and a run is the one of this compression."""

import pytest
import torch

from condlr._support.errors import UserError
from condlr.data.digits import Digits
from condlr.factorization import measure
from tests.helpers import configured

LENET5 = 20 * 25 + 50 * 500 + 500 * 800 + 500 * 10


def checked(*overrides):
    return configured("protocol=rivals", *overrides)


@pytest.mark.slow
@pytest.mark.parametrize(
    "row",
    ["condlr-tau0.1", "condlr-energy", "vanilla", "vanilla-energy", "dlrt", "svd_prune", "spectral_cap"],
)
@pytest.mark.parametrize("budget", [200e3, 85e3, 30e3])
def test_the_exported_network_has_at_most_these_weights(row, budget):
    config = checked(f"row={row}-c0.5", f"budget={budget}")
    torch.manual_seed(0)
    network = config.method.apply(config.model.build((1, 28, 28), 10), config.scheme)
    found = measure(network).deployed
    assert 0.95 * budget < found <= budget
    if row.endswith("energy"):
        return  # its ranks come from spectra, and fill the budget of the uniform ones
    looser = checked(f"row={row}-c0.5", f"compression={config.scheme.compression - 1e-4:.4f}")
    network = looser.method.apply(looser.model.build((1, 28, 28), 10), looser.scheme)
    assert measure(network).deployed > budget, "no smaller compression would do"


def test_a_run_with_a_budget_is_the_run_of_its_compression():
    asked = checked("budget=85e3")
    again = checked(f"compression={asked.scheme.compression}")
    assert asked.run_id == again.run_id and "budget" not in asked.identity
    assert checked("budget=1e9").scheme.compression == 0


def test_what_prunes_single_weights_keeps_as_many():
    config = checked("method=snip", "budget=85e3")
    assert (
        round((1 - config.scheme.compression) * LENET5)
        <= 85e3
        < (1.0001 - config.scheme.compression) * LENET5
    )


def test_a_dense_row_has_the_size_it_has():
    assert checked("method=baseline", "budget=85e3").run_id == checked("method=baseline").run_id


def test_a_budget_that_no_rank_meets_is_one_line():
    with pytest.raises(UserError, match=r"budget=1000: this network needs [\d,]+ weights with rank 1"):
        checked("budget=1000")


def test_ranks_that_are_shared_out_meet_it_where_factors_have_more_weights_than_their_product():
    """Under the released code's rule a layer is exported dense, and its factors' weights are not there."""
    config = configured(
        "protocol=rivals", "protocol.rank_rule=released_code", "method.ranks=energy", "budget=425000"
    )
    torch.manual_seed(0)
    network = config.method.apply(config.model.build((1, 28, 28), 10), config.scheme)
    assert 0.95 * 425_000 < measure(network).deployed <= 425_000


def test_a_dataset_that_does_not_say_its_classes_has_no_budget(monkeypatch):
    monkeypatch.setattr(Digits, "class_count", None)
    with pytest.raises(UserError, match="budget: this dataset does not say its number_of_classes; set"):
        configured("dataset=digits", "budget=60000")
    configured("dataset=digits")
