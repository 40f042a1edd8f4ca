"""Find the channel scales that a quantizer folded into a model before it rounded, from the weights alone.

AWQ and SmoothQuant divide the outputs of a layer (the producer) by s, channel by channel, and multiply the columns of
the linear layers that read these outputs (the consumers) by s. The model computes the same function, but the quantized
weight Q of a linear layer then approximates W' = diag(1/t) W diag(s), not W: its columns hold the scales s of the layer
before, and its rows are divided by the scales t of the layers after. The quantization error is W' - Q, not W - Q.

Scales that cancel do not change the function of the reference. Therefore s need not be known exactly, as long as the
producer is divided by the same numbers that its consumers are multiplied by: an inexact s makes the error W' - Q a
little larger, but not wrong. (A correction cannot change the bias of a producer, but the bias gives s exactly.) If no
producer of s is found, W' is unknown and an error is raised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["VISIBLE", "Match", "Pair", "Scales", "Slopes", "best_match", "fit_columns", "slopes"]

Pair = tuple[Tensor, Tensor]  # a module's W and Q, both (o, d) float32

# `Slopes.excess` from which channels may be scaled. In the bundled model, nf4, int2 to int4, GPTQ and HQQ stay below
# 0.001, and the folded layers of AWQ are above 0.04.
VISIBLE = 0.01
_CERTAIN = 0.05  # `Slopes.excess` above which channels can be certainly scaled
_LEFT = 0.7  # share of the error's energy that may be left after scaling each column; AWQ's folded layers keep 0.2-0.64
_NOISE = 0.25  # the same, as a share of the quantized weight's energy; normal values keep 0.12 in 2 bits, 0.36 as signs
_EXPLAINED = 0.5  # share of the columns' log scales that a layer must explain to be taken for their producer
_LEAST_COUNT = 16  # values of a channel; fewer do not tell its scale from the noise of rounding
_ROUNDS = 3
_CHUNK = 1024  # rows processed at once, so that the products of a large weight are never in memory as a whole


@dataclass(frozen=True)
class Scales:
    """The scales that are folded into a quantized weight: it approximates W' = diag(1 / rows) W diag(columns).

    Attributes:
        rows: t, shape (o,), float64: the rows of the weight are divided by it; None for ones.
        columns: s, shape (d,), float64: the columns of the weight are multiplied by it; None for ones.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None

    def apply(self, weight: Tensor) -> Tensor:
        """Scale `weight`, shape (o, d), in place, and return it."""
        if self.columns is not None:
            weight *= self.columns.to(weight)
        if self.rows is not None:
            weight /= self.rows.to(weight)[:, None]
        return weight


