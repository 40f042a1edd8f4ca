"""Ask PyPI's advisory service, through pip-audit, for known vulnerabilities of installed packages.

It is called with a file of lines "name==version". Exit codes: 0 all were audited and none is known; 1 some are known,
or some packages were not audited; 2 the service does not answer, and nothing was audited.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def main() -> int:
    lines = Path(sys.argv[1]).read_text().split()
    pins = sorted(line.partition("+")[0] for line in lines)  # advisories are for 2.13.0, not for 2.13.0+cpu
    probe = next((pin for pin in pins if pin.startswith("pip==")), pins[0])
    try:
        if not any("vulns" in found for found in _audit([probe])):
            raise OSError(f"it does not know {probe}")
        found = _audit(pins)
    except (OSError, ValueError) as error:
        print(f"audit: PyPI's advisory service does not answer ({error}); nothing was audited.", file=sys.stderr)
        return 2
    known = [(package, fault) for package in found for fault in package.get("vulns", [])]
    for package, fault in known:
        fixed = ", ".join(fault["fix_versions"]) or "no version yet"
        print(f"{package['name']} {package['version']}: {fault['id']}, fixed in {fixed}")
    left = [package["name"] for package in found if "vulns" not in package]
    if left:
        print(f"not audited, because the service does not know them: {', '.join(left)}")
    print(f"{len(found) - len(left)} packages audited, {len(known)} known vulnerabilities")
    return 1 if known or left else 0


def _audit(pins: list[str]) -> list[dict[str, Any]]:
    """What pip-audit reports: one entry for each package, with "vulns" if the service knows the package.

    Raises:
        OSError: the service cannot be reached.
        ValueError: pip-audit printed something else than its report.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "requirements.txt")
        file.write_text("\n".join(pins))
        command = [sys.executable, "-m", "pip_audit", "--requirement", str(file), "--no-deps", "--disable-pip"]
        done = subprocess.run(
            [*command, "--format", "json", "--progress-spinner", "off"], capture_output=True, text=True
        )
    if not done.stdout.startswith("{"):
        raise OSError(done.stderr.strip().rpartition("\n")[2][:200] or f"exit code {done.returncode}")
    report: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
    return report["dependencies"]


if __name__ == "__main__":
    raise SystemExit(main())
