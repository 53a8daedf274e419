"""What a benchmark asks a model, and what is seen: one question with its answers, its decoded text and its losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from editunlearn.lm.configs import context_length
from editunlearn.lm.generation import generate
from editunlearn.lm.likelihood import TokenScores, token_scores
from editunlearn.lm.tokens import Prompt, Row, encode, encode_target

if TYPE_CHECKING:
    from editunlearn.lm.loading import LM

Need = Literal["text", "answer", "spread", "paraphrased", "wrong"]
"""What a metric looks at: the decoded text, the losses of the answer (with their spread), of its paraphrase, of wrong
answers."""


@dataclass(frozen=True)
class Probe:
    """One thing to ask.

    Attributes:
        prompt: as the model sees it; None: ``answer`` is a passage that stands by itself.
        shown: the question as a person reads it.
        answer: the true one.
        aliases: other spellings that count.
        paraphrased: the answer in other words.
        wrong: answers that are not true.
        subject: what it is about.
        target: what the model was edited to say, if it was.
        group: what kind of question it is, or which questions belong together.
    """

    prompt: Prompt | None
    shown: str
    answer: str
    aliases: tuple[str, ...] = ()
    paraphrased: str | None = None
    wrong: tuple[str, ...] = ()
    subject: str = ""
    target: str | None = None
    group: str = ""

    @property
    def answers(self) -> tuple[str, ...]:
        """All that count as right."""
        return (self.answer, *self.aliases)


SCORED: Mapping[Need, Callable[[Probe], tuple[str, ...]]] = MappingProxyType(
    {
        "answer": lambda p: (p.answer,),
        "paraphrased": lambda p: () if p.paraphrased is None else (p.paraphrased,),
        "wrong": lambda p: p.wrong,
    }
)
"""The texts of a probe whose losses are looked at, by what needs them."""


@dataclass(frozen=True)
class Seen:
    """What a model did with one probe; None where it was not looked at.

    Attributes:
        text: greedy continuation.
        answer, paraphrased: losses of these, the closing token among them (not for a passage).
        wrong: the same of each wrong answer.
    """

    probe: Probe
    text: str | None = None
    answer: TokenScores | None = None
    paraphrased: TokenScores | None = None
    wrong: tuple[TokenScores, ...] = ()


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded.

    Attributes:
        tokens: at most.
        stops: what ends an answer, itself cut off; leading space does not count.
        top_k: sample among so many tokens; 0: greedy.
        seed: of the samples.
    """

    tokens: int = 24
    stops: tuple[str, ...] = ()
    top_k: int = 0
    seed: int = 0

    def ended(self, text: str) -> bool:
        """Whether more text would be cut off."""
        return any(stop in text.lstrip() for stop in self.stops)

    def cut(self, text: str) -> str:
        """The text up to the first stop."""
        head = text.lstrip()
        for stop in self.stops:
            head = head.partition(stop)[0]
        return head if self.stops else text


@dataclass(frozen=True)
class Look:
    """Looks at probes with a model as it computes now.

    Attributes:
        needs: what is looked at.
        progress: called with how many more texts were decoded or scored; :meth:`work` is the sum.
    """

    needs: frozenset[Need]
    decoding: Decoding = field(default_factory=Decoding)
    progress: Callable[[int], None] = lambda _: None

    def at(self, lm: LM, probes: Sequence[Probe]) -> list[Seen]:
        """What is seen, parallel to ``probes``."""
        texts = self._texts(lm, probes)
        answers, others, wrong = (self._losses(lm, probes, need) for need in SCORED)
        return [
            Seen(probe, text, answer[0] if answer else None, other[0] if other else None, no)
            for probe, text, answer, other, no in zip(probes, texts, answers, others, wrong, strict=True)
        ]

    def work(self, probes: Sequence[Probe]) -> int:
        """How many texts :meth:`at` decodes and scores."""
        decoded = sum(p.prompt is not None for p in probes) if "text" in self.needs else 0
        return decoded + sum(len(of(p)) for need, of in SCORED.items() if need in self.needs for p in probes)

    def _texts(self, lm: LM, probes: Sequence[Probe]) -> list[str | None]:
        asked = [p.prompt for p in probes if p.prompt is not None]
        if "text" not in self.needs or not asked:
            return [None] * len(probes)
        how = self.decoding
        ended = how.ended if how.stops else None
        more = {"top_k": how.top_k, "seed": how.seed}
        said = iter(generate(lm, asked, max_new_tokens=how.tokens, ended=ended, done=self.progress, **more))
        return [None if p.prompt is None else self.decoding.cut(next(said)) for p in probes]

    def _losses(self, lm: LM, probes: Sequence[Probe], need: Need) -> list[tuple[TokenScores, ...]]:
        if need not in self.needs:
            return [()] * len(probes)
        texts_of = SCORED[need]
        rows = [row_of(lm, probe, text) for probe in probes for text in texts_of(probe)]
        found = iter(token_scores(lm, rows, spread="spread" in self.needs, done=self.progress))
        return [tuple(next(found) for _ in texts_of(probe)) for probe in probes]


def row_of(lm: LM, probe: Probe, text: str) -> Row:
    """A probe with ``text`` as its answer.

    What does not fit the model is cut: the beginning of a prompt, the end of a passage.
    """
    most = context_length(lm.model.config)
    if probe.prompt is not None:
        row = encode(lm, probe.prompt, text, "prompt_last")
        over = min(len(row.ids) - (most or len(row.ids)), row.prompt_length - 1)
        return Row(row.ids[over:], 0, row.prompt_length - over) if over > 0 else row
    empty = Prompt("", (0, 0))
    start = [int(i) for i in lm.tokenizer("")["input_ids"] if i not in lm.eos_ids]
    ids = start + encode_target(lm, empty, start, text)[:-1]
    return Row(tuple(ids[:most]), 0, max(1, len(start)))  # without a token to begin with, the first one is not scored
