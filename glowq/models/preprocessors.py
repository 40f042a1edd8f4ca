"""Load what turns text, images or sounds into a model's inputs: its tokenizer or its processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ModelNotFoundError
from ..utils.files import refuse_irregular
from .load_errors import loading, named, parsing

__all__ = ["load_processor", "load_tokenizer"]

_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(*names: str | None) -> Any:
    """Load the tokenizer of the first of `names` that has one.

    Raises:
        ModelNotFoundError: none of them has one.
        ConfigError: its files are damaged.
    """
    from transformers import AutoTokenizer

    return _first(AutoTokenizer, "tokenizer", _TOKENIZER_FILES, names, "add the model's tokenizer files.")


def load_processor(main: str, *names: str | None) -> Any:
    """Load the processor of the first of `names` that has one.

    Args:
        main: name of the model's main input: "pixel_values" for an image, anything else for a sound.
        names: folders or Hub names.

    Raises:
        ModelNotFoundError: none of them has one.
        ConfigError: its files are damaged, or it needs a library that is not installed.
    """
    from transformers import AutoFeatureExtractor, AutoImageProcessor

    kind: Any = AutoImageProcessor if main == "pixel_values" else AutoFeatureExtractor
    advice = "add the model's preprocessor_config.json, or correct the model in Python with samples of your own."
    return _first(kind, "processor", _PROCESSOR_FILES, names, advice)


def _first(kind: Any, what: str, files: tuple[str, ...], names: tuple[str | None, ...], advice: str) -> Any:
    """Load the first that there is, by a class of transformers; a folder has one if it holds any of `files`."""
    given = list(dict.fromkeys(name for name in names if name))
    for name in given:
        if not Path(name).is_dir() or any((Path(name) / file).is_file() for file in files):
            if Path(name).is_dir():
                refuse_irregular(Path(name))
            with loading(name), parsing(name, f"a file of the {what}"):
                return kind.from_pretrained(**named(name), trust_remote_code=False)
    raise ModelNotFoundError(f"no {what} in {', '.join(map(repr, given))}; {advice}")
