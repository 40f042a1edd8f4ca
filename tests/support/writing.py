"""The commands that write a folder, and what they read: a tiny model, its correction, an adapter and texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.cli import call
from support.tiny import corrected, library_texts, tiny_llama

SIZES = ["--calibration-tokens", "256", "--sequence-length", "32"]
CORRECT = "correct MODEL --base nf4 --method svd --rank 2 --calibration TRAIN --output OUT"
COMMANDS = {
    "correct": CORRECT,
    "correct --resume": f"{CORRECT} --resume",
    "correct --format full": f"{CORRECT} --format full",
    "select": "select CORRECTED --budget 1% --output OUT",
    "export peft": "export CORRECTED --to peft --output OUT",
    "export merged": "export CORRECTED --to merged --output OUT",
    "compare": "compare MODEL --base nf4 --calibration TRAIN --data TEST --methods svd --budgets 5% --tokens 256 "
    "--output OUT",
    "bench": "bench CORRECTED --batch-sizes 1 --lengths 4 --new-tokens 1 --repeats 1 --output OUT",
    "import": "import ADAPTER --base-model MODEL --base nf4 --output OUT",
}


def sources(folder: Path) -> Path:
    """Write what the commands read into a folder, and return it."""
    _, correction = corrected(tiny_llama(folder / "model"), "nf4", method="svd", rank=2)
    correction.save_pretrained(folder / "corrected")
    assert call("export", folder / "corrected", "--to", "peft", "--output", folder / "adapter").exit_code == 0
    library_texts(folder)
    return folder


def words(name: str, folder: Path, out: Path) -> list[Any]:
    """The words of a command line of `COMMANDS`, which reads `sources(folder)` and writes `out`."""
    names = {word.upper(): folder / word for word in ("model", "corrected", "adapter")}
    names |= {"TRAIN": folder / "train.txt", "TEST": folder / "test.txt", "OUT": out}
    typed: list[Any] = [names.get(word, word) for word in COMMANDS[name].split()]
    return [*typed, *(SIZES if typed[0] in ("correct", "compare") else []), "--json"]


def run(name: str, folder: Path, out: Path) -> Any:
    """Run a command in this process."""
    return call(*words(name, folder, out))
