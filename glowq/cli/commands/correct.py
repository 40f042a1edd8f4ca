"""`glowq correct`: quantize a model if requested, correct it, measure the result, and save it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from ...evaluation.figures import measured_share, shown, shown_share, undone
from ...utils.timeline import timeline
from ..options import (
    BaseOption,
    BudgetOption,
    DistillOption,
    FactorDtypeOption,
    JsonOption,
    MaxRankOption,
    MethodOption,
    ModelArgument,
    RankStepOption,
    SeedOption,
    distill_steps,
    rank_request,
)
from ..output import command_line, grid, peak_rss_bytes, session
from ..output import note as print_note

__all__ = ["correct", "held_out_rows", "report"]

_CLEARLY = 0.03  # by how much bits must be predicted to lead: closer than that, predictions do not tell which wins


def correct(
    model: ModelArgument,
    calibration: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Text, or what MODEL reads in its place: a file, folder or datasets name; of text also several, "
            "separated by commas, which give equal parts.",
        ),
    ],
    output: Annotated[str, typer.Option(metavar="OUT", help="Folder to write; must be new, empty, or an old result.")],
    base: BaseOption = "none",
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of every group; 32 if no budget is given.")] = None,
    budget: BudgetOption = None,
    rank_step: RankStepOption = 1,
    max_rank: MaxRankOption = None,
    reference: Annotated[
        str | None,
        typer.Option(metavar="REF", help="Full-precision model; by default MODEL, if MODEL is not quantized."),
    ] = None,
    method: MethodOption = "glowq",
    format: Annotated[
        Literal["correction", "full"] | None,
        typer.Option(
            help="correction: the factors only, with the base by name; full: the whole corrected model. By default "
            "correction, if the base can be loaded again by name."
        ),
    ] = None,
    seed: SeedOption = 0,
    calibration_tokens: Annotated[int, typer.Option(min=2, help="Tokens to use; an eighth is held out.")] = 32768,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 512,
    gguf_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="GGUF file in MODEL, with --base dense.")
    ] = None,
    distill: DistillOption = "0",
    factor_dtype: FactorDtypeOption = "auto",
    force: Annotated[
        bool, typer.Option("--force", help="Keep a correction that held-out text shows to be no better than none.")
    ] = False,
    mixed: Annotated[
        bool, typer.Option("--mixed", help="Spend the budget on more bits, too, for groups that gain more by them.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep finished blocks in OUT.resume.")] = False,
    json: JsonOption = False,
) -> None:
    """Correct a model's quantization error and save the correction.

    \b
    Examples:
      glowq correct org/model --base nf4 --calibration notes.txt --output corrected
      glowq correct org/model-gptq --reference org/model --calibration notes.txt --output corrected --budget 1.5%
      glowq correct org/model-GGUF --gguf-file model-Q4_0.gguf --base dense --reference org/model ...
    """
    rank_request(rank, budget, rank_step, max_rank)

    def run(command: str) -> dict[str, Any]:
        from ...artifact.request import CorrectionRequest
        from ...integrations.transformers.checkpoint import correct_checkpoint

        return correct_checkpoint(
            model,
            output,
            request=CorrectionRequest(
                rank=rank,
                budget=budget,
                rank_step=rank_step,
                max_rank=max_rank,
                method=method,
                calibration=calibration,
                calibration_tokens=calibration_tokens,
                sequence_length=sequence_length,
                distill=distill_steps(distill),
                factor_dtype=factor_dtype,
                seed=seed,
                force=force,
                mixed=mixed,
            ),
            base=base,
            reference=reference,
            format=format,
            gguf_file=gguf_file,
            resume=resume,
            command=command,
        )

    report(run, model, output, json)


def report(run: Callable[[str], dict[str, Any]], model: str, output: str, json: bool) -> None:
    """Correct a model and print the result.

    Args:
        run: function that takes the command line for the model card, and returns the result of `correct_checkpoint`.
        model, output: arguments of the command.
        json: see `session`.
    """
    with session(json) as show, timeline() as stages:
        started = time.monotonic()
        result = run(command_line(output))
        result["command"] = command_line()
        result["timeline"] = {name: round(seconds, 1) for name, seconds in stages.items()}
        result.update(seconds=round(time.monotonic() - started, 1), peak_rss_bytes=peak_rss_bytes())
        if result["held_out"] is None:
            note = f"{model} predicts no next token: no perplexity is measured."
            print_note(note)
        if result["slow_here"] is not None:
            print_note(result["slow_here"])
        show(result, lambda: _table(result))


def _table(result: dict[str, Any]) -> Any:
    rows = {
        "output": result["output"],
        "groups": f"{result['groups']}, rank {', '.join(map(str, sorted(set(result['ranks'].values()))))}",
        "factors": f"{result['factor_bytes']:,} bytes in {result['factor_dtype']}, {result['overhead']:.2%} of "
        f"{result['base_bytes']:,}",
        "weights, by bytes": "; ".join(result["coverage"]["text"]),
        **_predicted(result),
        **_measured(result),
        **_rounding(result["rounding"], result["factor_dtype"], result["distilled_steps"]),
        **_mixed(result),
        "calibration": f"{result['calibration_tokens']:,} tokens, seed {result['seed']}",
        "time, peak memory": f"{result['seconds']} s, {result['peak_rss_bytes'] / 2**20:,.0f} MiB",
    }
    return grid({**rows, **held_out_rows(result["held_out"]), **_instead(result)})


def _predicted(result: dict[str, Any]) -> dict[str, str]:
    # Squared output errors do not predict the loss.
    if result["predicted"] is None or result["gains"] == "squared output":
        return {}
    unit = "KL divergence" if result["gains"] == "nats" else "distance of states"
    return {"predicted": f"{result['predicted']:.1%} of what quantization changed in the answers ({unit}) is undone"}


def _measured(result: dict[str, Any]) -> dict[str, str]:
    found, share = result["improvement"], measured_share(result["improvement"])
    if share is None:
        return {}
    return {"measured": f"{share:.1%} of that is undone on {found['tokens']:,} tokens that no factor was calibrated on"}


def _rounding(figures: dict[str, Any] | None, factor_dtype: str, steps: int | None) -> dict[str, str]:
    """Shares of the divergence undone by rounded factors, and by unrounded ones of equal bytes and of equal ranks."""
    shares = undone(figures)
    if figures is None or shares is None:
        return {}
    other = "unrounded" if steps is None else "neither rounded nor distilled"
    return {
        f"{factor_dtype} factors": f"{shares['rounded']:.1%} of the divergence undone on {figures['tokens']:,} tokens; "
        f"{other}: {shares['same_bytes']:.1%} in the same bytes, {shares['same_ranks']:.1%} at the same ranks"
    }


def _instead(result: dict[str, Any]) -> dict[str, str]:
    """What would gain more in the same bytes, if it is predicted to; it is no advice for a base that has both."""
    found, own = result["instead"], max(result["predicted"] or 0, measured_share(result["improvement"]) or 0)
    if found is None or result["mixed"] is not None or found["predicted"] < own + _CLEARLY:
        return {}
    return {
        "instead": f"{found['bits']:.0f} bits for the groups that gain most are predicted to undo "
        f"{found['predicted']:.1%} in the same bytes: --mixed buys both, `glowq compare --alternatives` measures it"
    }


def _mixed(result: dict[str, Any]) -> dict[str, str]:
    found = result["mixed"]
    if found is None:
        return {}
    groups = f"{len(found['widened'])} groups have more bits, {found['added_bytes']:,} bytes; quantized means this base"
    instead = "" if found["ranks_gain"] else "; bits gain more than ranks everywhere, ranks got what was left over"
    return {"mixed base": groups + instead}


def held_out_rows(figures: dict[str, Any] | None) -> dict[str, str]:
    """The held-out figures as rows of a table, name -> text."""
    if figures is None:
        return {}
    return {
        **{f"{name} perplexity": shown(figures[name], ".4f") for name in ("reference", "quantized", "corrected")},
        "recovered": f"{shown_share(figures)} on {figures['tokens']:,} held-out tokens",
    }
