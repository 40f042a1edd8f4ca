"""Correct models that people know, on several bases, and compare the methods and what a user would do instead.

python examples/benchmarks/real.py                      # SmolLM2-135M on nf4 and torchao-int3, about an hour on 2 cores
python examples/benchmarks/real.py --all                # every base and every model of `make models-all`: hours
python examples/benchmarks/real.py --table              # the tables of what was measured before; runs nothing
python examples/benchmarks/real.py --table --results examples/benchmarks/results   # those that are published
python examples/benchmarks/real.py --calibration valid.txt --data test.txt   # WikiText-2 from files

`make real` and `make real-all` run this. For each model and base it runs `glowq compare`, and then `glowq correct` with
every method of --making, for the time and the memory that each takes. It writes the figures, with the commands, the
machine and the versions, to build/results/MODEL-BASE.json, and a plot of the main rows beside it. What is there already
is not run again, an interrupted run goes on with what it had finished, which build/real keeps, and a method of --making
that a result lacks is added to it; --again measures anew. The figures that are published were written with --results
examples/benchmarks/results. A model that `make models` has not fetched is left out with one line.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from glowq.evaluation.plots import draw_recovered
from glowq.evaluation.timing import processor

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "build" / "models"
UNFINISHED = ROOT / "build" / "real"
RESULTS = ROOT / "build" / "results"
WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1"
BASES = ["nf4", "torchao-int3"]
MORE_BASES = ["torchao-int4", "torchao-int2", "gptq-3", "hqq-3", "hqq-2"]
NAMES = ["smollm2-135m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"]
METHODS = "svd,lqer,qera,eora,glowq-published,glowq"
BUDGETS = "1%,3%,6%"
FEWER = ["--budgets", "3%", "--factor-dtypes", "int8,int4"]
LARGE = {  # fewer methods, and on the first base only
    "qwen2.5-coder-0.5b": ["--methods", "svd,lqer,qera,glowq-published,glowq", *FEWER, "--alternatives"],
    "qwen2.5-coder-1.5b": ["--methods", "qera,glowq", *FEWER],
}
MADE_AT = "3%"
RANKED = ["svd", "lqer", "qera", "glowq-published"]  # made at the rank that they have within MADE_AT
MAKING = {
    "glowq": ["--budget", MADE_AT, "--factor-dtype", "float"],
    "glowq+int8": ["--budget", MADE_AT, "--factor-dtype", "int8"],
    "glowq+int4": ["--budget", MADE_AT, "--factor-dtype", "int4"],
    "glowq+distilled": ["--budget", MADE_AT, "--factor-dtype", "float", "--distill"],
}
DRAWN = {  # method -> its name in the plot
    "glowq+int4": "glowq (int4)",
    "glowq": "glowq in 16 bits",
    "glowq-published": "GlowQ as published",
    "qera": "QERA, EoRA",
    "lqer": "LQER",
    "svd": "plain SVD",
    "mixed": "instead: more bits for some groups",
    "finer": "instead: half the group size",
}
MOST_DRAWN = 0.16  # added bytes, as a share of the quantized weights'
PACKAGES = ["torch", "transformers", "torchao", "bitsandbytes"]


def main() -> None:
    """Measure what is asked for and not measured yet, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="NAME", help=f"of {', '.join(NAMES)}; default: the first")
    parser.add_argument("--bases", nargs="+", metavar="BASE", help=f"default: {' '.join(BASES)}")
    parser.add_argument("--all", action="store_true", help=f"all models, and also {' '.join(MORE_BASES)}")
    parser.add_argument(
        "--making",
        nargs="*",
        choices=[*RANKED, *MAKING],
        help="time and memory of which methods alone: by default of glowq, with --all of all; `--making` alone: none",
    )
    parser.add_argument("--table", action="store_true", help="print the tables of earlier measurements")
    parser.add_argument("--again", action="store_true", help="measure anew what was measured before")
    parser.add_argument("--folder", type=Path, default=MODELS, help="where the models are (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the figures go (%(default)s)")
    parser.add_argument("--unfinished", type=Path, default=UNFINISHED, help="where finished parts wait (%(default)s)")
    parser.add_argument("--calibration", default=f"{WIKITEXT}:validation", help="text to calibrate on (%(default)s)")
    parser.add_argument("--data", default=f"{WIKITEXT}:test", help="text to measure on (%(default)s)")
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=6144, help="number of tokens to measure on")
    parser.add_argument("--distill", type=int, default=20, help="steps of the distilled rows (%(default)s)")
    parser.add_argument("--cloze", type=int, default=0, help="number of multiple-choice items; 100 take half an hour")
    arguments = parser.parse_args()
    names = arguments.models or (NAMES if arguments.all else NAMES[:1])
    if arguments.making is None:
        arguments.making = [*RANKED, *MAKING] if arguments.all else ["glowq"]
    bases = arguments.bases or (BASES + MORE_BASES if arguments.all else BASES)
    for name in () if arguments.table else names:
        if not (arguments.folder / name / "config.json").is_file():
            print(f"{arguments.folder / name} is not there: left out; `make models-all` fetches it", file=sys.stderr)
            continue
        for base in bases[:1] if name in LARGE and arguments.bases is None else bases:
            measure(arguments.folder / name, base, arguments.results / f"{name}-{base}.json", arguments)
    for name in names:
        for file in (arguments.results / f"{name}-{base}.json" for base in bases):
            if file.is_file():
                stored = json.loads(file.read_text())
                draw(stored, file.with_suffix(".png"))
                print(table(stored), end="\n\n")


