"""The predicted gain by budget: each point of the curve equals a cut to its budget, and `glowq inspect` shows it."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import glowq
from glowq.artifact.provenance import Provenance
from glowq.factors.units import GainUnit
from glowq.selection.budget import RankRequest
from glowq.selection.curve import budget_curve
from glowq.selection.ranks import choose_ranks
from support.cli import call, result_of
from support.corrections import changed
from support.gains import few, gains_of
from support.tiny import corrected, tiny_llama


@given(
    gains=st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=6), min_size=1, max_size=4),
    rank_bytes=st.lists(st.integers(1, 30), min_size=4, max_size=4),
    base_bytes=st.integers(1, 10**7),
)
@few
def test_every_point_is_what_its_budget_keeps(gains: list[list[int]], rank_bytes: list[int], base_bytes: int) -> None:
    group_gains = gains_of([sorted(gain, reverse=True) for gain in gains], rank_bytes, [100] * 4)
    total = 2.0 * sum(map(sum, gains)) + 1
    points = budget_curve(group_gains, total, base_bytes)
    whole = sum(item.rank_bytes * len(item.gains) for item in group_gains)
    if not any(map(any, gains)):
        assert points == []
        return
    assert (points[-1].bytes, points[-1].share_of_base) == (whole, whole / base_bytes)
    assert points[-1].predicted == pytest.approx(sum(map(sum, gains)) / total)
    assert 1 <= len(points) <= 12
    for point in points:
        ranks = choose_ranks(group_gains, RankRequest(budget=point.bytes), base_bytes, total)
        kept = sum(sum(item.gains[: ranks.get(item.group.name, 0)]) for item in group_gains)
        assert point.predicted == pytest.approx(kept / total)
    for small, large in pairwise(points):
        assert small.bytes <= large.bytes
        assert small.share_of_base < large.share_of_base


def test_the_shares_are_round_and_about_even_in_their_logarithm() -> None:
    points = budget_curve(gains_of([[9] * 50], [100], [100]), 1000, 100_000)
    shares = [0.001, 0.0015, 0.002, 0.003, 0.005, 0.007, 0.01, 0.015, 0.02, 0.03, 0.05]
    assert [point.share_of_base for point in points] == shares
    assert [point.bytes for point in points] == [100, 150, 200, 300, 500, 700, 1000, 1500, 2000, 3000, 5000]


def test_nothing_is_predicted_of_what_was_not_measured() -> None:
    assert budget_curve(gains_of([[0, 0]], [1], [8]), 0.0, 100) == []
    assert budget_curve(gains_of([[2, 1]], [1], [8]), 3.0, 0) == []


class TestInspect:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Both forms of a correction of rank 8."""
        folder = tmp_path_factory.mktemp("curve")
        model, correction = corrected(tiny_llama(folder / "model"), "nf4", rank=8)
        correction.save_pretrained(folder / "correction")
        model.save_pretrained(folder / "full")
        return folder

    def test_points_are_what_select_keeps(self, folder: Path, tmp_path: Path) -> None:
        found = result_of("inspect", folder / "correction")
        correction = glowq.Correction.from_pretrained(folder / "correction")
        assert found["curve"][-1]["bytes"] == correction.factor_bytes
        assert found["curve"][-1]["predicted"] == pytest.approx(correction.predicted)
        assert 8 <= len(found["curve"]) <= 12
        for point in found["curve"][:-1]:
            assert set(point) == {"share_of_base", "bytes", "predicted"}
            share = f"{round(100 * point['share_of_base'], 6)}%"
            assert correction.cut(budget=share).predicted == pytest.approx(point["predicted"])
        cut = result_of("select", folder / "correction", "--budget", "5%", "--output", tmp_path / "cut")
        (point,) = (point for point in found["curve"] if point["share_of_base"] == 0.05)
        assert cut["predicted"] == pytest.approx(point["predicted"])
        assert result_of("inspect", tmp_path / "cut")["curve"][-1]["predicted"] == pytest.approx(cut["predicted"])

    def test_a_self_contained_model_has_the_same(self, folder: Path) -> None:
        assert result_of("inspect", folder / "full")["curve"] == result_of("inspect", folder / "correction")["curve"]

    def test_for_people(self, folder: Path) -> None:
        shown = call("inspect", folder / "correction").stdout
        assert re.search(r"bytes +┃ % of base ┃ predicted share recovered", shown)
        whole = result_of("inspect", folder / "correction")["curve"][-1]
        assert re.search(rf"│ {whole['bytes']:,} +│ \d+\.\d +│ {whole['predicted']:.1%} ", shown)

    def test_nothing_measured(self, folder: Path, tmp_path: Path) -> None:
        def remove_gains(stored: dict[str, Any]) -> None:
            stored["provenance"].pop("total")
            for group in stored["groups"].values():
                group.update(gains=[0.0] * group["rank"], total=0.0)

        copy = changed(folder / "correction", tmp_path / "copy", remove_gains)
        assert result_of("inspect", copy)["curve"] == []
        assert "predicted share" not in call("inspect", copy).stdout

    def test_what_to_expect_of_a_part_follows_the_measurement_of_the_whole(self, folder: Path, tmp_path: Path) -> None:
        found = result_of("inspect", folder / "correction")
        measured, whole = found["provenance"]["improvement"], found["curve"][-1]["predicted"]
        share = 1 - measured["corrected"] / measured["quantized"]
        assert found["times_predicted"] == pytest.approx(share / whole)
        assert "to expect, as the whole was measured" in call("inspect", folder / "correction").stdout
        cut = result_of("select", folder / "correction", "--budget", "5%", "--output", tmp_path / "cut")
        assert cut["expected"] == pytest.approx(cut["predicted"] * share / whole)
        again = result_of("select", tmp_path / "cut", "--budget", "2%", "--output", tmp_path / "again")
        assert again["expected"] is None  # the figures of the whole are not those of the part
        assert "to expect" not in call("inspect", tmp_path / "cut").stdout


MEASURED: Any = {"tokens": 512, "quantized": 2.0, "corrected": 0.5, "benefit": {"value": 1.5, "low": 1.2, "high": 1.8}}


@pytest.mark.parametrize(
    ("change", "times"),
    [
        ({}, 1.5),
        ({"gains": GainUnit.SQUARED_DISTANCE}, 1.5),
        ({"gains": GainUnit.SQUARED_OUTPUT}, None),
        ({"gains": None}, None),
        ({"distilled_steps": 20}, None),
        ({"improvement": None}, None),
        ({"improvement": {**MEASURED, "quantized": 0.0}}, None),
        ({"improvement": {**MEASURED, "benefit": {"value": 1.5, "low": None, "high": None}}}, None),
        ({"improvement": {**MEASURED, "benefit": {"value": 1.5, "low": -0.1, "high": 3.1}}}, None),
    ],
    ids=str,
)
def test_when_it_is_known_what_to_expect(change: dict[str, Any], times: float | None) -> None:
    provenance = Provenance(**{"gains": GainUnit.NATS, "improvement": MEASURED, **change})
    assert provenance.times_predicted(0.5) == times
    assert provenance.times_predicted(None) is provenance.times_predicted(0.0) is None
