"""The ledger keeps the sum of claims within the budget."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.engines.ledger import Ledger, OverBudget


@given(claims=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 60))), cut=st.integers(0, 100))
def test_free_is_the_budget_minus_all_claims(claims: list[tuple[str, int]], cut: int) -> None:
    ledger, held = Ledger(100), dict.fromkeys("", 0)
    for name, nbytes in claims:
        if sum(held.values()) - held.get(name, 0) + nbytes <= 100:
            ledger.claim(name, nbytes)
            held[name] = nbytes
        else:
            with pytest.raises(OverBudget, match=f"engine {name} needs"):
                ledger.claim(name, nbytes)
    assert ledger.held == held
    ledger.budget_bytes = cut
    assert ledger.free == cut - sum(held.values())
