"""The experts of a mixture as linear modules, where one parameter holds the matrices of all of them.

transformers stacks the experts' matrices into parameters of three dimensions, which no linear module multiplies by.
`open_experts` adds a module for each matrix to the module of the experts: `experts.3.gate_up_proj` stands for
`experts.gate_up_proj[3]`, or `experts.3.gate_proj` and `experts.3.up_proj` for its halves. It holds no tensor of its
own, so that the model is saved and loaded as before.

A model with such modules computes what it computed before. Only if one of them has a hook or another forward, the
experts of its layer run one by one, each by its modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = [
    "HALVES",
    "WHOLE",
    "ExpertLinear",
    "Layers",
    "close_experts",
    "every_token_everywhere",
    "layers_of",
    "open_experts",
    "stacks",
    "tensor_holder",
]


class Layers(NamedTuple):
    """Names of the linear layers of an expert; `gate` and `up` are the same if one layer holds both."""

    gate: str
    up: str
    down: str


WHOLE = Layers("gate_up_proj", "gate_up_proj", "down_proj")
"""A layer for each matrix, named as the parameter that holds it (`up_proj` in the place of `gate_up_proj` in some)."""
HALVES = (Layers("gate_proj", "up_proj", "down_proj"), Layers("w1", "w3", "w2"))
"""A layer for each half of `gate_up_proj`: the names that libraries use which quantize experts one by one."""

_IMPLEMENTATION = "glowq"  # an `experts_implementation` of transformers
_FIELD = "_experts_implementation_internal"  # of the experts' config; it is not saved
_EARLIER = "_glowq_earlier"  # of the experts: a list with the implementation chosen by the user, one for each config
_HANDLE = "_glowq_handle"
_ALL = slice(None)
_every_token_everywhere = ContextVar("every_token_everywhere", default=False)
_STACKS = ("gate_up_proj", "up_proj", "down_proj")


class ExpertLinear(nn.Linear):
    """The linear layer of one expert, whose weight and bias are a part of the parameters of all experts.

    Args:
        experts: the module that holds the parameters.
        stack: name of the parameter, shape (experts, out_features, in_features); the last two are swapped if `experts`
            says that its matrices are transposed.
        index: number of the expert.
        rows: the rows of its matrix, shape (out_features, in_features), that belong to this layer.
    """

    def __init__(self, experts: Any, stack: str, index: int, rows: slice = _ALL) -> None:
        nn.Module.__init__(self)
        self._experts = (experts,)  # in a tuple, so that it is not a submodule
        self.stack_name, self.index, self.rows = stack, index, rows
        outputs, inputs = getattr(experts, stack).shape[1:]
        if experts.is_transposed:
            outputs, inputs = inputs, outputs
        self.out_features, self.in_features = len(range(outputs)[rows]), inputs

    @property
    def holder(self) -> Any:
        """The module that holds the parameters."""
        return self._experts[0]

    @property
    def stack(self) -> Tensor:
        """The parameter with the matrices of all experts."""
        found: Tensor = getattr(self.holder, self.stack_name)
        return found

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Shape (out_features, in_features); of the parameter's class and dtype."""
        matrix = self.stack[self.index]
        matrix = matrix.transpose(0, 1) if self.holder.is_transposed else matrix
        return matrix if self.rows == _ALL else matrix[self.rows]

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """Shape (out_features,); None if the experts have no biases."""
        if not self.holder.has_bias:
            return None
        found: Tensor = getattr(self.holder, f"{self.stack_name}_bias")[self.index][self.rows]
        return found


