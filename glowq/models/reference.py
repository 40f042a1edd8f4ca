"""The full-precision reference model, whose weights are read one module at a time to save memory."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..data.inputs import Inputs, Samples
from ..errors import CalibrationError, NonFiniteError, ReferenceMismatchError, UnsupportedModuleError
from ..quantizers.experts import layers_of, open_experts, stacks
from ..utils.files import checkpoint_files, read_json, stored_variant
from ..utils.scratch import temporary_folder
from ..utils.snapshots import local_snapshot
from .disk_mapping import add_weight, compute_on, keep_read_elsewhere, quiet_loading, readable, unstored
from .forward import evaluating, input_embeddings, to_model

__all__ = ["Reference"]

_logger = logging.getLogger(__name__)

_MARK = "_is_quantized"  # an attribute of configs


class Reference:
    """Full-precision weights by module name.

    Use it as a context manager. A model given by name is mapped from its safetensors files, and each weight is read
    only when it is requested.

    Args:
        source: a model in memory, a folder, or a Hub name ("org/model" or "org/model@revision").
        model_class: class to load a named model with, the same as that of the quantized model.
        device: where a model given by name computes; each layer's weights are moved there for its forward. None is the
            CPU. A model in memory stays where it is.
        fresh: the quantized model. It has the weights which the checkpoint of a model given by name lacks, such as a
            new classification head: the reference uses the same ones. And the reference calls the modules that it
            calls.
        variant: read the weights of this variant, if there are any.
        **hub_kwargs: passed to `glowq.utils.hub.local_snapshot`, e.g. `revision`.

    Attributes:
        missing: names of the weights that the checkpoint lacks; known inside of the context.
    """

    def __init__(
        self,
        source: Any,
        model_class: type[nn.Module],
        device: torch.device | None = None,
        fresh: nn.Module | None = None,
        variant: str | None = None,
        **hub_kwargs: Any,
    ) -> None:
        self.source = source
        self.device = device
        self.model_class = model_class
        self.fresh = fresh
        self.variant = variant
        self.hub_kwargs = hub_kwargs
        self._model: nn.Module | None = source if isinstance(source, nn.Module) else None
        self._folder: Path | None = None
        self.missing: list[str] = []
        self._exit = ExitStack()

    def __enter__(self) -> Reference:
        if self._model is None:
            folder = self._folder = local_snapshot(self.source, **self.hub_kwargs)
            self.variant = stored_variant(folder, self.variant)
            checkpoint_files(folder, self.variant)
            if read_json(folder / "config.json").get("quantization_config") is not None:
                raise UnsupportedModuleError(
                    f"{folder} is quantized; the reference must be the full-precision model that it was made from."
                )
            self._model = self._load(folder)
        self._follow(self._model)
        return self

    def __exit__(self, *exc: Any) -> None:
        self._model = self.source if isinstance(self.source, nn.Module) else None
        self._exit.close()

    @property
    def model(self) -> nn.Module:
        """The reference as a module that can be run; its weights may stay on disk."""
        if self._model is None:
            raise RuntimeError("a Reference is used inside its `with` block")
        return self._model

    def check_runs(self, example: Mapping[str, Any]) -> None:
        """Run the reference once, and keep in memory the weights that cannot stay on disk.

        Args:
            example: keyword arguments of one short forward.
        """
        if self._folder is None:
            return
        with torch.no_grad(), evaluating(self.model):
            kept = keep_read_elsewhere(self.model, lambda: self.model(**to_model(example, self.model)))
        if kept:
            _logger.warning(
                "%s uses weights of layers that it does not call: %s MB of the reference stay in memory.",
                self.model_class.__name__,
                f"{sum(weight.nbytes for weight in kept) / 1e6:,.1f}",
            )

    def identity(self) -> str:
        """What tells these weights from others: an interrupted run continues only with the same reference.

        For files it is their names, sizes and times of change; for a model in memory, a digest of its weights.
        """
        if self._folder is not None:
            files = [Path(file) for file in checkpoint_files(self._folder, self.variant)]
            found = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
            return f"{self.source}: {found}"
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(f"|{name}|{value.dtype}|{tuple(value.shape)}|".encode())
            if not value.is_meta:
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def check(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Check the names and shapes of the modules, to find a wrong reference before any weight is read.

        Args:
            shapes: module name -> (out_features, in_features) of the quantized module.

        Raises:
            ReferenceMismatchError: the reference lacks a module, or the module has another shape.
            UnsupportedModuleError: a module of the reference is quantized, or is not a linear layer.
        """
        for name, shape in shapes.items():
            self._module(name, shape)

    def weight(self, name: str, shape: tuple[int, int]) -> Tensor:
        """Read the full-precision weight of one linear module.

        Args:
            name: the module's name, the same as in the quantized model.
            shape: (out_features, in_features) of the quantized module.

        Returns:
            float32 tensor of that shape.

        Raises:
            ReferenceMismatchError, UnsupportedModuleError: see `check`.
            NonFiniteError: the weight holds NaN or Inf.
        """
        module = self._module(name, shape)
        with readable(module):
            weight = module.weight.detach()
            full = (weight.T if isinstance(module, Conv1D) else weight).to(torch.float32, copy=True)
        if not bool(torch.isfinite(full).all()):
            raise NonFiniteError(f"{name} of the reference holds NaN or Inf; the checkpoint is damaged.")
        return full

    def _module(self, name: str, shape: tuple[int, int]) -> Any:
        try:
            module = self.model.get_submodule(name)
        except AttributeError:
            raise ReferenceMismatchError(
                f"the reference has no module {name!r}, which the quantized model has: it is another model. Give the "
                "full-precision model that the quantized one was made from."
            ) from None
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or type(weight.data) is not Tensor or not weight.is_floating_point():
            raise UnsupportedModuleError(
                f"{name} of the reference is a {type(module).__name__} without a plain float weight; the reference "
                "must be the full-precision model, not a quantized one."
            )
        found = tuple(weight.T.shape if isinstance(module, Conv1D) else weight.shape)
        if found != shape:
            raise ReferenceMismatchError(
                f"{name} has shape {found} in the reference and {shape} in the quantized model: it is another model. "
                "Give the full-precision model that the quantized one was made from."
            )
        return module

    def _load(self, folder: Path) -> nn.Module:
        offload = self._exit.enter_context(temporary_folder("reference"))
        with quiet_loading():
            model, found = self.model_class.from_pretrained(  # type: ignore[attr-defined]
                folder,
                dtype="auto",
                device_map={"": "disk"},
                offload_folder=offload,
                use_safetensors=True,
                variant=self.variant,
                output_loading_info=True,
            )
        self.missing = sorted(found["missing_keys"])
        for name in dict.fromkeys([*self.missing, *unstored(model)]):
            add_weight(model, name, self._fresh_value(name))
        if self.device is not None:
            compute_on(model, self.device)
        loaded: nn.Module = model
        return loaded

    def _follow(self, reference: nn.Module) -> None:
        """Let the reference call the modules that the quantized model calls.

        Its experts get a module each where those of the quantized model have one. transformers marks the configs of
        quantized models. By this mark, which the reference has until the context ends, the code of some models
        (FalconMamba, Jamba) calls a linear module of which it otherwise only reads the weight.
        """
        if self.fresh is not None:
            _open_as(reference, self.fresh)
        if not hasattr(getattr(self.fresh, "config", None), _MARK):
            return
        for module in reference.modules():
            config = getattr(module, "config", None)  # parts of a model can have their own
            if config is not None and not hasattr(config, _MARK):
                setattr(config, _MARK, True)
                self._exit.callback(delattr, config, _MARK)

    def _fresh_value(self, name: str) -> Tensor:
        """The value of a parameter that the checkpoint lacks, as the model to correct has it."""
        value: Any = None if self.fresh is None else _named_tensors(self.fresh).get(name)
        if value is None or type(value.data) is not Tensor:
            raise ReferenceMismatchError(
                f"the checkpoint of the reference holds no {name!r}, and the quantized model has no plain float weight "
                "of that name: it is another model. Give the full-precision model that the quantized one was made from."
            )
        found: Tensor = value.detach()
        return found

    def check_ids(self, sequences: Samples) -> None:
        """Refuse token ids that the reference has no embedding for, before it is run.

        Args:
            sequences: token ids, int64, or samples that may hold some.

        Raises:
            CalibrationError: the text holds tokens that were added to the quantized model's vocabulary later.
        """
        layer: Any = input_embeddings(self.model)
        rows = getattr(layer, "num_embeddings", None)
        samples = sequences.samples if isinstance(sequences, Inputs) else ({"input_ids": sequences},)
        largest = max((int(part["input_ids"].max()) for part in samples if "input_ids" in part), default=-1)
        if rows is not None and largest >= rows:
            raise CalibrationError(
                f"the calibration text holds the token id {largest}, and the reference has embeddings for {rows}: the "
                "others were added to the quantized model later. Give text without them, or a reference whose "
                "embeddings were extended in the same way."
            )


def _open_as(reference: nn.Module, model: nn.Module) -> None:
    """Open the experts of the reference where those of the quantized model are modules of their own."""
    names = {module: name for name, module in reference.named_modules()}
    parts = dict(model.named_modules())
    firsts = {id(getattr(experts, stack)): parts.get(f"{names[experts]}.0") for experts, stack in stacks(reference)}
    layers = {stack: layers_of(first) for stack, first in firsts.items() if first is not None}
    open_experts(reference, lambda stack: layers.get(id(stack)))


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all their names, of which tied ones have two."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
