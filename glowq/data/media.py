"""Read images and sounds that a user names, as samples of a model's own processor."""

from __future__ import annotations

import os
import random
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CalibrationError
from .text import read_rows

__all__ = ["read_media"]

_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_SOUNDS = (".wav",)
_COLUMNS = ("image", "audio")


def read_media(source: str, processor: Any, seed: int) -> Iterator[dict[str, Any]]:
    """Read the images, or the sounds, of a source, one sample each, in an order that the seed gives.

    Args:
        source: a folder (all .png, .jpg, .jpeg, .webp and .bmp files below it, or all .wav files), one such file, or a
            `datasets` name "org/name" or "org/name:config:split" with a column "image" or "audio".
        processor: processor of the model: an image processor, or a feature extractor of sounds.
        seed: seed of the order.

    Raises:
        CalibrationError: the source holds none, a file cannot be read, or a sound has another rate than the model.
        ModelNotFoundError: there is no such file or data set.
    """
    for name, read in _sources(source, seed):
        value = read()
        try:
            if isinstance(value, tuple):
                values, rate = value
                _check_rate(name, rate, processor)
                found = processor(values, sampling_rate=rate, return_tensors="pt")
            else:
                found = processor(images=value, return_tensors="pt")
        except (ValueError, TypeError, RuntimeError) as error:
            kind = type(processor).__name__
            raise CalibrationError(f"{name} is not what the model's processor ({kind}) reads: {error}") from error
        yield dict(found)


def _sources(source: str, seed: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The name of each image or sound, and a function that reads it."""
    draw = random.Random(seed)
    if os.path.exists(source):
        root = Path(source)
        files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
        files = [file for file in files if file.suffix.lower() in _IMAGES + _SOUNDS]
        draw.shuffle(files)
        for file in files:
            read = _image if file.suffix.lower() in _IMAGES else _sound
            yield str(file), lambda file=file, read=read: read(file)  # type: ignore[misc]
        if not files:
            raise CalibrationError(
                f"{source} holds no image ({', '.join(_IMAGES)}) and no sound ({', '.join(_SOUNDS)}), which this model "
                "reads: give a folder of them."
            )
        return
    rows, column = read_rows(source, _COLUMNS)
    for index in draw.sample(range(len(rows)), len(rows)):
        yield f"row {index} of {source}", lambda index=index: _of_row(rows[index][column])  # type: ignore[misc]


def _of_row(value: Any) -> Any:
    """An image as it is; a sound as its values and its rate."""
    try:
        return (np.asarray(value["array"]), int(value["sampling_rate"]))
    except (TypeError, KeyError, IndexError):
        return value


def _image(file: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as opened:
            return opened.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise CalibrationError(f"{file} cannot be read as an image: {error}") from error


def _sound(file: Path) -> tuple[np.ndarray[Any, Any], int]:
    """The values of a PCM file of 16 bits, between -1 and 1, and its rate. Several channels are averaged."""
    try:
        with wave.open(str(file)) as opened:
            if opened.getsampwidth() != 2:
                raise CalibrationError(f"{file} has {8 * opened.getsampwidth()} bits a value; give .wav files of 16.")
            values = np.frombuffer(opened.readframes(opened.getnframes()), dtype="<i2")
            return values.reshape(-1, opened.getnchannels()).mean(1) / 2**15, opened.getframerate()
    except (OSError, EOFError, wave.Error) as error:
        raise CalibrationError(f"{file} cannot be read as a sound: {error}") from error


def _check_rate(name: str, rate: int, processor: Any) -> None:
    wanted = getattr(processor, "sampling_rate", None) or getattr(
        getattr(processor, "feature_extractor", None), "sampling_rate", None
    )
    if wanted is not None and wanted != rate:
        raise CalibrationError(
            f"{name} has {rate:,} values a second, and the model reads {wanted:,}: convert it, for example with "
            f"ffmpeg -i IN -ar {wanted} OUT."
        )
