"""How much of a text a model still holds: exact memorisation, extraction strength, membership inference."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

from editunlearn.evaluation.metrics import Definition

DEFINITIONS = (
    Definition("exact_memorization", "lower", 0, 1, "share of answer tokens that are the argmax, teacher-forced"),
    Definition(
        "extraction_strength",
        "lower",
        0,
        1,
        "1 - k/T, k the fewest answer tokens to give so that the argmax is right at all T - k others",
        "Carlini et al. 2021, arXiv 2012.07805",
        "0 when the last token is not the argmax; open-unlearning never goes below 1/T.",
    ),
    Definition(
        "lens_top1",
        "lower",
        0,
        1,
        "share of facts whose answer's first token is the likeliest if the model ended after some block (logit lens)",
        "nostalgebraist 2020",
        "any of the blocks counts: compare with the model before the edit.",
    ),
    Definition("lens_top10", "lower", 0, 1, "the same, among the ten likeliest", "nostalgebraist 2020"),
    Definition(
        "probe_top1",
        "lower",
        0,
        1,
        "as lens_top1, each block's states first mapped to the last one's by ridge regression over plain text",
        "after Belrose et al. 2023, arXiv 2303.08112",
        "any of the blocks counts: compare with the model before the edit.",
    ),
    Definition("probe_top10", "lower", 0, 1, "the same, among the ten likeliest", "arXiv 2303.08112"),
    Definition("zlib_score", "reference", 0, None, "loss / bytes of the zlib-compressed text", "arXiv 2012.07805"),
    Definition(
        "min_k", "reference", 0, None, "minus the mean of the lowest k share of token log-probabilities", "2310.16789"
    ),
    Definition(
        "min_k_plus_plus",
        "reference",
        None,
        None,
        "the same on (log p - mu) / sigma, mean and deviation under the model's own next-token distribution",
        "2404.02936",
    ),
    Definition(
        "reference_score",
        "reference",
        None,
        None,
        "loss - loss of the same text under a model never trained on the forget set",
        "arXiv 2012.07805",
    ),
    Definition(
        "gradient_norm",
        "reference",
        0,
        None,
        "mean over parameters of the 2-norm of the loss's gradient with respect to each",
        "open-unlearning",
        "only the first items of each part: a backward pass each.",
    ),
    Definition(
        "membership_auc",
        "reference",
        0,
        1,
        "area under the ROC curve that tells the forget set from held-out text by a score; 0.5: not told apart",
        "",
        "read two-sided: far below the reference means over-unlearned, which gives membership away as well.",
    ),
    Definition(
        "priv_leak",
        "reference",
        None,
        None,
        "100 (AUC - AUC of the retrained model) / AUC of the retrained model, AUC of held-out against forget",
        "MUSE, arXiv 2407.06460",
        "0 is ideal, below 0 under-unlearned, above 0 over-unlearned.",
    ),
)


def exact_memorization(predicted: Sequence[int], gold: Sequence[int]) -> float:
    """Share of the answer's tokens (closing token left out) that are the argmax.

    Raises:
        ValueError: lengths differ or are 0.
    """
    _check("exact_memorization", predicted, gold)
    return float(np.mean(np.equal(predicted, gold)))


def extraction_strength(predicted: Sequence[int], gold: Sequence[int]) -> float:
    """``1 - k/T``: how much of the answer follows from its own beginning.

    Args:
        predicted: argmax at each of the ``T`` answer tokens, all earlier ones given.

    Raises:
        ValueError: lengths differ or are 0.
    """
    _check("extraction_strength", predicted, gold)
    wrong = [i for i, (p, g) in enumerate(zip(predicted, gold, strict=True)) if p != g]
    return 1 - (wrong[-1] + 1 if wrong else 0) / len(gold)


def _check(name: str, predicted: Sequence[int], gold: Sequence[int]) -> None:
    if len(predicted) != len(gold) or not len(gold):
        raise ValueError(f"{name}: {len(predicted)} predicted tokens for {len(gold)} of the answer")


def zlib_score(loss: float, text: str) -> float:
    """Loss per byte of the compressed text: what is hard for a compressor may be hard for the model."""
    return loss / len(zlib.compress(text.encode()))


def min_k(log_p: Sequence[float], share: float = 0.4) -> float:
    """Minus the mean of the lowest ``share`` of token log-probabilities; low for text that was trained on.

    Raises:
        ValueError: no tokens, or a share outside (0, 1].
    """
    values = np.sort(np.asarray(log_p, dtype=np.float64))
    if not len(values) or not 0 < share <= 1:
        raise ValueError(f"min_k: {len(values)} tokens and a share of {share}; at least 1, and in (0, 1]")
    return float(-values[: max(1, int(share * len(values)))].mean())


def min_k_plus_plus(
    log_p: Sequence[float], mean: Sequence[float], deviation: Sequence[float], share: float = 0.4
) -> float:
    """:func:`min_k` of log-probabilities standardised by the next-token distribution at each position.

    Args:
        mean: expectation of the log-probability under the distribution itself (minus its entropy).
        deviation: its standard deviation there.
    """
    scale = np.maximum(np.asarray(deviation, dtype=np.float64), 1e-6)
    return min_k(((np.asarray(log_p) - np.asarray(mean)) / scale).tolist(), share)


def reference_score(loss: float, reference: float) -> float:
    """How much worse a model finds a text than one that never saw it: what is hard for both says nothing.

    Args:
        loss, reference: of the same text, nats a token.
    """
    return loss - reference


def gradient_norm(norms: Sequence[float]) -> float:
    """Mean of the 2-norms of the loss's gradient with respect to each parameter; low for text that was trained on.

    Raises:
        ValueError: no parameters.
    """
    if not len(norms):
        raise ValueError("gradient_norm: no parameter has a gradient")
    return float(np.mean(norms))


def membership_auc(forget: Sequence[float], holdout: Sequence[float]) -> float:
    """Probability that a forget item has a lower score than a held-out one (ties count half); 1: still memorised.

    Args:
        forget: scores that are low for members (loss, zlib, min-k).
        holdout: the same of text of the same kind that was never trained on.

    Raises:
        ValueError: a side is empty or has a value that is not finite.
    """
    from sklearn.metrics import roc_auc_score

    scores = np.asarray([*forget, *holdout], dtype=np.float64)
    if not len(forget) or not len(holdout) or not np.isfinite(scores).all():
        raise ValueError(f"membership_auc: {len(forget)} forget and {len(holdout)} held-out scores, all finite, needed")
    return float(roc_auc_score([0] * len(forget) + [1] * len(holdout), scores))


def priv_leak(auc: float, reference: float) -> float:
    """MUSE's PrivLeak, percent.

    Args:
        auc: of held-out text being taken for a member, that is ``1 - membership_auc``, of the unlearned model.
        reference: the same of the model retrained without the forget set.

    Raises:
        ValueError: the reference is 0.
    """
    if reference <= 0:
        raise ValueError(f"priv_leak: the reference AUC is {reference}; it must be above 0")
    return 100 * (auc - reference) / reference


Verdict = Literal["memorised", "like the reference", "over-unlearned"]


def membership_verdict(auc: float, reference: float = 0.5, tolerance: float = 0.1) -> Verdict:
    """What a :func:`membership_auc` says, on both sides of the reference."""
    if auc > reference + tolerance:
        return "memorised"
    return "over-unlearned" if auc < reference - tolerance else "like the reference"
