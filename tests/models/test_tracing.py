"""Groups of modules that share an input, in real architectures with tiny configs and in difficult toy models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from glowq.errors import UnsupportedModuleError
from glowq.factors.group import Group
from glowq.models.blocks import blocks
from glowq.models.tracing import find_groups, trace_groups

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
LLAMA_LIKE = {"self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj", "mlp.gate_proj+up_proj", "mlp.down_proj"}
GQA = {"num_key_value_heads": 2}
BERT_LIKE = {
    "attention.self.query+key+value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
}
# architecture -> config changes, prefix of block 1, groups of block 1
DECODERS: dict[str, tuple[dict[str, Any], str, set[str]]] = {
    "llama": (GQA, "model.layers.1", LLAMA_LIKE),
    "mistral": (GQA, "model.layers.1", LLAMA_LIKE),
    "qwen2": (GQA, "model.layers.1", LLAMA_LIKE),
    "gemma2": (GQA | {"head_dim": 8}, "model.layers.1", LLAMA_LIKE),
    "gemma3_text": (GQA | {"head_dim": 8}, "model.layers.1", LLAMA_LIKE),
    "phi": (
        {},
        "model.layers.1",
        {"self_attn.q_proj+self_attn.k_proj+self_attn.v_proj+mlp.fc1", "self_attn.dense", "mlp.fc2"},
    ),
    "phi3": (
        GQA | {"pad_token_id": 0},
        "model.layers.1",
        {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"},
    ),
    "gpt_neox": (
        {},
        "gpt_neox.layers.1",
        {"attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    ),
    "opt": (
        {"ffn_dim": 48, "word_embed_proj_dim": 32},
        "model.decoder.layers.1",
        {"self_attn.q_proj+k_proj+v_proj", "self_attn.out_proj", "fc1", "fc2"},
    ),
    "falcon": (
        {"num_kv_heads": 4, "new_decoder_architecture": False, "parallel_attn": True},
        "transformer.h.1",
        {"self_attention.query_key_value+mlp.dense_h_to_4h", "self_attention.dense", "mlp.dense_4h_to_h"},
    ),
}


def small(kind: str, **changes: Any) -> Any:
    return AutoConfig.for_model(kind, **(SMALL | changes))


def of_block(groups: list[Group], prefix: str) -> set[str]:
    return {group.name.removeprefix(f"{prefix}.") for group in groups if group.block == prefix}


def covered_once(model: nn.Module, groups: list[Group]) -> bool:
    members = [member for group in groups for member in group.members]
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return len(members) == len(set(members)) and set(members) <= linears


@pytest.mark.parametrize("kind", DECODERS)
def test_decoders(kind: str, tiny_ids: Tensor) -> None:
    changes, prefix, expected = DECODERS[kind]
    model = AutoModelForCausalLM.from_config(small(kind, **changes)).eval()
    trace = trace_groups(model, {"input_ids": tiny_ids})
    assert of_block(trace.groups, prefix) == expected
    assert covered_once(model, trace.groups)
    assert trace.skipped == {}
    assert trace.in_order
    assert prefix in blocks(model)
    for group in trace.groups:
        for member, width in zip(group.members, group.out_features, strict=True):
            assert tuple(model.get_submodule(member).weight.shape) == (width, group.in_features)
    assert [group.name for group in find_groups(model, {"input_ids": tiny_ids})] == [g.name for g in trace.groups]


def test_gpt2_keeps_its_weights_in_conv1d_so_that_only_its_head_is_linear(tiny_ids: Tensor) -> None:
    config = AutoConfig.for_model("gpt2", vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    (group,) = find_groups(AutoModelForCausalLM.from_config(config), {"input_ids": tiny_ids})
    assert group == Group("lm_head", ("lm_head",), 32, (64,), "lm_head")
    assert group.parent == ""


def test_bert(tiny_ids: Tensor) -> None:
    model = AutoModel.from_config(small("bert"))
    assert of_block(find_groups(model, {"input_ids": tiny_ids}), "encoder.layer.1") == BERT_LIKE


def test_t5_cross_attention_is_split_by_block(tiny_ids: Tensor) -> None:
    config = AutoConfig.for_model("t5", vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    model = AutoModelForSeq2SeqLM.from_config(config)
    groups = find_groups(model, {"input_ids": tiny_ids, "decoder_input_ids": tiny_ids[:, :5]})
    assert of_block(groups, "encoder.block.1") == {
        "layer.0.SelfAttention.q+k+v",
        "layer.0.SelfAttention.o",
        "layer.1.DenseReluDense.wi",
        "layer.1.DenseReluDense.wo",
    }
    for index in (0, 1):
        names = of_block(groups, f"decoder.block.{index}")
        assert {"layer.0.SelfAttention.q+k+v", "layer.1.EncDecAttention.k+v", "layer.1.EncDecAttention.q"} <= names
    assert covered_once(model, groups)


def test_of_a_mixture_of_experts_only_modules_are_found(tiny_ids: Tensor) -> None:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    model = AutoModelForCausalLM.from_config(small("mixtral", **GQA, **experts))
    groups = find_groups(model, {"input_ids": tiny_ids})
    assert of_block(groups, "model.layers.1") == {"self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj"}
    assert covered_once(model, groups)


def test_deepseek_shares_its_low_rank_projections_and_shared_expert(tiny_ids: Tensor) -> None:
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    config = small(
        "deepseek_v3", **latent, **experts, moe_intermediate_size=16, n_shared_experts=1, num_key_value_heads=4
    )
    groups = find_groups(AutoModelForCausalLM.from_config(config), {"input_ids": tiny_ids})
    names = of_block(groups, "model.layers.1")
    assert "self_attn.q_a_proj+kv_a_proj_with_mqa" in names
    assert "mlp.shared_experts.gate_proj+up_proj" in names


def test_albert_runs_one_layer_many_times(tiny_ids: Tensor) -> None:
    model = AutoModel.from_config(small("albert", embedding_size=16, num_hidden_layers=3))
    trace = trace_groups(model, {"input_ids": tiny_ids})
    layer = "encoder.albert_layer_groups.0.albert_layers.0"
    assert {f"{layer}.attention.query+key+value", f"{layer}.ffn"} <= {group.name for group in trace.groups}
    assert not trace.in_order


def test_mambas_uncalled_projection_is_skipped_with_a_reason(tiny_ids: Tensor) -> None:
    model = AutoModelForCausalLM.from_config(small("mamba", state_size=4, time_step_rank=4))
    trace = trace_groups(model, {"input_ids": tiny_ids})
    assert set(trace.skipped) == {f"backbone.layers.{index}.mixer.dt_proj" for index in (0, 1)}
    assert all("never called" in reason for reason in trace.skipped.values())


class Toy(nn.Module):
    """Linear layers that the function `calls` runs."""

    def __init__(self, calls: Callable[[Toy, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 2)
        self.calls = calls

    def forward(self, x: Tensor) -> Any:
        return self.calls(self, x)


class Stack(nn.Module):
    """A model with one block, because only modules of the same block can share a group."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block])

    def forward(self, x: Tensor) -> Any:
        return self.layers[0](x)


