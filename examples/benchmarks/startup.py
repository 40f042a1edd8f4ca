"""Measure the CPU seconds of imports and of commands that need no model, each in its own process.

python examples/benchmarks/startup.py
python examples/benchmarks/startup.py --repeats 10 --json
python examples/benchmarks/startup.py --starts "import glowq" "glowq --help"
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys

_REGISTRY = "import transformers.quantizers.auto"
STARTS = {  # name of the row -> arguments of python
    "python": ["-c", ""],
    "import glowq": ["-c", "import glowq"],
    _REGISTRY: ["-c", _REGISTRY],
    "import glowq, transformers.quantizers.auto": ["-c", f"import glowq; {_REGISTRY}"],
    "glowq --version": ["-m", "glowq", "--version"],
    "glowq --help": ["-m", "glowq", "--help"],
    "glowq correct --help": ["-m", "glowq", "correct", "--help"],
}


def main() -> None:
    """Time every start in turns and print the minimum of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="processes per row; the minimum is shown")
    parser.add_argument(
        "--starts", nargs="+", choices=STARTS, default=list(STARTS), metavar="START", help="rows to measure"
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    least = dict.fromkeys(arguments.starts, float("inf"))
    for _ in range(arguments.repeats):
        for name in least:
            least[name] = min(least[name], cpu_seconds([sys.executable, *STARTS[name]]))
    rows = [{"start": name, "cpu_seconds": seconds} for name, seconds in least.items()]
    if arguments.json:
        print(json.dumps({"command": sys.argv, "repeats": arguments.repeats, "rows": rows}))
        return
    print(f"{'start':44} CPU seconds, minimum of {arguments.repeats}")
    for name, seconds in least.items():
        print(f"{name:44} {seconds:.2f}")


def cpu_seconds(command: list[str]) -> float:
    """Return the user and system time of one process and of the child processes that it waits for."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
