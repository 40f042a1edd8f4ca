"""The fingerprint of quantized weights: one for the same weights however they are loaded, another for any other."""

from __future__ import annotations

import hashlib

import pytest
import torch
from accelerate.utils import align_module_device
from torch import nn

from glowq import errors
from glowq.artifact.fingerprint import fingerprint, same_weights
from glowq.quantizers.model import prepare_model, quantized_modules
from support.bases import BASES, Base, rows

pytestmark = pytest.mark.usefixtures("uncompiled")

WRITTEN = [base.name for base in BASES if not base.is_preset]


def loaded(base: Base, dtype: torch.dtype = torch.float32) -> nn.Module:
    model: nn.Module = base.load(dtype)
    prepare_model(model)
    return model


@pytest.mark.parametrize("base", rows(*WRITTEN))
def test_it_is_the_same_in_any_dtype_that_a_checkpoint_is_loaded_in(base: Base) -> None:
    assert fingerprint(loaded(base, torch.bfloat16)) == fingerprint(loaded(base, torch.float32))


@pytest.mark.parametrize("base", rows())
def test_one_changed_scale_or_offset_is_seen(base: Base) -> None:
    model = loaded(base)
    before, seen = fingerprint(model), []
    name, backend = list(quantized_modules(model).items())[-1]
    module = model.get_submodule(name)
    with align_module_device(module), torch.inference_mode():  # hqq makes inference tensors
        parts = [*backend.scales(module), *backend.offsets(module)]
        for part in parts:
            flat = part.detach().reshape(-1)
            kept = flat[-1].clone()
            flat[-1] = 3 if kept == 0 else 0 if part.dtype.itemsize == 1 else kept * 8
            seen.append(fingerprint(model) != before)
            flat[-1] = kept
    assert all(seen), f"{seen} of {len(parts)} scales and offsets"
    assert fingerprint(model) == before


@pytest.mark.parametrize("base", rows("nf4"))
def test_the_fingerprints_of_older_versions_are_still_compared(base: Base) -> None:
    """Up to glowq 0.1: codes and settings alone, written here as that version computed them."""
    model, digest = loaded(base), hashlib.sha256()
    for name in sorted(quantized_modules(model)):
        module = model.get_submodule(name)
        digest.update(f"{name}|{(module.out_features, module.in_features)}|nf4, groups of 64|".encode())
        codes = module.weight.data.reshape(-1)
        digest.update(codes[:: max(1, codes.numel() // 4096)].numpy().tobytes())
    assert same_weights(model, f"sha256:{digest.hexdigest()}")
    assert not same_weights(model, "sha256:" + "0" * 64)


@pytest.mark.parametrize("stored", ["", "0", "md5:00", "weights-sha512:00"])
@pytest.mark.parametrize("base", rows("nf4"))
def test_a_fingerprint_of_a_kind_that_nobody_computes_is_refused(base: Base, stored: str) -> None:
    with pytest.raises(errors.FingerprintError, match="not a fingerprint that this version"):
        same_weights(loaded(base), stored)
