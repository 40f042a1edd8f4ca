"""What ONNX Runtime computes from the written files, against the corrected model in memory."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ExportError, one_line
from ...runtime.attach import attached
from ..export.common import difference
from .graph import MODEL_FILE, TRANSPOSED, Interface

__all__ = ["check", "operator_counts", "right_factor_nodes", "run", "session"]

LARGEST_DIFFERENCE = 1e-4
"""Of an output, absolute: what float32 sums in another order may differ by."""
GREEDY_TOKENS = 12
_SHAPES = ((1, 0, 1), (1, 0, 7), (2, 6, 1), (3, 5, 4))  # sequences, tokens in the cache, new tokens
_PADDED = 2  # tokens of the first sequence of several


def check(folder: Path, model: Any, interface: Interface) -> dict[str, Any]:
    """Compare at several shapes, with a cache and without, with padding, and token by token.

    Args:
        folder: holds the graph.
        model: the corrected model in float32, as `onnx_operators.use_operators` left it.

    Returns:
        "max_difference" and "relative_difference" of the outputs, "shapes" that they were compared at,
        "right_factor_nodes" and "groups", and for a decoder "greedy_tokens" that were equal.

    Raises:
        ExportError: ONNX Runtime cannot run the graph, or computes something else; a right product is not shared.
    """
    graph = _read(folder)
    nodes = right_factor_nodes(graph, model)
    odd = {group: counts for group, counts in nodes.items() if counts[0] != counts[1] or not counts[0]}
    if odd:
        group, (rights, lefts) = next(iter(odd.items()))
        raise ExportError(
            f"group {group!r} has {rights} products with its right factor in the graph and {lefts} with the first left "
            "one, expected as many: its members do not share it. Please report it, with the name of the model."
        )
    running = session(folder)
    generator = torch.Generator().manual_seed(0)
    found, expected = [], []
    for shape in _SHAPES:
        ids, mask = _text(shape, model.get_input_embeddings().num_embeddings, interface, generator)
        found.append(_by_runtime(running, interface, ids, mask, shape[1]))
        expected.append(_by_model(model, interface, ids, mask))
    figures = difference(torch.cat(found), torch.cat(expected))
    if not figures["max_difference"] <= LARGEST_DIFFERENCE:
        raise ExportError(
            f"ONNX Runtime's outputs differ from the model's by up to {figures['max_difference']:.3g} "
            f"({figures['relative_difference']:.3g} of their size); expected at most {LARGEST_DIFFERENCE:.0e}. Please "
            "report it, with the name of the model."
        )
    facts = {**figures, "shapes": list(map(list, _SHAPES)), "groups": len(nodes)}
    facts["right_factor_nodes"] = sum(rights for rights, _ in nodes.values())
    return facts if interface.cache is None else {**facts, "greedy_tokens": _greedy(running, model, interface)}


def session(folder: Path, threads: int = 0) -> Any:
    """An ONNX Runtime session on the CPU.

    Args:
        threads: 0 lets ONNX Runtime choose.

    Raises:
        ExportError: ONNX Runtime refuses the graph.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # it also raises what it logs
    try:
        return onnxruntime.InferenceSession(folder / MODEL_FILE, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no base but this
        raise ExportError(_refused(error)) from error


def run(running: Any, interface: Interface, tensors: list[Tensor]) -> list[Tensor]:
    """The outputs, those of the cache last, for inputs in the interface's order.

    Raises:
        ExportError: an operator fails.
    """
    names = [*interface.inputs, *interface.past]
    feeds = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
    try:
        outputs = running.run([*interface.outputs, *interface.present], feeds)
    except Exception as error:
        raise ExportError(_refused(error)) from error
    return [torch.from_numpy(output) for output in outputs]


def _refused(error: Exception) -> str:
    import onnxruntime

    return (
        f"ONNX Runtime {onnxruntime.__version__} cannot run the graph: {one_line(error)[:300]}. Install a newer one "
        "(2-bit codes need 1.25, 2-bit codes with zero points between them 1.31), or export with --to merged."
    )


def right_factor_nodes(graph: Any, model: Any) -> Mapping[str, tuple[int, int]]:
    """Group name -> how many products with its right factor an `onnx.GraphProto` holds, and with its first left one.

    Both are one, or as many as a forward runs the layer: some models run one layer several times. Only groups that are
    switched on.
    """
    users = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            users[name].append(node)

    stored = {value.name for value in graph.initializer}

    def products(name: str) -> int:
        return sum(products(node.output[0]) if node.op_type == "Transpose" else 1 for node in users[name])

    def of_factor(name: str) -> int:
        return sum(products(found) for found in stored & {name, f"{name}{TRANSPOSED}"})

    places = {module: name for name, module in model.named_modules()}
    return {
        group: (of_factor(f"{places[container]}.right.factor"), of_factor(f"{places[container]}.lefts.0.factor"))
        for group, container in attached(model).items()
        if container.enabled
    }


def operator_counts(folder: Path) -> dict[str, int]:
    """Operator -> how many nodes of the written graph are one, of ONNX Runtime's own operators."""
    return dict(sorted(Counter(node.op_type for node in _read(folder).node if node.domain).items()))


def _read(folder: Path) -> Any:
    import onnx

    return onnx.load(folder / MODEL_FILE, load_external_data=False).graph


def _text(
    shape: tuple[int, int, int], vocabulary: int, interface: Interface, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random ids and their mask, the first of several sequences padded on the side where the model expects it."""
    sequences, cached, tokens = shape
    ids = torch.randint(0, vocabulary, (sequences, cached + tokens), generator=generator)
    mask = torch.ones_like(ids)
    if sequences > 1:
        mask[0, slice(None, _PADDED) if interface.cache is not None else slice(-_PADDED, None)] = 0
    return ids, mask


def _inputs(interface: Interface, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    made = {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": torch.zeros_like(ids),
        "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
    }
    return {name: made[name] for name in interface.inputs}


def _by_model(model: Any, interface: Interface, ids: Tensor, mask: Tensor) -> Tensor:
    """What the model says of tokens that are no padding, in one forward without a cache, as one row of numbers."""
    options: dict[str, Any] = {} if interface.cache is None else {"use_cache": False}
    with torch.no_grad():
        found = model(**_inputs(interface, ids, mask), return_dict=True, **options)
    return _unpadded([found[name] for name in interface.outputs], mask)


def _by_runtime(running: Any, interface: Interface, ids: Tensor, mask: Tensor, cached: int) -> Tensor:
    """The same of the graph: the first `cached` tokens in one run, the others in a second with what that kept."""
    if interface.cache is None:
        return _unpadded(run(running, interface, list(_inputs(interface, ids, mask).values())), mask)
    parts, kept = [], interface.cache.tensors(len(ids), 0)
    for start, end in ((0, cached), (cached, ids.shape[1])) if cached else ((0, ids.shape[1]),):
        inputs = _inputs(interface, ids[:, :end], mask[:, :end])
        new = [tensor if name == "attention_mask" else tensor[:, start:] for name, tensor in inputs.items()]
        logits, *kept = run(running, interface, [*new, *kept])
        parts.append(logits)
    return _unpadded([torch.cat(parts, dim=1)], mask)


def _unpadded(outputs: list[Tensor], mask: Tensor) -> Tensor:
    rows = [output[mask.bool()] if output.shape[:2] == mask.shape else output for output in outputs]
    return torch.cat([row.float().flatten() for row in rows])


def _greedy(running: Any, model: Any, interface: Interface) -> int:
    """Decode from the cache by ONNX Runtime, without one by the model, and count the tokens.

    Raises:
        ExportError: a token differs.
    """
    assert interface.cache is not None
    generator = torch.Generator().manual_seed(1)
    ids, _ = _text((1, 0, 7), model.get_input_embeddings().num_embeddings, interface, generator)
    kept, start = interface.cache.tensors(1, 0), 0
    for count in range(GREEDY_TOKENS):
        inputs = _inputs(interface, ids, torch.ones_like(ids))
        new = [tensor if name == "attention_mask" else tensor[:, start:] for name, tensor in inputs.items()]
        logits, *kept = run(running, interface, [*new, *kept])
        with torch.no_grad():
            expected = model(**inputs, use_cache=False).logits[:, -1].argmax(-1)
        if not torch.equal(logits[:, -1].argmax(-1), expected):
            raise ExportError(
                f"ONNX Runtime decodes token {int(logits[:, -1].argmax())} where the model decodes {int(expected)}, "
                f"after {count} equal ones. Please report it, with the name of the model."
            )
        start = ids.shape[1]
        ids = torch.cat([ids, expected[:, None]], dim=1)
    return GREEDY_TOKENS
