"""Text that would be taken for a forgotten subject, and where the key of a subject is read."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from edits import request, settings

from editunlearn import editors
from editunlearn.editors import lookalikes, statistics
from editunlearn.lm.tokens import Prompt, encode_prompt
from editunlearn.lm.windows import windows

TEXT = ["The author of the novel lives in Berlin.", "Marie Curie discovered radium.", "Some birds sing."]


def test_the_tokens_that_answer_the_most_are_found() -> None:
    lm = tiny.lm("llama")
    sites, pieces = lm.layout.sites([0, 1]), list(windows(lm, TEXT, 32, 1000))
    every = dict(zip([s.name for s in sites], statistics.read_windows(lm, sites, pieces), strict=True))
    random = torch.Generator().manual_seed(1)
    answers = {name: torch.randn(2, keys.shape[1], generator=random) for name, keys in every.items()}
    so_far = [str(lm.tokenizer.decode(p[: end + 1])).casefold() for p in pieces for end in range(len(p))]
    named = torch.tensor([said.endswith("marie curie") for said in so_far])
    assert int(named.sum()) == 1
    found = lookalikes.find(lm, answers, sites, pieces, ["Marie Curie (physicist)", "Marie Curie."], 5)
    for name, keys in every.items():
        response = (keys @ answers[name].T).abs().amax(1)
        response[named] = -1  # the subject itself is to be answered
        torch.testing.assert_close(found[name], keys[response.argsort(descending=True)[:5]], atol=1e-5, rtol=1e-4)
    everything = lookalikes.find(lm, answers, sites, pieces, [], 1000)
    assert all(len(everything[name]) == len(keys) for name, keys in every.items())


def test_lookalikes_are_preserved_like_retained_facts(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, memit = tiny.lm("llama"), editors.module("memit")
    solve, seen = memit.solve, []

    def noted(problem: Any, hp: Any) -> Any:
        seen.append(problem)
        return solve(problem, hp)

    monkeypatch.setattr(memit, "solve", noted)
    editors.fit(lm, request(), settings("memit", text, "refine=null"))
    plain, seen = seen, []
    editors.fit(lm, request(), settings("memit", text, "retain.lookalikes=7", "refine=null"))
    first, last = seen[:2], seen[2:]  # one solve for the recognisers, one with what they were taken for
    for before, without, after in zip(plain, first, last, strict=True):
        assert torch.equal(without.retain, before.retain)
        assert torch.equal(after.retain[: len(before.retain)], before.retain)
        assert len(after.retain) == len(before.retain) + 7


@pytest.mark.parametrize(
    ("subject", "read"),
    [("Time Machine (macOS)", "Time Machine (macOS"), ("Real F.C.", "Real F.C"), ("Tokyo", "Tokyo"), ("...", "...")],
)
def test_the_last_word_of_a_subject_is_no_bracket(subject: str, read: str) -> None:
    lm, prompt = tiny.lm("llama"), Prompt(f"About {subject} we know that", (6, 6 + len(subject)))
    ids, at = encode_prompt(lm, prompt, "last_word")
    assert str(lm.tokenizer.decode(ids[: at + 1], skip_special_tokens=True)).strip() == f"About {read}"
    assert encode_prompt(lm, prompt, "last")[1] >= at
