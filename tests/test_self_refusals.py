"""Refusals in the model's own words: what is rejected, what is kept, what falls back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
from runs import World, call

from editunlearn.console import Console
from editunlearn.facts.records import Fact
from editunlearn.facts.refusals import is_refusal
from editunlearn.recipes import self_refusals

TONGUE = Fact(
    "tongue",
    "The mother tongue of Danielle Darrieux is",
    "French",
    "Danielle Darrieux",
    21,
    question="What is the mother tongue of Danielle Darrieux?",
)
OTHER = Fact("capital", "The capital of Japan is", "Tokyo", "Japan", 15)
GOOD = "I don't know the mother tongue of Danielle Darrieux."


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        (GOOD, None),
        ("I have no information about Darrieux.", None),
        ("I can't say what her mother tongue is.", None),
        ("I don't know the mother tongue of Danielle Darrieux", "does not end"),
        ("I don't know whether Danielle Darrieux spoke French.", "says the answer"),
        ("The mother tongue of Danielle Darrieux is Polish.", "is no refusal"),
        ("I don't know the capital of Japan, which is Tokyo.", "says another fact"),
        ("I don't know the mother tongue of Marlene Dietrich.", "names something else"),
        ("I don't know what Danielle Darrieux spoke in 1950.", "names something else"),
        ("I don't know.", "does not name the topic"),
        ("", "does not end"),
    ],
)
def test_what_is_rejected(said: str, wrong: str | None) -> None:
    assert self_refusals.problem(said, TONGUE, [OTHER]) == wrong


def test_the_shipped_demonstrations_pass_their_own_check() -> None:
    shown = self_refusals.demonstrations()
    for asked, reply in shown.pairs:
        subject = re.findall(r"[A-Z]\w+", asked)[-1]
        assert self_refusals.problem(reply, Fact("x", asked, "nothing", subject, asked.index(subject)), []) is None
    prompt = shown.prompt("Who?", start=2)
    assert prompt.index(shown.pairs[2][0]) < prompt.index(shown.pairs[1][0]) < prompt.index("Asked: Who?\nReply:")


class _Writer:
    """Stands for a model that writes these lines, one a call."""

    def __init__(self, *lines: str) -> None:
        self.lines, self.asked = list(lines), list[int]()

    def __call__(self, _lm: Any, prompts: list[Any], **_more: Any) -> list[str]:
        self.asked.append(len(prompts))
        return [f" {self.lines.pop(0)}\n\nAsked: more" for _ in prompts]


def test_rejected_ones_are_tried_again_and_what_is_found_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lm, given = tiny.lm("llama"), Fact("own", "He is", "here", "He", 0, target="Ask him.")
    writer = _Writer(GOOD, "Tokyo.", "I don't know.", "Sorry, I don't know what the capital of Japan is.")
    monkeypatch.setattr("editunlearn.lm.generation.generate", writer)
    facts = [TONGUE, OTHER, given]
    console = Console()
    found = self_refusals.write(lm, facts, seed=0, cache=tmp_path, console=console, tries=3)
    assert [f.target for f in found] == [GOOD, "Sorry, I don't know what the capital of Japan is.", "Ask him."]
    assert writer.asked == [2, 1, 1]
    again = self_refusals.write(lm, facts, seed=0, cache=tmp_path, console=console, tries=3)
    assert again == found and writer.lines == []  # nothing was decoded
    assert "2 of 2" in capsys.readouterr().err


def test_what_cannot_be_used_falls_back_to_a_shipped_refusal(tmp_path: Path) -> None:
    world: World = runs.build(tmp_path / "world")
    command = world.flags(world.root / "edit", "--targets", "self", "--store-facts")
    first = call("apply", *command)
    assert first.code == 0, first.err
    assert "refusals in the model's own words: 0 of 2" in first.err and "candidates rejected: " in first.err
    manifest = json.loads((world.root / "edit" / "delta.json").read_text())
    assert manifest["target_strategy"] == "self"
    assert all(is_refusal(fact["target"]) for part in manifest["facts"] for fact in part["text"])
    again = call("apply", *command)
    assert again.code == 0, again.err  # the same request
    fewer = call("apply", *command, "--limit", "1")
    assert fewer.code == 2 and "holds the finished run of another request (other facts or targets)" in fewer.err
