"""`GlowQConfig`: the quantization config of a corrected model, as transformers knows it."""

from __future__ import annotations

from transformers.utils.quantization_config import QuantizationConfigMixin

from .correction_config import CorrectionConfig

__all__ = ["GlowQConfig"]


class GlowQConfig(CorrectionConfig, QuantizationConfigMixin):
    """Quantization config of a corrected model: pass it to `from_pretrained` to correct while loading.

    A configuration is of one of three kinds:

    - a request for a new correction: `calibration` and the settings of the correction;
    - a saved correction to attach: `correction`, and a budget to cut it to;
    - the description of a finished correction, read from config.json: `groups`.

    An argument that has no effect for its kind is refused.

    Args:
        base: the base quantizer: a transformers quantization config, its dict, or a `--base` name such as "nf4".
        correction: instead of `calibration`: folder or Hub name of a saved correction to attach after quantizing.
        version, minor, format, base_model, groups, base_bytes, provenance: written by glowq; users do not set them.
        **options: the fields of `CorrectionRequest`: rank, budget, rank_step, max_rank, method, calibration,
            calibration_tokens, sequence_length, distill, factor_dtype, seed.

    Attributes:
        request: the requested settings; None for a finished correction.
        method, seed: name of the solver method, and the seed.

    Raises:
        ConfigError: a field is unknown, has no effect, or holds a value that cannot be used.
        UnknownBaseError: no such base quantizer, or its library is not installed.
        VersionError: the configuration was written by a newer major version of the format.
    """
