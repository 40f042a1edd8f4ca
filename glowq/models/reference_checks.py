"""Checks that a quantized model was made from its reference: weights that quantizers do not change are compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import ReferenceMismatchError
from ..quantizers.experts import ExpertLinear, stacks
from ..quantizers.model import quantized_modules
from .disk_mapping import readable
from .forward import input_embeddings

__all__ = ["LEAST_SIMILARITY", "REVISION_TOLERANCE", "check_loaded", "check_revision"]

REVISION_TOLERANCE = 3e-3  # rounding to bfloat16 makes a difference of 1.1e-3
LEAST_SIMILARITY = 0.5  # cosine; 2-bit rounding of the bundled model keeps 0.90, an unrelated weight has 0
_SAMPLED_ROWS = 1024


def check_revision(model: nn.Module, reference: nn.Module, tolerance: float = REVISION_TOLERANCE) -> None:
    """Compare the input embeddings, to find a reference that is another revision or a fine-tune.

    Such a model has the same modules and shapes. Quantizers do not change the input embeddings, so they must be
    equal. (Quantizers may change norms, see `glowq.models.channel_scales`.)

    Args:
        model: the quantized model.
        reference: the full-precision model; its weights may be on disk.
        tolerance: largest relative difference, as a root mean square over a sample of rows. Give more than the
            default only if the embeddings were quantized too and then stored as floats (GGUF).

    Raises:
        ReferenceMismatchError: the embeddings differ by more.
    """
    ours, theirs = (_embedding_rows(side) for side in (model, reference))
    if ours is None or theirs is None or ours.shape[1] != theirs.shape[1]:
        return
    common = min(len(ours), len(theirs))  # one of the vocabularies may be padded
    sample = torch.linspace(0, common - 1, min(common, _SAMPLED_ROWS)).long()
    quantized, full = ours[sample].float(), theirs[sample].float()
    found = float((quantized - full).norm() / full.norm().clamp_min(1e-30))
    if not found <= tolerance:
        raise ReferenceMismatchError(
            f"the embeddings differ by {found:.1%}: the reference is another revision or a fine-tune of the model "
            "that was quantized; give the revision that was quantized, as in reference='org/model@revision'."
        )


def check_loaded(model: nn.Module, reference: nn.Module) -> None:
    """Compare the linear layers and experts that are not quantized, to find weights that transformers could not load.

    It leaves them random and only warns, as with NomicBert on torchao, and with experts that a library has saved one
    by one. Scaled columns, as AWQ leaves them in the layers of a router, are accepted.

    Args:
        model: the quantized model.
        reference: the full-precision model; its weights may be on disk.

    Raises:
        ReferenceMismatchError: a layer's weight has nothing in common with the reference's.
    """
    quantized, others = quantized_modules(model), _float_weights(reference)
    for name, (module, weight) in _float_weights(model).items():
        if name in quantized or name not in others:
            continue
        if getattr(module, weight).shape != getattr(*others[name]).shape:
            continue  # a head that was resized, or another one
        ours, theirs = _sampled_rows(module, weight), _sampled_rows(*others[name])
        if ours is None or theirs is None:
            continue
        found = float(torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0))
        if found < LEAST_SIMILARITY and bool(theirs.any()):
            raise ReferenceMismatchError(
                f"{name}, which is not quantized, has cosine similarity {found:.2f} with the reference's: "
                "transformers did not load it (its load report names it as MISSING; another quantizer may load "
                "it), or the reference is another model."
            )


def _float_weights(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Linear layer -> itself and "weight"; parameter of all experts of a layer -> their module and its name."""
    names = {module: name for name, module in model.named_modules()}
    experts = {f"{names[module]}.{stack}": (module, stack) for module, stack in stacks(model)}
    kinds = nn.Linear | Conv1D
    layers = {name: (module, "weight") for module, name in names.items() if isinstance(module, kinds)}
    return {name: found for name, found in layers.items() if not isinstance(found[0], ExpertLinear)} | experts


def _sampled_rows(module: Any, name: str) -> Tensor | None:
    """Some rows of a module's weight, or of its experts', float32 on the CPU; None if it is no plain float tensor."""
    weight = getattr(module, name)
    if type(weight.data) is not Tensor or not weight.is_floating_point() or weight.dim() not in (2, 3):
        return None
    with readable(module):
        weight = getattr(module, name).detach().flatten(0, -2)
        rows = torch.linspace(0, len(weight) - 1, min(len(weight), _SAMPLED_ROWS), device=weight.device).long()
        values: Tensor = weight[rows].float().cpu()
    return values


def _embedding_rows(model: nn.Module) -> Tensor | None:
    """Return the input embeddings, (vocabulary, width), on the CPU; None if the model has none as plain floats."""
    layer: Any = input_embeddings(model)
    weight = getattr(layer, "weight", None)
    if layer is None or not isinstance(weight, Tensor) or type(weight.data) is not Tensor or weight.dim() != 2:
        return None
    with readable(layer):
        values: Tensor = layer.weight.detach()
        return values.cpu() if values.is_floating_point() else None
