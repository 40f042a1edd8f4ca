"""torch.compile and torch.export: one right product per group in the graph, no recompilation, the results of eager."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glowq.runtime.attach import attached, detach
from glowq.runtime.switching import disabled

Factory = Callable[..., Any]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def build(tiny_llama: Factory) -> Factory:
    """A function that builds a random Llama of one block, because tracing takes half a second per block."""

    def build(**changes: Any) -> nn.Module:
        return tiny_llama(**{"use_cache": False, "num_hidden_layers": 1, **changes})

    return build


@pytest.fixture
def corrected(build: Factory, tiny_ids: Tensor, correct_randomly: Factory) -> nn.Module:
    model = build()
    correct_randomly(model, tiny_ids)
    return model


class Counting:
    """A backend that runs the graph unchanged and counts its products with factors by the shape of the factor."""

    def __init__(self) -> None:
        self.graphs: list[Counter[tuple[int, ...]]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        uses: Counter[tuple[int, ...]] = Counter()
        for node in graph.graph.nodes:
            if node.op == "placeholder" and "parameters_factor" in node.name:
                uses[tuple(node.meta["example_value"].shape)] += len(node.users)
        self.graphs.append(uses)
        return graph.forward


def right_products(uses: Counter[tuple[int, ...]], rank: int = 3) -> int:
    return sum(count for shape, count in uses.items() if shape[0] == rank)


@pytest.mark.parametrize("gradients", [False, True])
def test_one_graph_with_one_right_product_a_group(
    build: Factory, tiny_ids: Tensor, correct_randomly: Factory, gradients: bool
) -> None:
    blocks = 2
    corrected = build(num_hidden_layers=blocks)
    correct_randomly(corrected, tiny_ids)
    backend = Counting()
    compiled = torch.compile(corrected, fullgraph=True, backend=backend)
    with torch.set_grad_enabled(gradients):
        expected = corrected(tiny_ids).logits
        for _ in range(3):
            torch.testing.assert_close(compiled(tiny_ids).logits, expected)
    (uses,) = backend.graphs
    groups = len(attached(corrected))
    assert groups == 4 * blocks + 1
    assert right_products(uses) == groups
    assert sum(count for shape, count in uses.items() if shape[-1] == 3) == 7 * blocks + 1
    assert all(part._slot == part._traced == [None] for part in attached(corrected).values())


def test_the_traced_autograd_graph_equals_eager(corrected: nn.Module, tiny_ids: Tensor) -> None:
    compiled = torch.compile(corrected, fullgraph=True, backend="aot_eager")
    embeddings = corrected.get_input_embeddings()(tiny_ids).detach()
    results = []
    for model in (corrected, compiled):
        x = embeddings.clone().requires_grad_()
        logits = model(inputs_embeds=x).logits
        logits.square().mean().backward()
        results.append((logits.detach(), x.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_another_length_compiles_at_most_once_more(corrected: nn.Module) -> None:
    backend = Counting()
    compiled = torch.compile(corrected, fullgraph=True, backend=backend, dynamic=True)
    with torch.no_grad():
        for length in (5, 9, 17, 33):
            ids = torch.arange(2 * length).reshape(2, length) % 64
            torch.testing.assert_close(compiled(ids).logits, corrected(ids).logits)
    assert len(backend.graphs) == 1


def test_disabling_and_detaching_are_seen(corrected: nn.Module, tiny_ids: Tensor) -> None:
    compiled = torch.compile(corrected, fullgraph=True, backend="eager")
    with torch.no_grad():
        before = compiled(tiny_ids).logits
        with disabled(corrected):
            plain = corrected(tiny_ids).logits
            torch.testing.assert_close(compiled(tiny_ids).logits, plain)
        torch.testing.assert_close(compiled(tiny_ids).logits, before)
        detach(corrected)
        torch.compiler.reset()
        torch.testing.assert_close(torch.compile(corrected, backend="eager")(tiny_ids).logits, plain)


def test_a_compiled_model_follows_when_a_correction_comes_and_goes(
    build: Factory, tiny_ids: Tensor, correct_randomly: Factory
) -> None:
    """By default torch.compile does not check hooks again, and would run its old graph."""
    model = build()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        plain = compiled(tiny_ids).logits
        correct_randomly(model, tiny_ids)
        corrected = model(tiny_ids).logits
        assert not torch.allclose(corrected, plain)
        torch.testing.assert_close(compiled(tiny_ids).logits, corrected)
        detach(model)
        torch.testing.assert_close(compiled(tiny_ids).logits, plain)


def test_graphs_made_before_the_first_correction_are_thrown_away(
    build: Factory, tiny_ids: Tensor, correct_randomly: Factory
) -> None:
    """Before the first correction in a process is attached, torch.compile uses its default setting."""
    model = build()
    backend = Counting()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True), torch.no_grad():
        plain = compiled(tiny_ids).logits
        correct_randomly(model, tiny_ids)
        corrected = model(tiny_ids).logits
        assert not torch.allclose(corrected, plain)
        torch.testing.assert_close(compiled(tiny_ids).logits, corrected)
        assert torch._dynamo.config.skip_nnmodule_hook_guards is False
        graphs = len(backend.graphs)
        correct_randomly(build(), tiny_ids)  # does not discard graphs again
        compiled(tiny_ids)
        assert len(backend.graphs) == graphs


def test_a_graph_of_float64_computes_in_it(trio: nn.Module) -> None:
    trio.double()
    x = torch.randn(3, 8, dtype=torch.float64)
    with torch.no_grad():
        compiled = torch.compile(trio, fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(compiled, trio(x), rtol=1e-14, atol=1e-14)


def test_models_of_one_class_get_their_own_graphs(build: Factory, tiny_ids: Tensor, correct_randomly: Factory) -> None:
    plain, corrected, other = (build() for _ in range(3))
    correct_randomly(corrected, tiny_ids)
    correct_randomly(other, tiny_ids, scale=0.1)
    with torch.no_grad():
        for model in (plain, corrected, other, plain):
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            torch.testing.assert_close(compiled(tiny_ids).logits, model(tiny_ids).logits)


def test_eager_and_compiled_calls_alternate(corrected: nn.Module, tiny_ids: Tensor) -> None:
    compiled = torch.compile(corrected, fullgraph=True, backend="eager")
    with torch.no_grad():
        for seed in range(4):
            ids = (tiny_ids + seed) % 64
            torch.testing.assert_close(compiled(ids).logits, corrected(ids).logits)


def test_one_compiled_member_among_eager_ones(trio: nn.Module) -> None:
    x = torch.randn(3, 8)
    expected = trio(x)
    trio.q.compile(backend="eager")
    for _ in range(2):
        torch.testing.assert_close(trio(x), expected)
        torch.testing.assert_close(trio(x.clone()), expected)


def test_a_graph_break_between_members(trio: nn.Module) -> None:
    def broken(x: Tensor) -> Tensor:
        first = trio.q(x)
        torch._dynamo.graph_break()
        return torch.cat([first, trio.k(x), trio.v(x)], -1)

    compiled = torch.compile(broken, backend="eager")
    for _ in range(3):
        x = torch.randn(3, 8)
        torch.testing.assert_close(compiled(x), trio(x))


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids).logits  # type: ignore[no-any-return]


def test_export_keeps_one_right_product_a_group(corrected: nn.Module, tiny_ids: Tensor) -> None:
    with torch.no_grad():
        program = torch.export.export(Logits(corrected), (tiny_ids,))
        torch.testing.assert_close(program.module()(tiny_ids), corrected(tiny_ids).logits)
    rights = {name for name in program.state_dict if name.endswith("right.factor")}
    signature = program.graph_signature.inputs_to_parameters
    uses = [
        node
        for node in program.graph.nodes
        if node.op == "call_function"
        and any(signature.get(argument.name) in rights for argument in node.all_input_nodes)
    ]
    assert len(rights) == len(uses) == len(attached(corrected))


@pytest.mark.parametrize(("length", "gradients"), [(7, False), (12, True)])
def test_an_exported_model_needs_no_operator_of_glowq(corrected: nn.Module, length: int, gradients: bool) -> None:
    """A program can load the exported file without glowq."""
    ids = torch.arange(2 * length).reshape(2, length)
    with torch.set_grad_enabled(gradients):
        program = torch.export.export(Logits(corrected), (ids,))
        for graph in (program.graph, program.run_decompositions().graph):
            called = {str(node.target) for node in graph.nodes if node.op == "call_function"}
            assert any(target.startswith("aten.") for target in called)
            assert not [target for target in called if "glowq" in target]
        torch.testing.assert_close(program.module()(ids), corrected(ids).logits)


def test_generating_with_a_static_cache(build: Factory, tiny_ids: Tensor, correct_randomly: Factory) -> None:
    model = build(use_cache=True, max_position_embeddings=128)
    correct_randomly(model, tiny_ids)
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(tiny_ids, **options, disable_compile=True)
    backend = Counting()
    model.forward = torch.compile(model.forward, fullgraph=True, backend=backend)
    found = model.generate(tiny_ids, **options, disable_compile=True)
    assert found.shape == (2, 7 + 64)
    assert torch.equal(found, expected)
    assert len(backend.graphs) <= 2  # one for the prompt, and one for the 63 other steps
    assert all(right_products(uses) == len(attached(model)) for uses in backend.graphs)


@pytest.mark.slow
def test_inductor_equals_eager(trio: nn.Module) -> None:
    compiled = torch.compile(trio, fullgraph=True)
    x = torch.randn(3, 8)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), trio(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_inductor_is_as_near_to_float64_as_eager(build: Factory, tiny_ids: Tensor, correct_randomly: Factory) -> None:
    model = build()
    correct_randomly(model, tiny_ids)
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    with torch.no_grad():
        oracle = copy.deepcopy(model).double()(tiny_ids).logits
        eager, found = (float((run(tiny_ids).logits - oracle).abs().max()) for run in (model, compiled))
    assert found <= 4 * eager  # the orders of the sums differ
    assert eager < 1e-4
