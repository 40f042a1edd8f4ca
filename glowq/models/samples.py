"""Check that samples fit a model, and supply what its decoder reads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from ..data.inputs import Inputs
from ..errors import CalibrationError, TokenizerMismatchError
from .dequantized import dequantized
from .fast_products import fast_products
from .forward import evaluating, linear_names, to_model

__all__ = ["checked_samples", "is_encoder_decoder", "refuse_text", "with_decoder"]

_DECODER = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
_TOGETHER = 16  # samples that are answered in one batch
_GREEDY: dict[str, Any] = {"max_new_tokens": 32, "max_length": None, "do_sample": False, "num_beams": 1}
_NO_TEXT = ("pixel_values", "input_features", "input_values")


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model is an encoder with a decoder; the encoder of one alone, like T5EncoderModel, is not."""
    declared = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return bool(declared) and "decoder_input_ids" in _arguments(model)


def refuse_text(model: nn.Module, *, failed: bool = False) -> None:
    """Refuse a model that reads images or sound, which text is not.

    Args:
        model: the model.
        failed: whether a forward with text alone has failed. Many models that read images beside text need none.

    Raises:
        CalibrationError: the message says what to give in place of text.
    """
    main = getattr(model, "main_input_name", "input_ids")
    others = [name for name in _NO_TEXT if name in _arguments(model)]
    if main not in ("input_ids", "inputs_embeds") or (others and failed):
        raise CalibrationError(
            f"{type(model).__name__} reads {', '.join(others or [main])}, and the calibration is text: give "
            "calibration= a list of what its processor returns for a sample, such as "
            '[processor(images=image, return_tensors="pt") for image in images].'
        )


def with_decoder(model: Any, ids: Tensor) -> Inputs:
    """Inputs of an encoder with a decoder: the encoder reads the first half of each sequence, the decoder the second.

    Args:
        model: an encoder with a decoder.
        ids: token ids, shape (n, length), int64, length >= 2.

    Raises:
        CalibrationError: the model's config says no token that a decoder starts with.
    """
    configs = (model.config, model.config.get_text_config(decoder=True))
    names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    known = (getattr(config, name, None) for config in configs for name in names)
    start = next((found for found in known if found is not None), None)
    if start is None:
        raise CalibrationError(
            f"the config of {type(model).__name__} names no decoder_start_token_id: set it, or give calibration= a "
            "list of mappings that hold decoder_input_ids."
        )
    half = ids.shape[1] // 2
    decoder = torch.cat([torch.full((len(ids), 1), int(start)), ids[:, half:-1]], dim=1)
    rows = zip(ids[:, :half].split(1), decoder.split(1), strict=True)
    return Inputs(
        tuple({"input_ids": first, "decoder_input_ids": second} for first, second in rows), ids.shape[1] - half
    )


