"""`glowq import`: save a LoRA adapter as a correction."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ...errors import ConfigError, ModelNotFoundError
from ...models.loading import load_config, load_model
from ...models.preprocessors import load_tokenizer
from ..options import BaseOption, JsonOption
from ..output import command_line, grid, session

__all__ = ["import_"]


def import_(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder or Hub name of a LoRA adapter.")],
    base_model: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="The quantized model that the adapter was made for, or the model that --base quantizes.",
        ),
    ],
    output: Annotated[str, typer.Option(metavar="OUT", help="Folder to write; must be new, empty, or an old result.")],
    base: BaseOption = "none",
    json: JsonOption = False,
) -> None:
    """Save a LoRA adapter of EoRA, QERA, LoftQ or `glowq export --to peft` as a correction.

    \b
    Examples:
      glowq import eora --base-model org/model-GPTQ --output corrected
      glowq import adapter --base-model org/model --base nf4 --output corrected
    """
    with session(json) as show:
        from ...integrations.peft.importer import import_adapter
        from ...utils.output import check_output, output_path, write_directory

        target = output_path(output)
        check_output(target)
        config = load_config(base_model)
        model = load_model(base_model, config, _quantization(base_model, config, base))
        correction = import_adapter(adapter, model, tokenizer=_tokenizer(base_model), dense=base == "dense")
        write_directory(target, correction.write_files, checked=True)
        result = {
            "output": output,
            "adapter": adapter,
            "base_model": base_model,
            "groups": len(correction.factors),
            "modules": sum(len(entry.group.members) for entry in correction.factors),
            "ranks": correction.ranks,
            "factor_bytes": correction.factor_bytes,
            "base_bytes": correction.base_bytes,
            "overhead": correction.overhead,
            "command": command_line(),
        }
        show(result, lambda: _table(result))


def _quantization(model: str, config: Any, base: str) -> Any:
    """The config to quantize `model` with while loading; None if the model is loaded without quantizing.

    Raises:
        ConfigError: `base` names a quantizer for a quantized model, or none for a model that is not quantized; the
            model carries a correction; or the quantizer needs calibration text.
    """
    from ...quantizers.registry import base_config, is_calibrated, method_of

    stored = getattr(config, "quantization_config", None)
    kind = None if stored is None else method_of(stored)
    if kind == "glowq":
        raise ConfigError(f"{model} carries a glowq correction already; name its base model.")
    if kind is not None and base != "none":
        raise ConfigError(f"{model} is quantized already ({kind}): leave out --base.")
    if kind is None and base == "none":
        raise ConfigError(
            f"{model} is not quantized: name the quantizer that the adapter was made for, for example --base nf4, or "
            "say --base dense if its float weights hold quantized values."
        )
    quantization = None if base in ("none", "dense") else base_config(base)
    if is_calibrated(quantization):
        raise ConfigError(
            f"--base {base} quantizes with text, so its weights would differ from those that the adapter was made for: "
            "name the quantized model that it was made for."
        )
    return quantization


def _tokenizer(model: str) -> Any:
    try:
        return load_tokenizer(model)
    except ModelNotFoundError:  # not every model reads text
        return None


def _table(result: dict[str, Any]) -> Any:
    ranks = sorted(set(result["ranks"].values()))
    return grid(
        {
            "output": result["output"],
            "groups": f"{result['groups']} of {result['modules']} modules, rank {', '.join(map(str, ranks))}",
            "factors": f"{result['factor_bytes']:,} bytes, {result['overhead']:.2%} of {result['base_bytes']:,}",
        }
    )
