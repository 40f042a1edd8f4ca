"""Each method minimises the objective of its paper, and shares the right factor or not as declared."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from glowq.errors import CalibrationError, ConfigError
from glowq.solving.low_rank import factorize
from glowq.solving.methods.base import Method, get_method, method_names, register
from glowq.solving.moments import LowRankMoment, Moments, of_divided_outputs
from support.moments import measured

PUBLISHED = ["glowq-published", "glowq-s", "glowq-s-ratio"]
NAMES = ["aser", "d-rank", "eora", "fwsvd", "glowq", *PUBLISHED, "lqer", "qera", "svd", "zeroquant"]
SECOND = ["aser", "d-rank", "eora", "glowq", *PUBLISHED, "qera"]
RANK = 4


def streamed(error: Tensor, moments: Moments) -> Moments:
    assert moments.second is not None
    return replace(moments, second=None, energy=error.double() @ moments.second @ error.double().T)


def weight_of(name: str, moments: Moments) -> Tensor:
    """Return the dense weight S in the objective of the method's paper."""
    assert moments.second is not None
    identity = torch.eye(len(moments.magnitude), dtype=torch.float64)
    if name in {"fwsvd", "svd", "zeroquant"}:
        return identity
    if name == "lqer":
        return moments.magnitude.square().diag()
    if name in PUBLISHED:
        return 0.95 * moments.second + 0.05 * moments.second.trace() / len(identity) * identity
    return moments.second


def left_over(error: Tensor, correction: Tensor, weight: Tensor) -> float:
    rest = error.double() - correction
    return float((rest @ weight * rest).sum())


def test_the_methods_are_known() -> None:
    assert set(NAMES) <= set(method_names())
    assert method_names() == sorted(method_names())


