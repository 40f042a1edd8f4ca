"""Compare what ONNX Runtime computes from the written files with the corrected model in memory."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ExportError, one_line
from ...models.fast_products import fast_products
from ...runtime.attach import attached
from ..export.common import difference
from .graph import MODEL_FILE, TRANSPOSED, Interface

__all__ = ["check", "operator_counts", "right_factor_nodes", "run", "session"]

LARGEST_DIFFERENCE = 1e-4
"""Largest allowed absolute difference of an output: float32 sums in another order of summation differ by less."""
GREEDY_TOKENS = 12
_SHAPES = ((1, 0, 1), (1, 0, 7), (2, 6, 1), (3, 5, 4))  # sequences, tokens in the cache, new tokens
_PADDED = 2  # padding tokens in the first sequence, where there are several sequences


def check(folder: Path, model: Any, interface: Interface) -> dict[str, Any]:
    """Compare outputs at several shapes, with and without a cache and padding, and decode token by token.

    Args:
        folder: the folder that holds the graph.
        model: the corrected model in float32, as `glowq.integrations.onnx.operators.use_operators` left it.
        interface: the inputs and outputs of the graph.

    Returns:
        "max_difference" and "relative_difference" of the outputs, "shapes" (all compared shapes), "groups" (number of
        groups), "right_factor_nodes" (number of nodes that compute a right product), and for a decoder "greedy_tokens"
        (number of decoded tokens, all equal).

    Raises:
        ExportError: ONNX Runtime cannot run the graph, its outputs differ from the model's, or a right product is not
            shared.
    """
    graph = _read(folder)
    nodes = right_factor_nodes(graph, model)
    odd = {group: counts for group, counts in nodes.items() if counts[0] != counts[1] or not counts[0]}
    if odd:
        group, (rights, lefts) = next(iter(odd.items()))
        raise ExportError(
            f"group {group!r} has {rights} products with its right factor in the graph and {lefts} with its first left "
            "factor, expected equal numbers of at least 1: its members do not share the right product. Please report "
            "it, with the name of the model."
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
        folder: the folder that holds the graph.
        threads: number of threads; 0 lets ONNX Runtime choose.

    Raises:
        ExportError: ONNX Runtime cannot load the graph.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # only fatal errors: ONNX Runtime raises the other errors as well
    try:
        return onnxruntime.InferenceSession(folder / MODEL_FILE, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the error classes of ONNX Runtime have no other common base
        raise ExportError(_refused(error)) from error


def run(running: Any, interface: Interface, tensors: list[Tensor]) -> list[Tensor]:
    """Run the graph on inputs in the interface's order; in the outputs, those of the cache come last.

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
        f"ONNX Runtime {onnxruntime.__version__} cannot run the graph: {one_line(error)[:300]}. Install a newer "
        "version (2-bit codes need 1.25, 2-bit codes with fractional zero points need 1.31), or export with --to "
        "merged."
    )


def right_factor_nodes(graph: Any, model: Any) -> Mapping[str, tuple[int, int]]:
    """Count the products with the right factor and with the first left factor of each group in an `onnx.GraphProto`.

    If the members share the right product, both counts are the number of times that a forward runs the layer: one, or
    more in models that run one layer several times.

    Returns:
        Group name -> (products with the right factor, products with the first left factor), for every group that is
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
    """Operator -> number of its nodes in the written graph, for ONNX Runtime's own operators."""
    return dict(sorted(Counter(node.op_type for node in _read(folder).node if node.domain).items()))


def _read(folder: Path) -> Any:
    import onnx

    return onnx.load(folder / MODEL_FILE, load_external_data=False).graph


def _text(
    shape: tuple[int, int, int], vocabulary: int, interface: Interface, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random token ids and their attention mask.

    If there are several sequences, the first one is padded: on the left for a decoder, on the right for an encoder.
    """
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
    """The model's outputs for all tokens but padding, from one forward without a cache, as a vector."""
    options: dict[str, Any] = {} if interface.cache is None else {"use_cache": False}
    with torch.no_grad(), fast_products(model):
        found = model(**_inputs(interface, ids, mask), return_dict=True, **options)
    return _unpadded([found[name] for name in interface.outputs], mask)


def _by_runtime(running: Any, interface: Interface, ids: Tensor, mask: Tensor, cached: int) -> Tensor:
    """The graph's outputs for the same tokens, as a vector.

    The first `cached` tokens go into one run, the others into a second run with the cache of the first.
    """
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
    """Decode greedily with ONNX Runtime and a cache, and compare every token with the model's, without a cache.

    Returns:
        The number of decoded tokens.

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
        with torch.no_grad(), fast_products(model):
            expected = model(**inputs, use_cache=False).logits[:, -1].argmax(-1)
        if not torch.equal(logits[:, -1].argmax(-1), expected):
            raise ExportError(
                f"ONNX Runtime decodes token {int(logits[:, -1].argmax())} where the model decodes {int(expected)}, "
                f"after {count} equal ones. Please report it, with the name of the model."
            )
        start = ids.shape[1]
        ids = torch.cat([ids, expected[:, None]], dim=1)
    return GREEDY_TOKENS
