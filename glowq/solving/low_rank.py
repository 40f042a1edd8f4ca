"""The best low-rank correction of a weight error, without a square root or an inverse of the input moment.

Let U be the leading eigenvectors of E S E^T. Then A = U and B = U^T E minimise trace((E - AB) S (E - AB)^T). This is
the theorem of Eckart and Young for E S^(1/2), written so that the method only multiplies by S. Therefore S needs no
shrinkage, even if it is singular or comes from few samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import ConfigError, RankError
from .moments import LowRankMoment, OutputMoment
from .output_root import OutputRoot
from .scaling import power_of, scaled

__all__ = ["Factors", "factorize", "weighted_error"]

# Measured on two AVX-512 cores: these change the time, not the result.
_DIRECT_SIZE = 192  # up to this size, a float64 eigendecomposition is faster than the Krylov loop
_DIRECT_SHARE = 4  # the same for a rank of at least 1/4 of the size: a Krylov space would save no work
_BLOCK = 16  # columns multiplied at a time
_GUARD = 16  # Ritz vectors beyond the rank that the final float64 Rayleigh-Ritz step gets
_PROBES = 64  # random vectors that estimate the trace outside of the basis
_TOLERANCE = 3e-4  # stop when a block removes less than this share of the error that any correction must leave
_JITTER = 1e-6  # relative rounding error of a Ritz value from float32 products
_FLOOR = 1e-3  # smaller gains are noise, in units of the working dtype's eps times the largest Ritz value
_SINGLE_SPREAD = 1e5  # above this ratio of the first gain to the residual, float32 products are not accurate to 0.1%
_ROUNDING = 1e-26  # square of a float64 rounding error, as a share of the largest square
_EXACT = 1e-12  # gains below this share of the largest are rounding errors: the exact rank is reached


@dataclass(frozen=True)
class Factors:
    """A nested low-rank correction: its first k columns and rows are the optimum of rank k.

    Attributes:
        left: A, shape (O, r), float32; columns beyond the exact rank are zero.
        right: B, shape (r, d), float32; the norm of each row is within a factor of 2 of that of its column in A.
        gains: weighted squared output error removed by each rank, shape (r,), float64, descending, never negative.
        total: weighted squared output error before any rank, in the unit of the gains. The part outside of the leading
            eigenvectors is estimated from random probes, with a standard deviation of about 1% of this part.
    """

    left: Tensor
    right: Tensor
    gains: Tensor
    total: float

    def cut(self, rank: int) -> Factors:
        """Return the optimum of a smaller rank, 1 <= rank <= r, as views of these factors.

        Raises:
            RankError: the rank is not between 1 and r.
        """
        if not 1 <= rank <= self.gains.numel():
            raise RankError(f"rank must lie in 1..{self.gains.numel()}, the rank of these factors; found {rank}.")
        return Factors(self.left[:, :rank], self.right[:rank], self.gains[:rank], self.total)


def factorize(
    error: Tensor,
    moment: Tensor | None,
    rank: int,
    *,
    energy: Tensor | None = None,
    output_moment: OutputMoment | None = None,
    damping: float = 0.1,
    seed: int = 0,
) -> Factors:
    """Compute the best low-rank correction of a group under its input moment and, if given, its output moment.

    Args:
        error: stacked weight error E, shape (O, d), any float dtype; O = sum of the members' outputs.
        moment: input second moment S, shape (d, d), or its diagonal, shape (d,), positive semi-definite, squared
            activation units; None means the identity.
        rank: largest rank r to keep, 1 <= r <= min(O, d).
        energy: E S E^T, summed during calibration, shape (O, O); give it instead of `moment`.
        output_moment: second moment G of the loss gradient at the outputs, shape (O, O), or its diagonal, shape (O,),
            or a diagonal plus a low-rank part; None means the identity.
        damping: share of G's mean diagonal that is added to its diagonal before G is factored, > 0; not used without G.
        seed: seed of the start of the Krylov iteration; the global random state is neither read nor changed.

    Returns:
        Factors with left (O, r) and right (r, d) float32 and gains (r,) float64: the error removed by each rank, in
        squared output units, or in units of loss with `output_moment`. Large products run in float32. They are repeated
        in float64 if the first gain is so much larger than the residual that float32 is not accurate to 0.1%.

    Raises:
        NonFiniteError: a tensor holds NaN or Inf.
        RankError: the rank is not between 1 and min(O, d).
        ConfigError: a tensor has the wrong shape, moment and energy are both given, or damping is not positive.

    Source: GlowQ (arXiv 2603.25385) sec. 3; block Krylov iteration after Musco and Musco (arXiv 1504.05477).
    """
    _check(error, moment, rank, energy, output_moment, damping)
    problem = _Problem.build(error, moment, energy, output_moment, damping)
    size = error.shape[0] if problem.streamed else min(error.shape)
    if problem.unit == 0.0:
        basis = error.new_empty(error.shape[0], 0, dtype=torch.float64)
    elif size <= _DIRECT_SIZE or _DIRECT_SHARE * rank >= size:
        basis = problem.eigenvectors()[:, : rank + _GUARD]
    else:
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(error.shape[0], _BLOCK, generator=generator, dtype=torch.float64)
        basis, spread = _krylov(problem, rank, start.to(error.device), size)
        if spread > _SINGLE_SPREAD:
            problem = _Problem.build(error, moment, energy, output_moment, damping, torch.float64)
            basis, _ = _krylov(problem, rank, start.to(error.device), size)
    return _finish(problem, basis, rank, seed)


def weighted_error(error: Tensor, factors: Factors, moment: Tensor | None) -> float:
    """Compute trace((E - AB) S (E - AB)^T), the mean squared output error that remains, in float64.

    Args:
        error: stacked weight error E, shape (O, d).
        factors: correction with left (O, r) and right (r, d).
        moment: S, shape (d, d), its diagonal (d,), or None for the identity.
    """
    right = factors.right.double()
    total = 0.0
    for rows, left in zip(error.split(1024), factors.left.split(1024), strict=True):
        rest = (rows.double() - left.double() @ right).T
        total += float((_times(moment, rest) * rest).sum())
    return total


@dataclass(frozen=True)
class _Problem:
    """The matrix M = L^T X N X^T L, scaled to values near 1, where X N X^T is E S E^T.

    X is E and N is S. If `streamed`, X is the identity and N is E S E^T.
    """

    error: Tensor  # E, (O, d), in the working dtype
    inner: Tensor | None  # N as given
    thin: Tensor | None  # N scaled to values near 1, in the working dtype
    root: OutputRoot  # L, float64
    thin_root: OutputRoot  # L in the working dtype
    streamed: bool
    scale: float  # power of two that brings X near 1
    weight: float  # power of two that brings N near 1
    unit: float  # converts an eigenvalue of M to the caller's units; 0 if there is nothing to correct

    @staticmethod
    def build(
        error: Tensor,
        moment: Tensor | None,
        energy: Tensor | None,
        output_moment: OutputMoment | None,
        damping: float,
        working: torch.dtype = torch.float32,
    ) -> _Problem:
        streamed = energy is not None
        inner = energy if streamed else moment
        scale, weight = power_of("error", error), power_of("energy" if streamed else "moment", inner)
        outer = power_of("output_moment", output_moment)
        alive = scale * weight * outer > 0.0
        scale = 1.0 if streamed else scale
        root = OutputRoot.of(output_moment, outer, damping) if alive and output_moment is not None else OutputRoot()
        unit = 1.0 / scale / scale / weight / outer if alive else 0.0
        thin = None if inner is None else scaled(inner, weight, working)
        return _Problem(error.to(working), inner, thin, root, root.to(working), streamed, scale, weight, unit)

    def apply(self, block: Tensor) -> Tensor:
        """Return M Q, shape (O, b), float64, for Q (O, b); the large products run in the working dtype."""
        image = self.thin_root.apply(block.to(self.error.dtype))
        if not self.streamed:
            image = self.error.T @ image * self.scale
        image = _times(self.thin, image)
        if not self.streamed:
            image = self.error @ image * self.scale
        return self.thin_root.apply_transposed(image).double()

    def project(self, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return E^T L U, unscaled, N X^T L U and U^T M U, all float64, for U (O, m).

        The shapes are (d, m), (d, m) and (m, m). If `streamed`, the second one is (O, m).
        """
        lifted = self.root.apply(basis)
        pulled = (self.error.T @ lifted.to(self.error.dtype)).double()
        outside = (lifted if self.streamed else pulled) * self.scale
        weighted = _times(self.inner, outside) * self.weight
        return pulled, weighted, outside.T @ weighted

    def response(self, weighted: Tensor) -> Tensor:
        """Return X N X^T L U, shape (O, m), float64, from the N X^T L U of `project`."""
        if self.streamed:
            return weighted
        return torch.cat([rows.double() @ weighted for rows in self.error.split(1024)]) * self.scale

    def eigenvectors(self) -> Tensor:
        """Return the eigenvectors of M, leading first, by a dense float64 eigendecomposition of at most min(O, d)."""
        if self.streamed:
            wide = torch.eye(self.error.shape[0], dtype=torch.float64, device=self.error.device)
        else:
            wide = self.error.double() * self.scale
        wide = self.root.apply_transposed(wide)
        frame, wide = torch.linalg.qr(wide) if wide.shape[0] > wide.shape[1] else (None, wide)
        return _times(frame, _leading(wide @ _times(self.inner, wide.T)))


