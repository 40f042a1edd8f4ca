"""The exceptions and warnings of glowq.

Each message says what was expected, what was found, where, and what to do. All exceptions derive from `GlowQError`, so
that a caller such as the CLI can distinguish them from bugs. examples/guides/errors.md holds the table of their
meanings and remedies, and `tests/test_errors.py` compares it with the docstrings here, and raises each.
"""

from __future__ import annotations

__all__ = [
    "BackendError",
    "CalibrationError",
    "ConfigError",
    "CorrectionError",
    "EvaluationError",
    "ExportError",
    "FingerprintError",
    "FoldingError",
    "GlowQError",
    "HubError",
    "ModelNotFoundError",
    "NewerFormatWarning",
    "NoGainError",
    "NoGradientWarning",
    "NoImprovementError",
    "NonFiniteError",
    "OutputError",
    "PickleRefusedError",
    "RankError",
    "ReadError",
    "ReferenceMismatchError",
    "RepackedWeightError",
    "RoundingError",
    "SensitivityError",
    "TokenizerMismatchError",
    "UnknownBaseError",
    "UnsafePathError",
    "UnsupportedModuleError",
    "UntestedVersionWarning",
    "VersionError",
    "one_line",
]


_LONGEST = 1200  # letters of a message
_END = 200  # letters of the end of a long message that are kept: it says what to do


class GlowQError(Exception):
    """Base of every error that glowq raises on purpose."""

    def __str__(self) -> str:
        """The message. Of a long one the middle is left out: it quotes names and values of files of strangers."""
        message = super().__str__()
        return message if len(message) <= _LONGEST else f"{message[: _LONGEST - _END]} ... {message[-_END:]}"


class ConfigError(GlowQError, ValueError):
    """A setting, or a field of a configuration file, is unknown or missing, or holds a value that cannot be used.

    Remedy: correct the field that the message names; if it is in a downloaded file, download it again.
    """


class VersionError(ConfigError):
    """A file has a newer format than this version of glowq can read.

    Remedy: upgrade glowq.
    """


class UnsafePathError(ConfigError):
    """A config or an index names a file outside its own folder, or a folder of this machine.

    Remedy: do not use the files; ask their author to save or push them again.
    """


class PickleRefusedError(GlowQError):
    """Weights are stored only as pickles, which can run code, and glowq reads only safetensors.

    Remedy: convert the weights to safetensors, or use a revision that has them.
    """


class ModelNotFoundError(GlowQError, FileNotFoundError):
    """A model, checkpoint, data set or file that was named does not exist.

    Remedy: correct the name, save or download the missing file, or go online.
    """


class ReadError(GlowQError, OSError):
    """A file exists and cannot be read: no permission, a folder or a pipe in its place, or the disk fails.

    Remedy: correct the permission or the path, or save the file again.
    """


class OutputError(GlowQError, OSError):
    """An output folder cannot be written: it holds other files, is in use or not writable, or the disk is full.

    Remedy: choose another folder, move what the message names, or free space.
    """


class UnknownBaseError(GlowQError, ValueError):
    """A base quantizer is not known, its settings cannot be read, or its library is not installed.

    Remedy: choose a name that the message lists, or install the extra that it names.
    """


class BackendError(GlowQError, RuntimeError):
    """A module of a base quantizer cannot be read or prepared.

    Remedy: load or save the model in the way that the message describes.
    """


class RepackedWeightError(BackendError):
    """A quantized weight was rewritten in place by its library's kernel and can no longer be read back.

    Remedy: load the model again, and correct or save it before its first forward.
    """


class UnsupportedModuleError(GlowQError, ValueError):
    """A model or a module cannot be corrected; the message names it and says why.

    Remedy: quantize the model first, or leave that kind of model uncorrected.
    """


class CalibrationError(GlowQError, ValueError):
    """Calibration text is missing, cannot be read, or holds fewer tokens than needed.

    Remedy: give more text, or take shorter sequences.
    """


class NoGainError(ConfigError):
    """A budget cannot be used: no group was measured to bring the model's outputs closer to those of the reference.

    Remedy: calibrate on more or on more similar text, or leave the model uncorrected.
    """


class NoImprovementError(GlowQError, ValueError):
    """A correction does not bring a model's answers nearer to the reference's on text that it was not made of.

    Remedy: calibrate on more or on more similar text; `force` keeps the correction as it is.
    """


class SensitivityError(GlowQError, RuntimeError):
    """The gradient of the loss at a group's outputs cannot be computed, or is zero.

    Remedy: correct without distillation, or with a method that needs no gradient.
    """


class TokenizerMismatchError(GlowQError, ValueError):
    """A tokenizer or the given token ids hold an id that the model has no embedding for.

    Remedy: use the tokenizer of the model.
    """


class NonFiniteError(GlowQError, ValueError):
    """NaN or Inf in an activation, weight or factor; the message names the tensor.

    Remedy: download or save the model again, or load it in a dtype with a larger range.
    """


class RankError(GlowQError, ValueError):
    """A rank is not between 1 and min(outputs, inputs) of its group.

    Remedy: give a rank in that range.
    """


class RoundingError(GlowQError, ValueError):
    """Rounded factors would be less accurate than unrounded factors in the same bytes; the message holds the figures.

    Remedy: --factor-dtype float, one with more bits, or cut the correction to a budget.
    """


class ReferenceMismatchError(GlowQError, ValueError):
    """The modules, shapes or weights of the reference model do not match the quantized model.

    Remedy: name the very model and revision that was quantized.
    """


class FoldingError(ReferenceMismatchError):
    """Channel scales were folded into a quantized weight, but no layer before it holds the inverse scales.

    Remedy: give the reference that the model was quantized from, or choose a base without channel scales.
    """


class CorrectionError(GlowQError, ValueError):
    """Files of a correction or a model are damaged, or a tensor is missing, unexpected or of the wrong shape.

    Remedy: download or save them again.
    """


class FingerprintError(CorrectionError):
    """A correction was made for quantized weights that differ from those of the model.

    Remedy: load the base and the revision that it was made for, or correct this model again.
    """


class EvaluationError(GlowQError, ValueError):
    """Models cannot be compared on this data.

    Remedy: compare causal language models with one vocabulary, on text that is not the calibration text.
    """


class ExportError(GlowQError, ValueError):
    """A model, module or operator cannot be written in the target's format, or the exported model fails its check.

    Remedy: choose another target, for example `--to merged`.
    """


class HubError(GlowQError, OSError):
    """The Hub refused a request or cannot be reached, or an upload was interrupted.

    Remedy: do what the message says: log in, correct the name, or run the command again.
    """


class UntestedVersionWarning(UserWarning):
    """A library's version is outside the range that glowq is tested with; shown once for each library.

    Remedy: install a version of that range if something goes wrong.
    """


class NewerFormatWarning(UserWarning):
    """A file holds fields that a newer minor version of its format added; this version of glowq ignores them.

    Remedy: upgrade glowq.
    """


class NoGradientWarning(UserWarning):
    """No gradient of the loss could be computed, so that errors are measured in output units.

    Remedy: none is needed; what is measured of each group decides about a budget as always.
    """


def one_line(error: BaseException) -> str:
    """An error's message without its line breaks."""
    return " ".join(str(error).split())
