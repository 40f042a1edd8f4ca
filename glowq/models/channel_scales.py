"""Diagonal scales that a quantizer folded into a model before it rounded, found again from the weights alone.

AWQ and SmoothQuant divide what a layer gives out by s, channel by channel, and multiply the columns of the linear
layers that read it by s. The model computes the same, but Q then approximates W' = diag(1/t) W diag(s), not W: s came
in from the layer before, t went out to the layer behind. So W - Q is no quantization error, and W' - Q is.

Any pair of scales that cancels leaves the reference's function alone. That is why s need not be known exactly, as long
as the producer is divided by the very numbers that its consumers are multiplied by: an inexact s makes the error W' - Q
a little larger, never wrong. (A bias of the producer is not ours to change, but it tells s to the digit.) Where no
producer of s is found, W' is unknown and the model is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["VISIBLE", "Match", "Pair", "Scales", "Slopes", "best_match", "fit_columns", "slopes"]

Pair = tuple[Tensor, Tensor]  # a module's W and Q, both (o, d) float32

VISIBLE = 0.01  # nf4, int2 to int4, GPTQ and HQQ of the bundled model stay below 0.001, AWQ's folded layers above 0.04
_CERTAIN = 0.05
_LEFT = 0.7  # of the error's energy, once every column is scaled: AWQ's folded layers keep 0.2 to 0.64
_NOISE = 0.25  # of the quantized weight's energy: 2 bits of normal values keep 0.12, signs alone 0.36
_EXPLAINED = 0.5  # of the columns' log scales, by a layer that is believed to be their producer
_ROUNDS = 3
_CHUNK = 1024  # rows worked on at once, so that the products of a large weight are never held as a whole


@dataclass(frozen=True)
class Scales:
    """W' = diag(1 / rows) W diag(columns) is what a quantized weight approximates.

    Attributes:
        rows: t, shape (o,), float64: divided out of the module's outputs; None for ones.
        columns: s, shape (d,), float64: multiplied into the module's inputs; None for ones.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None

    def apply(self, weight: Tensor) -> Tensor:
        """Scale `weight`, shape (o, d), in place; returns it."""
        if self.columns is not None:
            weight *= self.columns.to(weight)
        if self.rows is not None:
            weight /= self.rows.to(weight)[:, None]
        return weight


@dataclass(frozen=True)
class Slopes:
    """Regression of Q on W, a channel at a time.

    Attributes:
        full: sum of W^2 of each channel, float64 on the CPU like the others.
        cross: sum of W Q.
        quantized: sum of Q^2.
        count: values a channel.
    """

    full: Tensor
    cross: Tensor
    quantized: Tensor
    count: int

    @property
    def log(self) -> Tensor:
        """log of the slope <W, Q> / <W, W>; 0 where W and Q say nothing."""
        return torch.where(self._sound, self.cross / self.full, 1.0).log()

    @property
    def weight(self) -> Tensor:
        """How much each channel's slope is worth: its signal against its noise."""
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
        """The same with W multiplied by `factor`, a number a channel."""
        return replace(self, full=self.full * factor**2, cross=self.cross * factor)

    def excess(self) -> float:
        """Root mean square of log scale, by energy, that rounding cannot explain.

        Rounding makes no difference between a scale of <W, Q> / <W, W> (its noise is independent of W) and one of
        <Q, Q> / <W, Q> (independent of Q, as with clipping): a channel counts by how far all of that interval, and
        three standard deviations of its sample, lie outside the interval of all channels together.
        """
        sound = self._sound & (self.quantized > 0)
        if not bool(sound.any()):
            return 0.0
        energy = torch.where(sound, self.quantized, 0.0)
        spread = torch.where(sound, self.full * self.quantized / self.cross**2, 1.0).clamp_min(1.0)
        low, high = self.log, self.log + spread.log()
        all_low, all_high = (self.cross.sum() / self.full.sum()).log(), (self.quantized.sum() / self.cross.sum()).log()
        outside = torch.relu(low - all_high) + torch.relu(all_low - high) - 3 * ((spread - 1) / self.count).sqrt()
        return float(((energy * torch.relu(outside) ** 2).sum() / energy.sum()).sqrt())

    def certain(self) -> bool:
        """Whether the channels are scaled beyond doubt.

        Columns of very unequal size that were clipped hard or rounded to signs look alike, but then scaling them leaves
        most of the error where it was.
        """
        total = self.quantized.sum()
        one = total - self.cross.sum() ** 2 / self.full.sum().clamp_min(1e-300)
        each = total - (self.cross**2 / self.full.clamp_min(1e-300)).sum()
        return self.excess() > _CERTAIN and bool(each < _LEFT * one) and bool(each < _NOISE * total)

    @property
    def _sound(self) -> Tensor:
        # Channels whose values are told apart: one that is rounded to nothing but signs or zeros has a slope that its
        # neighbours' step decides, not its own scale. Signs of normal values keep 0.64, 2 bits 0.88.
        return (self.full > 0) & (self.cross > 0) & (self.cross**2 > 0.7 * self.full * self.quantized)


