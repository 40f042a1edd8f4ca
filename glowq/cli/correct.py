"""`glowq correct`: quantize a model if asked to, correct it, measure what that gave, and save it."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..backends import base_names
from ..errors import OutputError
from ..loading import load_config, load_model, load_tokenizer, reference_name, scores_text
from ..methods import method_names
from .common import (
    BudgetOption,
    JsonOption,
    MaxRankOption,
    ModelArgument,
    RankStepOption,
    SeedOption,
    command_line,
    grid,
    peak_rss_bytes,
    rank_request,
    session,
)
from .held_out import held_out_figures, held_out_rows, parted_sequences, reference_score

__all__ = ["correct"]


def correct(
    model: ModelArgument,
    calibration: Annotated[str, typer.Option(metavar="FILE", help="Text: a file, a folder, or a datasets name.")],
    output: Annotated[str, typer.Option(metavar="OUT", help="Folder to write; must be new, empty, or an old result.")],
    base: Annotated[
        str,
        typer.Option(
            help=f"Quantizer: {', '.join(base_names())}; none: MODEL is quantized already; dense: its float weights "
            "hold quantized values."
        ),
    ] = "none",
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of every group; 32 if no budget is given.")] = None,
    budget: BudgetOption = None,
    rank_step: RankStepOption = 1,
    max_rank: MaxRankOption = None,
    reference: Annotated[
        str | None, typer.Option(metavar="REF", help="Full-precision model; MODEL unless that is quantized already.")
    ] = None,
    method: Annotated[str, typer.Option(help=f"Solver method: {', '.join(method_names())}.")] = "glowq",
    format: Annotated[
        Literal["correction", "full"] | None,
        typer.Option(help="A small correction (if its base can be named), or the corrected model in one piece."),
    ] = None,
    seed: SeedOption = 0,
    calibration_tokens: Annotated[int, typer.Option(min=2, help="Tokens used; an eighth is held out.")] = 32768,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens a sequence.")] = 512,
    gguf_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="GGUF file in MODEL, with --base dense.")
    ] = None,
    distill: Annotated[
        int, typer.Option(min=0, metavar="STEPS", help="Steps of gradient descent on the chosen factors; 60 are good.")
    ] = 0,
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
    with session(json) as show:
        from .. import correct as correct_model
        from ..backends import base_config, with_calibration
        from ..files import check_output
        from ..methods import get_method

        started = time.monotonic()
        target = Path(output).resolve()
        kept = target.with_name(f"{target.name}.resume")
        check_output(target)
        if resume:
            _check_kept(kept)
        get_method(method)
        quantization = None if base in ("none", "dense") else base_config(base)
        config = load_config(model, gguf_file)
        source = reference_name(model, config, base, reference)
        tokenizer = load_tokenizer(model, source)
        train, held = parted_sequences(config, tokenizer, calibration, calibration_tokens, sequence_length, seed)
        score = reference_score(source, held) if _is_measured(model, config) else None
        if quantization is not None:
            quantization = with_calibration(quantization, train)
        corrected = load_model(model, config, quantization, gguf_file)
        correction = correct_model(
            corrected,
            reference=source,
            calibration=train,
            tokenizer=tokenizer,
            rank=rank,
            budget=budget,
            rank_step=rank_step,
            max_rank=max_rank,
            method=method,
            distill=distill,
            seed=seed,
            resume=kept if resume else None,
            dense=base == "dense",
        )
        held_out = None if score is None else held_out_figures(score, corrected, held, seed)
        result = {
            "output": output,
            "groups": len(correction.ranks),
            "ranks": correction.ranks,
            "factor_bytes": correction.factor_bytes,
            "base_bytes": correction.base_bytes,
            "overhead": correction.overhead,
            "predicted": correction.predicted,
            "calibration_tokens": train.numel(),
            "held_out": held_out,
            "command": command_line(),
            "seed": seed,
        }
        # Without the folder's name, so that the same command gives the same files wherever they are written.
        command = command_line().replace(f"--output {shlex.quote(output)}", "--output OUT")
        facts = {"command": command, "held_out": held_out}
        for config in (correction.config, corrected.config.quantization_config):
            config.provenance.update(facts)
        _save(correction, corrected, target, format or ("correction" if correction.base_is_stored else "full"))
        if resume:
            shutil.rmtree(kept)
        result.update(seconds=round(time.monotonic() - started, 1), peak_rss_bytes=peak_rss_bytes())
        show(result, lambda: _table(result, correction))


def _check_kept(folder: Path) -> None:
    """The folder is removed in the end: it must hold nothing but finished blocks."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.suffix not in (".json", ".safetensors", ".tmp"):
            raise OutputError(
                f"{folder} holds {entry.name!r}, which is no finished block; move it, or choose another OUT."
            )


def _is_measured(model: str, config: Any) -> bool:
    if not scores_text(config):
        print(f"glowq: note: {model} predicts no next token: nothing is measured on held-out text.", file=sys.stderr)
    return scores_text(config)


def _save(correction: Any, model: Any, target: Path, format: str) -> None:
    from ..files import write_directory

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        correction.tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(correction.model_card())

    if format == "full":
        correction.config = correction.config.with_format("full")
        write_directory(target, write)
    else:
        correction.save_pretrained(target)


def _predicted(correction: Any) -> dict[str, str]:
    # Output errors say nothing of the loss.
    if correction.predicted is None or correction.config.provenance["gains"] == "squared output":
        return {}
    unit = "KL divergence" if correction.config.provenance["gains"] == "nats" else "distance of states"
    return {"predicted": f"{correction.predicted:.1%} of what quantization changed in the answers ({unit}) is undone"}


def _table(result: dict[str, Any], correction: Any) -> Any:
    rows = {
        "output": result["output"],
        "groups": f"{result['groups']}, rank {', '.join(map(str, sorted(set(result['ranks'].values()))))}",
        "factors": f"{result['factor_bytes']:,} bytes, {result['overhead']:.2%} of {result['base_bytes']:,}",
        **_predicted(correction),
        "calibration": f"{result['calibration_tokens']:,} tokens, seed {result['seed']}",
        "time, peak memory": f"{result['seconds']} s, {result['peak_rss_bytes'] / 2**20:,.0f} MiB",
    }
    return grid({**rows, **held_out_rows(result["held_out"])})
