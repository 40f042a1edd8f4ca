"""Every model type that transformers has, as a tiny random model: what the base alone can do, the corrected one can.

A type is skipped where the base alone fails: it cannot load, run, or load what it saved.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from support.survey import BASES, NotRunnable, cell, examined, types
from support.tiny import EXAMPLE

GUIDE = EXAMPLE.parent / "guides" / "architectures.md"

# One of each kind of fault that was found.
FEW = ["llama", "mixtral", "ctrl", "big_bird", "albert", "t5", "vit", "whisper", "llava", "falcon"]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in FEW else pytest.mark.long) for kind in types()]
)
def test_a_type_works_whole(kind: str, base: str, tmp_path: Path) -> None:
    try:
        found = examined(kind, base, tmp_path)
    except NotRunnable as error:
        pytest.skip(str(error))
    assert found["groups"] > 0
    (row,) = [line for line in GUIDE.read_text().splitlines() if line.startswith(f"| `{kind}` |")]
    assert [part.strip() for part in row.split("|")][3 + BASES.index(base)] == cell(found)
