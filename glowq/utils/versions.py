"""Versions of other projects that glowq is tested with."""

from __future__ import annotations

import importlib.metadata
import warnings
from functools import cache

from ..errors import UntestedVersionWarning

__all__ = ["warn_untested"]


@cache
def warn_untested(package: str, tested: str, otherwise: str) -> None:
    """Warn, once per process, if the installed version of a package is outside the range that glowq is tested with.

    Args:
        package: import name of the package.
        tested: version specifier; an empty one accepts every version.
        otherwise: what the warning advises if something goes wrong.
    """
    if not tested:
        return
    from packaging.specifiers import SpecifierSet

    try:
        distribution = importlib.metadata.distribution(package).name
    except importlib.metadata.PackageNotFoundError:  # it has another name; to search all takes a third of a second
        distribution = importlib.metadata.packages_distributions().get(package, [package])[0]
    installed = importlib.metadata.version(distribution)
    if not SpecifierSet(tested).contains(installed, prereleases=True):
        warnings.warn(
            f"{distribution} {installed} is outside the versions that glowq is tested with ({tested}); {otherwise}.",
            UntestedVersionWarning,
            stacklevel=3,
        )
