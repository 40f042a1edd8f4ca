"""Write a corrected model in memory as an ONNX graph: find its inputs and outputs, and run torch's exporter.

The correction needs no extra code. torch's exporter traces its hooks like the model's own code, and all members of a
group use the right product that is traced for the first member.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ExportError, one_line

__all__ = ["MODEL_FILE", "TRANSPOSED", "Cache", "Interface", "Traced", "describe", "export_graph"]

MODEL_FILE = "model.onnx"
TRANSPOSED = ".transposed"
_WRAPPED = "wrapped"
_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
_EXAMPLE = (2, 5, 3)  # sequences, tokens in the cache, new tokens; torch would treat sizes 0 and 1 as fixed


@dataclass(frozen=True)
class Cache:
    """The keys and values in a decoder's cache.

    Attributes:
        shapes: for every layer, (heads, size of a head) of its keys and of its values.
    """

    shapes: tuple[tuple[tuple[int, int], tuple[int, int]], ...]

    def names(self, prefix: str) -> list[str]:
        """`<prefix>.<layer>.key` and `<prefix>.<layer>.value` for every layer, in the order of the graph."""
        return [f"{prefix}.{layer}.{kind}" for layer in range(len(self.shapes)) for kind in ("key", "value")]

    def tensors(self, sequences: int, tokens: int) -> list[Tensor]:
        """Float32 tensors of zeros, shape (sequences, heads, tokens, size of a head), in the order of `names`."""
        return [torch.zeros(sequences, heads, tokens, size) for pair in self.shapes for heads, size in pair]


@dataclass(frozen=True)
class Interface:
    """The inputs and outputs of a graph, with the names that optimum and ONNX Runtime's generate() use.

    Attributes:
        inputs: names of the int64 inputs; input_ids comes first.
        outputs: names of the outputs, without those of the cache.
        cache: the cache of a decoder; None for an encoder.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    cache: Cache | None

    @property
    def past(self) -> list[str]:
        """Names of the cache's inputs."""
        return [] if self.cache is None else self.cache.names("past_key_values")

    @property
    def present(self) -> list[str]:
        """Names of the cache's outputs."""
        return [] if self.cache is None else self.cache.names("present")

    def example(self) -> list[Tensor]:
        """Example inputs for tracing; those of the cache come last."""
        sequences, cached, tokens = _EXAMPLE if self.cache is not None else (_EXAMPLE[0], 0, _EXAMPLE[1])
        made = {
            "input_ids": torch.ones(sequences, tokens, dtype=torch.int64),
            "attention_mask": torch.ones(sequences, cached + tokens, dtype=torch.int64),
            "token_type_ids": torch.zeros(sequences, tokens, dtype=torch.int64),
            "position_ids": torch.arange(cached, cached + tokens).repeat(sequences, 1),
        }
        past = [] if self.cache is None else self.cache.tensors(sequences, cached)
        return [*(made[name] for name in self.inputs), *past]

    def dynamic_axes(self) -> list[dict[int, str]]:
        """For every input, axis of variable size -> name of the axis."""
        whole = "total_sequence_length" if self.cache is not None else "sequence_length"
        token = {0: "batch_size", 1: "sequence_length"}
        axes = [{0: "batch_size", 1: whole} if name == "attention_mask" else token for name in self.inputs]
        return [*axes, *({0: "batch_size", 2: "past_sequence_length"} for _ in self.past)]


class Traced(nn.Module):
    """A model whose inputs and outputs are those of an `Interface`, passed by position."""

    def __init__(self, model: nn.Module, interface: Interface) -> None:
        super().__init__()
        self.wrapped = model
        self.interface = interface
        self.eval()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Outputs in the interface's order; those of the cache come last."""
        from transformers import DynamicCache

        named: dict[str, Any] = dict(zip(self.interface.inputs, tensors, strict=False))
        if self.interface.cache is None:
            found = self.wrapped(**named, return_dict=True)
            return tuple(found[name] for name in self.interface.outputs)
        past = tensors[len(self.interface.inputs) :]
        cache: Any = DynamicCache()  # without the config, which could make a cache that drops tokens outside a window
        for layer, (key, value) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(key, value, layer)
        found = self.wrapped(**named, past_key_values=cache, use_cache=True, return_dict=True)
        kept = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return (*(found[name] for name in self.interface.outputs), *kept)


