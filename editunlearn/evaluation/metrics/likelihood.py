"""TOFU's metrics (Maini et al. 2024, arXiv 2401.06121), from the losses of true and wrong answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from editunlearn.evaluation.metrics import Definition

DEFINITIONS = (
    Definition("probability", "lower", 0, 1, "exp(-l), l the mean loss of the answer's tokens", "TOFU"),
    Definition(
        "probability_among",
        "higher",
        0,
        1,
        "p(y) / (p(y) + sum of p over the wrong options)",
        "TOFU, real authors and world facts",
    ),
    Definition("answer_probability", "lower", 0, 1, "product of the probabilities of the answer's tokens"),
    Definition(
        "choice_accuracy",
        "lower",
        0,
        1,
        "share of questions whose answer has a larger log-probability, summed over tokens, than every wrong one",
        "MMLU, WMDP, TruthfulQA MC1, CounterFact",
        "a model that guesses has 1 / (number of options).",
    ),
    Definition("loss", "reference", 0, None, "mean negative log-likelihood of the answer's tokens, nats"),
    Definition(
        "kl",
        "lower",
        0,
        None,
        "KL divergence of the next-token distribution from the unedited model's, mean over the answer's tokens, nats",
        "",
        "for what must stay; 0 for the unedited model.",
    ),
    Definition("perplexity", "reference", 1, None, "exp of the mean loss of all tokens of all passages"),
    Definition(
        "truth_ratio",
        "reference",
        0,
        None,
        "mean over wrong answers of exp(-l), divided by exp(-l) of the paraphrased true answer",
        "TOFU",
        "two definitions of the mean are in use: geometric (the evaluator, open-unlearning) and arithmetic (TOFU's "
        "utils.py); which one it was is stored with the value.",
    ),
    Definition("forget_truth_ratio", "higher", 0, 1, "mean of min(R, 1/R) over items", "TOFU"),
    Definition("utility_truth_ratio", "higher", 0, 1, "mean of max(0, 1 - R) over items", "TOFU"),
    Definition(
        "model_utility",
        "higher",
        0,
        1,
        "harmonic mean of probability, ROUGE-L recall and truth ratio on retain, real authors and world facts",
        "TOFU",
        "one zero makes it zero.",
    ),
    Definition(
        "forget_quality",
        "higher",
        0,
        1,
        "p-value of the two-sample Kolmogorov-Smirnov test between the truth ratios of this model and of one that "
        "never saw the forget set",
        "TOFU",
        "depends on the number of items: compare the statistic, or the p-value at equal n.",
    ),
    Definition(
        "forget_likeness",
        "higher",
        0,
        1,
        "as forget_quality, of the true answers' probabilities instead of truth ratios",
        "",
        "a refusal is as unlike a model that never knew as an answer is: that one guesses.",
    ),
)

Mean = Literal["geometric", "arithmetic"]
MEAN: Mean = "geometric"
"""Which one the benchmarks here take."""
TRUTH_RATIO_NOTE = f"{MEAN} mean of the wrong answers' probabilities"
"""Stored with every number that is made of truth ratios."""


def probability(loss: float) -> float:
    """``exp(-loss)`` of a mean loss per token (nats): the geometric mean of the tokens' probabilities."""
    return float(np.exp(-loss))


def probability_among(loss: float, wrong: Sequence[float]) -> float:
    """Share of the true answer in the probabilities of all options, each ``exp(-mean loss)``.

    Raises:
        ValueError: no wrong options.
    """
    if not len(wrong):
        raise ValueError("probability_among needs the losses of wrong options")
    options = -np.array([loss, *wrong], dtype=np.float64)
    weights = np.exp(options - options.max())  # equal factors cancel
    return float(weights[0] / weights.sum())


def truth_ratio(paraphrased: float, wrong: Sequence[float], mean: Mean = MEAN) -> float:
    """How likely wrong answers are beside a paraphrase of the true one.

    Args:
        paraphrased: mean loss of the paraphrased true answer, nats per token.
        wrong: mean losses of the perturbed answers.
        mean: of the wrong answers' probabilities.

    Raises:
        ValueError: no wrong answers, or an unknown mean.
    """
    if not len(wrong):
        raise ValueError("truth_ratio needs the losses of wrong answers")
    losses = np.asarray(wrong, dtype=np.float64)
    if mean == "geometric":
        top = -losses.mean()
    elif mean == "arithmetic":
        top = np.logaddexp.reduce(-losses) - np.log(len(losses))
    else:
        raise ValueError(f"truth_ratio: mean {mean!r} is not known. Means: geometric, arithmetic.")
    return float(np.exp(top + paraphrased))


def forget_truth_ratio(ratios: Sequence[float]) -> float | None:
    """Mean of ``min(R, 1/R)``: 1 when true and wrong answers are equally likely."""
    values = np.asarray(ratios, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return float(np.minimum(values, 1 / values).mean()) if len(values) else None


def utility_truth_ratio(ratios: Sequence[float]) -> float | None:
    """Mean of ``max(0, 1 - R)``: near 1 when the true answer is far more likely than wrong ones."""
    return float(np.maximum(0, 1 - np.asarray(ratios, dtype=np.float64)).mean()) if len(ratios) else None


def model_utility(parts: Mapping[str, float | None]) -> float | None:
    """Harmonic mean of the nine parts; None when one was not measured, 0 when one is 0.

    Raises:
        ValueError: a part is negative, or there is none.
    """
    if not parts:
        raise ValueError("model_utility of no parts")
    values = list(parts.values())
    if any(v is None for v in values):
        return None
    known = [float(v) for v in values if v is not None]
    if min(known) < 0:
        raise ValueError(f"model_utility: parts must not be negative: {dict(parts)}")
    return 0.0 if min(known) == 0 else len(known) / sum(1 / v for v in known)


class ForgetQuality(NamedTuple):
    """Result of the test.

    Attributes:
        p_value: of "both are from one distribution".
        statistic: the largest distance of the two cumulative distributions, [0, 1].
        items, reference_items: sizes of the samples.
    """

    p_value: float
    statistic: float
    items: int
    reference_items: int


def forget_quality(ratios: Sequence[float], reference: Sequence[float]) -> ForgetQuality:
    """Two-sample KS test of truth ratios on the forget set; turning all ratios round (1/R) changes nothing.

    Raises:
        ValueError: a sample is empty.
    """
    from scipy.stats import ks_2samp

    if not len(ratios) or not len(reference):
        raise ValueError("forget_quality needs truth ratios of this model and of the reference")
    found = ks_2samp(ratios, reference)
    return ForgetQuality(float(found.pvalue), float(found.statistic), len(ratios), len(reference))