@dataclass(frozen=True)
class Slopes:
    """Regression of Q on W, separately for each channel.

    Attributes:
        full: sum of W^2 of each channel, float64, on the CPU.
        cross: sum of W Q of each channel, likewise.
        quantized: sum of Q^2 of each channel, likewise.
        count: number of values per channel.
    """

    full: Tensor
    cross: Tensor
    quantized: Tensor
    count: int

    @property
    def log(self) -> Tensor:
        """log of the slope <W, Q> / <W, W> of each channel; 0 for a channel whose slope is not reliable."""
        return torch.where(self._sound, self.cross / self.full, 1.0).log()

    @property
    def weight(self) -> Tensor:
        """Weight of each channel's slope: the ratio of signal to noise; 0 for a channel whose slope is not reliable."""
        noise = (self.quantized - self.cross**2 / self.full).clamp_min(1e-9 * self.quantized)
        return torch.where(self._sound, self.cross**2 / self.full / noise, 0.0)

    @property
    def cosine(self) -> float:
        """Cosine similarity of W and Q, all channels together; 1 where one of them is zero."""
        size = (self.full.sum() * self.quantized.sum()).sqrt()
        return float(self.cross.sum() / size) if size > 0 else 1.0

    @property
    def error(self) -> float:
        """|W - Q| / |W|."""
        square = (self.full - 2 * self.cross + self.quantized).sum() / self.full.sum().clamp_min(1e-300)
        return float(square.clamp_min(0).sqrt())

    def scaled(self, factor: Tensor) -> Slopes:
        """Return the regression for W multiplied by `factor`, one number per channel."""
        return replace(self, full=self.full * factor**2, cross=self.cross * factor)

    def excess(self) -> float:
        """Return the log scale that rounding cannot explain, as a root mean square over channels, weighted by energy.

        If the rounding noise is independent of W, the scale of a channel is <W, Q> / <W, W>. If it is independent of Q,
        as with clipping, the scale is <Q, Q> / <W, Q>. The true scale lies in the interval between the two. A channel
        counts by the distance between its interval and the interval of all channels together, less three standard
        deviations of the sample.
        """
        sound = self._sound & (self.quantized > 0)
        if not bool(sound.any()) or self.count < _LEAST_COUNT:
            return 0.0
        energy = torch.where(sound, self.quantized, 0.0)
        spread = torch.where(sound, self.full * self.quantized / self.cross**2, 1.0).clamp_min(1.0)
        low, high = self.log, self.log + spread.log()
        all_low, all_high = (self.cross.sum() / self.full.sum()).log(), (self.quantized.sum() / self.cross.sum()).log()
        outside = torch.relu(low - all_high) + torch.relu(all_low - high) - 3 * ((spread - 1) / self.count).sqrt()
        return float(((energy * torch.relu(outside) ** 2).sum() / energy.sum()).sqrt())

    def certain(self) -> bool:
        """Whether the channels are certainly scaled.

        Columns of very unequal size that were strongly clipped or rounded to signs also have a large `excess`. But if
        such columns are scaled, most of the error is left.
        """
        total = self.quantized.sum()
        one = total - self.cross.sum() ** 2 / self.full.sum().clamp_min(1e-300)
        each = total - (self.cross**2 / self.full.clamp_min(1e-300)).sum()
        return self.excess() > _CERTAIN and bool(each < _LEFT * one) and bool(each < _NOISE * total)

    @property
    def _sound(self) -> Tensor:
        # Whether the slope of a channel is reliable. If all its values were rounded to signs or zeros, its slope
        # depends on the rounding step that it shares with its neighbours, not on its own scale. The squared cosine of W
        # and Q is 0.64 for signs of normal values and 0.88 for 2 bits.
        return (self.full > 0) & (self.cross > 0) & (self.cross**2 > 0.7 * self.full * self.quantized)


@dataclass(frozen=True)
class Match:
    """The layer whose outputs were divided by a group's column scales.

    Attributes:
        producer: name of the layer.
        rows: scales that its outputs were divided by, shape (o,), float64.
        reading: index of the output that each column of the group reads, shape (d,), int64. None if the producer is not
            a quantized linear module: its outputs are then the group's input (o = d).
    """

    producer: str
    rows: Tensor
    reading: Tensor | None = None


def slopes(pairs: Sequence[Pair], dim: int, factors: Sequence[Tensor] = ()) -> Slopes:
    """Compute the regression of Q on W for modules that read the same tensor.

    Args:
        pairs: W and Q of each module, shape (o_i, d).
        dim: 0 for one slope per column, over all modules together; 1 for one slope per row, over the rows of all
            modules in order.
        factors: factors to multiply W by first. For `dim` 0 they multiply the rows: one tensor of shape (o_i,) per
            module. For `dim` 1 they multiply the columns: one tensor of shape (d,).
    """
    parts: list[list[Tensor]] = [[], [], []]
    for index, (weight, quantized) in enumerate(pairs):
        factor = (factors[index][:, None] if dim == 0 else factors[0][None]).to(weight) if factors else None
        for w, q, f in _chunks(weight, quantized, factor):
            scaled = w if f is None else w * f
            for part, (a, b) in zip(parts, ((scaled, scaled), (scaled, q), (q, q)), strict=True):
                part.append((a * b).sum(dim).cpu().double())
    full, cross, square = (torch.stack(part).sum(0) if dim == 0 else torch.cat(part) for part in parts)
    count = sum(w.shape[0] for w, _ in pairs) if dim == 0 else pairs[0][0].shape[1]
    return Slopes(full, cross, square, count)


def fit_columns(pairs: Sequence[Pair]) -> Slopes:
    """Compute the column slopes of modules that read the same tensor, if their rows may be scaled too.

    Alternating least squares fit Q by diag(a) W diag(b). Only the ratios within b are determined, since a common factor
    can be moved from a to b.
    """
    widths = [weight.shape[0] for weight, _ in pairs]
    columns = slopes(pairs, 0)
    for _ in range(_ROUNDS):
        rows = slopes(pairs, 1, [_centred(columns).exp()])
        columns = slopes(pairs, 0, _centred(rows).exp().split(widths))
    return columns