@dataclass(frozen=True)
class Match:
    """The layer whose outputs hold the inverse of a group's column scales.

    Attributes:
        producer: its name.
        rows: what its outputs were divided by, shape (o,), float64.
        reading: the output that each column of the group reads, shape (d,), int64; None where the producer is no
            quantized linear module but gives out the group's input as it is (o = d).
    """

    producer: str
    rows: Tensor
    reading: Tensor | None = None


def slopes(pairs: Sequence[Pair], dim: int, factors: Sequence[Tensor] = ()) -> Slopes:
    """Regression of Q on W of modules that share their channels.

    Args:
        pairs: W and Q of each module, shape (o_i, d).
        dim: 0 for one slope a column, all modules together; 1 for one slope a row, one module's rows after another's.
        factors: what W is multiplied by first: for `dim` 0 its rows, one tensor of shape (o_i,) a module; for `dim` 1
            its columns, one tensor of shape (d,).
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
    """Column slopes of modules that read the same tensor, whatever their rows are scaled by.

    Q is fitted by diag(a) W diag(b) in alternating least squares; only the shape of b over the channels is meant, since
    a number can always be moved from a to b.
    """
    widths = [weight.shape[0] for weight, _ in pairs]
    columns = slopes(pairs, 0)
    for _ in range(_ROUNDS):
        rows = slopes(pairs, 1, [_centred(columns).exp()])
        columns = slopes(pairs, 0, _centred(rows).exp().split(widths))
    return columns


def best_match(columns: Sequence[Slopes], layers: Mapping[str, Tensor], linears: Mapping[str, Slopes]) -> Match | None:
    """The layer that the column scales of a group were folded out of.

    Args:
        columns: estimates of the group's column slopes, each of shape (d,): as they are, and from `fit_columns`.
        layers: name -> exact scale of a layer that is no quantized linear module, shape (d,).
        linears: name -> row slopes of a linear module that ran before, any width.

    Returns:
        The producer that explains the scales best, exact ones first; None where none does.
    """
    plain, fitted = columns
    energy = fitted.quantized * (fitted.weight > 0)
    share, producer, scale = _EXPLAINED, "", None
    for name, exact in layers.items():
        # As they are, to see a scale that is the same for every channel; fitted, where the rows are scaled as well.
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
    """Share of the slopes' log scales that `log` explains: 1 all of it, below 0 less than no scale at all.

    Args:
        weight: of each channel.
        shape: whether only the shape over the channels counts, not the level.
    """
    rest = found.log - log
    before, after = (values - _mean(values, weight) if shape else values for values in (found.log, rest))
    square = float((weight * before**2).sum())
    return 1 - float((weight * after**2).sum()) / square if square > 0 else 0.0


def _readings(outputs: int, inputs: int) -> Iterator[Tensor]:
    """Ways in which `inputs` channels can come from a layer's last rows: index of the row of each channel.

    The last rows, because a fused layer gives the values (of q, k, v) or the multiplied half (of gate, up) last. With
    grouped heads each head's rows are read by several heads in turn, whose width no weight tells: all are tried.
    """
    for repeat in (n for n in range(1, inputs + 1) if inputs % n == 0 and inputs // n <= outputs):
        size = inputs // repeat
        if repeat > 1 and size == 1:
            return
        for width in (n for n in range(1, size + 1) if size % n == 0) if repeat > 1 else (size,):
            rows = torch.arange(outputs - size, outputs).view(-1, 1, width)
            yield rows.expand(-1, repeat, -1).reshape(-1)


def _joint_scale(producer: Slopes, columns: Slopes, reading: Tensor) -> Tensor:
    """One scale for both sides, from the rows of the one and the columns of the other, by what each is worth."""
    made = producer.weight
    read = torch.zeros_like(made).index_add_(0, reading, columns.weight)
    # The producer's own columns are settled, so its rows say how large the scales are as well as how they differ.
    level = _mean(columns.log + producer.log[reading], columns.weight * (made[reading] > 0))
    seen = torch.zeros_like(made).index_add_(0, reading, columns.weight * (columns.log - level))
    log = (seen - made * producer.log) / (made + read).clamp_min(1e-300)
    used = torch.zeros_like(made).index_fill_(0, reading, 1.0)
    return torch.where(used > 0, log, 0.0).exp()
