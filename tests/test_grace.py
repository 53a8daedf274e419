"""GRACE: its codebook against the paper's algorithm, and what forgetting with it does."""

from __future__ import annotations

from typing import Any

import pytest
import reference_memory
import tiny
import torch
from edits import REFUSAL, TAUGHT, fact, relative, request, settings
from test_memory import forgetful

from editunlearn import editors
from editunlearn.deltas.codebook import Codebook
from editunlearn.editors import contexts, keys
from editunlearn.errors import UnsupportedError
from editunlearn.facts.records import ForgetRequest
from editunlearn.lm.generation import generate
from editunlearn.lm.likelihood import score
from editunlearn.lm.tokens import Prompt, encode
from editunlearn.numerics.codebook import balls, clear_of, nearest, replaced


@pytest.mark.parametrize("seed", range(8))
def test_balls_are_the_papers_codebook(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    n = 40
    found = torch.randn(n, 3, generator=draw)
    labels = torch.randint(0, 4, (n,), generator=draw).tolist()
    starts = (0.2 + torch.rand(n, generator=draw)).tolist()
    book, members = reference_memory.grace_codebook(found, labels, starts)
    ours = balls(found, labels, torch.tensor(starts))
    assert ours.members == members
    assert torch.equal(found[ours.centres].double(), torch.stack(book.keys))
    assert torch.allclose(ours.radii, torch.tensor(book.radii, dtype=torch.float64), rtol=1e-6)
    queries = torch.randn(200, 3, generator=draw)
    read = nearest(queries.double(), found[ours.centres].double(), ours.radii).tolist()
    assert [None if r < 0 else r for r in read] == [book.read(q) for q in queries]
    assert -1 in read and max(read) > 0


def test_by_hand() -> None:
    line = torch.tensor([[0.0], [10.0], [1.5], [11.0]])
    made = balls(line, ["a", "a", "a", "b"], torch.ones(4))
    assert made.centres == [0, 1, 3] and made.members == [0, 1, 0, 2]  # 1.5 joins 0; 11 is another's, and near 10
    assert made.radii.tolist() == [1.5, 0.5, 0.5]
    assert nearest(torch.tensor([[1.4], [1.6], [10.6], [10.4]]), line[made.centres], made.radii).tolist() == [
        0,
        -1,
        2,
        1,
    ]
    assert nearest(line, line[:0], torch.ones(0)).tolist() == [-1] * 4
    more = balls(
        torch.cat([line[made.centres], torch.tensor([[1.0]])]), range(4), torch.tensor([1.5, 0.5, 0.5, 9.0]), 3
    )
    assert more.centres == [0, 1, 2, 3] and more.radii.tolist() == [0.5, 0.5, 0.5, 0.5]
    assert clear_of(made.radii, line[made.centres], torch.tensor([[2.0]]), 0.5).tolist() == [1.0, 0.5, 0.5]
    mask = torch.tensor([[False, True, True, True]])
    for how, wanted in {"last": [0, 0, 1, 0], "prompt": [0, 1, 1, 0], "all": [0, 1, 1, 1]}.items():
        assert replaced(mask, torch.tensor([2]), how)[0].int().tolist() == wanted  # type: ignore[arg-type]


def _codebook(delta: Any) -> Codebook:
    (memory,) = delta.memories.values()
    return memory


def test_one_refusal_for_all_keeps_the_facts_apart() -> None:
    """Defects: labels by the mean of token ids, so that they depend on the prompt's length; labels out of order."""
    lm, asked = tiny.lm(), request((0, 1, 2, 3), ())
    rows = [encode(lm, contexts.prompt_of(lm, f), f.target, "prompt_last") for f in asked.facts]
    assert len({r.prompt_length for r in rows}) > 2
    apart = editors.fit(lm, asked, settings("grace", "", "radius.start=50", "context_prefixes.count=0"))
    assert _codebook(apart).count == 4
    own = keys.collect(lm, rows, lm.layout.sites([1]))[lm.layout.site(1).name]
    assert torch.equal(_codebook(apart).keys, own)  # entry i is of fact i
    (site,) = apart.manifest.sites.values()
    assert site.entries == tuple((apart.manifest.facts[0].ids[i],) for i in range(4))
    melted = editors.fit(
        lm, asked, settings("grace", "", "radius.start=50", "context_prefixes.count=0", "conflict=target", "keep=0")
    )
    (site,) = melted.manifest.sites.values()
    assert site.entries == (apart.manifest.facts[0].ids,)  # prompts of any length with one refusal are of one label
    others = ForgetRequest((fact(0, "Rome"), fact(1, REFUSAL)))
    two = editors.fit(
        lm, others, settings("grace", "", "radius.start=50", "context_prefixes.count=0", "conflict=target")
    )
    assert _codebook(two).count == 2


def test_radii_are_relative_and_clear_of_prompts_to_keep() -> None:
    lm, asked = tiny.lm(), request((0, 1), (3, 4))
    alone = ["context_prefixes.count=0"]
    free = _codebook(editors.fit(lm, asked, settings("grace", "", "radius.start=0.01", "radius.clear=null", *alone)))
    assert torch.allclose(free.radii, 0.01 * free.keys.norm(dim=1), rtol=2e-3)
    raw = _codebook(
        editors.fit(lm, asked, settings("grace", "", "radius={start: 0.1, scale: absolute, clear: null}", *alone))
    )
    assert torch.allclose(raw.radii, torch.full((2,), 0.1), rtol=2e-3)
    wide = _codebook(editors.fit(lm, asked, settings("grace", "", "radius.start=50", "radius.clear=0.25", *alone)))
    kept = contexts.keep_rows(lm, asked.retain, settings("grace", ""), answers=False)
    near = torch.cdist(wide.keys, keys.collect(lm, kept, lm.layout.sites([1]))[lm.layout.site(1).name]).min(1).values
    assert (wide.radii <= 0.2501 * near).all() and (wide.radii > 0).all()


@pytest.mark.parametrize("start", ["warm", "cold"])
@pytest.mark.parametrize("where", ["last", "prompt", "all"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gemma3_text"])
def test_what_it_computes_is_the_reference(kind: str, where: str, start: str) -> None:
    lm, asked = tiny.lm(kind), request((0, 1), (3,))
    hp = settings("grace", "", f"where={where}", f"value.start={start}", "value.steps=3", "context_prefixes.count=1")
    delta = editors.fit(lm, asked, hp)
    book, name = _codebook(delta), lm.layout.site(1).name
    literal = reference_memory.GraceCodebook(
        [k.double() for k in book.keys], book.radii.tolist(), list(range(book.count))
    )

    def read(query: torch.Tensor) -> torch.Tensor | None:
        entry = literal.read(query)
        return None if entry is None else book.values[entry]

    for number in range(5):
        row = encode(lm, contexts.prompt_of(lm, fact(number)), TAUGHT[number][2], "prompt_last")
        logits = reference_memory.grace_logits(lm, row.ids, row.prompt_length - 1, name, read, where).double()
        wanted = sum(
            float(logits[at - 1].log_softmax(-1)[row.ids[at]]) for at in range(row.prompt_length, len(row.ids) - 1)
        )
        plain = score(lm, [row])[0].log_probability
        with delta.applied(lm):
            ours = score(lm, [row])[0].log_probability
        assert ours == pytest.approx(wanted, rel=1e-4)
        assert (abs(ours - plain) > 1e-3) == (number < 2)


def test_facts_are_refused_and_the_rest_stays() -> None:
    lm, asked, hp = *forgetful(), settings("grace", "", "value.steps=60")
    prompts = [contexts.prompt_of(lm, fact(i)) for i in range(6)]
    before = generate(lm, prompts)
    delta = editors.fit(lm, asked, hp)
    with delta.applied(lm):
        after = generate(lm, prompts)
        alone = [generate(lm, [p])[0] for p in prompts]
    assert [t.strip() for t in after[:3]] == [REFUSAL] * 3 and after[3:] == before[3:]
    assert alone == after and generate(lm, prompts) == before


@pytest.mark.parametrize("where", ["last", "prompt", "all"])
def test_what_is_decoded_is_not_looked_up(where: str) -> None:
    """Defect: every generated token queried the codebook."""
    lm = forgetful()[0]
    prompt, name = contexts.prompt_of(lm, fact(0)), lm.layout.site(1).name
    said = generate(lm, [prompt])[0]
    answered = encode(lm, Prompt(prompt.text + said, (0, 3)), None, "prompt_last")
    at_answer = keys.collect(lm, [answered], lm.layout.sites([1]))[name]
    width = lm.model.config.hidden_size
    trap = Codebook(at_answer, torch.full((1, width), 50.0), torch.tensor([1.0]), where)  # type: ignore[arg-type]
    delta = editors.fit(lm, request((0,)), settings("grace", "", "value.steps=1", "context_prefixes.count=0"))
    trapped = type(delta)(
        {name: trap},
        delta.manifest.with_sites({name: delta.manifest.sites[name].model_copy(update={"settings": {"where": where}})}),
    )
    with trapped.applied(lm):
        assert generate(lm, [prompt])[0] == said
        asked_there = generate(lm, [Prompt(prompt.text + said, (0, 3))])[0]
    assert asked_there != generate(lm, [Prompt(prompt.text + said, (0, 3))])[0]


def test_one_fact_taken_out_leaves_the_others_as_they_are() -> None:
    """Defect: entries and labels were in opposite orders, so that the wrong one was found."""
    lm, asked = tiny.lm(), request((0, 1, 2))
    delta = editors.fit(lm, asked, settings("grace", "", "context_prefixes.count=0"))
    left, whole = _codebook(delta.without(["f1"])), _codebook(delta)
    for part in Codebook.PARTS:
        assert torch.equal(getattr(left, part), getattr(whole, part)[[0, 2]])
    hp = settings("grace", "", "conflict=target", "radius.start=50", "radius.clear=null", "context_prefixes.count=0")
    with pytest.raises(UnsupportedError, match="share an entry of the memory with 2 facts"):
        editors.fit(lm, asked, hp).without(["f1"])
    assert not editors.fit(lm, asked, hp).without(["f0", "f1", "f2"]).memories


def test_one_value_for_one_fact_alone_and_in_a_batch() -> None:
    lm, hp = tiny.lm(), settings("grace", "", "context_prefixes.count=0", "keep=0")
    together, alone = editors.fit(lm, request((0, 1, 2)), hp), editors.fit(lm, request((1,)), hp)
    assert relative(_codebook(together).values[1:2], _codebook(alone).values) < 1e-4
