"""Versions of other projects that glowq is tested with."""

from __future__ import annotations

import importlib.metadata
import warnings
from functools import cache

from ..errors import UntestedVersionWarning

__all__ = ["warn_untested"]


@cache
def warn_untested(package: str, tested: str, otherwise: str) -> None:
    """Warn, once in a process, where an installed package's version is none of those that glowq is tested with.

    Args:
        package: its import name.
        tested: version specifier; an empty one takes every version.
        otherwise: what to do if something goes wrong.
    """
    if not tested:
        return
    from packaging.specifiers import SpecifierSet

    distribution = importlib.metadata.packages_distributions().get(package, [package])[0]
    installed = importlib.metadata.version(distribution)
    if not SpecifierSet(tested).contains(installed, prereleases=True):
        warnings.warn(
            f"{distribution} {installed} is outside the versions that glowq is tested with ({tested}); {otherwise}.",
            UntestedVersionWarning,
            stacklevel=3,
        )
