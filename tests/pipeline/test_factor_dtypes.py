"""How the factors of a correction are stored if a user does not say it."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import glowq
from glowq.cli.app import app
from glowq.errors import CalibrationError, RoundingError
from glowq.pipeline.correct import _solved_ranks as solved_ranks
from support import tiny


def test_a_budget_is_spent_in_4_bits(source: Path, tmp_path: Path) -> None:
    correction = tiny.corrected(source, "nf4", rank=None, budget="12%")[1]
    assert {entry.bits for entry in correction.factors} == {4}
    assert 0.1 < correction.overhead <= 0.12
    provenance = correction.config.provenance
    assert provenance.factor_dtype == "int4"
    assert provenance.rounding["rounded"] <= provenance.rounding["same_bytes"] * 1.01
    asked = tiny.corrected(source, "nf4", rank=None, budget="12%", factor_dtype="int4")[1]
    for folder, one in (("auto", correction), ("asked", asked)):
        one.save_pretrained(tmp_path / folder)
    auto, other = ((tmp_path / folder / "glowq.safetensors").read_bytes() for folder in ("auto", "asked"))
    assert auto == other


@pytest.mark.parametrize("options", [{"rank": 4}, {"rank": None, "budget": "12%", "factor_dtype": "float"}], ids=str)
def test_a_rank_is_stored_in_floats_and_so_is_what_asks_for_it(source: Path, options: dict[str, Any]) -> None:
    correction = tiny.corrected(source, "nf4", **options)[1]
    assert {entry.bits for entry in correction.factors} == {None}
    assert correction.config.provenance.factor_dtype is None


def test_a_method_without_measured_gains_keeps_floats(source: Path) -> None:
    correction = tiny.corrected(source, "nf4", rank=None, budget="12%", method="qera")[1]
    assert {entry.bits for entry in correction.factors} == {None}


def test_where_rounding_loses_too_much_the_factors_stay_floats(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def lose(*_: object) -> dict[str, Any]:
        raise RoundingError("int4 factors lose too much")

    def as_for_int4(groups: Any, request: Any, *rest: Any) -> Any:
        return solved_ranks(groups, replace(request, factor_dtype="auto"), *rest)

    # Both are solved at the same ranks: beside other ranks, the last bit of a factor differs on some processors.
    monkeypatch.setattr("glowq.pipeline.correct._solved_ranks", as_for_int4)
    floats = tiny.corrected(source, "nf4", rank=None, budget="12%", factor_dtype="float")[1]
    monkeypatch.setattr("glowq.pipeline.finish.rounding_cost", lose)
    with caplog.at_level(logging.WARNING, logger="glowq"):
        found = tiny.corrected(source, "nf4", rank=None, budget="12%")[1]
    assert "the factors are stored in the model's own dtype: int4 factors lose too much" in caplog.text
    assert found.config.provenance.factor_dtype is None
    assert found.ranks == floats.ranks
    for name, tensor in floats.tensors().items():
        assert torch.equal(found.tensors()[name], tensor), name


def test_text_for_fewer_ranks_than_4_bits_would_hold(source: Path) -> None:
    """160 tokens to calibrate on allow rank 80, which floats do not need for this budget, and 4 bits do."""
    ids = torch.randint(0, 4096, (6, 32), generator=torch.Generator().manual_seed(0))
    correction = tiny.corrected(source, "nf4", rank=None, budget="12%", calibration=ids, force=True)[1]
    assert {entry.bits for entry in correction.factors} == {4}
    assert max(correction.ranks.values()) <= 80
    with pytest.raises(CalibrationError, match="calibration tokens are too few for rank"):
        tiny.corrected(source, "nf4", rank=None, budget="900%", calibration=ids[:3], force=True)


def test_a_target_is_reached_by_the_rounded_factors(source: Path) -> None:
    correction = tiny.corrected(source, "nf4", rank=None, budget="recover 70%")[1]
    assert {entry.bits for entry in correction.factors} == {4}
    assert correction.predicted is not None
    assert 0.7 <= correction.predicted < 0.8


def test_select_cuts_what_has_these_bits_already(source: Path, tmp_path: Path) -> None:
    whole = tiny.corrected(source, "nf4", rank=None, budget="12%")[1]
    whole.save_pretrained(tmp_path / "whole")
    for name, form in (("plain", []), ("int4", ["--factor-dtype", "int4"])):
        options = ["--budget", "5%", "--output", str(tmp_path / name), *form]
        done = CliRunner().invoke(app, ["select", str(tmp_path / "whole"), *options, "--json"])
        assert done.exit_code == 0, done.output
    plain, other = (glowq.Correction.from_pretrained(tmp_path / name) for name in ("plain", "int4"))
    assert plain.ranks == other.ranks
    assert plain.factor_bytes < whole.factor_bytes


def test_the_command_says_how_factors_are_stored(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("\n".join(tiny.TEXTS))
    size = ["--budget", "12%", "--calibration-tokens", "1024", "--sequence-length", "128", "--force"]
    command = ["correct", str(source), "--base", "nf4", "--calibration", str(text), *size]
    done = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["factor_dtype"] == "int4"
    plain = ["--factor-dtype", "float", "--output", str(tmp_path / "floats"), "--json"]
    assert json.loads(CliRunner().invoke(app, [*command, *plain]).stdout)["factor_dtype"] == "float"