def best_match(columns: Sequence[Slopes], layers: Mapping[str, Tensor], linears: Mapping[str, Slopes]) -> Match | None:
    """Find the layer that the column scales of a group were folded out of.

    Args:
        columns: two estimates of the group's column slopes, each of shape (d,): from `slopes`, and from `fit_columns`.
        layers: name -> exact scale of a layer that is not a quantized linear module, shape (d,).
        linears: name -> row slopes of a quantized linear module that runs before the group, any width.

    Returns:
        The producer that explains the scales best, from `layers` if one of them explains them; None if no layer does.
    """
    plain, fitted = columns
    energy = fitted.quantized * (fitted.weight > 0)
    share, producer, scale = _EXPLAINED, "", None
    for name, exact in layers.items():
        # The plain slopes show a scale that is the same for every channel. The fitted ones are right for scaled rows.
        alike = max(
            _explained(plain, exact.log(), plain.quantized * (plain.weight > 0), shape=False),
            _explained(fitted, exact.log(), energy, shape=True),
        )
        if alike > share:
            share, producer, scale = alike, name, exact
    if scale is not None:
        return Match(producer, scale)
    if fitted.excess() < VISIBLE:
        return None
    reading = None
    for name, rows in linears.items():
        if rows.excess() < VISIBLE:
            continue
        for index in _readings(rows.full.shape[0], fitted.full.shape[0]):
            alike = _explained(fitted, -rows.log[index], energy * (rows.weight[index] > 0), shape=True)
            if alike > share:
                share, producer, reading = alike, name, index
    if reading is None:
        return None
    return Match(producer, _joint_scale(linears[producer], fitted, reading), reading)


def _chunks(weight: Tensor, quantized: Tensor, factor: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    for start in range(0, weight.shape[0], _CHUNK):
        rows = slice(start, start + _CHUNK)
        yield weight[rows], quantized[rows], factor if factor is None or factor.shape[0] == 1 else factor[rows]


def _centred(found: Slopes) -> Tensor:
    return found.log - _mean(found.log, found.full)


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    return (values * weight).sum() / weight.sum().clamp_min(1e-300)


def _explained(found: Slopes, log: Tensor, weight: Tensor, *, shape: bool) -> float:
    """Share of the slopes' log scales that `log` explains: 1 for a perfect fit, below 0 if no scale would fit better.

    Args:
        weight: weight of each channel.
        shape: whether only the differences between channels count, not the mean.
    """
    rest = found.log - log
    before, after = (values - _mean(values, weight) if shape else values for values in (found.log, rest))
    square = float((weight * before**2).sum())
    return 1 - float((weight * after**2).sum()) / square if square > 0 else 0.0


def _readings(outputs: int, inputs: int) -> Iterator[Tensor]:
    """Yield the ways in which `inputs` channels can read a layer's last rows: the index of the row of each channel.

    Scales are folded into the last rows of a fused layer: v of q, k and v, or up of gate and up. With grouped heads,
    several heads read the rows of one head. The weights do not show how wide a head is, so all widths are tried.
    """
    for repeat in (n for n in range(1, inputs + 1) if inputs % n == 0 and inputs // n <= outputs):
        size = inputs // repeat
        if repeat > 1 and size == 1:
            return
        for width in (n for n in range(1, size + 1) if size % n == 0) if repeat > 1 else (size,):
            rows = torch.arange(outputs - size, outputs).view(-1, 1, width)
            yield rows.expand(-1, repeat, -1).reshape(-1)


def _joint_scale(producer: Slopes, columns: Slopes, reading: Tensor) -> Tensor:
    """Compute one scale from the rows of the producer and the columns of the group, as a mean by their weights."""
    made = producer.weight
    read = torch.zeros_like(made).index_add_(0, reading, columns.weight)
    # The scales of the producer's own columns are known. Therefore the slopes of its rows also give the size of its row
    # scales, not only their ratios.
    level = _mean(columns.log + producer.log[reading], columns.weight * (made[reading] > 0))
    seen = torch.zeros_like(made).index_add_(0, reading, columns.weight * (columns.log - level))
    log = (seen - made * producer.log) / (made + read).clamp_min(1e-300)
    used = torch.zeros_like(made).index_fill_(0, reading, 1.0)
    return torch.where(used > 0, log, 0.0).exp()
