"""Metrics against versions written out from their definitions, on random data, and single values worked by hand."""

from __future__ import annotations

import math
import random
import re
from fractions import Fraction
from pathlib import Path

import benchmark_data
import numpy as np
import pytest
import tiny
import torch
from nltk.stem.porter import PorterStemmer

from editunlearn.evaluation.attacks.probing import Lens
from editunlearn.evaluation.judging import judge
from editunlearn.evaluation.metrics import likelihood, text
from editunlearn.evaluation.probes import Probe, Seen
from editunlearn.evaluation.suites import Source, facts, inside, muse, rwku
from editunlearn.lm.likelihood import TokenScores
from editunlearn.lm.tokens import Prompt

# --- ROUGE-L


def stemmed(line: str) -> list[str]:
    stem = PorterStemmer().stem
    return [stem(word) if len(word) > 3 else word for word in re.findall("[a-z0-9]+", line.lower())]


def subsequence(one: list[str], other: list[str]) -> int:
    """Length of the longest common one, by its definition (exponential, for few words)."""
    if not one or not other:
        return 0
    if one[0] == other[0]:
        return 1 + subsequence(one[1:], other[1:])
    return max(subsequence(one[1:], other), subsequence(one, other[1:]))


def test_rouge_l_stemmed() -> None:
    words = "Running runs, runner! Flies flying the cats' cat-like 1783 Zürich relational relate A an".split()
    draw = random.Random(0)
    for _ in range(60):
        said, gold = (" ".join(draw.choices(words, k=draw.randint(1, 7))) for _ in range(2))
        common, one, other = subsequence(stemmed(said), stemmed(gold)), stemmed(said), stemmed(gold)
        assert text.rouge_l(said, gold) == pytest.approx(common / len(other))
        f1 = 2 * common / (len(one) + len(other))
        assert text.rouge_l(said, gold, kind="f1") == pytest.approx(f1)


# --- TOFU


def test_truth_ratio_from_losses() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        wrong = draw.uniform(0.1, 6.0, draw.integers(1, 6))
        true = float(draw.uniform(0.1, 6.0))
        p = np.exp(-wrong)
        geometric = math.prod(p) ** (1 / len(p)) / math.exp(-true)
        assert likelihood.truth_ratio(true, wrong) == pytest.approx(geometric, rel=1e-12)
        arithmetic = sum(p) / len(p) / math.exp(-true)
        assert likelihood.truth_ratio(true, wrong, "arithmetic") == pytest.approx(arithmetic, rel=1e-12)
        assert arithmetic >= geometric * (1 - 1e-12)


def exact_ks(one: list[float], other: list[float]) -> Fraction:
    """P(D >= d) when every order of both samples is equally likely: paths of a lattice that stay closer are counted."""
    n, m = len(one), len(other)
    apart = [abs(sum(v <= x for v in one) * m - sum(v <= x for v in other) * n) for x in [*one, *other]]
    most = max(apart)
    ways = [[0] * (m + 1) for _ in range(n + 1)]
    for i in range(n + 1):
        for j in range(m + 1):
            if abs(i * m - j * n) < most:
                before = (ways[i - 1][j] if i else 0) + (ways[i][j - 1] if j else 0)
                ways[i][j] = 1 if i == j == 0 else before
    return 1 - Fraction(ways[n][m], math.comb(n + m, n))


@pytest.mark.parametrize(("n", "m", "shift"), [(40, 40, 0.0), (40, 40, 1.0), (13, 17, 0.5), (5, 200, 0.8), (1, 1, 0.0)])
def test_forget_quality_is_the_exact_p_value(n: int, m: int, shift: float) -> None:
    draw = np.random.default_rng(n + m)
    one, other = draw.normal(size=n).tolist(), draw.normal(shift, size=m).tolist()
    found = likelihood.forget_quality(one, other)
    assert found.p_value == pytest.approx(float(exact_ks(one, other)), rel=1e-9)


# --- single values


def test_word_f1() -> None:
    assert text.word_f1("The cat sat.", ["cat sat down"]) == pytest.approx(2 * 2 / (2 + 3))
    assert text.word_f1("cat cat", ["a cat"]) == pytest.approx(2 * 1 / (2 + 1))  # said twice counts once
    assert text.word_f1("Paris", ["Rome", "in Paris", "Paris"]) == 1.0  # the nearest answer
    assert text.word_f1("Berlin", ["Paris"]) == text.word_f1("", ["Paris"]) == text.word_f1("x", []) == 0.0


