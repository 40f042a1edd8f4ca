"""The streamed diagonal plus low-rank moment, compared with the exact matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from glowq.calibration.gradient_sums import GradientSketch
from glowq.solving.low_rank import factorize
from glowq.solving.moments import LowRankMoment, Moments

CPU = torch.device("cpu")


def gradients(tokens: int, width: int, *, decay: float = 1.0, rank: int | None = None) -> Tensor:
    """Return rows whose second moment has eigenvalues close to k^(-2 decay), and only `rank` nonzero ones if given."""
    generator = torch.Generator().manual_seed(0)
    rank = width if rank is None else rank
    scales = torch.arange(1, rank + 1).pow(-decay)
    return torch.randn(tokens, rank, generator=generator) * scales @ torch.randn(rank, width, generator=generator)


def streamed(rows: Tensor, rank: int, *, seed: int = 0) -> LowRankMoment:
    sketch = GradientSketch(rows.shape[1], rank, seed, CPU)
    for part in rows.split(100):
        sketch.add(part)
    return sketch.moment(len(rows))


def dense(moment: LowRankMoment) -> Tensor:
    factor = moment.factor.double()
    return moment.diagonal.double().diag() + factor @ factor.T


def exact(rows: Tensor) -> Tensor:
    return rows.double().T @ rows.double() / len(rows)


@pytest.mark.parametrize(("width", "rank", "true_rank"), [(40, 40, 40), (40, 64, 40), (200, 32, 20), (200, 32, 1)])
def test_nothing_is_lost_where_the_sketch_holds_every_direction(width: int, rank: int, true_rank: int) -> None:
    rows = gradients(500, width, rank=true_rank)
    expected, found = exact(rows), streamed(rows, rank)
    assert found.factor.shape == (width, min(rank, width))
    assert found.diagonal.dtype == found.factor.dtype == torch.float32
    # Theorem 4.1, where only the shift lies beyond the true rank: 8 float32 roundings of the largest eigenvalue.
    beyond = width * (1 + true_rank / (rank - true_rank - 1)) if rank < width else 2
    bound = beyond * 8 * 1.2e-7 * float(torch.linalg.matrix_norm(expected, 2))
    assert float(torch.linalg.matrix_norm(dense(found) - expected, 2)) < bound


def test_the_diagonal_is_exact_and_the_low_rank_part_never_exceeds_the_moment() -> None:
    rows = gradients(800, 150, decay=0.5)
    expected, found = exact(rows), streamed(rows, 24)
    torch.testing.assert_close(dense(found).diagonal(), expected.diagonal(), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(found.full_diagonal(), expected.diagonal(), rtol=1e-5, atol=0.0)
    assert (found.diagonal >= 0).all()
    rest = torch.linalg.eigvalsh(expected - found.factor.double() @ found.factor.double().T)
    assert float(rest[0]) > -1e-5 * float(rest[-1])


def test_what_is_left_out_is_near_the_least_that_a_low_rank_part_can_leave() -> None:
    rows = gradients(2000, 300)
    values = torch.linalg.eigvalsh(exact(rows)).flip(0)
    factor = streamed(rows, 40).factor.double()
    left = float((exact(rows) - factor @ factor.T).diagonal().sum())
    # Theorem 4.1 for a sketch of 40 directions at rank 19: 1 + 19 / (40 - 19 - 1) times the tail beyond that rank.
    assert float(values[40:].sum()) <= left <= (1 + 19 / 20) * float(values[19:].sum())


def test_the_seed_decides_the_directions() -> None:
    rows = gradients(300, 120)
    first, again, other = (streamed(rows, 16, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.factor, again.factor)
    assert torch.equal(first.diagonal, again.diagonal)
    assert not torch.equal(first.factor, other.factor)


def test_rows_are_the_block_of_the_members_outputs() -> None:
    rows = gradients(300, 60)
    moment = streamed(rows, 16)
    for output, whole in (
        (moment, dense(moment)),
        (exact(rows), exact(rows)),
        (exact(rows).diagonal(), exact(rows).diagonal().diag()),
    ):
        part = Moments(tokens=300, output=output).rows(10, 25).output
        if isinstance(part, LowRankMoment):
            part = dense(part)
        found = part if part is not None and part.ndim == 2 else part.diag()  # type: ignore[union-attr]
        torch.testing.assert_close(found, whole[10:25, 10:25])


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return found


def test_no_matrix_of_all_outputs_is_ever_made() -> None:
    width, inputs, rank = 3000, 64, 32
    rows = gradients(400, width, rank=50)
    with LargestTensor() as largest:
        moment = streamed(rows, rank)
        error = torch.randn(width, inputs, generator=torch.Generator().manual_seed(1))
        for kept in (4, 40):  # solved by Krylov iteration, and densely
            factorize(error, torch.eye(inputs), kept, output_moment=moment)
            factorize(error.repeat(1, 4), None, kept, output_moment=moment)
    assert largest.elements <= width * 4 * inputs
