"""Measure the CPU seconds of imports and of commands that need no model, each in its own process.

python examples/benchmarks/startup.py
python examples/benchmarks/startup.py --repeats 10 --json
python examples/benchmarks/startup.py --correction corr      # also of the commands that read a saved correction
python examples/benchmarks/startup.py --starts "import glowq" "glowq --help"
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys

from glowq.evaluation.timing import processor

_REGISTRY = "import transformers.quantizers.auto"
STARTS = {  # name of the row -> arguments of python
    "python": ["-c", ""],
    "import glowq": ["-c", "import glowq"],
    _REGISTRY: ["-c", _REGISTRY],
    "import glowq, transformers.quantizers.auto": ["-c", f"import glowq; {_REGISTRY}"],
    "glowq --version": ["-m", "glowq", "--version"],
    "glowq --help": ["-m", "glowq", "--help"],
    "glowq correct --help": ["-m", "glowq", "correct", "--help"],
    "glowq corect": ["-m", "glowq", "corect"],
}
CORRECTION = "CORR"
OF_A_CORRECTION = {
    "glowq inspect CORR": ["-m", "glowq", "inspect", CORRECTION],
    "glowq verify CORR --headers": ["-m", "glowq", "verify", CORRECTION, "--headers"],
    "glowq select CORR, more than it has": ["-m", "glowq", "select", CORRECTION, "--budget", "90%", "--output", "none"],
}


def main() -> None:
    """Time every start in turns and print the minimum of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="processes per row; the minimum is shown")
    parser.add_argument("--starts", nargs="+", choices=STARTS, metavar="START", help="rows to measure; default: all")
    parser.add_argument("--correction", help="folder of a saved correction (--format correction)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    chosen = {name: STARTS[name] for name in arguments.starts or STARTS}
    if arguments.correction is not None:
        chosen |= {
            name: [arguments.correction if word == CORRECTION else word for word in words]
            for name, words in OF_A_CORRECTION.items()
        }
    least = dict.fromkeys(chosen, float("inf"))
    for _ in range(arguments.repeats):
        for name, words in chosen.items():
            least[name] = min(least[name], cpu_seconds([sys.executable, *words]))
    rows = [{"start": name, "cpu_seconds": seconds} for name, seconds in least.items()]
    if arguments.json:
        print(json.dumps({"machine": processor(), "repeats": arguments.repeats, "rows": rows}))
        return
    print(f"{'start':44} CPU seconds, minimum of {arguments.repeats}")
    for name, seconds in least.items():
        print(f"{name:44} {seconds:.2f}")


def cpu_seconds(command: list[str]) -> float:
    """Return the user and system time of one process and of the child processes that it waits for."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=False, capture_output=True)  # an error is an answer, too
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
