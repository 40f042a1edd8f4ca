"""Display of the recovered share of the gap; no share is shown if there is no gap."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import glowq
from glowq.cli.commands.correct import held_out_rows
from glowq.evaluation.figures import has_gap
from support.tiny import corrected, tiny_llama


def figures(quantized: float | None, **changes: Any) -> dict[str, Any]:
    """Return held-out figures with reference perplexity 10 and corrected perplexity 9.9."""
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
    assert shown["recovered"] == "too few tokens to tell (undefined) on 1,024 held-out tokens"


def test_nothing_measured_shows_nothing() -> None:
    assert held_out_rows(None) == {}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> glowq.Correction:
    """A rank-8 correction with held-out figures, as `glowq correct` records them."""
    _, correction = corrected(tiny_llama(tmp_path_factory.mktemp("source") / "llama"), "nf4", rank=8)
    correction.config.record(held_out=figures(12.0, recovered=0.6))
    return correction


class TestCut:
    """Figures measured on the whole correction do not apply to a part of it."""

    @pytest.mark.parametrize("cut", [{"rank": 4}, {"budget": "5%"}], ids=str)
    def test_a_part_has_none(self, measured: glowq.Correction, tmp_path: Path, cut: dict[str, Any]) -> None:
        assert "| 10.0000 | 12.0000 | 9.9000 | 60.0% [-500.0%, 8000.0%] |" in measured.model_card()
        measured.save_pretrained(tmp_path)
        for part in (measured.cut(**cut), glowq.Correction.from_pretrained(tmp_path, **cut)):
            assert part.config.provenance.held_out is None
            selected = {"of_factor_bytes": measured.factor_bytes, "of_held_out": figures(12.0, recovered=0.6)}
            assert part.config.provenance.selected == selected
            assert "Measured" not in part.model_card()
            assert part.cut(rank=1).config.provenance.selected == selected
        assert measured.config.provenance.held_out is not None

    def test_all_of_it_keeps_them(self, measured: glowq.Correction, tmp_path: Path) -> None:
        measured.save_pretrained(tmp_path)
        for whole in (measured.cut(rank=99), glowq.Correction.from_pretrained(tmp_path, rank=8)):
            assert whole.config.provenance == measured.config.provenance

    def test_what_was_never_measured_is_not_selected_from(self, measured: glowq.Correction) -> None:
        plain = measured.cut(rank=4)
        plain.config.record(selected=None)
        assert plain.cut(rank=2).config.provenance.selected is None


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"quantized": 10.009}, "| 10.0000 | 10.0090 | 9.9000 | no gap to recover |"),
        ({"quantized": 10.011}, "| 10.0000 | 10.0110 | 9.9000 | 3702.0% [-500.0%, 8000.0%] |"),
        ({"quantized": None, "recovered": None}, "| 10.0000 | undefined | 9.9000 | undefined [-500.0%, 8000.0%] |"),
    ],
)
def test_a_card_shows_no_share_of_hardly_any_gap(
    measured: glowq.Correction, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], shown: str
) -> None:
    changed = replace(measured.config.provenance, held_out={**figures(None), **changes})
    monkeypatch.setattr(measured.config, "provenance", changed)
    assert shown in measured.model_card()


def test_too_few_sequences_for_an_interval_tell_nothing() -> None:
    shown = held_out_rows(figures(11.0, recovered_ci95=None))
    assert shown["recovered"] == "too few tokens to tell (3702.0%) on 1,024 held-out tokens"
