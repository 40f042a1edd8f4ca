"""The cloze test: its items come from the text as described, and its scores are those of transformers' own loss."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from glowq.errors import ConfigError, EvaluationError, NonFiniteError
from glowq.evaluation.cloze import ClozeScore, accuracy, accuracy_gain, cloze_items, cloze_scores
from glowq.evaluation.intervals import Interval
from support.tiny import load, quantized, seeded

NUMBERED = torch.arange(6 * 250).view(6, 250)  # no token twice, so that an id says where it stands
SEQUENCES = torch.randint(0, 4096, (8, 170), generator=torch.Generator().manual_seed(3))


class Counting(nn.Module):
    """A model that expects each number to be followed by the next one, and knows no number from `known` on."""

    def __init__(self, known: int) -> None:
        super().__init__()
        self.known = known

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        following = torch.where(input_ids < self.known, input_ids + 1, 0)
        return SimpleNamespace(logits=10 * nn.functional.one_hot(following, NUMBERED.numel() + 1).float())


def test_a_passage_is_followed_by_the_answer() -> None:
    items = cloze_items(NUMBERED, 12, seed=4)
    assert items.contexts.shape == (12, 64)
    assert items.choices.shape == (12, 4, 16)
    assert items.answers.shape == (12,)
    true = items.choices[torch.arange(12), items.answers]
    passages = torch.cat([items.contexts, true], dim=1)
    assert torch.equal(passages, passages[:, :1] + torch.arange(80))
    assert (passages[:, 0] // 250 == passages[:, -1] // 250).all()  # of one sequence
    assert len(passages.unique()) == passages.numel()  # and none overlaps another


def test_the_answer_stands_at_each_place_equally_often() -> None:
    answers = cloze_items(torch.arange(100 * 160).view(100, 160), 200).answers
    assert all(30 <= found <= 70 for found in answers.bincount(minlength=4).tolist())


def test_other_continuations_are_runs_of_the_text_from_elsewhere() -> None:
    items = cloze_items(NUMBERED, 18)
    assert torch.equal(items.choices, items.choices[..., :1] + torch.arange(16))
    for context, choices, answer in zip(items.contexts, items.choices, items.answers, strict=True):
        assert len(choices.unique()) == 64  # no two overlap
        others = choices[torch.arange(4) != answer]
        assert not torch.isin(others, context).any()
        assert (others[:, 0] // 250 == others[:, -1] // 250).all()


def test_items_are_those_of_their_seed() -> None:
    state = torch.get_rng_state()
    first, again, other = (cloze_items(NUMBERED, 6, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.choices, again.choices)
    assert torch.equal(first.contexts, again.contexts)
    assert torch.equal(first.answers, again.answers)
    assert not torch.equal(first.choices, other.choices)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_continuation_that_occurs_twice_is_offered_once() -> None:
    repeated = NUMBERED.clone()
    repeated[1:] = repeated[1:2]
    for choices in cloze_items(repeated, 18).choices:
        assert len(choices.unique(dim=0)) == 4


def test_likelihoods_are_those_of_transformers_own_loss(source: Path) -> None:
    model = load(source, dtype=torch.float32)
    items = cloze_items(SEQUENCES, 5)
    found = cloze_scores({"model": model}, items)["model"]
    for at, (context, choices) in enumerate(zip(items.contexts, items.choices, strict=True)):
        for number, choice in enumerate(choices):
            ids = torch.cat([context, choice])[None]
            labels = ids.clone()
            labels[:, :64] = -100
            with torch.no_grad():
                loss = model(input_ids=ids, labels=labels).loss
            assert float(found.likelihoods[at, number]) == pytest.approx(-float(loss), rel=1e-5)
    best = [max(range(4), key=lambda number, row=row: row[number]) for row in found.likelihoods.tolist()]
    assert found.correct.tolist() == [float(a == b) for a, b in zip(best, items.answers.tolist(), strict=True)]


def test_models_answer_the_same_items_and_batches_do_not_matter(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = cloze_items(SEQUENCES, 5)
    models = {"first": load(source, dtype=torch.float32), "nf4": quantized(source, "nf4")}
    together = cloze_scores(models, items)
    monkeypatch.setattr("glowq.evaluation.cloze._BATCH_TOKENS", 1)
    alone = cloze_scores({"first": models["first"]}, items)
    assert torch.allclose(alone["first"].likelihoods, together["first"].likelihoods, rtol=1e-6)
    assert not torch.equal(together["nf4"].likelihoods, together["first"].likelihoods)


def test_a_model_that_knows_the_text_is_right_and_one_that_knows_half_is_not() -> None:
    items = cloze_items(NUMBERED, 18)
    found = cloze_scores({"all": Counting(NUMBERED.numel()), "half": Counting(750)}, items)
    assert accuracy(found["all"]) == Interval(1.0, 1.0, 1.0)
    knows = items.contexts[:, 0] < 750
    assert (found["half"].correct[knows] == 1).all()
    assert 0.5 <= accuracy(found["half"]).value < 1


def test_gain_is_paired_by_item() -> None:
    draws = torch.rand(60, generator=torch.Generator().manual_seed(0))
    first = ClozeScore(torch.zeros(60, 4), (draws < 0.5).double())
    second = ClozeScore(torch.zeros(60, 4), (draws < 0.6).double())  # right wherever the first one is
    gain = accuracy_gain(first, second)
    assert gain.value == pytest.approx(accuracy(second).value - accuracy(first).value)
    assert gain.low >= 0
    assert gain.high - gain.low < accuracy(first).high - accuracy(first).low
    assert accuracy_gain(first, first) == Interval(0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("sequences", "count", "expected"),
    [
        (NUMBERED, 0, "the number of cloze items must be a whole number of at least 1, found 0"),
        (
            NUMBERED,
            19,
            r"19 cloze items need 19 passages of 80 tokens, found 18 in 6 sequences of 250 tokens: give",
        ),
        (NUMBERED[:, :79], 1, "found 0 in 6 sequences of 79 tokens"),
        (NUMBERED[:1, :112], 1, "needs 3 other continuations of 16 tokens, found 2 that differ: give more text"),
        (torch.zeros(4, 250, dtype=torch.int64), 1, "found 0 that differ"),
    ],
    ids=["none", "too many", "short sequences", "few continuations", "one token"],
)
def test_text_that_is_not_enough(sequences: Tensor, count: int, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        cloze_items(sequences, count)


def test_logits_that_are_no_numbers_are_refused(source: Path) -> None:
    model = load(source)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(NonFiniteError, match="broken: its logits hold NaN or Inf"):
        cloze_scores({"broken": model}, cloze_items(SEQUENCES, 1))


def test_a_model_without_logits_is_refused() -> None:
    with seeded(0):
        model = BertModel(
            BertConfig(
                vocab_size=1500, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
            )
        )
    with pytest.raises(EvaluationError, match="encoder returns no token logits"):
        cloze_scores({"encoder": model}, cloze_items(NUMBERED, 1))