@pytest.mark.parametrize("name", NAMES)
def test_each_method_reaches_the_optimum_of_its_own_weight(name: str) -> None:
    error, moments = measured()
    weight = weight_of(name, moments)
    factors = get_method(name).solve(error, moments, RANK, 0)
    values = torch.linalg.eigvalsh(error.double() @ weight @ error.double().T).flip(0)
    correction = factors.left.double() @ factors.right.double()
    assert left_over(error, correction, weight) == pytest.approx(float(values[RANK:].sum()), rel=1e-6)
    torch.testing.assert_close(factors.gains, values[:RANK], rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("name", SECOND)
def test_streamed_energy_serves_as_well_as_the_moment(name: str) -> None:
    error, moments = measured()
    method = get_method(name)
    full = method.solve(error, moments, RANK, 0)
    energy = method.solve(error, streamed(error, moments), RANK, 0)
    torch.testing.assert_close(energy.gains, full.gains, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(energy.left @ energy.right, full.left @ full.right, rtol=0.0, atol=1e-4)


def test_solving_leaves_the_moments_as_they_were() -> None:
    error, moments = measured()
    assert moments.second is not None
    before = moments.second.clone()
    for name in NAMES:
        get_method(name).solve(error, moments, RANK, 0)
    assert torch.equal(moments.second, before)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_method_says_of_itself(name: str) -> None:
    method = get_method(name)
    assert method.name == name
    assert method.shared == (name in {"d-rank", "glowq", *PUBLISHED, "svd"})
    assert method.statistic == {"fwsvd": "none", "svd": "none", "zeroquant": "none", "lqer": "magnitude"}.get(
        name, "second"
    )
    own = {"glowq": "gain", "glowq-s": "groups", "glowq-s-ratio": "groups", "d-rank": "effective-rank"}
    assert method.allocation == own.get(name, "uniform")
    assert (method.score is not None) == (method.allocation == "groups")
    assert method.summary
    assert method.source


def test_the_published_scores() -> None:
    gains, scores = torch.tensor([9.0, 4.0, 0.0], dtype=torch.float64), {}
    for name in ("glowq-s", "glowq-s-ratio"):
        score = get_method(name).score
        assert score is not None
        scores[name] = score(gains, 0.125)
    assert scores == {"glowq-s": 3.0 + 2.0, "glowq-s-ratio": 0.125}


def test_rows_are_weighted_by_their_fisher_information() -> None:
    """The oracle is a dense SVD of the weighted rows, for every form of the output moment."""
    error, moments = measured()
    draw = torch.randn(len(error), len(error), dtype=torch.float64)
    dense = draw @ draw.T
    low = LowRankMoment(dense.diagonal() - draw[:, :2].square().sum(1), draw[:, :2])
    rows = (dense.diagonal() + 0.03 * dense.diagonal().mean()).sqrt()[:, None]
    left, values, right = torch.linalg.svd(rows * error.double(), full_matrices=False)
    expected = (left[:, :RANK] * values[:RANK]) @ right[:RANK] / rows
    for moment in (dense, dense.diagonal(), low):
        found = get_method("fwsvd").solve(error, replace(moments, output=moment), RANK, 0)
        torch.testing.assert_close(found.left.double() @ found.right.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["matrix", "diagonal", "low-rank"])
def test_outputs_that_were_divided_get_the_same_correction(form: str) -> None:
    """Quantizers that scale the rows of a layer (AWQ) change the outputs, their errors and their gradients alike."""
    error, moments = measured()
    draw = torch.randn(len(error), len(error), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    dense = draw @ draw.T
    low = LowRankMoment(dense.diagonal() - draw[:, :2].square().sum(1), draw[:, :2])
    moment = {"matrix": dense, "diagonal": dense.diagonal(), "low-rank": low}[form]
    rows = torch.rand(len(error), dtype=torch.float64, generator=torch.Generator().manual_seed(4)) + 0.5
    # Damping adds a share of the mean diagonal, which is another one for scaled outputs: without it, they are the same.
    plain, divided = (
        factorize(part, moments.second, RANK, output_moment=output, damping=1e-9)
        for part, output in ((error, moment), (error / rows[:, None], of_divided_outputs(moment, rows)))
    )
    torch.testing.assert_close(divided.gains, plain.gains, rtol=1e-5, atol=0.0)
    expected = plain.left.double() @ plain.right.double() / rows[:, None]
    torch.testing.assert_close(divided.left.double() @ divided.right.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["fwsvd", "svd", "zeroquant"])
def test_weight_only_methods_need_no_calibration(name: str) -> None:
    error, moments = measured()
    unmeasured = replace(moments, tokens=0, second=None)
    solve = get_method(name).solve
    assert torch.equal(solve(error, unmeasured, RANK, 0).left, solve(error, moments, RANK, 0).left)


@pytest.mark.parametrize("name", [*SECOND, "lqer"])
def test_without_calibration_the_others_refuse(name: str) -> None:
    error, moments = measured()
    method = get_method(name)
    message = f"the {method.statistic} statistic of the inputs is needed; found 0 tokens counted"
    with pytest.raises(CalibrationError, match=message):
        method.solve(error, replace(moments, tokens=0), RANK, 0)


@pytest.mark.parametrize("name", SECOND)
def test_without_a_second_moment_they_do_not_fall_back_to_plain_svd(name: str) -> None:
    error, moments = measured()
    with pytest.raises(CalibrationError, match="found 500 tokens counted and no second moment"):
        get_method(name).solve(error, replace(moments, second=None), RANK, 0)


def test_unknown_and_repeated_names_are_refused() -> None:
    message = (
        r"^method must be one of aser, d-rank, eora, fwsvd, glowq, .*zeroquant; found 'qlora'\. Did you mean 'qera'\?$"
    )
    with pytest.raises(ConfigError, match=message):
        get_method("qlora")
    svd = get_method("svd")
    again = Method("svd", True, "none", svd.solve, svd.summary, svd.source)
    with pytest.raises(ConfigError, match="method 'svd' is registered twice"):
        register(again)
