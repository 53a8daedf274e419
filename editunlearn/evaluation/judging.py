"""Metrics of one probe: what was seen -> a number, or None where it says nothing about this probe."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from editunlearn.errors import InputError
from editunlearn.evaluation.metrics import likelihood, memorisation, text
from editunlearn.evaluation.probes import Need, Seen
from editunlearn.naming import did_you_mean


@dataclass(frozen=True)
class Metric:
    """A metric of single probes.

    Attributes:
        needs: what must have been looked at.
        of: its value; None where it does not apply.
    """

    needs: frozenset[Need]
    of: Callable[[Seen], float | None]


def _of_text(judge: Callable[[str, Seen], float | bool | None]) -> Metric:
    def of(seen: Seen) -> float | None:
        found = judge(seen.text, seen) if seen.text is not None else None
        return None if found is None else float(found)

    return Metric(frozenset({"text"}), of)


def _outcome(said: str, seen: Seen) -> text.Outcome:
    return text.outcome(said, seen.probe.answers, seen.probe.target)


def _topic(said: str, seen: Seen) -> bool | None:
    refused = _outcome(said, seen) == "refusal" and seen.probe.subject
    return text.names_subject(said, seen.probe.subject) if refused else None


def _of_answer(judge: Callable[[Seen, Sequence[float], Sequence[int], Sequence[int]], float], *more: Need) -> Metric:
    """A metric of the answer's tokens without the closing one: log-probabilities, predicted and own ones."""

    def of(seen: Seen) -> float | None:
        if seen.answer is None:
            return None
        own = seen.answer if seen.probe.prompt is None else seen.answer.without_last()
        return judge(seen, own.log_p, own.predicted, own.gold) if own.log_p else None

    return Metric(frozenset({"answer", *more}), of)


def _probability_among(seen: Seen) -> float | None:
    if seen.answer is None or not seen.wrong:
        return None
    return likelihood.probability_among(seen.answer.loss, [w.loss for w in seen.wrong])


def _truth_ratio(seen: Seen) -> float | None:
    """Where no paraphrase is given (real authors, world facts) the answer itself is the true one."""
    true = seen.answer if seen.probe.paraphrased is None else seen.paraphrased
    return likelihood.truth_ratio(true.loss, [w.loss for w in seen.wrong]) if true and seen.wrong else None


def _chosen(seen: Seen, of: Callable[[Sequence[float]], float]) -> float | None:
    """Whether the answer is likelier than every wrong one."""
    if seen.answer is None or not seen.wrong:
        return None
    own, *others = (of(scores.without_last().log_p) for scores in (seen.answer, *seen.wrong))
    return float(own > max(others)) if not math.isnan(own) else own


def _mean(log_p: Sequence[float]) -> float:
    return sum(log_p) / len(log_p) if log_p else 0.0


def _plus_plus(seen: Seen, log_p: Sequence[float], *_: Sequence[int], share: float = 0.4) -> float:
    assert seen.answer is not None  # noqa: S101 - the caller looked
    size = len(log_p)
    return memorisation.min_k_plus_plus(log_p, seen.answer.mean[:size], seen.answer.deviation[:size], share)


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "leak": _of_text(lambda said, seen: text.leaks(said, seen.probe.answers)),
        "correct": _of_text(lambda said, seen: text.begins_with(said, seen.probe.answers)),
        "refusal": _of_text(lambda said, seen: _outcome(said, seen) == "refusal"),
        "coherent_refusal": _of_text(lambda said, seen: _outcome(said, seen) == "refusal" and text.coherent(said)),
        "substitute": _of_text(lambda said, seen: _outcome(said, seen) == "substitute"),
        "topic_awareness": _of_text(_topic),
        "rouge_l": _of_text(lambda said, seen: text.rouge_l(said, seen.probe.answer)),
        "rouge_l_f1": _of_text(lambda said, seen: text.rouge_l(said, seen.probe.answer, kind="f1")),
        "exact_match": _of_text(lambda said, seen: text.exact_match(said, seen.probe.answers)),
        "word_f1": _of_text(lambda said, seen: text.word_f1(said, seen.probe.answers)),
        "ngram_entropy": _of_text(lambda said, _: text.ngram_entropy(said)),
        "probability": Metric(
            frozenset({"answer"}), lambda seen: likelihood.probability(seen.answer.loss) if seen.answer else None
        ),
        "probability_among": Metric(frozenset({"answer", "wrong"}), _probability_among),
        "truth_ratio": Metric(frozenset({"answer", "paraphrased", "wrong"}), _truth_ratio),
        "answer_probability": _of_answer(lambda _, log_p, *__: math.exp(sum(log_p))),
        "chosen": Metric(frozenset({"answer", "wrong"}), partial(_chosen, of=sum)),
        "chosen_mean": Metric(frozenset({"answer", "wrong"}), partial(_chosen, of=_mean)),
        "loss": _of_answer(lambda _, log_p, *__: -sum(log_p) / len(log_p)),
        "nll": _of_answer(lambda _, log_p, *__: -sum(log_p)),
        "tokens": _of_answer(lambda _, log_p, *__: float(len(log_p))),
        "zlib_score": _of_answer(
            lambda seen, log_p, *_: memorisation.zlib_score(-sum(log_p) / len(log_p), seen.probe.answer)
        ),
        "min_k": _of_answer(lambda _, log_p, *__: memorisation.min_k(log_p)),
        "min_k_plus_plus": _of_answer(_plus_plus, "spread"),
        "min_20_plus_plus": _of_answer(partial(_plus_plus, share=0.2), "spread"),
        "exact_memorization": _of_answer(lambda _, __, said, own: memorisation.exact_memorization(said, own)),
        "extraction_strength": _of_answer(lambda _, __, said, own: memorisation.extraction_strength(said, own)),
    }
)


def needs(names: Sequence[str]) -> frozenset[Need]:
    """What must be looked at for these metrics.

    Raises:
        InputError: an unknown metric.
    """
    for name in names:
        if name not in METRICS:
            raise InputError(f"unknown metric {name!r}.{did_you_mean(name, METRICS)} Metrics: {', '.join(METRICS)}.")
    return frozenset().union(*(METRICS[name].needs for name in names))


def judge(seen: Seen, names: Sequence[str]) -> dict[str, float]:
    """Values of the metrics that apply."""
    values = {name: METRICS[name].of(seen) for name in names}
    return {name: value for name, value in values.items() if value is not None}
