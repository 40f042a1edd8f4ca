"""The block walk compared with whole forwards: each block gets its inputs from the corrected blocks before it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glowq.calibration.block_walk import BlockWalk
from glowq.calibration.input_moments import MomentCollector
from glowq.factors.group import Group
from glowq.models.tracing import find_groups
from glowq.runtime.attach import attach

Factory = Callable[..., Any]


class Recorder:
    """A replacement for a collector that keeps every input."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.seen: list[Tensor] = []

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        self.seen.append(x.clone())


def by_block(groups: list[Group]) -> dict[str, list[Group]]:
    stops: dict[str, list[Group]] = {}
    for group in groups:
        stops.setdefault(group.block, []).append(group)
    return stops


def uneven(limit: int = 64) -> list[dict[str, Tensor]]:
    """Return three batches of different shapes; one of them has padding."""
    shapes = ((2, 7), (1, 11), (3, 4))
    generator = torch.Generator().manual_seed(0)
    inputs = [{"input_ids": torch.randint(1, limit, shape, generator=generator)} for shape in shapes]
    inputs[2]["attention_mask"] = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    return inputs


def walked(model: nn.Module, batches: list[dict[str, Any]], factors: Factory) -> dict[str, list[Tensor]]:
    """Return group name -> its inputs in the block walk; corrections attached meanwhile make no difference."""
    stops = by_block(find_groups(model, batches[0]))
    found: dict[str, list[Tensor]] = {}
    with BlockWalk(model, batches, list(stops)) as walk:
        for stop, groups in stops.items():
            recorders = [Recorder(group) for group in groups]
            assert list(walk.collect(stop, recorders)) == [1, 2, 3][: len(batches)]
            for recorder in recorders:
                found[recorder.group.name] = recorder.seen
                attach(model, factors(recorder.group))
    return found


def ordinary(model: nn.Module, batches: list[dict[str, Any]]) -> dict[str, list[Tensor]]:
    """Return the same inputs from whole forwards of the model, one for each block and batch."""
    found: dict[str, list[Tensor]] = {}
    for groups in by_block(find_groups(model, batches[0])).values():
        handles = []
        for group in groups:
            seen = found.setdefault(group.name, [])
            member = model.get_submodule(group.members[0])
            handles.append(member.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].clone())))
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        for handle in handles:
            handle.remove()
    return found