def measure(folder: Path, base: str, result: Path, arguments: argparse.Namespace) -> None:
    """Run what the result lacks of `glowq compare` and `glowq correct`, and write the figures and the plot."""
    text = ["--calibration", arguments.calibration, "--calibration-tokens", str(arguments.calibration_tokens)]
    model = str(folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder)
    unfinished = arguments.unfinished / result.stem
    unfinished.mkdir(parents=True, exist_ok=True)
    started = [model, "--base", base, *text]
    if arguments.again or not result.is_file():
        stored = compared(started, unfinished, arguments)
    else:
        stored = json.loads(result.read_text())
    ranks = {row["method"]: row["rank"] or 1 for row in stored["rows"] if row["budget"] == MADE_AT}
    size = {**{name: ["--rank", str(ranks[name])] for name in RANKED if name in ranks}, **MAKING}
    size["glowq+distilled"] = [*size["glowq+distilled"], str(arguments.distill)]
    for method in missing(folder.name, stored, arguments.making):
        file = unfinished / f"{method}.json"
        if not file.is_file():
            options = ["--method", method.partition("+")[0], *size[method], "--force"]
            made = run("correct", *started, *options, "--output", str(unfinished / "made"))
            kept = {key: made[key] for key in ("seconds", "peak_rss_bytes", "timeline", "predicted", "improvement")}
            kept |= {"machine": processor(), "threads": torch.get_num_threads()}
            _write(file, {"command": _public(made["command"]), **kept})
        stored["making"][method] = json.loads(file.read_text())
    result.parent.mkdir(exist_ok=True)
    _write(result, stored)
    shutil.rmtree(unfinished, ignore_errors=True)


