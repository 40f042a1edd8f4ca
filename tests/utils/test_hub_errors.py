"""An exception that does not come from the Hub reaches the caller unchanged, or as what it is."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from glowq.errors import GlowQError, ModelNotFoundError, ReadError
from glowq.models.load_errors import loading
from glowq.utils.hub import asking_hub


@pytest.mark.parametrize("writing", [False, True])
def test_a_value_error_of_somebody_else_comes_through(writing: bool) -> None:
    error = ValueError("a mistake of the caller's")
    with pytest.raises(ValueError, match="a mistake") as raised, asking_hub("name/of-model", writing=writing):
        raise error
    assert raised.value is error


def test_a_runtime_error_that_is_not_of_a_transfer_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="a fault of ours") as caught, asking_hub("org/model", writing=True):
        raise RuntimeError("a fault of ours")
    assert not isinstance(caught.value, GlowQError)


def test_a_local_file_that_cannot_be_read_is_not_the_hubs_fault(tmp_path: Path) -> None:
    message = r"weights cannot be read or written \(Permission denied\)"
    with pytest.raises(ReadError, match=message), asking_hub("org/model", writing=True):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "weights"))


@pytest.mark.parametrize(("number", "expected"), [(errno.EACCES, ReadError), (errno.ENOENT, ModelNotFoundError)])
def test_only_a_file_that_is_not_there_is_not_found(number: int, expected: type[Exception]) -> None:
    with pytest.raises(expected, match="'somewhere' cannot be loaded"), loading("somewhere"):
        raise OSError(number, "no", "config.json")
