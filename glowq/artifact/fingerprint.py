"""Which quantized weights a correction is valid for."""

from __future__ import annotations

import hashlib

from accelerate.utils import align_module_device
from torch import nn

from ..errors import FingerprintError
from ..quantizers.model import quantized_modules
from ..quantizers.registry import find_backend
from .config import GlowQConfig

__all__ = ["fingerprint", "verify_fingerprint"]

_SAMPLED_CODES = 4096


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over a fixed sample of each quantized module's stored codes, its shape and its quantization settings.

    Two models agree exactly when the correction of one is valid for the other: the same weights, quantized the same
    way. Codes rather than dequantized values are taken, for those do not depend on the device that reads them; all
    quantized modules rather than the corrected ones, so that a correction that was cut keeps its fingerprint.
    """

    digest = hashlib.sha256()
    for name, backend in sorted(quantized_modules(model).items()):
        module = model.get_submodule(name)
        with align_module_device(module):
            digest.update(f"{name}|{backend.features(module)}|{backend.scheme(module)}|".encode())
            for codes in backend.codes(module):
                flat = codes.detach().reshape(-1)
                step = max(1, flat.numel() // _SAMPLED_CODES)
                digest.update(flat[::step].cpu().contiguous().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def verify_fingerprint(model: nn.Module, config: GlowQConfig) -> None:
    """Refuse a correction made for other quantized weights.

    Raises:
        FingerprintError: model and correction do not belong together.
    """
    expected = (config.base_model or {}).get("fingerprint")
    for member in (member for group in (config.groups or {}).values() for member in group["members"]):
        try:
            module = model.get_submodule(member)
        except AttributeError:
            raise FingerprintError(
                f"the model has no module {member!r}: this correction was made for another model."
            ) from None
        if find_backend(module) is None:
            raise FingerprintError(
                f"{member} is not quantized here, but the correction was made for a quantized module. Load the model "
                "with the base quantizer that config.json names."
            )
    found = fingerprint(model)
    if found != expected:
        raise FingerprintError(
            f"the correction was made for quantized weights {expected}, but this model's are {found}: another model, "
            "another revision, other quantization settings, or weights quantized from another dtype than config.json "
            "names. Load what the correction was made for, or correct this model again with `glowq correct`."
        )