def _krylov(problem: _Problem, rank: int, start: Tensor, size: int) -> tuple[Tensor, float]:
    """Compute the leading Ritz vectors of M from a block Krylov space, which grows until a block adds too little.

    Returns:
        The vectors, and the ratio of the first Ritz value to the sum of those left out.
    """
    block: Tensor = torch.linalg.qr(start)[0]
    basis: Tensor = block[:, :0]
    small, before, largest = block.new_empty(0, 0), block.new_zeros(rank), 0.0
    floor = _FLOOR * torch.finfo(problem.error.dtype).eps
    while block.shape[1] > 0:
        basis = torch.cat([basis, block], dim=1)
        image = problem.apply(block)
        largest = max(largest, float(image.norm(dim=0).max()))
        coupling = basis.T @ image
        small = torch.cat([pad(small, (0, block.shape[1])), coupling.T])  # lower triangle of basis^T M basis
        if small.shape[0] > rank:
            values = torch.linalg.eigvalsh(small).flip(0)
            gained = (values[:rank] * (1 - _JITTER) - before).clamp_min(0).sum()
            # By interlacing, the sum of the Ritz values left out is at most the error that the best correction leaves.
            if gained <= _TOLERANCE * values[rank:].clamp_min(0).sum() + floor * values[0]:
                break
            before = values[:rank]
        block = _fresh(basis, image - basis @ coupling, largest)[:, : size - small.shape[0]]
    values, vectors = torch.linalg.eigh(small)
    spread = float(values[-1] / values[: max(0, len(values) - rank)].clamp_min(0).sum().clamp_min(1e-300))
    return basis @ vectors.flip(1)[:, : rank + _GUARD], spread


