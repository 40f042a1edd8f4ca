"""Streamed input moments compared with float64 sums over all tokens at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glowq.calibration.input_moments import MomentCollector, collecting
from glowq.errors import CalibrationError, NonFiniteError
from glowq.factors.group import Group
from glowq.models.tracing import find_groups
from glowq.solving.moments import Moments

WIDTH = 6
GROUP = Group("layer", ("layer",), WIDTH, (3, 1), "layer")


class Model(nn.Module):
    """One linear layer that each forward calls `times` times."""

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 4)
        self.times = times

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.layer(x * (index + 1)) for index in range(self.times)]


def batches(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return batches of different shapes, with correlated tokens and one outlier channel."""
    mix = torch.randn(WIDTH, WIDTH) + torch.tensor([0, 0, 20, 0, 0, 0])
    return [(torch.randn(*shape, WIDTH) @ mix).to(dtype) for shape in ((2, 5), (1, 9), (3, 1))]


def measure(inputs: list[Tensor], masks: list[Tensor | None] | None = None, **options: Any) -> Moments:
    model = Model(options.pop("times", 1)).to(inputs[0].dtype)
    collector = MomentCollector(GROUP, options.pop("statistic", "second"), **options)
    with collecting(model, [collector]) as feed, torch.no_grad():
        for x, mask in zip(inputs, masks or [None] * len(inputs), strict=True):
            feed.mask = mask
            model(x)
    return collector.moments()


def close(found: Tensor | None, exact: Tensor) -> None:
    assert found is not None
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6 * float(exact.abs().max()))


