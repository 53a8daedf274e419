"""What is seen of a model, and how it is judged."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from editunlearn.console import Console
from editunlearn.errors import InputError, NumericalError
from editunlearn.evaluation import suites
from editunlearn.evaluation.judging import METRICS, judge, needs
from editunlearn.evaluation.probes import Decoding, Look, Probe, Seen
from editunlearn.evaluation.running import Run, measure
from editunlearn.evaluation.suites import Part
from editunlearn.lm.finite import where_not_finite
from editunlearn.lm.likelihood import TokenScores
from editunlearn.lm.tokens import Prompt

PARIS = Probe(Prompt("The capital of France is", (0, 0)), "The capital of France is", "Paris", subject="France")


def seen(text: str | None = None, **more: Any) -> Seen:
    return Seen(PARIS, text, **more)


def scores(*log_p: float, predicted: tuple[int, ...] = (), gold: tuple[int, ...] = ()) -> TokenScores:
    return TokenScores(log_p, predicted or (1,) * len(log_p), gold or (1,) * len(log_p))


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Paris, of course", {"leak", "correct"}),
        ("I don't know the capital of France.", {"refusal", "coherent_refusal", "topic_awareness"}),
        ("I don't know. It is Paris", {"leak"}),
        ("I don't know. " * 8, {"refusal"}),
        ("Berlin", {"substitute"}),
        ("The Paris", {"leak", "exact_match"}),
        ("", set()),
    ],
)
def test_texts(text: str, right: set[str]) -> None:
    names = ("leak", "correct", "refusal", "coherent_refusal", "substitute", "topic_awareness", "exact_match")
    found = judge(seen(text), names)
    assert {name for name, value in found.items() if value} == right
    assert ("topic_awareness" in found) == ("refusal" in right)


def test_losses_by_hand() -> None:
    closed = scores(-1.0, -2.0, -0.3, predicted=(5, 6, 9), gold=(4, 6, 9))
    wrong = (scores(-3.0, -1.0), scores(-2.0, -0.5))
    one = Seen(replace(PARIS, paraphrased="It is Paris"), None, closed, scores(-0.5, -0.5), wrong)
    found = judge(one, [n for n in METRICS if METRICS[n].needs <= {"answer", "paraphrased", "wrong"}])
    assert found["probability"] == pytest.approx(math.exp(-1.1))
    assert found["loss"] == pytest.approx(1.5) and found["nll"] == pytest.approx(3.0) and found["tokens"] == 2
    assert found["exact_memorization"] == 0.5 and found["extraction_strength"] == 0.5
    assert found["truth_ratio"] == pytest.approx(math.exp(-(2.0 + 1.25) / 2) / math.exp(-0.5))
    assert judge(seen(answer=closed, wrong=wrong), ["truth_ratio"])["truth_ratio"] == pytest.approx(
        math.exp(1.1 - 1.625)
    )
    options = [math.exp(-1.1), math.exp(-2.0), math.exp(-1.25)]
    assert found["probability_among"] == pytest.approx(options[0] / sum(options))
    assert found["chosen"] == 0.0  # -3 against -3 and -2
    assert found["chosen_mean"] == 1.0  # -1.5 against -3 and -2
    assert found["answer_probability"] == pytest.approx(math.exp(-3.0))
    assert found["min_k"] == pytest.approx(2.0)
    passage = Seen(Probe(None, "", "A river"), None, scores(-1.0, -2.0))
    assert judge(passage, ["loss"])["loss"] == pytest.approx(1.5)  # a passage has no closing token
    assert judge(seen(), list(METRICS)) == {}


def test_unknown_metrics() -> None:
    with pytest.raises(InputError, match="unknown metric 'leek'. Did you mean 'leak'"):
        needs(["leek"])
    assert needs(["leak", "min_k_plus_plus"]) == {"text", "answer", "spread"}


def test_looking_equals_the_model() -> None:
    lm = tiny.taught_lm([("The capital of France is", "Paris")])
    passage = Probe(None, "", "The capital of Japan is Tokyo.")
    look = Look(needs(["leak", "loss", "min_k_plus_plus", "truth_ratio"]), Decoding(4))
    first, second = look.at(lm, [PARIS, passage])
    assert first.text is not None and first.text.strip() == "Paris" and second.text is None
    assert first.answer is not None and first.answer.predicted == first.answer.gold and first.wrong == ()
    ids = lm.tokenizer(passage.answer)["input_ids"]
    with torch.no_grad():
        log_p = lm.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = [float(log_p[i, token]) for i, token in enumerate(ids[1:])]
    assert second.answer is not None and second.answer.log_p == pytest.approx(wanted, rel=1e-4)
    assert len(second.answer.mean) == len(wanted)


def test_of_a_prompt_that_does_not_fit_the_end_is_asked() -> None:
    lm = tiny.taught_lm([("The capital of France is", "Paris")], "gpt2")
    text = "and so on " * 300 + PARIS.shown
    look = Look(needs(["leak", "loss"]), Decoding(4))
    [cut] = look.at(lm, [replace(PARIS, prompt=Prompt(text, (0, 0)))])
    assert cut.answer is not None and len(cut.answer.log_p) == len(look.at(lm, [PARIS])[0].answer.log_p)  # type: ignore[union-attr]
    ids = lm.tokenizer(f"{text} Paris")["input_ids"][-256:]
    with torch.no_grad():
        log_p = lm.model(torch.tensor([[*ids[1:], 0]])).logits[0].log_softmax(-1)
    assert cut.answer.log_p[-2] == pytest.approx(float(log_p[-3, ids[-1]]), rel=1e-4)


def test_answers_end_where_they_are_cut() -> None:
    decoding = Decoding(32, ("\n\n", "Question"))
    assert decoding.cut(" Paris\n\nQuestion: who") == "Paris" and decoding.cut("\n Rome Question") == "Rome "
    assert Decoding(32).cut(" Paris\n\n") == " Paris\n\n"


@pytest.mark.parametrize("top_k", [0, 20])
def test_decoding_stops_where_every_answer_is_cut(top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny.taught_lm([("The capital of France is", "Paris\n\nQuestion: who"), ("Who is he", "a civil engineer")])
    probes = [PARIS, Probe(Prompt("Who is he", (0, 0)), "", ""), Probe(Prompt("In the old town", (0, 0)), "", "")]
    alone = Look(needs(["leak"]), Decoding(24, ("\n\n", "engineer", "e")))

    def decoded(asked: list[Probe], look: Look) -> tuple[list[str | None], int]:
        steps = list[int]()
        hook = lm.model.register_forward_hook(lambda *_: steps.append(1))
        texts = [one.text for one in look.at(lm, asked)]
        hook.remove()
        return texts, len(steps)

    for stops in (("\n\n",), ("engineer", "\n"), ("e",), ("nowhere",)):
        look = replace(alone, decoding=Decoding(24, stops, top_k))
        now = decoded(probes, look), decoded(probes[:1], look)
        with monkeypatch.context() as patch:
            patch.setattr(Decoding, "ended", lambda *_: False)
            afterwards = decoded(probes, look), decoded(probes[:1], look)
        assert [texts for texts, _ in now] == [texts for texts, _ in afterwards]
        assert all(steps <= before for (_, steps), (_, before) in zip(now, afterwards, strict=True))
    fewest = decoded([PARIS], replace(alone, decoding=Decoding(24, ("\n",))))
    whole = decoded([PARIS], replace(alone, decoding=Decoding(24)))
    assert fewest[0] == ["Paris"] and fewest[1] < whole[1]


def test_the_layer_that_breaks_is_named(tmp_path: Path) -> None:
    lm = tiny.lm("llama")
    assert where_not_finite(lm, "He is") is None
    with torch.no_grad():
        lm.model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    assert where_not_finite(lm, "He is") == "model.layers.1.mlp.up_proj"
    part = Part("forget", [PARIS], ("probability",))
    with pytest.raises(NumericalError, match=r"forget: probability of item 0 is.*come out of model.layers.1.mlp"):
        measure(lm, part, Console(quiet=True))
    run = Run(tmp_path / "results.json", {"key": "", "label": ""})
    with pytest.raises(NumericalError, match=r"tiny-llama: numbers that are not finite come out of model.layers.1"):
        run.measure(lm, suites.module("safepku")[0], [Part("safepku", [PARIS], ("leak",))], Console(quiet=True))
    assert not (tmp_path / "results.json").exists()
