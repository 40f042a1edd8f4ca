"""The weight errors of a block, where the channel scales that a quantizer folded in are applied to the reference."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ..errors import FoldingError, ReferenceMismatchError
from ..factors.group import Group
from ..quantizers.base import Backend
from ..quantizers.experts import tensor_holder
from ..quantizers.model import read_weight
from ..utils.timeline import stage
from .blocks import blocks
from .channel_scales import VISIBLE, Pair, Scales, Slopes, best_match, fit_columns, slopes
from .reference import Reference
from .reference_checks import LEAST_SIMILARITY

__all__ = ["WeightErrors", "changed_layers"]

_ROUNDING = 0.01  # relative; above the rounding error of a norm's weights that were rounded to bfloat16 twice
_PROBES = 8
_BIAS_TOLERANCE = 0.2  # of a scale's log; the estimate from the weights is off by a few hundredths


class WeightErrors:
    """Computes the weight errors E = W' - Q of groups, W' being the reference's weight with the folded scales applied.

    If no scales were folded into a module, W' is exactly the reference's weight.

    Args:
        model: the quantized model.
        reference: its full-precision weights.
        backends: module name -> backend of every quantized module.

    Attributes:
        scales: module name -> the scales folded into it, for the modules that have any and that `errors` has processed.
    """

    def __init__(self, model: nn.Module, reference: Reference, backends: Mapping[str, Backend]) -> None:
        self.model = model
        self.reference = reference
        self.backends = backends
        self.scales: dict[str, Scales] = {}

    @stage("weight errors")
    def errors(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        """Compute the stacked weight error of each group.

        Args:
            groups: the groups of one or more blocks in call order, in which a scale's producer is before its consumers.

        Returns:
            Group name -> tensor of shape (O, d), float32.

        Raises:
            ReferenceMismatchError: a reference weight is not similar to its quantized weight.
            FoldingError: a group's columns are scaled, but no layer before it holds the inverse scales; or the scales
                that were found make an error larger.
        """
        errors: dict[str, Tensor] = {}
        raw: dict[str, Slopes] = {}
        rows: dict[str, dict[str, Slopes]] = {group.block: {} for group in groups}
        for group in groups:
            pairs = [self._pair(name, shape) for name, shape in group.shapes.items()]
            before = _by_member(group, slopes(pairs, 1))
            raw.update(before)
            divided = self._divide_columns(group, pairs, rows[group.block])
            rows[group.block].update(_by_member(group, slopes(pairs, 1)) if divided else before)
            errors[group.name] = torch.cat([weight.sub_(quantized) for weight, quantized in pairs])
        for group in groups:
            self._divide_rows(group, errors[group.name])
            for name in group.members:
                self._check(name, raw[name], rows[group.block][name])
        return errors

    def _pair(self, name: str, shape: tuple[int, int]) -> Pair:
        quantized = read_weight(self.backends[name], name, self.model.get_submodule(name))
        return self.reference.weight(name, shape).to(quantized.device), quantized

    def _divide_columns(self, group: Group, pairs: Sequence[Pair], earlier: Mapping[str, Slopes]) -> bool:
        """Multiply W of `pairs` by the scales that were folded into the group's columns; return whether any were."""
        layers = self._layers_before(group)
        plain = slopes(pairs, 0)
        if not layers and plain.excess() < VISIBLE:
            return False
        fitted = fit_columns(pairs)
        match = best_match(
            (plain, fitted), layers, {name: rows for name, rows in earlier.items() if self._rows_unscaled(name)}
        )
        if match is None:
            _refuse_scaled(group, fitted)
            return False
        columns = match.rows
        if match.reading is not None:
            rows = self._refined_by_bias(match.producer, match.rows)
            self._add(match.producer, rows=rows)
            columns = rows[match.reading]
        for name, (weight, _) in zip(group.members, pairs, strict=True):
            self._add(name, columns=columns)
            weight *= columns.to(weight)
        _refuse_scaled(group, fit_columns(pairs))
        return True

    def row_scales(self, group: Group) -> Tensor | None:
        """What the outputs of a group were divided by, shape (O,), float64; None for ones.

        Call it after `errors` has processed the group's block.
        """
        known = [self.scales.get(member, Scales()).rows for member in group.members]
        if all(rows is None for rows in known):
            return None
        ones = [torch.ones(width, dtype=torch.float64) for width in group.out_features]
        return torch.cat([one if rows is None else rows.cpu() for rows, one in zip(known, ones, strict=True)])

    def _rows_unscaled(self, name: str) -> bool:
        """Whether no scale was found for the module's rows yet, so that it can still be a producer."""
        return self.scales.get(name, Scales()).rows is None

    def _refined_by_bias(self, name: str, rows: Tensor) -> Tensor:
        """Return the scales of a module's rows: those that its bias was divided by, where the bias shows them."""
        biases = []
        for model in (self.reference.model, self.model):
            module: Any = model.get_submodule(name)
            with align_module_device(tensor_holder(module)):
                bias = getattr(module, "bias", None)
                if bias is None:
                    return rows
                biases.append(bias.detach().cpu().double())
        ratio = biases[0] / biases[1]
        # A bias near zero does not show its scale, but an inexact scale of such a bias makes no difference either.
        return torch.where((ratio > 0) & ((ratio.log() - rows.log()).abs() < _BIAS_TOLERANCE), ratio, rows)

    def _add(self, name: str, **found: Tensor) -> None:
        known = self.scales.get(name, Scales())
        self.scales[name] = Scales(**{"rows": known.rows, "columns": known.columns, **found})

    def _divide_rows(self, group: Group, error: Tensor) -> None:
        """Compute the errors of the members again whose row scales were found only later, with their consumers."""
        for (name, shape), part in zip(group.shapes.items(), error.split(list(group.out_features)), strict=True):
            if not self._rows_unscaled(name):
                weight, quantized = self._pair(name, shape)
                part.copy_(self.scales[name].apply(weight).sub_(quantized))

    def _check(self, name: str, raw: Slopes, rows: Slopes) -> None:
        scale = self.scales.get(name)
        found = rows if scale is None or scale.rows is None else rows.scaled(1 / scale.rows)
        if found.cosine < LEAST_SIMILARITY:
            raise ReferenceMismatchError(
                f"{name} of the reference has cosine similarity {found.cosine:.2f} with the quantized weight: the "
                "shapes agree, but it is another model. Give the full-precision model that the quantized one was made "
                "from."
            )
        if scale is not None:
            _refuse_rise(name, raw.error, found.error)

    def _layers_before(self, group: Group) -> dict[str, Tensor]:
        """The changed layers whose outputs the group may read: those in its block, and those outside of every block."""
        near = {**self._changed.get("", {}), **self._changed.get(group.block, {})}
        return {name: scale for name, scale in near.items() if scale.shape[0] == group.in_features}

    @cached_property
    def _changed(self) -> dict[str, dict[str, Tensor]]:
        """Block name -> its changed layers; "" for those outside of every block."""
        found: dict[str, dict[str, Tensor]] = {}
        names = blocks(self.model)
        for name, scale in changed_layers(self.model, self.reference.model, self.backends).items():
            block = next((block for block in names if name.startswith(f"{block}.")), "")
            found.setdefault(block, {})[name] = scale
        return found