def traced(calls: Callable[[Toy, Tensor], Any]) -> tuple[set[str], dict[str, str]]:
    trace = trace_groups(Stack(Toy(calls)), {"x": torch.randn(2, 4)})
    skipped = {name.removeprefix("layers.0."): reason for name, reason in trace.skipped.items()}
    return of_block(trace.groups, "layers.0"), skipped


def test_an_uncalled_module_is_skipped_with_a_reason() -> None:
    groups, skipped = traced(lambda m, x: (m.a(x), m.b(x)))
    assert groups == {"a+b"}
    assert list(skipped) == ["unused"]
    assert "never called in the traced forward" in skipped["unused"]


def test_a_module_that_is_called_with_no_token_is_skipped_with_a_reason() -> None:
    """As the experts that no token is routed to, and HiggsAudio's layers for sound where there is only text."""
    groups, skipped = traced(lambda m, x: (m.a(x), m.b(x[:0])))
    assert groups == {"a"}
    assert skipped["b"] == "no token of the traced text reaches it"
    assert traced(lambda m, x: (m.a(x), m.a(x[:0]), m.b(x), m.b(x[:0])))[0] == {"a+b"}


@pytest.mark.parametrize(
    "calls",
    [
        pytest.param(lambda m, x: (m.a(x), m.b(x.add_(1))), id="written in between"),
        pytest.param(lambda m, x: (m.a(x), m.b(x.clone())), id="equal values"),
        pytest.param(lambda m, x: (m.a(x), m.b(x[1:])), id="a part"),
        pytest.param(lambda m, x: (m.a(x[:1]), m.b(x[1:])), id="another part"),
        pytest.param(lambda m, x: (m.a(x), m.b(x.expand(3, 2, 4))), id="repeated"),
        pytest.param(lambda m, x: (m.a(y := x[None].expand(2, 2, 4)), m.b(y.transpose(0, 1))), id="another order"),
        pytest.param(lambda m, x: (m.a(y := x.view(1, 2, 4)), y.add_(1), m.b(x)), id="written through a view"),
        pytest.param(lambda m, x: (m.a(x), m.b(x), m.a(x * 2)), id="one of them again"),
        pytest.param(lambda m, x: (m.a(y := x * 2), m.b(x), m.a(x), m.b(y)), id="other order"),
    ],
)
def test_what_is_not_one_input_is_not_one_group(calls: Callable[[Toy, Tensor], Any]) -> None:
    assert traced(calls)[0] == {"a", "b"}