def same(found: dict[str, list[Tensor]], exact: dict[str, list[Tensor]]) -> None:
    assert list(found) == list(exact)
    for name, inputs in exact.items():
        torch.testing.assert_close(
            found[name], inputs, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def has_no_hooks(model: nn.Module) -> bool:
    return not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_each_block_sees_what_the_quantized_blocks_before_it_give(tiny_llama: Factory, random_factors: Factory) -> None:
    batches = uneven()
    found = walked(tiny_llama(num_hidden_layers=3), batches, random_factors)
    same(found, ordinary(tiny_llama(num_hidden_layers=3), batches))


def test_the_bundled_model_is_walked_alike(bundled: Any, token_ids: Tensor, random_factors: Factory) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(bundled, dtype=torch.float32)
    batches = [{"input_ids": token_ids[:2, :12]}, {"input_ids": token_ids[2:3, :20]}]

    def small(group: Group) -> Any:
        return random_factors(group, scale=0.02)

    copied = copy.deepcopy(model)
    same(walked(model, batches, small), ordinary(copied, batches))


@pytest.mark.parametrize("kind", ["gpt_neox", "gemma2", "falcon", "opt", "bert"])
def test_other_architectures_are_walked_alike(kind: str, random_factors: Factory) -> None:
    from transformers import AutoConfig, AutoModel

    changes = {"num_attention_heads": 4, "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    extra = {"opt": {"word_embed_proj_dim": 32, "ffn_dim": 48}, "gemma2": {"num_key_value_heads": 2, "head_dim": 8}}
    config = AutoConfig.for_model(kind, intermediate_size=48, **changes, **extra.get(kind, {}))
    model = AutoModel.from_config(config).eval()
    copied = copy.deepcopy(model)
    same(walked(model, uneven(), random_factors), ordinary(copied, uneven()))


def test_a_part_with_a_config_of_its_own_keeps_no_cache(random_factors: Factory) -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = LlamaConfig(vocab_size=64, num_key_value_heads=2, **size)
    vision = CLIPVisionConfig(image_size=8, patch_size=4, **size)
    config = LlavaConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_index=63)
    model = LlavaForConditionalGeneration(config).eval()
    copied = copy.deepcopy(model)
    batches = uneven(limit=60)
    same(walked(model, batches, random_factors), ordinary(copied, batches))
    assert model.config.text_config.use_cache is True


def test_padding_reaches_the_collectors(tiny_llama: Factory) -> None:
    model, batches = tiny_llama(), uneven()
    stops = by_block(find_groups(model, batches[0]))
    with BlockWalk(model, batches, list(stops)) as walk:
        for stop, groups in stops.items():
            collectors = [MomentCollector(group, "second") for group in groups]
            list(walk.collect(stop, collectors))
            assert {collector.moments().tokens for collector in collectors} == {2 * 7 + 11 + 9}


def test_one_stop_for_the_whole_model(tiny_llama: Factory) -> None:
    model, batches = tiny_llama(), uneven()
    recorders = [Recorder(group) for group in find_groups(model, batches[0])]
    with BlockWalk(model, batches, [""]) as walk:
        list(walk.collect("", recorders))
    assert all(len(recorder.seen) == len(batches) for recorder in recorders)


@pytest.mark.parametrize(
    "moment", ["never", "before the walk", "inside a forward", "between batches", "between blocks"]
)
def test_nothing_is_left_on_the_model(tiny_llama: Factory, moment: str) -> None:
    model, batches = tiny_llama(use_cache=True).train(), uneven()
    model.model.layers[1].eval()
    stops = list(by_block(find_groups(model, batches[0])))
    if moment == "inside a forward":
        batches[1]["input_ids"] = batches[1]["input_ids"] + 100

    def run() -> None:
        with BlockWalk(model, batches, stops) as walk:
            assert not any(module.training for module in model.modules())
            if moment == "before the walk":
                raise IndexError
            for stop in stops:
                for done in walk.collect(stop, []):
                    if moment == "between batches" and done == 2:
                        raise IndexError
                if moment == "between blocks":
                    raise IndexError

    if moment == "never":
        run()
    else:
        with pytest.raises(IndexError):
            run()
    assert has_no_hooks(model)
    assert model.training
    assert model.model.layers[0].mlp.up_proj.training
    assert not any(module.training for module in model.model.layers[1].modules())
    assert model.config.use_cache is True
    assert torch.is_grad_enabled()
    logits = model.eval()(uneven()[0]["input_ids"]).logits
    assert logits.requires_grad


def test_inference_mode_outside_does_not_matter(tiny_llama: Factory, random_factors: Factory) -> None:
    exact = ordinary(tiny_llama(), uneven())
    model = tiny_llama()
    with torch.inference_mode():
        same(walked(model, uneven(), random_factors), exact)


def test_a_forward_under_autocast_is_alone_in_it(tiny_llama: Factory, random_factors: Factory) -> None:
    model, copied = tiny_llama(), tiny_llama()
    for each in (model, copied):
        each.forward = torch.autocast("cpu", torch.bfloat16)(each.forward)
    stops = by_block(find_groups(model, uneven()[0]))
    with BlockWalk(model, uneven(), list(stops)) as walk:
        for stop in stops:
            for _ in walk.collect(stop, []):
                assert not torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")
    same(walked(model, uneven(), random_factors), ordinary(copied, uneven()))


class InPlace(nn.Module):
    """A block that adds to its input in place and returns it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.linear(x))


class Pure(InPlace):
    """The same block without the write in place."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class Blocks(nn.Module):
    """Two blocks; the first one reads the input of the model."""

    def __init__(self, kind: type[InPlace]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_block_that_writes_into_its_input_runs_once(random_factors: Factory) -> None:
    model = Blocks(InPlace)
    x = torch.randn(2, 4)
    middle = (x + model.layers[0].linear(x)).detach()
    stops = ["layers.0", "layers.1"]
    groups = [Group(f"{stop}.linear", (f"{stop}.linear",), 4, (4,), stop) for stop in stops]
    recorders = [Recorder(group) for group in groups]
    with BlockWalk(model, [{"x": x.clone()}], stops) as walk:
        for stop, recorder in zip(stops, recorders, strict=True):
            list(walk.collect(stop, [recorder]))
            attach(model, random_factors(recorder.group))
    torch.testing.assert_close([recorder.seen for recorder in recorders], [[x], [middle]])


def test_batches_made_in_inference_mode_are_walked(random_factors: Factory) -> None:
    model = Blocks(Pure)
    copied = copy.deepcopy(model)
    with torch.inference_mode():
        x = torch.randn(2, 4)
    same(walked(model, [{"x": x}], random_factors), ordinary(copied, [{"x": x}]))