def _refuse_scaled(group: Group, columns: Slopes) -> None:
    """Raise an error if a group's columns are still scaled after all scales that were found have been applied."""
    if not columns.certain():
        return
    log = columns.log[columns.quantized > 0]
    low, high = (float(edge) for edge in (log - log.median()).exp().quantile(torch.tensor([0.01, 0.99]).double()))
    raise FoldingError(
        f"{group.name}: its columns are scaled by {low:.2f} to {high:.2f} against the reference's, as AWQ and "
        f"SmoothQuant do, but no layer before it in {group.block} holds the inverse scales: the error of the weight "
        "cannot be computed. Give exactly the model that was quantized (of a smoothed model, the smoothed one) as the "
        "reference. If it is that one, the quantized model is damaged (AutoAWQ leaves such scales behind when it "
        "quantizes on a CPU): quantize it again."
    )


def _refuse_rise(name: str, before: float, after: float) -> None:
    """Raise an error if the scales make the relative error of a weight larger.

    A small increase is accepted: the errors before and after are relative to different weights, W and W'.
    """
    if after > 1.02 * before + 1e-4:
        raise FoldingError(
            f"{name}: dividing out the scales that were folded into the layers before it raises its error from "
            f"{before:.3f} to {after:.3f} of the weight; it should fall. The reference is not the model that was "
            "quantized: give that one."
        )