def compared(started: list[str], unfinished: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """What `glowq compare` finds, with the machine and the versions; `started` are its model, base and text."""
    report = ["--data", arguments.data, "--tokens", str(arguments.tokens), "--cloze", str(arguments.cloze)]
    whole = ["--methods", METHODS, "--budgets", BUDGETS, "--factor-dtypes", "int8,int4,int3"]
    whole += ["--distill", str(arguments.distill), "--alternatives"]
    chosen = LARGE.get(Path(started[0]).name, whole)
    files, about = unfinished / "compared", unfinished / "compared.json"
    if not about.is_file():
        found = run("compare", *started, *report, *chosen, "--output", str(files), "--resume")
        _write(about, {key: found[key] for key in ("timeline", "peak_rss_bytes")})
    stored: dict[str, Any] = json.loads((files / "compare.json").read_text())
    stored.pop("benefit")
    for part in (stored["calibration"], stored["data"]):
        part["source"] = _last(part["source"])
    versions = {package: version(package) for package in PACKAGES}
    about_it = {"comparing": json.loads(about.read_text()), "machine": processor(), "versions": versions}
    return {**stored, "making": {}, **about_it}


def missing(name: str, stored: Mapping[str, Any], making: list[str]) -> list[str]:
    """The methods of `making` whose time and memory the result of this model lacks; of a large model, glowq's alone."""
    return [one for one in making if one not in stored["making"] and (one == "glowq" or name not in LARGE)]


def _write(file: Path, content: Any) -> None:
    """Write a JSON file, completely or not at all."""
    whole = file.with_suffix(".part")
    whole.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    whole.replace(file)


def run(*arguments: str) -> dict[str, Any]:
    """Run a command of glowq from the repository's root, and return its JSON."""
    print(f"glowq {' '.join(arguments)}", file=sys.stderr)
    command = [sys.executable, "-m", "glowq", *arguments, "--json"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"glowq {arguments[0]} ended with status {done.returncode}; what was measured before is kept")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def table(result: Mapping[str, Any]) -> str:
    """The figures of one model and base as a Markdown table: a row a method, and perplexity and KL at every budget."""
    reference, quantized = result["models"]
    budgets = list(dict.fromkeys(row["budget"] for row in result["rows"] if row["budget"]))
    rows = [row for row in result["rows"] if row["perplexity"] is not None]
    making = result["making"]
    lines = [
        f"**{Path(result['model']).name}, {result['base']}**: perplexity {reference['perplexity']:.2f}, quantized "
        f"{quantized['perplexity']:.2f}, at a KL divergence of {quantized['kl']:.3f} nats",
        "",
        f"| perplexity, KL divergence undone | {' | '.join(f'+{budget} bytes' for budget in budgets)} |",
        f"|---|{'---|' * len(budgets)}",
    ]
    for method in dict.fromkeys(row["method"] for row in rows if row["budget"]):
        found = {row["budget"]: row for row in rows if row["method"] == method}
        lines.append(f"| {method} | {' | '.join(_cell(found.get(budget)) for budget in budgets)} |")
    for row in (row for row in rows if not row["budget"]):
        empty = "| " * (len(budgets) - 1)
        lines.append(f"| {row['method']}: {row['settings']} | {empty}+{row['overhead']:.1%} bytes: {_cell(row)} |")
    made = [
        f"{method} {one['seconds']:.0f} s, {one['peak_rss_bytes'] / 1e9:.1f} GB"
        + (f" ({one['threads']} threads)" if "threads" in one else "")
        for method, one in making.items()
    ]
    if made:
        machines = {one.get("machine", result["machine"]) for one in making.values()}
        lines += ["", f"`glowq correct` at +{MADE_AT} ({', '.join(sorted(machines))}): {'; '.join(made)}."]
    return "\n".join(lines)


def draw(result: Mapping[str, Any], file: Path) -> None:
    """Draw bytes against the share of the KL divergence undone, one line a method of `DRAWN`."""
    lines: dict[str, list[dict[str, Any]]] = {name: [] for name in DRAWN.values()}
    for row in result["rows"]:
        if row["method"] in DRAWN and row["perplexity"] is not None and row["overhead"] < MOST_DRAWN:
            shares = {"recovered": row["undone"], "recovered_ci95": row["undone_ci95"]}
            lines[DRAWN[row["method"]]].append({"overhead": row["overhead"], **shares})
    title = f"{Path(result['model']).name}, {result['base']}: what comes back of the quantization's KL divergence"
    draw_recovered(file, {name: line for name, line in lines.items() if line}, title, "KL divergence undone")


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    low, high = row["undone_ci95"] or (row["undone"],) * 2
    return f"{row['perplexity']:.2f}, {row['undone']:.0%} [{100 * low:.0f}, {100 * high:.0f}]"


def _public(command: str) -> str:
    """The command without the folder that it wrote to, and without folders that only this machine has."""
    words = command.split()
    pairs = zip(["", *words], words, strict=False)
    return " ".join("OUT" if before == "--output" else _last(word) for before, word in pairs)


def _last(path: str) -> str:
    return Path(path).name if Path(path).is_absolute() else path


if __name__ == "__main__":
    main()