def checked_samples(
    model: Any, samples: Iterable[dict[str, Tensor]], vocab_size: int | None, tokens: int | None
) -> Inputs:
    """Check samples, give a decoder its inputs where they hold none, and count their rows.

    Labels stay only where a decoder reads them. A decoder without inputs reads what the model answers.

    Args:
        model: the model that will run.
        samples: what `glowq.data.read_inputs.read_inputs` yields.
        vocab_size: number of rows of the model's embedding; None checks no upper bound.
        tokens: take as many samples as give a linear layer this many rows, and at least two; None takes all.

    Raises:
        CalibrationError: there is no sample; one holds a field that the model does not take, lacks its main input, or
            holds NaN or Inf; or a forward refuses it.
        TokenizerMismatchError: an id has no row in the model's embedding.
    """
    found: list[dict[str, Tensor]] = []
    length, most = 1, math.inf
    for number, sample in enumerate(samples):
        found.append(_checked(model, number, sample, vocab_size))
        if number == 0:
            length = _rows_of(model, *_answered(model, found))
            most = math.inf if tokens is None else max(2, tokens // length)
        if len(found) >= most:
            break
    if not found:
        raise CalibrationError("calibration holds no sample: give at least one mapping of a processor's tensors.")
    whole = _answered(model, found)
    return Inputs(tuple(whole), length, _answers_each(model, whole[0]))


def _checked(model: Any, number: int, sample: dict[str, Tensor], vocab_size: int | None) -> dict[str, Tensor]:
    """A sample with the fields that the model reads."""
    arguments, main = _arguments(model), getattr(model, "main_input_name", "input_ids")
    if not is_encoder_decoder(model) or "decoder_input_ids" in sample:
        sample = {name: value for name, value in sample.items() if name != "labels"}
    unknown = sorted(set(sample) - set(arguments))
    if unknown:
        raise CalibrationError(
            f"calibration sample {number} holds {', '.join(unknown)}, which {type(model).__name__} does not take; "
            f"it takes {', '.join(_data(arguments))}."
        )
    if main not in sample and "inputs_embeds" not in sample:
        raise CalibrationError(
            f"calibration sample {number} holds no {main}, which {type(model).__name__} reads; it holds "
            f"{', '.join(sorted(sample))}."
        )
    _check_values(number, sample, vocab_size)
    return sample


def _rows_of(model: Any, sample: Mapping[str, Tensor]) -> int:
    """The most rows that a sample gives any linear layer of a model.

    Raises:
        CalibrationError: the model refuses the sample.
    """
    most = 1

    def count(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal most
        if args and isinstance(args[0], Tensor) and args[0].dim() >= 2:
            most = max(most, args[0].numel() // max(1, args[0].shape[-1]))

    hooks = [model.get_submodule(name).register_forward_pre_hook(count) for name in linear_names(model)]
    try:
        with torch.no_grad(), evaluating(model):
            model(**to_model(sample, model))
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in sample.items())
        raise CalibrationError(f"{type(model).__name__} refuses the calibration sample ({shapes}): {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return most


def _answers_each(model: Any, sample: Mapping[str, Tensor]) -> bool:
    """Whether a model takes a batch of samples and answers each; some (Pixtral) lay all images in one row."""
    firsts = []
    with torch.no_grad(), evaluating(model):
        for count in (1, 2):
            (batch,) = Inputs((sample,) * count).split(count)
            try:
                output = model(**to_model(batch, model))
            except (ValueError, TypeError, RuntimeError, IndexError):
                return False
            values = output.to_tuple() if hasattr(output, "to_tuple") else output
            firsts.append(next((value.shape[0] for value in values if isinstance(value, Tensor) and value.dim()), 0))
    return firsts[1] == 2 * firsts[0]


def _answered(model: Any, samples: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The samples, with the decoder's inputs if there is one: what the model answers, up to its first end token."""
    lacking = [sample for sample in samples if not any(name in sample for name in _DECODER)]
    if not is_encoder_decoder(model) or not lacking:
        return samples
    answers: list[Tensor] = []
    try:
        with torch.no_grad(), fast_products(model), dequantized(model):
            for batch in Inputs(tuple(lacking)).split(_TOGETHER):
                # Whisper's own `generate` splits long sounds in a loop of its own.
                generate: Any = GenerationMixin.generate
                found = generate(model, **to_model(batch, model), **_GREEDY)
                answers += found.cpu().split(1)
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
        raise CalibrationError(
            f"{type(model).__name__} cannot generate what its decoder reads ({error}): give samples that hold "
            "decoder_input_ids."
        ) from error
    ends, new = torch.tensor(model.generation_config.eos_token_id or []).flatten(), iter(answers)
    return [
        sample
        if any(name in sample for name in _DECODER)
        else {**sample, "decoder_input_ids": (answer := next(new))[:, : _length(answer[0], ends)]}
        for sample in samples
    ]


def _length(answer: Tensor, ends: Tensor) -> int:
    """Number of tokens before the first end token, of which the first token of an answer is none."""
    found = torch.isin(answer[1:], ends).nonzero().flatten()
    return 1 + int(found[0]) if len(found) else len(answer)


def _check_values(number: int, sample: Mapping[str, Tensor], vocab_size: int | None) -> None:
    for name, value in sample.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CalibrationError(f"calibration sample {number}: {name} holds NaN or Inf.")
    for name in ("input_ids", "decoder_input_ids", "labels"):
        ids = sample.get(name)
        if ids is None or not ids.numel() or vocab_size is None:
            continue
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= vocab_size:
            raise TokenizerMismatchError(
                f"calibration sample {number}: {name} holds id {low if low < 0 else high}, the model knows 0 to "
                f"{vocab_size - 1}; use the model's own processor."
            )


def _arguments(model: nn.Module) -> list[str]:
    return list(signature(type(model).forward).parameters)


def _data(arguments: list[str]) -> list[str]:
    """The arguments of a forward that hold data, for a message."""
    words = ("self", "kwargs", "past_key_values", "encoder_outputs", "return_dict", "use_cache", "cache_position")
    return [name for name in arguments if name not in words and not name.startswith("output_") and name != "labels"]