def _fresh(basis: Tensor, image: Tensor, largest: float) -> Tensor:
    """Orthonormal columns for the part of `image` outside of `basis`; fewer columns if the space is exhausted.

    Args:
        basis: orthonormal columns, shape (O, m).
        image: shape (O, b).
        largest: norm of the largest column of all images so far, to which the rounding errors are relative.
    """
    squares, vectors = torch.linalg.eigh(image.T @ image)
    kept = squares > max(_EXACT * float(squares[-1]), _ROUNDING * largest * largest)
    columns = image @ vectors[:, kept] / squares[kept].sqrt()
    frame: Tensor = torch.linalg.qr(columns - basis @ (basis.T @ columns))[0]
    return frame


def _finish(problem: _Problem, basis: Tensor, rank: int, seed: int) -> Factors:
    """Rotate a basis to eigenvectors in float64, and give the column and the row of each rank about the same norm.

    The left factor is X N X^T L U / values: the best one for the right factor, in every row. It equals L^-T U for exact
    eigenvectors, whose rounding errors would be relative to the largest output instead of to each output's own error.
    """
    pulled, weighted, small = problem.project(basis)
    values, vectors = (part.flip(-1)[..., :rank] for part in torch.linalg.eigh(small))
    alive = int((values > _EXACT * values[:1].clamp_min(0)).sum())
    vectors = vectors[:, :alive]
    left, right = problem.response(weighted @ vectors) / values[:alive], pulled @ vectors
    shift = (torch.log2(right.norm(dim=0) / left.norm(dim=0)) / 2).round().exp2()
    shift = shift * left.gather(0, left.abs().argmax(dim=0, keepdim=True)).sign()[0]
    rest = rank - alive
    total = max(float(small.trace()) + _beyond(problem, basis, seed), float(values.clamp_min(0).sum()))
    return Factors(
        left=pad(left * shift, (0, rest)).float(),
        right=pad(right / shift, (0, rest)).T.contiguous().float(),
        gains=pad(values[:alive] * problem.unit, (0, rest)),
        total=total * problem.unit,
    )


