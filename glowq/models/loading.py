"""Load models, configs and tokenizers by name, and turn every failure into a one-line error."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..errors import ConfigError, CorrectionError, ModelNotFoundError
from ..utils.files import read_json, refuse_irregular, refuse_pickles, stored_variant
from ..utils.timeline import stage
from .load_errors import loading, named, parsing

__all__ = [
    "load_config",
    "load_generation_config",
    "load_model",
    "main_input",
    "model_class",
    "reference_name",
    "scores_text",
    "token_limits",
]


def load_config(name: str, gguf_file: str | None = None) -> Any:
    """Load the transformers config of a folder, "org/model" or "org/model@revision", or of a GGUF file in it.

    Raises:
        ModelNotFoundError: the model does not exist.
        ReadError: its config.json cannot be read.
        PickleRefusedError: the folder holds its weights only as pickles.
        ConfigError: transformers does not support the model type, or the weights are GGUF and `gguf_file` is not given.
    """
    from transformers import AutoConfig

    if Path(name).is_dir():
        refuse_pickles(Path(name))
        refuse_irregular(Path(name))
    if gguf_file is None:
        _refuse_unnamed_gguf(Path(name))
    try:
        with loading(name), parsing(name, "the config.json"):
            if gguf_file is None:
                _check_config(name)
            return AutoConfig.from_pretrained(**named(name), trust_remote_code=False, **_gguf(gguf_file))
    except ModelNotFoundError as error:
        if Path(name).is_dir():
            raise
        raise ModelNotFoundError(f"no folder {name!r}, and no such model was found on the Hub; {error}") from error


def _check_config(name: str) -> None:
    """Refuse a config.json that would harm transformers, before transformers reads it."""
    from transformers.utils.hub import cached_file

    from .model_config import read_model_config

    place = named(name)
    file = cached_file(place.pop("pretrained_model_name_or_path"), "config.json", **place)
    if file is not None:
        read_model_config(Path(file))


def _gguf(file: str | None) -> dict[str, str]:
    return {} if file is None else {"gguf_file": file}


def _refuse_unnamed_gguf(path: Path) -> None:
    folder = path if path.is_dir() else path.parent
    if path.suffix == ".gguf" and path.is_file():
        files = [path.name]
    elif path.is_dir() and not (path / "config.json").is_file():
        files = sorted(file.name for file in path.glob("*.gguf"))
    else:
        return
    if files:
        raise ConfigError(
            f"{path} is GGUF, which transformers dequantizes on load: give {folder} as MODEL, --gguf-file {files[0]}, "
            "--base dense, and --reference, the full-precision model that it was made from."
        )


@stage("loading")
def load_model(
    name: str, config: Any, quantization_config: Any = None, gguf_file: str | None = None, auto_class: Any = None
) -> Any:
    """Load a model of the class that its config names, ready to run.

    Args:
        name: folder or Hub name.
        config: what `load_config(name)` returned.
        quantization_config: quantize with this config while loading; None loads the model as it is stored.
        gguf_file: GGUF file in the folder, which transformers dequantizes.
        auto_class: transformers class to load the model with; None takes `model_class(config)`.

    Raises:
        ModelNotFoundError, ReadError, ConfigError: see `loading`.
        CorrectionError: a file is damaged, or a model saved in one piece lacks a tensor.
    """
    import torch

    from ..quantizers.model import prepare_model
    from ..quantizers.registry import backend_of, check_installed, method_of
    from .fast_products import fast_products

    backend = backend_of(getattr(config, "quantization_config", None))
    if backend is not None:
        check_installed(backend, name)
    options: dict[str, Any] = {"use_safetensors": True} if gguf_file is None else _gguf(gguf_file)
    if gguf_file is None and Path(name).is_dir():
        options["variant"] = stored_variant(Path(name))
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if torch.cuda.is_available():
        options["device_map"] = "auto"
    # Some bases are quantized with calibration text, which runs the model while it is loaded.
    runs = quantization_config is not None and method_of(quantization_config) != "glowq"
    with loading(name), parsing(name, "the configuration or a weight"), fast_products(half=runs):
        options |= {"dtype": "auto", "output_loading_info": True}
        model, info = (auto_class or model_class(config)).from_pretrained(**named(name), **options)
    _refuse_incomplete(name, config, info["missing_keys"])
    prepare_model(model)
    return model.eval()


def _refuse_incomplete(name: str, config: Any, missing: Collection[str]) -> None:
    """Refuse a model saved in one piece that lacks a tensor: transformers fills it with random numbers.

    Other models may lack some: encoders are often published without their pooler.

    Raises:
        CorrectionError: the message names a tensor.
    """
    stored = getattr(config, "quantization_config", None)
    stored = stored if isinstance(stored, dict) else {}
    if missing and stored.get("quant_method") == "glowq" and stored.get("format") == "full":
        raise CorrectionError(
            f"the weights of {name!r} lack {min(missing)!r} ({len(missing)} tensors in all): the files are damaged or "
            "incomplete. Download or save the model again."
        )


def model_class(config: Any) -> Any:
    """Return the class that `architectures` of config.json names, or else the auto class for the model type.

    Raises:
        ConfigError: the class is for another model type.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = (getattr(config, "architectures", None) or [""])[0]
    found = getattr(transformers, name, None) if name.isidentifier() else None
    # Only a model class may be taken: a config.json can name any attribute of transformers, such as a function.
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) and found.config_class is not None:
        if not isinstance(config, found.config_class):
            raise ConfigError(
                f"config.json names the architecture {name}, which is for {found.config_class.__name__}, and the model "
                f"type {config.model_type!r}: they contradict each other."
            )
        return found
    causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return transformers.AutoModelForCausalLM if causal else transformers.AutoModel


