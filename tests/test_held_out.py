"""How the share of the gap that a correction recovers is shown, and that a share of no gap is not."""

from __future__ import annotations

from typing import Any

import pytest

from glowq.cli.held_out import has_gap, held_out_rows


def figures(quantized: float | None, **changes: Any) -> dict[str, Any]:
    """Those of a reference at perplexity 10 and a correction that is a hundredth better than the quantized model."""
    found = {"reference": 10.0, "quantized": quantized, "corrected": 9.9, "recovered": 37.02, "tokens": 1024}
    return {**found, "recovered_ci95": [-5.0, 80.0], **changes}


@pytest.mark.parametrize(("quantized", "gap"), [(9.9, False), (10.0, False), (10.009, False), (10.011, True)])
def test_a_gap_is_a_thousandth_of_the_reference(quantized: float, gap: bool) -> None:
    assert has_gap(10.0, quantized) is gap
    shown = held_out_rows(figures(quantized))
    share = "3702.0% [-500.0%, 8000.0%]" if gap else "no gap to recover"
    assert shown["recovered"] == f"{share} on 1,024 held-out tokens"
    assert shown["quantized perplexity"] == f"{quantized:.4f}"


@pytest.mark.parametrize("changes", [{"recovered_ci95": None}, {"recovered_ci95": [None, None]}])
def test_without_an_interval_there_is_no_gap_either(changes: dict[str, Any]) -> None:
    assert held_out_rows(figures(10.0, **changes))["recovered"] == "no gap to recover on 1,024 held-out tokens"


def test_an_undefined_perplexity_leaves_the_share_undefined() -> None:
    shown = held_out_rows(figures(None, recovered=None, recovered_ci95=None))
    assert shown["recovered"] == "undefined on 1,024 held-out tokens"


def test_nothing_measured_shows_nothing() -> None:
    assert held_out_rows(None) == {}