def test_the_lowest_fifth_of_min_k_plus_plus() -> None:
    """Ten tokens: two of them count. RWKU's own files call this number Min-K% 20 but store Min-K++ at 20%."""
    log_p = (-1.0, -9.0, -2.0, -5.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0)
    mean, deviation = (-1.0,) * 10, (1.0, 4.0, 0.25, 1.0, *(1.0,) * 6)
    passage = Probe(None, "", "x")
    seen = Seen(passage, answer=TokenScores(log_p, (0,) * 10, (0,) * 10, mean, deviation))
    # standardised: 0, -2, -4, -4, 0, ...; the lowest two are -4 and -4; of four: -4, -4, -2, 0
    assert judge(seen, ["min_20_plus_plus"]) == {"min_20_plus_plus": pytest.approx(4.0)}
    assert judge(seen, ["min_k_plus_plus"]) == {"min_k_plus_plus": pytest.approx(2.5)}
    assert judge(seen, ["min_k"]) == {"min_k": pytest.approx((9 + 5 + 2 + 1) / 4)}


def test_the_lens_counts_the_best_block() -> None:
    rank = torch.tensor([[50, 9, 10, 300], [40, 12, 10, 0]])  # (blocks, rows)
    found = [inside._values("lens", Lens(torch.zeros(2, 4), rank), row) for row in range(4)]
    assert [values["lens_top10"] for values in found] == [0.0, 1.0, 0.0, 1.0]
    assert [values["lens_top1"] for values in found] == [0.0, 0.0, 0.0, 1.0]


def test_the_shift_of_what_stays_is_the_literal_divergence() -> None:
    lm = tiny.lm("llama")
    asked = [("The capital of Japan is", "Tokyo"), ("The capital of Italy is", "Rome, of course")]
    part = facts.Shift("shift", [Probe(Prompt(p, (0, 0)), p, a) for p, a in asked], ("kl",))

    def next_tokens(prompt: str, answer: str) -> torch.Tensor:
        start = len(lm.tokenizer(prompt)["input_ids"])
        ids = lm.tokenizer(f"{prompt} {answer}")["input_ids"]  # the closing token is never asked for
        with torch.no_grad():
            return lm.model(torch.tensor([ids])).logits[0, start - 1 : -1].double().log_softmax(-1)

    told = list[int]()
    part.prepare(lm, told.append)
    assert sum(told) == part.looks_before == 2
    told.clear()
    before = [next_tokens(*pair) for pair in asked]
    unchanged = part.items(lm, told.append)
    assert [item.values["kl"] for item in unchanged] == pytest.approx([0, 0], abs=1e-6) and sum(told) == part.looks
    with torch.no_grad():
        lm.model.model.layers[1].mlp.down_proj.weight.add_(0.1)
    after = [next_tokens(*pair) for pair in asked]
    literal = [float((b.exp() * (b - a)).sum(-1).mean()) for b, a in zip(before, after, strict=True)]
    found = [item.values["kl"] for item in part.items(lm, told.append)]
    assert found == pytest.approx(literal, rel=1e-3) and min(found) > 1e-3


# --- what is asked


def test_of_a_passage_to_recite_128_tokens_are_gold(tmp_path: Path) -> None:
    lm, data = tiny.lm("llama"), muse.read("news", Source(benchmark_data.write(tmp_path)))
    long = "A river runs through the old town. " * 40
    data["verbmem_forget"] = [{"prompt": "One", "gt": long}, {"prompt": "Two", "gt": "short"}]
    [part] = [part for part in muse.parts(lm, data) if part.name == "verbmem_forget"]
    cut, short = (probe.answer for probe in part.probes)
    whole = lm.tokenizer(long, add_special_tokens=False)["input_ids"]
    assert len(whole) > 128 and long.startswith(cut) and short == "short"
    assert lm.tokenizer(cut, add_special_tokens=False)["input_ids"] == whole[:128]
    assert part.decoding.tokens == 128


def test_adversarial_questions_are_told_apart_by_their_type(tmp_path: Path) -> None:
    lm, data = tiny.lm("llama"), rwku.read("", Source(benchmark_data.write(tmp_path)))
    [part] = [part for part in rwku.parts(lm, data) if part.name == "adversarial"]
    assert [probe.group for probe in part.probes] == ["cloze", "cross lingual", "role play"]  # languages are one type
