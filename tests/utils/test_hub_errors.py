"""An exception that does not come from the Hub reaches the caller unchanged."""

from __future__ import annotations

import pytest

from glowq.utils.hub import asking_hub


@pytest.mark.parametrize("writing", [False, True])
def test_a_value_error_of_somebody_else_comes_through(writing: bool) -> None:
    error = ValueError("a mistake of the caller's")
    with pytest.raises(ValueError, match="a mistake") as raised, asking_hub("name/of-model", writing=writing):
        raise error
    assert raised.value is error
