"""Every way glowq can refuse, by name.

Each message says what was expected, what was found, where, and what to do. All of them derive from
`GlowQError`, so that a caller (the CLI among them) can tell a refusal from a bug.
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
    "NonFiniteError",
    "OutputError",
    "PickleRefusedError",
    "RankError",
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
    """A file was written by a newer format than this glowq reads."""


class UnsafePathError(ConfigError):
    """A config or index names a file outside its own folder."""


class PickleRefusedError(GlowQError):
    """A pickled file was offered where only safetensors is read."""


class ModelNotFoundError(GlowQError, FileNotFoundError):
    """A model, checkpoint or file named by the user does not exist."""


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
    """A budget has nothing to spend on: no group was measured to bring the answers nearer to the reference's."""


class SensitivityError(GlowQError, RuntimeError):
    """The gradient of the loss cannot be had at a group's outputs, or is zero there."""


class TokenizerMismatchError(GlowQError, ValueError):
    """The tokenizer produces ids that the model has no embedding for."""


class NonFiniteError(GlowQError, ValueError):
    """NaN or Inf in an activation, weight or factor; the message names the tensor."""


class RankError(GlowQError, ValueError):
    """A rank lies outside 1..min(outputs, inputs) of its group."""


class RoundingError(GlowQError, ValueError):
    """int8 factors would lose more accuracy than the bytes that they save give back; the message holds the figures."""


class ReferenceMismatchError(GlowQError, ValueError):
    """The reference model's modules or shapes are not those of the quantized model."""


class FoldingError(ReferenceMismatchError):
    """Scales were folded into a quantized weight that no layer before it takes out again."""


class CorrectionError(GlowQError, ValueError):
    """A correction's files are corrupt, or a factor is missing, extra or misshaped."""


class FingerprintError(CorrectionError):
    """A correction was made for other quantized weights than those it is being attached to."""


class EvaluationError(GlowQError, ValueError):
    """Models cannot be compared on this data."""


class ExportError(GlowQError, ValueError):
    """A model, a module or an operator has no form in the target's format, or the export fails its own check."""


class HubError(GlowQError, OSError):
    """The Hub refuses, cannot be reached, or an upload was interrupted; the message says what to do."""


class UntestedVersionWarning(UserWarning):
    """A library's version lies outside the range that glowq is tested with; said once for each library."""


class NewerFormatWarning(UserWarning):
    """A file holds fields that a newer minor version of its format added, and that this glowq leaves out."""


class NoGradientWarning(UserWarning):
    """No gradient of the loss could be had, so that errors are counted in output units."""


def one_line(error: BaseException) -> str:
    """An error's message without its line breaks."""
    return " ".join(str(error).split())
