"""`glowq select`: a saved correction cut to a budget, without calibrating again."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, OutputError
from .common import JsonOption, check_budget, command_line, grid, session

if TYPE_CHECKING:
    from ..correction import Correction

__all__ = ["select"]


def select(
    correction: Annotated[str, typer.Argument(metavar="OUT", help="Folder or Hub name of a saved correction.")],
    budget: Annotated[
        str,
        typer.Option(callback=check_budget, help="Bytes to keep: a share of the quantized weights (1.5%) or 200MB."),
    ],
    output: Annotated[str, typer.Option(metavar="OUT2", help="Folder to write; must be new, empty, or an old result.")],
    json: JsonOption = False,
) -> None:
    """Cut a correction to a budget: the ranks that gain most for their bytes are kept, nothing is solved again.

    \b
    Example:
      glowq select corrected --budget 1% --output smaller
    """
    with session(json) as show:
        from ..correction import Correction
        from ..files import check_output

        target = Path(output).resolve()
        if target == Path(correction).resolve():
            raise OutputError(f"{target} is the correction itself, which would be lost; choose another folder.")
        check_output(target)
        whole = Correction.from_pretrained(correction)
        _check_size(whole, correction, budget)
        note = _check_gains(whole, correction)
        cut = whole.cut(budget=budget)
        kept, had = (sum(float(entry.gains.sum()) for entry in side.factors) for side in (cut, whole))
        provenance = cut.config.provenance
        # Without the folder's name, so that the same command gives the same files wherever they are written.
        command = command_line().replace(f"--output {shlex.quote(output)}", "--output OUT2")
        provenance["selected"] = {
            "budget": budget,
            "of_factor_bytes": whole.factor_bytes,
            "of_held_out": provenance.pop("held_out", None),  # measured on the whole: no figure of what is left
        }
        provenance["command"] = "\n".join(filter(None, (provenance.get("command"), command)))
        cut.save_pretrained(target)
        if note is not None:
            print(f"glowq: note: {note}", file=sys.stderr)
        result = {
            "output": output,
            "budget": budget,
            "groups": len(cut.ranks),
            "of_groups": len(whole.ranks),
            "ranks": cut.ranks,
            "factor_bytes": cut.factor_bytes,
            "of_factor_bytes": whole.factor_bytes,
            "base_bytes": cut.base_bytes,
            "overhead": cut.overhead,
            "gain_kept": kept / had,
            "note": note,
            "seed": cut.config.seed,
            "command": command_line(),
        }
        show(result, lambda: _table(result))


def _check_size(whole: Correction, name: str, budget: str) -> None:
    """Refuse a budget that cuts nothing: bytes that were never solved for cannot be selected.

    Raises:
        ConfigError: the correction is smaller than the budget.
    """
    from ..selection import parse_budget

    if not whole.base_bytes:
        raise ConfigError(f"{name} does not say how many bytes its quantized weights take; correct again.")
    available = parse_budget(budget, whole.base_bytes)
    if available > whole.factor_bytes:
        raise ConfigError(
            f"budget {budget!r} is {available} bytes, but {name} has only {whole.factor_bytes} "
            f"({whole.overhead:.2%}); give less, or correct again with a larger --budget or --rank."
        )


def _check_gains(whole: Correction, name: str) -> str | None:
    """What to know about the measurements that ranks are chosen by; None where they are nats.

    Raises:
        ConfigError: nothing was measured.
    """
    if not any(bool(entry.gains.any()) for entry in whole.factors):
        raise ConfigError(
            f"{name} holds no measured gains to select by; `glowq correct --budget ...` writes a correction that does."
        )
    if whole.config.provenance.get("gains") == "nats":
        return None
    return (
        f"the gains in {name} are output errors, which compare less well across groups than loss does; `glowq correct "
        "--method glowq` measures them in nats."
    )


def _table(result: dict[str, Any]) -> Any:
    ranks = sorted(set(result["ranks"].values()))
    shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    return grid(
        {
            "output": result["output"],
            "groups": f"{result['groups']} of {result['of_groups']}, rank {shown}",
            "factors": f"{result['factor_bytes']:,} of {result['of_factor_bytes']:,} bytes, {result['overhead']:.2%} "
            f"of {result['base_bytes']:,}",
            "predicted gain kept": f"{result['gain_kept']:.1%}",
        }
    )
