"""The exceptions and warnings of glowq.

Each message says what was expected, what was found, where, and what to do. All exceptions derive from `GlowQError`, so
that a caller such as the CLI can distinguish them from bugs.
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


class GlowQError(Exception):
    """Base of every error that glowq raises on purpose."""


class ConfigError(GlowQError, ValueError):
    """A configuration field is unknown, missing, or holds a value that cannot be used."""


class VersionError(ConfigError):
    """A file has a newer format than this version of glowq can read."""


class UnsafePathError(ConfigError):
    """A config or index names a file outside its own folder."""


class PickleRefusedError(GlowQError):
    """Weights are stored only as pickles, and glowq reads only safetensors."""


class ModelNotFoundError(GlowQError, FileNotFoundError):
    """A model, checkpoint or file named by the user does not exist."""


class ReadError(GlowQError, OSError):
    """A file exists and cannot be read: no permission, a folder in its place, or the disk fails."""


class OutputError(GlowQError, OSError):
    """The output directory cannot be written: not empty, not writable, or the disk is full."""


class UnknownBaseError(GlowQError, ValueError):
    """A base quantizer name is not registered, or its library is not installed."""


class BackendError(GlowQError, RuntimeError):
    """A base quantizer's module cannot be read or prepared."""


class RepackedWeightError(BackendError):
    """A quantized weight was rewritten in place by its library's kernel and can no longer be read back."""


class UnsupportedModuleError(GlowQError, ValueError):
    """A module cannot be corrected; the message names it and says why."""


class CalibrationError(GlowQError, ValueError):
    """Calibration text is missing or holds fewer tokens than needed."""


class NoGainError(ConfigError):
    """A budget cannot be used: no group was measured to bring the model's outputs closer to those of the reference."""


class NoImprovementError(GlowQError, ValueError):
    """A correction does not bring a model's answers nearer to the reference's on text that it was not made of."""


class SensitivityError(GlowQError, RuntimeError):
    """The gradient of the loss at a group's outputs cannot be computed, or is zero."""


class TokenizerMismatchError(GlowQError, ValueError):
    """The tokenizer produces ids that the model has no embedding for."""


class NonFiniteError(GlowQError, ValueError):
    """NaN or Inf in an activation, weight or factor; the message names the tensor."""


class RankError(GlowQError, ValueError):
    """A rank is not between 1 and min(outputs, inputs) of its group."""


class RoundingError(GlowQError, ValueError):
    """int8 factors would be less accurate than unrounded factors in the same bytes; the message holds the figures."""


class ReferenceMismatchError(GlowQError, ValueError):
    """The modules, shapes or weights of the reference model do not match the quantized model."""


class FoldingError(ReferenceMismatchError):
    """Channel scales were folded into a quantized weight, but no layer before it holds the inverse scales."""


class CorrectionError(GlowQError, ValueError):
    """A correction's files are corrupt, or a factor is missing, unexpected or of the wrong shape."""


class FingerprintError(CorrectionError):
    """A correction was made for quantized weights that differ from those of the model."""


class EvaluationError(GlowQError, ValueError):
    """Models cannot be compared on this data."""


class ExportError(GlowQError, ValueError):
    """A model, module or operator cannot be written in the target's format, or the exported model fails its check."""


class HubError(GlowQError, OSError):
    """The Hub refused a request or cannot be reached, or an upload was interrupted; the message says what to do."""


class UntestedVersionWarning(UserWarning):
    """A library's version is outside the range that glowq is tested with; shown once for each library."""


class NewerFormatWarning(UserWarning):
    """A file holds fields that a newer minor version of its format added; this version of glowq ignores them."""


class NoGradientWarning(UserWarning):
    """No gradient of the loss could be computed, so that errors are measured in output units."""


def one_line(error: BaseException) -> str:
    """An error's message without its line breaks."""
    return " ".join(str(error).split())
