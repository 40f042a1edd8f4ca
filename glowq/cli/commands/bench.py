"""`glowq bench`: time a corrected model, its base, and the same correction with one right factor per module."""

from __future__ import annotations

import json as json_
from pathlib import Path
from typing import Annotated, Any

import typer

from ..options import JsonOption, RoundedDtype, SeedOption
from ..output import command_line, markdown_table, session, table

__all__ = ["bench"]

_TIMES = ("first token, ms", "prefill, tokens/s", "added", "decode, ms", "tokens/s", "added")
_HEADINGS = ("batch", "prompt", "model", *_TIMES, "bytes added", "peak memory, MB")


def _counts(value: str) -> str:
    """Callback of an option that takes a comma-separated list of whole numbers, each at least 1."""
    if not all(part.strip().isdecimal() and int(part) > 0 for part in value.split(",")):
        raise typer.BadParameter(f"expected whole numbers from 1 on, as in 1,4,16; found {value!r}.")
    return value


def bench(
    model: Annotated[str, typer.Argument(metavar="OUT", help="Folder or Hub name of a corrected model.")],
    batch_sizes: Annotated[str, typer.Option(callback=_counts, help="Batch sizes, separated by commas.")] = "1,4",
    lengths: Annotated[str, typer.Option(callback=_counts, help="Prompt lengths in tokens.")] = "32,256",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded after each prompt.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Prompts per batch size and length.")] = 5,
    compile_: Annotated[bool, typer.Option("--compile", help="Time the models with torch.compile.")] = False,
    factor_dtype: Annotated[
        RoundedDtype, typer.Option(help="Also time both corrections with rounded factors.")
    ] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default torch chooses.")] = None,
    output: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder for bench.json, table.md and bench.png.")
    ] = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Time a corrected model, its base, and the same correction with one right factor per module, in turns.

    The third model computes what QERA, EoRA and LoRA adapters compute. Each time is a median with its quartiles. The
    added time is the median difference from the base in the same turn. The table also shows the bytes that are added
    to the quantized weights, because the time of a linear layer in decoding depends on the bytes that it reads.

    \b
    Example:
      glowq bench corrected --batch-sizes 1,4,16 --lengths 128
    """
    with session(json) as show:
        import torch

        from ...evaluation.plots import check_plots
        from ...evaluation.timing import Shape, machine, measure, variants
        from ...models.loading import load_config, load_model, scores_text, token_limits
        from ...runtime.fast_kernels import use_fast_kernels
        from ...utils.output import Kind, check_output

        if output is not None:
            check_plots()
            check_output(Path(output), kind=Kind.TIMING)
        if threads is not None:
            torch.set_num_threads(threads)
        config = load_config(model)
        shapes = [Shape(int(batch), int(length)) for batch in batch_sizes.split(",") for length in lengths.split(",")]
        decoded = new_tokens if scores_text(config) else 0
        _check_length(config, max(shape.length for shape in shapes) + decoded, token_limits)
        loaded = load_model(model, config)
        if not compile_:  # torch.compile does not notice that a kernel rewrites its weight
            use_fast_kernels(loaded)
        options: dict[str, Any] = {"new_tokens": decoded, "repeats": repeats, "compiled": compile_, "seed": seed}
        models = variants(loaded, factor_dtype=factor_dtype)
        rows = measure(models, shapes, loaded.config.quantization_config.base_bytes, **options)
        about = {"model": model, **machine(loaded), **options, "factor_dtype": factor_dtype}
        result = {**about, "rows": rows, "command": command_line(output, "DIR")}
        if output is not None:
            _write(Path(output), result)
        show({**result, "output": output}, lambda: table(_title(result), _HEADINGS, _cells(result), ["model"]))


def _check_length(config: Any, wanted: int, token_limits: Any) -> None:
    from ...errors import ConfigError

    taken, _ = token_limits(config, wanted)
    if taken < wanted:
        raise ConfigError(
            f"the model takes sequences of {taken} tokens, but the longest prompt and the tokens decoded after it have "
            f"{wanted}: give smaller --lengths or --new-tokens."
        )


def _write(target: Path, result: dict[str, Any]) -> None:
    from ...evaluation.plots import draw_timing
    from ...utils.output import Kind, write_directory

    def write(folder: Path) -> None:
        (folder / "bench.json").write_text(json_.dumps(result, indent=2, allow_nan=False) + "\n")
        (folder / "table.md").write_text(_markdown(result))
        corrected = [row for row in result["rows"] if row["factor_bytes"]]
        kinds = [kind for kind in ("first_token", "decode") if kind in corrected[0]]
        draw_timing(folder / "bench.png", corrected, kinds, _title(result))

    write_directory(target, write, kind=Kind.TIMING, checked=True)


def _title(result: dict[str, Any]) -> str:
    how = "torch.compile" if result["compiled"] else "eager"
    return f"{result['model']}: {result['device']}, {result['threads']} threads, {result['dtype']}, {how}"


def _markdown(result: dict[str, Any]) -> str:
    lines = markdown_table(_HEADINGS, _cells(result))
    return "\n".join([f"# {_title(result)}", "", *lines, "", "```", result["command"], "```", ""])


def _cells(result: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            str(row["batch"]),
            str(row["length"]),
            row["model"],
            *_times(row, "first_token"),
            *_times(row, "decode"),
            f"{row['byte_ratio']:.2%}" if row["factor_bytes"] else "",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f}",
        )
        for row in result["rows"]
    ]


def _times(row: dict[str, Any], kind: str) -> tuple[str, str, str]:
    """Milliseconds with quartiles, tokens per second, and the added time; blank if this kind was not timed."""
    if kind not in row:
        return "", "", ""
    low, median, high = (1e3 * seconds for seconds in row[kind])
    added = f"{row[f'{kind}_overhead']:+.1%}" if row["factor_bytes"] else ""
    return f"{median:.2f} [{low:.2f}, {high:.2f}]", f"{row[f'{kind}_tokens_per_second']:,.1f}", added
