"""Files of other versions: unknown fields of a newer minor version give a warning; other differences are refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

import glowq
from glowq.artifact.correction_config import FORMAT_MINOR
from glowq.errors import ConfigError, NewerFormatWarning, VersionError
from support.corrections import changed


def first_group(stored: dict[str, Any]) -> dict[str, Any]:
    return next(iter(stored["groups"].values()))


ADDED = {
    "the config": lambda stored: stored.update(colour="red"),
    "provenance": lambda stored: stored["provenance"].update(colour="red"),
    "a group": lambda stored: first_group(stored).update(colour="red"),
}


@pytest.mark.parametrize("where", ADDED)
def test_a_field_that_a_newer_minor_version_added(where: str, rank_8: Path, tmp_path: Path) -> None:
    def newer(stored: dict[str, Any]) -> None:
        stored["minor"] = FORMAT_MINOR + 1
        ADDED[where](stored)

    folder = changed(rank_8, tmp_path / "copy", newer)
    with pytest.warns(NewerFormatWarning, match=r"holds 'colour', which format 1\.\d+ has"):
        found = glowq.Correction.from_pretrained(folder)
    whole = glowq.Correction.from_pretrained(rank_8)
    assert found.config.to_dict() == whole.config.to_dict()


@pytest.mark.parametrize("where", ADDED)
def test_the_same_field_of_this_version_is_a_mistake(where: str, rank_8: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="colour"):
        glowq.Correction.from_pretrained(changed(rank_8, tmp_path / "copy", ADDED[where]))


def test_a_newer_major_version_is_refused(rank_8: Path, tmp_path: Path) -> None:
    folder = changed(rank_8, tmp_path / "copy", lambda stored: stored.update(version=2))
    with pytest.raises(VersionError, match="format version 2; the installed glowq reads up to 1"):
        glowq.Correction.from_pretrained(folder)


def test_a_file_without_a_minor_version_is_of_the_first(rank_8: Path, tmp_path: Path) -> None:
    folder = changed(rank_8, tmp_path / "copy", lambda stored: stored.pop("minor"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert glowq.Correction.from_pretrained(folder).config.minor == FORMAT_MINOR


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gains": "apples"}, r"provenance\.gains in config\.json must be one of 'nats', .* found 'apples'"),
        ({"gains": ["nats"]}, r"provenance\.gains in config\.json must be one of"),
        ({"calibration_tokens": "many"}, r"provenance\.calibration_tokens must be a whole number"),
        ({"distilled_steps": -1}, r"provenance\.distilled_steps must be a whole number"),
        ({"held_out": 4}, r"provenance\.held_out in config\.json must be a JSON object, found int"),
        ({"selected": "all"}, r"provenance\.selected in config\.json must be a JSON object, found str"),
        ({"command": 4}, r"provenance\.command in config\.json must be a text, found 4"),
    ],
)
def test_facts_of_another_kind(change: dict[str, Any], message: str, rank_8: Path, tmp_path: Path) -> None:
    folder = changed(rank_8, tmp_path / "copy", lambda stored: stored["provenance"].update(change))
    with pytest.raises(ConfigError, match=message):
        glowq.Correction.from_pretrained(folder)
