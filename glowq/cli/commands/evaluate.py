"""`glowq evaluate`: perplexity and KL divergence of several models on the same text, paired by sequence."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ...errors import EvaluationError
from ...evaluation.figures import finite, shown
from ...models.loading import load_config, load_model, scores_text, token_limits
from ...models.preprocessors import load_tokenizer
from ..options import ClozeOption, JsonOption, SeedOption
from ..output import command_line, session
from ..reports.cloze import cloze_figures, cloze_text

__all__ = ["evaluate"]


def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL", help="Folders or Hub names; the first is the reference.")
    ],
    data: Annotated[str, typer.Option(metavar="FILE", help="Text: a file, a folder, or a datasets name.")],
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to use, from all parts of the text.")] = 32768,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 512,
    cloze: ClozeOption = 0,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Compare models on text: perplexity, and KL divergence from the first model.

    \b
    Example:
      glowq evaluate org/model org/model-nf4 corrected --data held-out.txt
    """
    with session(json) as show:
        from ...data.tokens import sequences_of
        from ...evaluation.cloze import cloze_items, cloze_scores
        from ...evaluation.intervals import LEAST_SEQUENCES
        from ...evaluation.scores import perplexity, perplexity_ratio, score_models

        configs = {name: load_config(name) for name in models}
        limits = _common_limits(configs, sequence_length)
        tokenizer = load_tokenizer(*models)
        sequences = sequences_of(data, tokenizer, length=limits[0], limit=tokens, seed=seed, vocab_size=limits[1])
        items = cloze_items(sequences, cloze, seed=seed) if cloze else None
        labels = [name if name not in models[:at] else f"{name} ({at + 1})" for at, name in enumerate(models)]
        loaded = {label: load_model(name, configs[name]) for label, name in zip(labels, models, strict=True)}
        scores = score_models(loaded, sequences)
        ratios = {label: perplexity_ratio(scores[labels[0]], scores[label], seed=seed) for label in labels[1:]}
        is_enough = len(sequences) >= LEAST_SEQUENCES
        result = {
            "models": [
                {
                    "model": label,
                    "perplexity": finite(perplexity(score)),
                    "kl": finite(float(score.kl.mean())),
                    "top1": float(score.top1.mean()),
                    "weight_bytes": _weight_bytes(loaded[label]),
                }
                for label, score in scores.items()
            ],
            "data_tokens": sequences.numel(),
            "pairs": [
                {
                    "model": label,
                    "ppl_ratio": finite(ratio.value),
                    "ci95": [finite(ratio.low), finite(ratio.high)] if is_enough else None,
                }
                for label, ratio in ratios.items()
            ],
            "seed": seed,
            "command": command_line(),
        }
        if items is not None:
            result["cloze"] = cloze_figures(cloze_scores(loaded, items), labels[0], seed)
        show(result, lambda: _table(result))


def _common_limits(configs: dict[str, Any], sequence_length: int) -> tuple[int, int | None]:
    """The longest sequence, up to `sequence_length`, that every model allows, and the models' vocabulary size."""
    first, vocab_size = next(iter(configs)), None
    for name, config in configs.items():
        if not scores_text(config):
            raise EvaluationError(f"{name} predicts no next token: perplexity is for causal language models.")
        sequence_length, found = token_limits(config, sequence_length)
        vocab_size = found if vocab_size is None else vocab_size
        if found is not None and found != vocab_size:
            raise EvaluationError(
                f"{name} has a vocabulary of {found} tokens and {first} one of {vocab_size}: models with different "
                "vocabularies cannot be compared."
            )
    return sequence_length, vocab_size


def _weight_bytes(model: Any) -> int:
    """Bytes of all weights: quantized ones at their nominal bit width; factors and all others as they are stored."""
    from ...quantizers.model import packed_bytes, quantized_modules

    quantized = quantized_modules(model)
    plain = (tensor for name, tensor in model.named_parameters() if not _is_packed(name, quantized))
    return packed_bytes(model) + sum(int(tensor.numel() * tensor.element_size()) for tensor in plain)


def _is_packed(parameter: str, quantized: Any) -> bool:
    module, _, name = parameter.rpartition(".")
    return module in quantized and name != "bias"


def _table(result: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title=f"{result['data_tokens']:,} tokens, seed {result['seed']}", title_justify="left")
    table.add_column("model", overflow="fold")
    for heading in ("perplexity", "ratio [95% CI]", "KL, nats", "top-1 agreement", "weights, MB"):
        table.add_column(heading, justify="right")
    cloze = result.get("cloze")
    if cloze is not None:
        table.add_column(f"right of {cloze['items']} cloze items", justify="right")
    pairs = {pair["model"]: pair for pair in result["pairs"]}
    for row in result["models"]:
        table.add_row(
            row["model"],
            shown(row["perplexity"], ".4f"),
            _ratio(pairs.get(row["model"])),
            shown(row["kl"], ".5f"),
            f"{row['top1']:.2%}",
            f"{row['weight_bytes'] / 1e6:,.1f}",
            *([] if cloze is None else [cloze_text(cloze["models"][row["model"]])]),
        )
    return table


def _ratio(pair: dict[str, Any] | None) -> str:
    if pair is None:
        return ""
    if pair["ci95"] is None:
        return f"{shown(pair['ppl_ratio'], '.4f')} (too few tokens to tell)"
    low, high = (shown(value, ".4f") for value in pair["ci95"])
    return f"{shown(pair['ppl_ratio'], '.4f')} [{low}, {high}]"