def describe(model: Any, tokenizer: Any) -> Interface:
    """Find the interface of a model by running one forward.

    Args:
        model: the model, in evaluation mode.
        tokenizer: its tokenizer, whose `model_input_names` are the inputs of an encoder.

    Raises:
        ExportError: the model reads no token ids, is an encoder with a decoder, or caches something other than keys and
            values (state-space models, linear attention).
    """
    kind, taken = type(model).__name__, inspect.signature(model.forward).parameters
    if model.config.is_encoder_decoder or "input_ids" not in taken:
        raise ExportError(
            f"{kind} {'is an encoder with a decoder' if model.config.is_encoder_decoder else 'reads no input_ids'}; "
            "--to onnx writes text decoders and text encoders. Export it with --to merged."
        )
    decodes = model.can_generate()
    wanted = ("input_ids", "attention_mask", "position_ids") if decodes else tokenizer.model_input_names
    inputs = tuple(name for name in _INPUTS if name in wanted and name in taken)
    plain = Interface(inputs, (), None)
    with torch.no_grad():
        example = [tensor.to(model.device) for tensor in plain.example()]
        found = model(**dict(zip(inputs, example, strict=True)), return_dict=True)
    if not decodes:
        return Interface(inputs, tuple(name for name, value in found.items() if isinstance(value, Tensor)), None)
    layers = getattr(found.get("past_key_values"), "layers", ())
    shapes = tuple((_kept(kind, layer, "keys"), _kept(kind, layer, "values")) for layer in layers)
    if not shapes:
        raise ExportError(f"{kind} returned no cache of keys and values; --to onnx cannot decode with it.")
    return Interface(inputs, ("logits",), Cache(shapes))


def _kept(kind: str, layer: Any, name: str) -> tuple[int, int]:
    tensor = getattr(layer, name, None)
    if not isinstance(tensor, Tensor) or tensor.dim() != 4:
        raise ExportError(
            f"a layer of {kind} keeps a {type(layer).__name__} instead of keys and values of shape (sequences, heads, "
            "tokens, size); --to onnx writes none of those. Export it with --to merged."
        )
    return tensor.shape[1], tensor.shape[3]


def export_graph(model: nn.Module, interface: Interface, folder: Path) -> None:
    """Write `model.onnx` and `model.onnx.data` into `folder`.

    Args:
        model: the model in float32, with operators in place of its quantized modules.
        interface: its inputs and outputs.
        folder: the folder to write to.

    Raises:
        ExportError: torch cannot trace the model, or has no ONNX form of an operator; the message names the module and
            the operator.
    """
    traced = Traced(model, interface)
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                traced,
                tuple(interface.example()),
                dynamo=True,
                optimize=False,
                verbose=False,
                dynamic_shapes=(tuple(interface.dynamic_axes()),),
                input_names=[*interface.inputs, *interface.past],
                output_names=[*interface.outputs, *interface.present],
            )
            assert program is not None
            _name_transposed(program.model)
            program.optimize()
        except Exception as error:  # torch.onnx wraps every failure in error classes of its own
            raise ExportError(
                f"{type(model).__name__} does not export: {_failure(error, model)}. Export it with --to merged."
            ) from error
        _strip(program.model)
        program.save(folder / MODEL_FILE, external_data=True)


def _name_transposed(graph_model: Any) -> None:
    """Give parameters the names that they have in the model, and name transposed weights after their parameters.

    The optimizer of the graph stores weights transposed and would number them. A weight that several calls use is
    transposed once.
    """
    graph = graph_model.graph
    first: dict[str, Any] = {}
    for value in list(graph.initializers.values()):
        value.name = value.name.removeprefix(f"{_WRAPPED}.")
    for node in graph:
        source = node.inputs[0] if node.op_type == "Transpose" else None
        if source is None or source.name not in graph.initializers or len(source.shape) != 2:
            continue
        if source.name in first:
            node.outputs[0].replace_all_uses_with(first[source.name])
        else:
            first[source.name] = node.outputs[0]
            node.outputs[0].name = f"{source.name}{TRANSPOSED}"


def _strip(graph_model: Any) -> None:
    """Remove file paths and stack traces, so that the same model gives the same bytes on every machine."""
    values = [*graph_model.graph.inputs, *graph_model.graph.initializers.values()]
    for node in graph_model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        values.extend(node.outputs)
    for value in values:
        value.metadata_props.clear()
    graph_model.graph.metadata_props.clear()
    graph_model.metadata_props.clear()


def _failure(error: BaseException, model: nn.Module) -> str:
    """The module and the operator at which the export failed, and the reason, in one line."""
    causes = [error]
    while (deeper := causes[-1].__cause__ or causes[-1].__context__) is not None and deeper not in causes:
        causes.append(deeper)
    names = {id(module): name for name, module in model.named_modules()}
    module = operator = None
    for frame in (frame for cause in causes for frame in _frames(cause)):
        module = names.get(id(frame.f_locals.get("self")), module)  # the failure is in the model's own code
        node = frame.f_locals.get("node")
        if isinstance(node, torch.fx.Node) and node.op == "call_function":  # the failure is in the translation to ONNX
            operator = str(node.target)
            called = node.meta.get("nn_module_stack") or {"": ("", None)}
            module = str(list(called.values())[-1][0]).removeprefix(f"{_WRAPPED}.")
    where = " at ".join(part for part in (module, operator) if part)
    return f"{where or type(model).__name__}: {one_line(causes[-1])[:300]}"


def _frames(error: BaseException) -> Iterator[FrameType]:
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


@contextmanager
def _quiet() -> Iterator[None]:
    """Context without the exporter's warnings, which a user can do nothing about."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)
