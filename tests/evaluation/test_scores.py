"""Perplexity, KL and their intervals, compared with transformers' loss and with values computed by hand."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from glowq.errors import EvaluationError, NonFiniteError
from glowq.evaluation.intervals import Interval, bootstrap
from glowq.evaluation.scores import Score, perplexity, perplexity_ratio, recovered, score_models
from support.tiny import load, quantized, seeded

SEQUENCES = torch.randint(0, 4096, (8, 48), generator=torch.Generator().manual_seed(3))


class Fixed(nn.Module):
    """A model that predicts the same distribution at every position."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.logits = torch.tensor(probabilities).log()

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


@pytest.fixture(scope="module")
def scores(source: Path) -> dict[str, Score]:
    model = load(source, dtype=torch.float32)
    return score_models({"first": model, "same": model, "nf4": quantized(source, "nf4")}, SEQUENCES)


def test_perplexity_is_that_of_transformers_own_loss(scores: dict[str, Score], source: Path) -> None:
    model = load(source, dtype=torch.float32)
    with torch.no_grad():
        losses = [float(model(input_ids=ids, labels=ids).loss) for ids in SEQUENCES.split(1)]
    assert scores["first"].nll.tolist() == pytest.approx(losses, rel=1e-6)
    assert perplexity(scores["first"]) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)


def test_a_model_does_not_differ_from_itself(scores: dict[str, Score]) -> None:
    assert torch.equal(scores["same"].kl, torch.zeros(8, dtype=torch.float64))
    assert torch.equal(scores["same"].top1, torch.ones(8, dtype=torch.float64))
    assert torch.equal(scores["same"].nll, scores["first"].nll)
    assert perplexity_ratio(scores["first"], scores["same"]) == Interval(1.0, 1.0, 1.0)


def test_a_quantized_model_differs_from_its_reference(scores: dict[str, Score]) -> None:
    assert (scores["nf4"].kl > 0).all()
    assert (scores["nf4"].top1 < 1).all()


def test_figures_worked_out_by_hand() -> None:
    ids = torch.tensor([[0, 1, 0], [2, 2, 1]])
    found = score_models({"reference": Fixed([0.5, 0.25, 0.25]), "model": Fixed([0.25, 0.5, 0.25])}, ids)
    half, quarter = math.log(2), math.log(4)
    assert found["reference"].nll.tolist() == pytest.approx([(quarter + half) / 2, quarter])
    assert found["model"].nll.tolist() == pytest.approx([(half + quarter) / 2, (quarter + half) / 2])
    assert found["model"].kl.tolist() == pytest.approx([0.25 * math.log(2)] * 2)
    assert found["model"].top1.tolist() == [0.0, 0.0]
    assert perplexity(found["reference"]) == pytest.approx(2**1.75)
    assert perplexity_ratio(found["reference"], found["model"]).value == pytest.approx(2**-0.25)


def test_batches_do_not_matter(source: Path, monkeypatch: pytest.MonkeyPatch, scores: dict[str, Score]) -> None:
    monkeypatch.setattr("glowq.evaluation.scores._BATCH_TOKENS", 1)
    one_by_one = score_models({"first": load(source, dtype=torch.float32)}, SEQUENCES)["first"]
    assert torch.allclose(one_by_one.nll, scores["first"].nll, rtol=1e-6)


def test_the_bootstrap_of_a_mean() -> None:
    columns = torch.tensor([1.0, 2.0, 4.0, 9.0] * 4, dtype=torch.float64)[:, None]
    found = bootstrap(lambda means: means[..., 0], columns, resamples=400, seed=7)
    generator = torch.Generator().manual_seed(7)
    rows = torch.randint(16, (400, 16), generator=generator)
    means = sorted(float(columns[row, 0].mean()) for row in rows)
    # Normal tail beyond Student's t of 15 degrees of freedom, 2.1314, times sqrt(16 / 15): 1.386%. The q-quantile of n
    # sorted values is at position q (n - 1) = 5.53, interpolated between the two nearest values.
    assert found.value == 4.0
    assert found.low == pytest.approx(means[5] + 0.53 * (means[6] - means[5]), abs=1e-3)
    assert found.high == pytest.approx(means[393] + 0.47 * (means[394] - means[393]), abs=1e-3)


def test_the_bootstrap_is_that_of_its_seed() -> None:
    columns = torch.rand(20, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    first, again, other = (bootstrap(lambda means: means[..., 0], columns, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert first.low < first.value < first.high
    assert torch.equal(torch.get_rng_state(), state)


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for seed in range(200):
        columns = torch.randn(60, 1, dtype=torch.float64, generator=generator)
        found = bootstrap(lambda means: means[..., 0], columns, resamples=400, seed=seed)
        hits += found.low <= 0.0 <= found.high
    assert 180 <= hits <= 198


def scored(nll: Tensor) -> Score:
    return Score(nll, torch.zeros_like(nll), torch.ones_like(nll))


def test_recovered_is_the_share_of_the_perplexity_gap() -> None:
    reference = torch.full((8,), math.log(10.0), dtype=torch.float64)
    quantized_, halfway = (torch.full_like(reference, math.log(value)) for value in (14.0, 12.0))
    found = recovered(scored(reference), scored(quantized_), scored(halfway))
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    assert recovered(scored(reference), scored(quantized_), scored(reference)).value == pytest.approx(1.0)
    assert recovered(scored(reference), scored(quantized_), scored(quantized_)).value == 0.0


def test_pairing_takes_the_difficulty_of_the_text_out() -> None:
    hard = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = perplexity_ratio(scored(hard), scored(hard + 0.1))
    assert found.value == pytest.approx(math.exp(0.1))
    assert found.high - found.low < 1e-12


def test_different_vocabularies_cannot_be_compared() -> None:
    models = {"reference": Fixed([0.5, 0.25, 0.25]), "other": Fixed([0.5, 0.5])}
    with pytest.raises(EvaluationError, match="other predicts 2 tokens and the reference 3"):
        score_models(models, torch.zeros(1, 4, dtype=torch.int64))


def test_logits_that_are_no_numbers_are_refused(source: Path) -> None:
    model = load(source)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(NonFiniteError, match="broken: its logits hold NaN or Inf"):
        score_models({"broken": model}, SEQUENCES)


def test_a_model_without_logits_is_refused() -> None:
    with seeded(0):
        model = BertModel(
            BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        )
    with pytest.raises(EvaluationError, match="encoder returns no token logits"):
        score_models({"encoder": model}, torch.zeros(1, 4, dtype=torch.int64))


def test_an_interval_reads_well() -> None:
    assert str(Interval(0.46784, 0.3857, 0.54961)) == "0.4678 [0.3857, 0.5496]"
