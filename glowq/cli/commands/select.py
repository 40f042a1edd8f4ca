"""`glowq select`: cut a saved correction to a budget, without a new calibration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import OutputError
from ...factors.units import GainUnit
from ..options import BUDGET, JsonOption, MaxRankOption, RankStepOption, RoundedDtypeOption, rank_request
from ..output import command_line, grid, session
from ..output import note as print_note

if TYPE_CHECKING:
    from ...artifact.correction_config import CorrectionConfig

__all__ = ["select"]


def select(
    correction: Annotated[str, typer.Argument(metavar="OUT", help="Folder or Hub name of a saved correction.")],
    budget: Annotated[str, typer.Option(help=f"Bytes to keep: {BUDGET}.")],
    output: Annotated[str, typer.Option(metavar="OUT2", help="Folder to write; must be new, empty, or an old result.")],
    rank_step: RankStepOption = 1,
    max_rank: MaxRankOption = None,
    factor_dtype: RoundedDtypeOption = "auto",
    json: JsonOption = False,
) -> None:
    """Cut a correction to a budget: keep the ranks that gain most for their bytes. Nothing is solved again.

    With --factor-dtype, the kept factors are rounded, and each value counts as the bits that it then has. The loss of
    accuracy by rounding is predicted.

    \b
    Examples:
      glowq select corrected --budget 1% --output smaller
      glowq select corrected --budget 1% --factor-dtype int4 --output smaller
      glowq select corrected --budget "recover 50%" --rank-step 8 --output smaller
    """
    request = rank_request(None, budget, rank_step, max_rank)
    with session(json) as show:
        from ...artifact.saved import read_saved
        from ...factors.form import bits_of
        from ...utils.output import check_output, output_path, write_directory

        target = output_path(output)
        if Path(correction).is_dir() and target == Path(correction).resolve():
            raise OutputError(f"{target} is the correction itself, which would be lost; choose another folder.")
        check_output(target)
        whole = read_saved(correction)
        ranks = whole.choose(request, factor_dtype)
        from ...artifact.correction import Correction  # imports torch, which reading headers does not take

        cut = Correction.from_saved(whole, ranks)
        if factor_dtype != "auto" and any(entry.bits != bits_of(factor_dtype) for entry in cut.factors):
            cut = cut.rounded(factor_dtype)
        note = _note(whole.config, correction)
        had = sum(sum(item.gains) for item in whole.headers.group_gains)
        kept = sum(float(entry.gains.sum()) for entry in cut.factors)
        times = whole.config.provenance.times_predicted(had / whole.config.total if whole.config.total else None)
        provenance = cut.config.provenance
        command = command_line(output, "OUT2")
        of_whole = {"of_factor_bytes": whole.headers.factor_bytes, "of_held_out": None}
        selected = {**of_whole, **(provenance.selected or {}), "budget": budget}
        cut.config.record(selected=selected, command="\n".join(filter(None, (provenance.command, command))))
        write_directory(target, cut.write_files, checked=True)
        if note is not None:
            print_note(note)
        result = {
            "output": output,
            "budget": budget,
            "rank_step": rank_step,
            "max_rank": max_rank,
            "factor_dtype": factor_dtype,
            "groups": len(cut.ranks),
            "of_groups": len(whole.headers.group_gains),
            "ranks": cut.ranks,
            "factor_bytes": cut.factor_bytes,
            "of_factor_bytes": whole.headers.factor_bytes,
            "base_bytes": cut.base_bytes,
            "overhead": cut.overhead,
            "gain_kept": kept / had,
            "predicted": cut.predicted,
            "expected": None if times is None or cut.predicted is None else min(1.0, times * cut.predicted),
            "note": note,
            "seed": cut.config.seed,
            "command": command_line(),
        }
        show(result, lambda: _table(result))


def _note(config: CorrectionConfig, name: str) -> str | None:
    """A warning if the measured gains are not reliable for choosing ranks; None if they are."""
    if config.provenance.distilled_steps:
        return (
            f"{name} was distilled at the ranks that it has: what a part of it recovers was neither measured nor "
            "predicted. Correct with the smaller budget and --distill instead."
        )
    if config.provenance.gains is not GainUnit.SQUARED_OUTPUT:
        return None
    return (
        f"the gains in {name} are output errors, which compare less well across groups than loss does; `glowq correct "
        "--method glowq` measures them in nats."
    )


def _table(result: dict[str, Any]) -> Any:
    ranks = sorted(set(result["ranks"].values()))
    expected = result["expected"]
    shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    return grid(
        {
            "output": result["output"],
            "groups": f"{result['groups']} of {result['of_groups']}, rank {shown}",
            "factors": f"{result['factor_bytes']:,} of {result['of_factor_bytes']:,} bytes, {result['overhead']:.2%} "
            f"of {result['base_bytes']:,}",
            "predicted gain kept": f"{result['gain_kept']:.1%}",
            "predicted share of the loss recovered": _share(result["predicted"]),
            **({} if expected is None else {"to expect, as the whole was measured": _share(expected)}),
        }
    )


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"