def changed_layers(model: nn.Module, reference: nn.Module, skip: Mapping[str, Any]) -> dict[str, Tensor]:
    """Find layers whose outputs are those of the reference divided by a scale: norms, and AWQ's scaled activations.

    The outputs for a random input are compared, so that it does not matter how a layer computes them (w, 1 + w, a
    bias).

    Args:
        model: the quantized model.
        reference: the full-precision model; its weights may be on disk.
        skip: names of the quantized modules.

    Returns:
        Name -> scale that the layer's output was divided by, shape (d,), float64 on the CPU. It is the scale of its
        consumers' columns. Layers with the same outputs as in the reference, up to rounding, are left out.
    """
    others = dict(reference.named_modules())
    found = {}
    for name, module in model.named_modules():
        own = [parameter for parameter in module.parameters(recurse=False)]
        narrow = own and all(p.dim() == 1 and p.shape == own[0].shape and p.is_floating_point() for p in own)
        if name in skip or name not in others or not narrow or len(own) != len(list(module.parameters())):
            continue
        scale = _ratio(others[name], module, own[0].shape[0])
        if scale is not None and float(scale.log().abs().max()) > _ROUNDING:
            found[name] = scale
    return found


def _ratio(reference: nn.Module, module: nn.Module, width: int) -> Tensor | None:
    probe = torch.randn(1, _PROBES, width, generator=torch.Generator().manual_seed(0))
    try:
        expected, given = (_run(layer, probe) for layer in (reference, module))
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return None  # the layer does not take one input of that width, so it cannot be a producer
    if not isinstance(expected, Tensor) or not isinstance(given, Tensor):
        return None  # I-BERT's layers return a tensor and its scale
    expected, given = expected.double(), given.double()
    if expected.shape != probe.shape or given.shape != probe.shape:
        return None
    dead = (expected == 0).all(1) & (given == 0).all(1)
    scale = torch.where(dead, 1.0, (expected * given).sum(1) / (given * given).sum(1))[0]
    rest = (expected - given * scale).square().sum() / expected.square().sum()
    return scale if bool((scale > 0).all()) and float(rest.sqrt()) < _ROUNDING else None


def _run(layer: nn.Module, probe: Tensor) -> Any:
    """Run the layer in float32 on the CPU, without its hooks and without changing it."""
    with align_module_device(layer), torch.no_grad():
        double = copy.copy(layer)
        double._parameters = {
            name: None if p is None else nn.Parameter(p.detach().float().cpu(), requires_grad=False)
            for name, p in layer._parameters.items()
        }
        # A loader may have set another forward on the instance; the class has the layer's own forward.
        return type(layer).forward(double, probe)


def _by_member(group: Group, rows: Slopes) -> dict[str, Slopes]:
    widths = list(group.out_features)
    parts = zip(rows.full.split(widths), rows.cross.split(widths), rows.quantized.split(widths), strict=True)
    return {name: Slopes(*part, rows.count) for name, part in zip(group.members, parts, strict=True)}