def stacks(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Every module of experts that can be opened, with the name of each of its parameters of three dimensions."""
    for module in model.modules():
        if hasattr(module, "is_transposed") and hasattr(type(module).forward, "__wrapped__"):
            for name in _STACKS:
                if isinstance(getattr(module, name, None), Tensor) and getattr(module, name).dim() == 3:
                    yield module, name


def open_experts(model: nn.Module, choose: Callable[[Tensor], Layers | None]) -> None:
    """Add a linear module for every expert's matrix, or half of one.

    Args:
        model: a model of transformers; a layer of experts that is open already stays as it is.
        choose: parameter with the matrices of all experts -> the names of the layers of an expert, or None to leave it.
            All parameters of a layer's experts are opened if one of them is.
    """
    names: dict[Any, list[str]] = {}
    for experts, name in stacks(model):
        names.setdefault(experts, []).append(name)
    chosen = {experts: [choose(getattr(experts, name)) for name in names[experts]] for experts in names}
    opened = {experts: next(filter(None, found)) for experts, found in chosen.items() if any(found)}
    if opened:
        _implementations()
        _remember_implementations(names)
    for experts, layers in opened.items():
        if not _is_open(experts):
            for index in range(experts.num_experts):
                expert = nn.Module()
                for name in names[experts]:
                    for part, rows in _parts(experts, name, layers).items():
                        expert.add_module(part, ExpertLinear(experts, name, index, rows))
                experts.add_module(str(index), expert)
            vars(experts)[_HANDLE] = experts.register_forward_pre_hook(_choose_implementation)


def layers_of(expert: nn.Module) -> Layers:
    """The names of an expert's layers."""
    return next((names for names in HALVES if all(name in expert._modules for name in names)), WHOLE)


def _parts(experts: Any, stack: str, layers: Layers) -> dict[str, slice]:
    """Name of each layer that a matrix is divided into -> its rows."""
    if layers == WHOLE:
        return {stack: _ALL}
    if stack != "gate_up_proj":
        return {layers.down if stack == "down_proj" else layers.up: _ALL}
    if not experts.is_concatenated:
        return {layers.gate: slice(0, None, 2), layers.up: slice(1, None, 2)}
    half = experts.gate_up_proj.shape[2 if experts.is_transposed else 1] // 2
    return {layers.gate: slice(0, half), layers.up: slice(half, None)}


def close_experts(model: nn.Module) -> None:
    """Undo `open_experts`."""
    for experts in {module: None for module, _ in stacks(model) if _is_open(module)}:
        for name in [name for name in experts._modules if name.isdecimal()]:
            delattr(experts, name)
        vars(experts).pop(_HANDLE).remove()
        setattr(experts.config, _FIELD, vars(experts).pop(_EARLIER)[0])


@contextmanager
def every_token_everywhere() -> Iterator[None]:
    """Inside this context, each token goes to all experts, for forwards that run on shapes alone."""
    token = _every_token_everywhere.set(True)
    try:
        yield
    finally:
        _every_token_everywhere.reset(token)


def tensor_holder(module: nn.Module) -> nn.Module:
    """The module that holds a linear layer's tensors: the layer itself, or the module of all experts."""
    return module.holder if isinstance(module, ExpertLinear) else module


def _implementations() -> Any:
    """The implementations that transformers knows, with glowq's among them. Their import is slow, and so made late."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if _IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(_IMPLEMENTATION, _run)
    return ALL_EXPERTS_FUNCTIONS


def _remember_implementations(layers: Iterable[Any]) -> None:
    """Note the implementation that each config has chosen; layers with the same config share one list."""
    noted = {id(experts.config): vars(experts)[_EARLIER] for experts in layers if _EARLIER in vars(experts)}
    for experts in layers:
        found = getattr(experts.config, _FIELD, None)  # glowq's own in a copy of the config of an open model
        chosen = ["eager" if found == _IMPLEMENTATION else found]
        vars(experts)[_EARLIER] = noted.setdefault(id(experts.config), chosen)


def _is_open(experts: Any) -> bool:
    return "0" in experts._modules


def _choose_implementation(experts: Any, args: Any) -> None:
    """Let transformers call `_run`, also after the user has chosen another implementation, and in another process."""
    _implementations()
    found = getattr(experts.config, _FIELD, None)
    if found != _IMPLEMENTATION:
        vars(experts)[_EARLIER][0] = found
        setattr(experts.config, _FIELD, _IMPLEMENTATION)


def _run(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of a module of experts, see `transformers.integrations.moe`.

    Args:
        experts: the module.
        hidden_states: shape (tokens, d).
        top_k_index: numbers of the experts that each token goes to, shape (tokens, k), int64. A number without an
            expert stands for none.
        top_k_weights: their weights, shape (tokens, k).

    Returns:
        Shape and dtype of `hidden_states`.
    """
    if not (_is_open(experts) and any(map(_is_changed, _linears(experts)))):
        own = type(experts).forward.__wrapped__
        compute = _implementations().get_interface(vars(experts).get(_EARLIER, ["eager"])[0], own)
        unchanged: Tensor = compute(experts, hidden_states, top_k_index, top_k_weights)
        return unchanged
    total = torch.zeros_like(hidden_states)
    for index in range(experts.num_experts):
        token, position = _routed(top_k_index, index)
        if len(token):
            expert: Any = experts._modules[str(index)]
            names = layers_of(expert)
            inner = _first_product(experts, expert, names, hidden_states[token])
            inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
            output = expert._modules[names.down](inner)
            if getattr(experts, "has_post_expert_norm", False):
                output = experts.post_expert_norm(output)
            total.index_add_(0, token, (output * top_k_weights[token, position, None]).to(total.dtype))
    return total


def _first_product(experts: Any, expert: Any, names: Layers, x: Tensor) -> Tensor:
    """Both halves of what an expert's gate needs, in the order in which the parameter holds them."""
    if names == WHOLE:
        product: Tensor = expert._modules["gate_up_proj" if experts.has_gate else "up_proj"](x)
        return product
    gate, up = expert._modules[names.gate](x), expert._modules[names.up](x)
    return torch.cat([gate, up], -1) if experts.is_concatenated else torch.stack([gate, up], -1).flatten(-2)


def _routed(top_k_index: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """Numbers of the tokens that go to an expert, and which of their k choices it is, both shape (n,), int64."""
    if _every_token_everywhere.get():
        tokens = torch.arange(len(top_k_index), device=top_k_index.device)
        return tokens, torch.zeros_like(tokens)
    token, position = torch.where(top_k_index == index)
    return token, position


def _linears(experts: nn.Module) -> Iterator[nn.Module]:
    for name, expert in experts._modules.items():
        if name.isdecimal() and expert is not None:
            yield from (layer for layer in expert._modules.values() if layer is not None)


def _is_changed(layer: nn.Module) -> bool:
    """Whether a layer may compute something else than its weight and bias say, or somebody watches it."""
    return type(layer) is not ExpertLinear or bool(
        layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or "forward" in vars(layer)
    )
