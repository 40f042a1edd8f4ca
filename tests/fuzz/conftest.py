"""Fixtures of the tests that change files at random."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from glowq.errors import NewerFormatWarning
from support.forms import FORMS, Saved, write_forms


@pytest.fixture(scope="session")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    return write_forms(tmp_path_factory.mktemp("forms"))


@pytest.fixture(params=FORMS)
def saved(request: pytest.FixtureRequest, forms: dict[str, Saved]) -> Saved:
    return forms[request.param]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The folder that a changed copy is written to."""
    (tmp_path / "copy").mkdir()
    return tmp_path / "copy"


@pytest.fixture(autouse=True)
def newer_formats() -> Iterator[None]:
    """A changed "minor" may be a newer one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NewerFormatWarning)
        yield