@pytest.mark.parametrize(
    "calls",
    [
        pytest.param(lambda m, x: (m.a(x), m.b(x.view(1, 2, 4))), id="a view"),
        pytest.param(lambda m, x: (m.a(x.reshape(-1, 4)), m.b(x[None, :, None])), id="two views"),
        pytest.param(lambda m, x: (m.a(x[1:]), m.b(x[1:])), id="the same part"),
        pytest.param(lambda m, x: (m.a((y := x * 2).view(-1, 4)), m.b(y.to(y.dtype))), id="of a product"),
    ],
)
def test_views_of_one_input_are_one_group(calls: Callable[[Toy, Tensor], Any]) -> None:
    """As the routers of HunYuan, which flatten what the shared experts read."""
    assert traced(calls)[0] == {"a+b"}


def test_negated_views_are_other_inputs() -> None:
    def calls(model: Toy, x: Tensor) -> None:
        whole = torch.view_as_complex(torch.stack([x, x * 2], -1))
        negated = whole.conj().imag
        assert negated.is_neg()
        assert negated._base is whole.imag._base
        model.a(whole.imag)
        model.b(negated)

    assert traced(calls)[0] == {"a", "b"}


def test_the_same_inputs_in_the_same_order_are_one_group() -> None:
    assert traced(lambda m, x: (m.a(x), m.b(x), m.a(y := x * 2), m.b(y)))[0] == {"a+b"}


def test_freed_inputs_do_not_meet_by_address() -> None:
    def calls(model: Toy, x: Tensor) -> None:
        for layer in (model.a, model.b):
            layer(x * 2)

    assert all(traced(calls)[0] == {"a", "b"} for _ in range(5))


def test_outside_of_every_block_each_module_stands_alone() -> None:
    trace = trace_groups(Toy(lambda m, x: (m.a(x), m.b(x))), {"x": torch.randn(2, 4)})
    assert [(group.name, group.block) for group in trace.groups] == [("a", "a"), ("b", "b")]


def test_keyword_inputs_are_refused() -> None:
    groups, skipped = traced(lambda m, x: (m.a(x), m.b(input=x)))
    assert groups == {"a"}
    assert "positional" in skipped["b"]


def test_members_in_two_parents_name_their_paths() -> None:
    group = Group("block.attn.q+mlp.up", ("block.attn.q", "block.mlp.up"), 4, (4, 4), "block")
    assert group.parent == "block"
    assert Group("x", ("layers.1.q", "layers.10.q"), 4, (4, 4), "").parent == "layers"


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(tiny_llama: Callable[..., Any], tiny_ids: Tensor, fails: bool) -> None:
    model = tiny_llama(use_cache=True).train()
    frozen = model.model.layers[0].eval()
    if fails:
        with pytest.raises(IndexError):
            find_groups(model, {"input_ids": tiny_ids + 100})
    else:
        find_groups(model, {"input_ids": tiny_ids})
    assert model.training
    assert model.model.layers[1].training
    assert not any(module.training for module in frozen.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert model.config.use_cache is True


def test_groups_are_found_in_any_mode(tiny_llama: Callable[..., Any], tiny_ids: Tensor) -> None:
    names = [group.name for group in find_groups(tiny_llama(), {"input_ids": tiny_ids})]
    with torch.inference_mode():
        assert [group.name for group in find_groups(tiny_llama(), {"input_ids": tiny_ids})] == names


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(UnsupportedModuleError, match="Sequential has no linear module"):
        find_groups(nn.Sequential(nn.ReLU()), {"input": torch.zeros(1)})


def test_blocks_of_a_plain_module_are_its_module_lists() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(2))
    assert blocks(model) == ["layers.0", "layers.1"]


def test_a_list_of_blocks_is_no_block() -> None:
    """GLPN, PVT and Funnel keep the layers of each stage in a list, which has no forward where a walk could pause."""
    model = nn.Module()
    model.stages = nn.ModuleList(nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(2)) for _ in range(2))
    assert blocks(model) == ["stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1"]


def test_blocks_whose_parts_are_called_one_by_one_are_not_run_in_order() -> None:
    model = Stack(Toy(lambda m, x: m.b(m.a(x))))
    model.forward = lambda x: model.layers[0].b(model.layers[0].a(x))
    trace = trace_groups(model, {"x": torch.randn(2, 4)})
    assert [group.name for group in trace.groups] == ["layers.0.a", "layers.0.b"]
    assert not trace.in_order


def test_whole_numbers_as_an_input_are_refused() -> None:
    """LongT5 turns hidden states into the dtype of the next weight, which is that of bytes where it is packed."""
    with pytest.raises(UnsupportedModuleError, match=r"^layers\.0\.a: the model turns its input into torch\.uint8, "):
        traced(lambda m, x: m.a((10 * x).to(torch.uint8)))
