"""Fingerprints of quantized weights, to check that a correction is valid for a model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ..errors import FingerprintError
from ..quantizers.experts import tensor_holder
from ..quantizers.model import quantized_modules
from ..quantizers.registry import find_backend
from .config import GlowQConfig

__all__ = ["backbone_fingerprint", "fingerprint", "same_weights", "verify_fingerprint"]

_SAMPLED_CODES = 4096
_CODES_ONLY = "sha256"
_WEIGHTS = "weights-sha256"


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of what identifies the quantized weights of `model`, as "weights-sha256:<64 hexadecimal digits>".

    It covers the name, shape and quantization settings of each quantized module, a fixed sample of its codes, and all
    of its scales and offsets. Two models agree exactly when the correction of one is valid for the other. Stored values
    are hashed rather than dequantized ones, because those depend on the device. Scales and offsets are rounded to
    bfloat16 first, because a model can be loaded with them in another dtype. All quantized modules take part, also
    those without a correction, so that a correction that was cut keeps its fingerprint.
    """
    return _hash(model, _WEIGHTS, {name: name for name in quantized_modules(model)})


def backbone_fingerprint(model: nn.Module) -> str:
    """The fingerprint of a model without its head, the same for every class that has this backbone.

    The backbone is the part of a transformers model that `base_model_prefix` names, or the whole model if it has no
    such part. Names count from there.
    """
    prefix = getattr(model, "base_model_prefix", "")
    start = f"{prefix}." if prefix and hasattr(model, prefix) else ""
    names = {name: name.removeprefix(start) for name in quantized_modules(model) if name.startswith(start)}
    return _hash(model, _WEIGHTS, names)


def same_weights(model: nn.Module, expected: str) -> bool:
    """Whether `expected` is the fingerprint of `model`; those of glowq 0.1 ("sha256:...") cover no scales.

    Raises:
        FingerprintError: `expected` is not a fingerprint of a kind that this version of glowq computes.
    """
    kind = expected.partition(":")[0]
    if kind not in (_CODES_ONLY, _WEIGHTS):
        raise FingerprintError(
            f"{expected!r} is not a fingerprint that this version of glowq computes ({_CODES_ONLY} or {_WEIGHTS}, a "
            "colon and 64 digits): another model's file, a damaged one, or one of a newer glowq. Download it again, or "
            "upgrade glowq."
        )
    return _hash(model, kind, {name: name for name in quantized_modules(model)}) == expected


def _hash(model: nn.Module, kind: str, names: Mapping[str, str]) -> str:
    """Hash the modules in `names`: name in the model -> name that is hashed."""
    digest = hashlib.sha256()
    for name, backend in sorted(quantized_modules(model).items()):
        if name not in names:
            continue
        module = model.get_submodule(name)
        with align_module_device(tensor_holder(module)):
            digest.update(f"{names[name]}|{backend.features(module)}|{backend.scheme(module)}|".encode())
            for codes in backend.codes(module):
                flat = codes.detach().reshape(-1)
                step = max(1, flat.numel() // _SAMPLED_CODES)
                digest.update(_bytes(flat[::step]))
            if kind == _WEIGHTS:
                for part in (*backend.scales(module), *backend.offsets(module)):
                    digest.update(_bytes(part))
    return f"{kind}:{digest.hexdigest()}"


def _bytes(tensor: Tensor) -> bytes:
    """The values of a tensor of any shape, floats as bfloat16."""
    flat = tensor.detach().reshape(-1)
    if flat.is_floating_point():
        flat = flat.to(torch.bfloat16).view(torch.int16)
    return flat.cpu().contiguous().numpy().tobytes()


def verify_fingerprint(model: nn.Module, config: GlowQConfig, other_class: bool = False) -> None:
    """Refuse a correction made for other quantized weights.

    Args:
        model: the quantized model.
        config: description of the correction, under the names that its modules have in `model`.
        other_class: whether the correction was made for another class with the same backbone. Then the heads are not
            compared.

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
    backbone = (config.base_model or {}).get("backbone")
    if other_class and backbone is not None and backbone_fingerprint(model) == backbone:
        return
    if not same_weights(model, str(expected)):
        found = fingerprint(model)
        raise FingerprintError(
            f"the correction was made for quantized weights {expected}, but this model's are {found}: another model, "
            "another revision, other quantization settings, or weights quantized from another dtype than config.json "
            "names. Load what the correction was made for, or correct this model again with `glowq correct`."
        )