def scores_text(config: Any, auto_class: Any = None) -> bool:
    """Whether the model predicts the next token, so that its perplexity can be measured."""
    found = auto_class or model_class(config)
    causal = found.can_generate() if hasattr(found, "can_generate") else found.__name__ == "AutoModelForCausalLM"
    return bool(causal) and not getattr(config, "is_encoder_decoder", False)


def main_input(config: Any, auto_class: Any = None) -> str:
    """Name of the model's main input: "input_ids" for text, or another for an image or a sound."""
    main: str = getattr(auto_class or model_class(config), "main_input_name", "input_ids")
    return "input_ids" if main == "inputs_embeds" else main


def token_limits(config: Any, sequence_length: int) -> tuple[int, int | None]:
    """Return the longest usable sequence, at most `sequence_length`, and the vocabulary size (None if not known)."""
    from .positions import limit_of_config, stated_positions

    text = config.get_text_config()
    vocab_size, most = getattr(text, "vocab_size", None), stated_positions(config)
    # Only a model says how many of the stated positions it reserves, for padding: one is built, without weights, where
    # the answer matters.
    padding = getattr(text, "pad_token_id", None)
    if most is not None and isinstance(padding, int) and sequence_length > most - padding - 1:
        most = limit_of_config(config, model_class(config))
    return sequence_length if most is None else min(sequence_length, most), vocab_size


def load_generation_config(folder: Path) -> Any:
    """Load generation_config.json of a folder.

    Raises:
        ConfigError: the file is damaged.
    """
    from transformers import GenerationConfig

    with loading(str(folder)), parsing(str(folder), "generation_config.json"):
        read_json(folder / "generation_config.json")
        return GenerationConfig.from_pretrained(folder)


def reference_name(model: str, config: Any, base: str, reference: str | None) -> str:
    """Return the name of the full-precision model.

    Raises:
        ConfigError: the model, `base` and `reference` do not fit together; the message says what to give.
    """
    stored = getattr(config, "quantization_config", None)
    kind = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    if str(kind) == "glowq":
        raise ConfigError(f"{model} carries a glowq correction already; correct its base model instead.")
    if base == "dense":
        if reference is None:
            raise ConfigError(
                f"--base dense corrects the weights of {model} as they are: give --reference, the full-precision model "
                "that it was made from."
            )
        return reference
    if stored is None and base == "none":
        raise ConfigError(
            f"{model} is not quantized: name the quantizer to use, for example --base nf4, or say --base dense if its "
            "float weights hold quantized values."
        )
    if stored is not None and base != "none":
        raise ConfigError(f"{model} is quantized already ({kind}): leave out --base and give --reference.")
    if stored is not None and reference is None:
        raise ConfigError(
            f"{model} is quantized ({kind}): give --reference, the full-precision model that it was made from."
        )
    return reference or model