def second(x: Tensor) -> Tensor:
    return x.double().T @ x.double() / len(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_second_moment_is_the_mean_over_all_tokens(dtype: torch.dtype) -> None:
    inputs = batches(dtype)
    tokens = torch.cat([x.flatten(0, 1) for x in inputs])
    moments = measure(inputs)
    assert moments.tokens == len(tokens) == 22
    close(moments.second, second(tokens))
    close(moments.mean_square, second(tokens).diagonal().mean())
    assert moments.energy is None


def test_padding_is_left_out() -> None:
    inputs = batches()
    masks = [torch.ones(x.shape[:2], dtype=torch.long) for x in inputs]
    masks[0][0, :3] = 0
    masks[1][0, 7:] = 0
    masks[2][1] = 0
    real = torch.cat([x[mask.bool()] for x, mask in zip(inputs, masks, strict=True)])
    for x, mask in zip(inputs, masks, strict=True):
        x[~mask.bool()] = 1e4
    moments = measure(inputs, masks)
    assert moments.tokens == len(real) == 16
    close(moments.second, second(real))
    assert measure(inputs, masks, statistic="magnitude").tokens == 16
    per_sequence = [
        row[keep.bool()].double().abs().mean(0)
        for x, m in zip(inputs, masks, strict=True)
        for row, keep in zip(x, m, strict=True)
        if keep.any()
    ]
    close(measure(inputs, masks, statistic="magnitude").magnitude, torch.stack(per_sequence).amax(0))


def test_what_lies_in_the_padding_does_not_matter_even_if_it_is_nan() -> None:
    x = torch.randn(2, 4, WIDTH)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    clean = [measure([x], [mask], statistic=statistic) for statistic in ("second", "magnitude")]
    x[0, :2] = float("nan")
    damaged = [measure([x], [mask], statistic=statistic) for statistic in ("second", "magnitude")]
    assert torch.equal(damaged[0].second, clean[0].second)
    assert torch.equal(damaged[0].mean_square, clean[0].mean_square)
    assert torch.equal(damaged[1].magnitude, clean[1].magnitude)


def test_magnitude_is_the_largest_mean_of_a_sequence() -> None:
    inputs = batches()
    moments = measure(inputs, statistic="magnitude")
    close(moments.magnitude, torch.cat([x.double().abs().mean(1) for x in inputs]).amax(0))
    assert moments.second is None
    assert measure(inputs).magnitude is None


def test_bfloat16_inputs_lose_nothing_and_leave_the_global_precision_alone() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    x = torch.randn(4, 256, 64).bfloat16()
    collector = MomentCollector(Group("block.a", ("block.a",), 64, (64,), "block"), "second")
    collector.update(x)
    exact = second(x.flatten(0, 1))
    torch.testing.assert_close(collector.moments().second, exact, rtol=1e-5, atol=1e-6 * float(exact.abs().max()))
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_energy_is_the_error_under_the_second_moment() -> None:
    inputs, error = batches(), torch.randn(4, WIDTH)
    moments = measure(inputs, error=error)
    tokens = torch.cat([x.flatten(0, 1) for x in inputs])
    exact = error.double() @ second(tokens) @ error.double().T
    close(moments.energy, exact)
    assert moments.second is None
    close(moments.rows(1, 3).energy, exact[1:3, 1:3])
    whole = measure(inputs)
    assert whole.rows(1, 3) is whole


def test_a_member_called_twice_counts_twice() -> None:
    inputs = batches()
    tokens = torch.cat([x.flatten(0, 1) for x in inputs])
    moments = measure(inputs, times=2)
    assert moments.tokens == 2 * len(tokens)
    close(moments.second, second(torch.cat([tokens, 2 * tokens])))


def test_flattened_tokens_are_still_masked() -> None:
    x = torch.randn(2, 5, WIDTH)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    moments = measure([x.flatten(0, 1)], [mask])
    assert moments.tokens == 7
    close(moments.second, second(x[mask.bool()]))


def test_a_mask_of_other_tokens_is_ignored() -> None:
    x = torch.randn(2, 5, WIDTH)
    assert measure([x], [torch.zeros(2, 4)]).tokens == 10


def test_a_whole_batch_of_padding_counts_nothing() -> None:
    x = torch.randn(2, 5, WIDTH)
    moments = measure([x * 100, x], [torch.zeros(2, 5), torch.ones(2, 5)])
    assert moments.tokens == 10
    close(moments.second, second(x.flatten(0, 1)))


def test_long_sums_lose_no_digits() -> None:
    x = torch.rand(1, 64, WIDTH)
    x[..., 0] *= 1e-3
    collector = MomentCollector(GROUP, "second")
    for _ in range(3000):
        collector.update(x)
    close(collector.moments().second, second(x[0]))


@pytest.mark.parametrize("weights", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("activations", [1e-30, 1e-20, 1e20, 1e30])
def test_activations_and_errors_of_any_size(activations: float, weights: float) -> None:
    """Their squares are no float32 numbers."""
    inputs, error = batches(), torch.randn(4, WIDTH)
    large = [x * activations for x in inputs]
    square = measure(inputs).mean_square
    plain, found = measure(inputs), measure(large)
    close(found.second / activations**2, plain.second)
    close(found.mean_square / activations**2, square)
    plain, found = measure(inputs, error=error), measure(large, error=error * weights)
    close(found.energy / (activations * weights) ** 2, plain.energy)
    close(found.mean_square / activations**2, square)


def test_batches_of_very_different_sizes_add_up() -> None:
    first, second_ = torch.randn(1, 8, WIDTH), torch.randn(1, 8, WIDTH) * 1e25
    close(measure([first, second_]).second, second(torch.cat([first, second_], 1)[0]))
    close(measure([first, 0 * second_]).second, second(torch.cat([first, 0 * second_], 1)[0]))


@pytest.mark.parametrize("statistic", ["second", "magnitude"])
def test_float16_at_the_end_of_its_range(statistic: str) -> None:
    x = torch.full((1, 4, WIDTH), 65504.0).half()
    x[..., 1], x[..., 2] = 6e-8, -65504.0
    found = measure([x], statistic=statistic)
    exact = second(x[0]) if statistic == "second" else x[0].double().abs().mean(0)
    close(found.second if statistic == "second" else found.magnitude, exact)


def test_one_token() -> None:
    x = torch.randn(1, 1, WIDTH)
    found = measure([x])
    assert found.tokens == 1
    close(found.second, second(x[0]))


@pytest.mark.parametrize("error", [None, torch.ones(2, WIDTH)], ids=["second", "energy"])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_split_into_batches_does_not_matter(size: int, error: Tensor | None) -> None:
    x = batches()[0].repeat(4, 1, 1) * torch.arange(1, 9)[:, None, None]
    whole, found = measure([x], error=error), measure(list(x.split(size)), error=error)
    assert whole.tokens == found.tokens
    close(found.mean_square, whole.mean_square)
    close(*((found.second, whole.second) if error is None else (found.energy, whole.energy)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_activation_names_the_module(tiny_llama: Callable[..., Any], tiny_ids: Tensor, value: float) -> None:
    model = tiny_llama()
    (group,) = [g for g in find_groups(model, {"input_ids": tiny_ids}) if g.name.endswith("layers.1.mlp.down_proj")]
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = value
    collector = MomentCollector(group, "second")
    with collecting(model, [collector]):
        model(tiny_ids)
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.down_proj: its input holds NaN or Inf"):
        collector.moments()


def test_no_token_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="layer: no calibration token reached this module"):
        MomentCollector(GROUP, "second").moments()
    with pytest.raises(CalibrationError, match="no calibration token"):
        measure([torch.randn(1, 3, WIDTH)], [torch.zeros(1, 3)])


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_go_also_on_exceptions(fails: bool) -> None:
    model = Model()
    collector = MomentCollector(GROUP, "second")
    if fails:
        with pytest.raises(RuntimeError), collecting(model, [collector]):
            model(torch.randn(1, 2, WIDTH + 1))
    else:
        with collecting(model, [collector]):
            model(torch.randn(1, 2, WIDTH))
    assert not model.layer._forward_pre_hooks
    counted = collector.tokens
    model(torch.randn(1, 2, WIDTH))
    assert collector.tokens == counted


def test_the_input_is_neither_changed_nor_tracked() -> None:
    x = torch.randn(1, 3, WIDTH, requires_grad=True)
    before = x.detach().clone()
    collector = MomentCollector(GROUP, "second")
    collector.update(x)
    found = collector.moments()
    assert torch.equal(x, before)
    assert not any(value.requires_grad for value in (found.second, found.mean_square))


def test_rounded_energy_finds_the_same_subspace() -> None:
    """With bfloat16 inputs, the leading directions of the streamed energy leave as little error as the exact ones."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(96, 96, generator=generator) * torch.logspace(0, -2, 96)
    x = (torch.randn(8, 256, 96, generator=generator) @ mix).bfloat16()
    error = torch.randn(48, 96, generator=generator) * 0.01
    collector = MomentCollector(Group("block.a", ("block.a",), 96, (48,), "block"), "second", error)
    collector.update(x)
    exact = error.double() @ second(x.flatten(0, 1)) @ error.double().T
    vectors = torch.linalg.eigh(collector.moments().energy).eigenvectors
    leading = vectors[:, -8:]
    left = exact.trace() - (leading.T @ exact @ leading).trace()
    best = torch.linalg.eigvalsh(exact)[:-8].sum()
    assert float(left / best) < 1 + 1e-5