def _beyond(problem: _Problem, basis: Tensor, seed: int) -> float:
    """Estimate the trace of M outside of a basis from random probes (Hutch++, arXiv 2010.09649)."""
    generator = torch.Generator().manual_seed(seed)
    probes = torch.randn(basis.shape[0], _PROBES, generator=generator, dtype=torch.float64).to(basis.device)
    probes -= basis @ (basis.T @ probes)
    return max(0.0, float((probes * problem.apply(probes)).sum()) / _PROBES)


def _leading(matrix: Tensor) -> Tensor:
    """Eigenvectors of a symmetric matrix, leading first; reads its lower triangle."""
    vectors: Tensor = torch.linalg.eigh(matrix)[1]
    return vectors.flip(1)


def _times(weight: Tensor | None, block: Tensor) -> Tensor:
    """weight @ block in the block's dtype, for a full matrix, a diagonal, or None for the identity."""
    if weight is None:
        return block
    weight = weight.to(block.dtype)
    if weight.ndim == 1:
        return weight[:, None] * block
    return weight @ block


def _check(
    error: Tensor, moment: Tensor | None, rank: int, energy: Tensor | None, outer: OutputMoment | None, damping: float
) -> None:
    if error.ndim != 2:
        raise ConfigError(f"error must have shape (outputs, inputs); found {tuple(error.shape)}.")
    outputs, inputs = error.shape
    if not 1 <= rank <= min(outputs, inputs):
        raise RankError(f"rank must lie in 1..{min(outputs, inputs)}, error being {outputs} x {inputs}; found {rank}.")
    if moment is not None and energy is not None:
        raise ConfigError("moment and energy were both given; give one: energy already holds the input moment.")
    if damping <= 0:
        raise ConfigError(f"damping must be positive; found {damping}.")
    if isinstance(outer, LowRankMoment):
        if outer.factor.ndim != 2 or (*outer.diagonal.shape, len(outer.factor)) != (outputs, outputs):
            found = f"{tuple(outer.diagonal.shape)} and {tuple(outer.factor.shape)}"
            raise ConfigError(f"output_moment must have shapes ({outputs},) and ({outputs}, k); found {found}.")
        outer = None
    widths = (("moment", moment, inputs), ("energy", energy, outputs), ("output_moment", outer, outputs))
    for name, tensor, width in widths:
        shapes = [(width, width)] if name == "energy" else [(width, width), (width,)]
        if tensor is not None and tuple(tensor.shape) not in shapes:
            wanted = " or ".join(str(shape) for shape in shapes)
            raise ConfigError(f"{name} must have shape {wanted}; found {tuple(tensor.shape)}.")
