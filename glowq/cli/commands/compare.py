"""`glowq compare`: several methods at equal bytes on one model, measured on text that is not calibration text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from ...errors import ConfigError, EvaluationError
from ...integrations.lm_eval import check_tasks, run_tasks
from ...models.loading import load_config, load_model, reference_name, scores_text, token_limits
from ...models.preprocessors import load_tokenizer
from ...utils.timeline import timeline
from ..options import (
    METHOD_NAMES,
    BaseOption,
    ClozeOption,
    DistillOption,
    JsonOption,
    ModelArgument,
    RoundedDtype,
    SeedOption,
    check_budget,
    check_method,
    distill_steps,
)
from ..output import command_line, peak_rss_bytes, session
from ..reports.cloze import cloze_figures
from ..reports.comparison_files import tables, write_comparison
from ..reports.comparison_rows import figures

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...pipeline.compare.budgets import Entry

__all__ = ["compare"]

_DTYPES = get_args(RoundedDtype)[1:]  # without "auto"
_METHODS = "svd,zeroquant,lqer,qera,eora,aser,glowq-published,glowq"


def _check_list(value: str | None) -> str | None:
    if value is not None and not _list(value):
        raise typer.BadParameter("expected a comma-separated list, found an empty one.")
    return value


def _check_methods(value: str) -> str:
    _check_list(value)
    for name in _list(value):
        check_method(name)
    return value


def _check_budgets(value: str) -> str:
    _check_list(value)
    for budget in _list(value):
        check_budget(budget)
    return value


def _check_dtypes(value: str | None) -> str | None:
    _check_list(value)
    unknown = [name for name in _list(value) if name not in _DTYPES]
    if unknown:
        raise typer.BadParameter(f"expected some of {', '.join(_DTYPES)}, separated by commas; found {unknown[0]!r}.")
    return value


def compare(
    model: ModelArgument,
    calibration: Annotated[
        str, typer.Option(metavar="FILE", help="Text: a file, folder or datasets name; or several, by commas.")
    ],
    data: Annotated[str, typer.Option(metavar="FILE", help="Text to measure on; must not overlap the calibration.")],
    base: BaseOption = "none",
    reference: Annotated[
        str | None,
        typer.Option(metavar="REF", help="Full-precision model; by default MODEL, if MODEL is not quantized."),
    ] = None,
    methods: Annotated[
        str, typer.Option(callback=_check_methods, help=f"Any of {', '.join(METHOD_NAMES)}.")
    ] = _METHODS,
    budgets: Annotated[
        str, typer.Option(callback=_check_budgets, help="Budgets: shares of the quantized weights' bytes, or sizes.")
    ] = "0.5%,1%,2%",
    output: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder for compare.json, table.md, bytes.png and heatmap.png.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(callback=_check_list, metavar="NAMES", help="Also run these tasks of lm-evaluation-harness."),
    ] = None,
    cloze: ClozeOption = 0,
    distill: DistillOption = "0",
    factor_dtypes: Annotated[
        str | None,
        typer.Option(
            callback=_check_dtypes,
            metavar="NAMES",
            help="Also round the first method that allocates by gain: int8, int4 (as `glowq correct` does), int3.",
        ),
    ] = None,
    alternatives: Annotated[
        bool, typer.Option("--alternatives", help="Also score other settings of --base at the same bytes.")
    ] = False,
    seed: SeedOption = 0,
    calibration_tokens: Annotated[int, typer.Option(min=2, help="Tokens to calibrate on.")] = 32768,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to measure on, from all parts of the text.")] = 32768,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 512,
    gguf_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="GGUF file in MODEL, with --base dense.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Allow text that overlaps the calibration text.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep finished cells in DIR.resume.")] = False,
    json: JsonOption = False,
) -> None:
    """Compare correction methods at equal bytes: perplexity, KL divergence and top-1 agreement, paired by sequence.

    \b
    Example:
      glowq compare org/model --base nf4 --calibration notes.txt --data held-out.txt --budgets 0.5%,1%,2% --output DIR
    """
    with session(json) as show, timeline() as stages, ExitStack() as opened:
        from ..._version import __version__
        from ...data.overlap import check_disjoint
        from ...evaluation.cloze import cloze_items
        from ...pipeline.block_store import open_blocks, remove_blocks
        from ...pipeline.compare.alternatives import alternatives_of
        from ...pipeline.compare.cells import cells_of
        from ...pipeline.compare.comparison import cloze_entries, compare_methods, distill_entries, score_entries
        from ...pipeline.sequences import unmeasured
        from ...quantizers.registry import base_config, with_calibration
        from ...selection.budget import parse_budget
        from ...utils.output import output_path

        if alternatives and base in ("none", "dense"):
            raise ConfigError("--alternatives quantizes with other settings of a --base: name one, such as nf4.")
        if resume and output is None:
            raise ConfigError("--resume keeps finished cells in DIR.resume: name DIR with --output.")
        names, sizes, wanted, dtypes = map(_list, (methods, budgets, tasks, factor_dtypes))
        steps = distill_steps(distill)
        _check_early(names, wanted, output, {"--distill": bool(steps), "--factor-dtypes": bool(dtypes)})
        kept = f"{output_path(output)}.resume" if resume and output is not None else None
        blocks = None if kept is None else opened.enter_context(open_blocks(kept))
        quantization = None if base in ("none", "dense") else base_config(base)
        config = load_config(model, gguf_file)
        if not scores_text(config):
            raise EvaluationError(f"{model} predicts no next token: perplexity is for causal language models.")
        source = reference_name(model, config, base, reference)
        tokenizer = load_tokenizer(model, source)
        train = _sequences(config, tokenizer, calibration, calibration_tokens, sequence_length, seed)
        report = _sequences(config, tokenizer, data, tokens, sequence_length, seed)
        overlap = check_disjoint(train, report, force=force)
        items = cloze_items(report, cloze, seed=seed) if cloze else None
        if quantization is not None:
            quantization = with_calibration(quantization, unmeasured(train, seed))
        quantized = load_model(model, config, quantization, gguf_file)
        settings = [names, sizes, dtypes, steps, alternatives, cloze, base, seed]
        cells = cells_of(blocks, quantized, source, [train, report], seed, settings)
        comparison = compare_methods(
            quantized,
            reference=source,
            calibration=train,
            methods=names,
            budgets=sizes,
            factor_dtypes=dtypes,
            seed=seed,
            dense=base == "dense",
            cells=cells,
        )
        full = load_model(source, load_config(source))
        if steps:
            learned = distill_entries(quantized, full, comparison.entries, train, steps=steps, seed=seed, cells=cells)
            comparison = replace(comparison, entries=[*comparison.entries, *learned])
        scores = score_entries(full, quantized, comparison.entries, report, cells)
        others = {}
        if alternatives:
            found = alternatives_of(
                quantized,
                full,
                quantization,
                lambda settings: load_model(model, config, settings),
                calibration=train,
                sequences=report,
                budgets={size: parse_budget(size, comparison.base_bytes) for size in sizes},
                seed=seed,
                cells=cells,
            )
            others = {other.label: other for other, _ in found}
            scores |= {other.label: score for other, score in found if score is not None}
        result = {
            "model": model,
            "base": base,
            "reference": source,
            "base_bytes": comparison.base_bytes,
            **figures(comparison, scores, seed, list(others.values())),
            "benefit": None if comparison.benefit is None else asdict(comparison.benefit),
            "calibration": {"source": calibration, "tokens": train.numel()},
            "data": {"source": data, "tokens": report.numel(), "sequences": len(report)},
            "sequence_length": report.shape[1],
            "overlap": {**asdict(overlap), "forced": force},
            "seed": seed,
            "glowq": __version__,
            "command": command_line(),
        }
        if items is not None:
            answers = cloze_entries(full, quantized, comparison.entries, items, cells)
            result["cloze"] = cloze_figures(answers, "quantized", seed)
        if wanted:
            result["tasks"] = _tasks(full, quantized, comparison.entries, tokenizer, wanted, seed)
        if output is not None:
            command = command_line(output, "DIR")
            write_comparison(Path(output), {**result, "command": command}, comparison.benefit)
        opened.close()
        if kept is not None:
            remove_blocks(Path(kept))
        times = {name: round(seconds, 1) for name, seconds in stages.items()}
        more = {"output": output, "timeline": times, "peak_rss_bytes": peak_rss_bytes()}
        show({**result, **more}, lambda: tables(result))


def _list(text: str | None) -> list[str]:
    """The parts of a comma-separated option, without duplicates."""
    return list(dict.fromkeys(part.strip() for part in (text or "").split(",") if part.strip()))


def _check_early(names: Sequence[str], tasks: Sequence[str], output: str | None, more: Mapping[str, bool]) -> None:
    """Check, before anything is loaded, the options that would otherwise fail only at the end."""
    from ...evaluation.plots import check_plots
    from ...solving.methods.base import get_method
    from ...utils.output import Kind, check_output

    allocations = [get_method(name).allocation for name in names]
    for option in (option for option, wanted in more.items() if wanted and "gain" not in allocations):
        raise ConfigError(f"{option} needs a method that allocates by gain: add glowq to --methods, or leave it out.")
    if tasks:
        check_tasks(tasks)
    if output is not None:
        check_plots()
        check_output(Path(output), kind=Kind.COMPARISON)


def _sequences(config: Any, tokenizer: Any, text: str, tokens: int, sequence_length: int, seed: int) -> Tensor:
    """Token ids, shape (n, length)."""
    from ...data.tokens import sequences_of

    length, vocab_size = token_limits(config, sequence_length)
    return sequences_of(text, tokenizer, length=length, limit=tokens, seed=seed, vocab_size=vocab_size)


def _tasks(
    full: nn.Module, quantized: nn.Module, entries: Sequence[Entry], tokenizer: Any, names: list[str], seed: int
) -> dict[str, Any]:
    """Label of every model -> its figures for every task."""
    from ...runtime.attach import applied

    found = {
        "reference": run_tasks(full, tokenizer, names, seed),
        "quantized": run_tasks(quantized, tokenizer, names, seed),
    }
    for entry in entries:
        if entry.factors and entry.same_as is None:
            with applied(quantized, entry.factors):
                found[entry.label] = run_tasks(quantized, tokenizer, names, seed)
        elif entry.factors:
            found[entry.label] = found[f"{entry.same_as} at {entry.budget}"]
    return found
