"""SECURITY.md names tests that exist, and an audit that cannot be made says so."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
AUDIT = ROOT / ".ci" / "audit.py"


def test_each_test_that_is_named_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "SECURITY.md").read_text())
    assert len(named) > 15
    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / file).read_text()]
    assert not missing


@pytest.mark.skipif(not AUDIT.is_file(), reason="the sources of a release hold no .ci")
@pytest.mark.skipif(importlib.util.find_spec("pip_audit") is not None, reason="pip-audit would ask the network")
def test_an_audit_that_cannot_be_made_is_none(tmp_path: Path) -> None:
    (tmp_path / "installed.txt").write_text("pip==26.3\ntorch==2.13.0+cpu\n")
    done = subprocess.run([sys.executable, AUDIT, tmp_path / "installed.txt"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"audit: PyPI's advisory service does not answer .*; nothing was audited\.\n", done.stderr)
