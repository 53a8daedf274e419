"""Walking up the blocks gives the keys and outputs of passes that begin anew, and runs far less."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import tiny
import torch
from edits import relative
from torch.utils.flop_counter import FlopCounterMode

from editunlearn.editors import reading
from editunlearn.editors.flow import applied
from editunlearn.editors.reading import Anew, reader, walkable
from editunlearn.lm import walk as walking
from editunlearn.lm.tokens import Row
from editunlearn.lm.walk import Walk

CONTEXTS = ([0], [0, 5, 6, 7, 8], [0, 5, 6, 9, 10, 11])


def rows(facts: int = 4) -> list[Row]:
    found = []
    for fact, context in itertools.product(range(facts), CONTEXTS):
        ids = (*context, *range(20 + 7 * fact, 22 + 7 * fact + fact % 2), 90 + fact, 3, 4)
        found.append(Row(ids, len(ids) - 3, len(ids) - 2))
    return [*found, Row((50, 51, 52, 53, 54), 2, 3)]  # the last begins like no other


def edited(lm: Any, read: Any, sites: list[Any]) -> list[torch.Tensor]:
    """Keys of each site and outputs above it, an edit being written to each site in turn."""
    factors: dict[str, Any] = {}
    found = []
    last = lm.layout.block_name(sites[-1].layer)
    for number, site in enumerate(sites):
        with applied(lm, factors):
            keys = read.keys(site)
            outputs = read.outputs([0, 3, 12], [last, site.name])
        found += [keys, outputs[last], outputs[site.name]]
        torch.manual_seed(number)
        factors[site.name] = (torch.randn(lm.layout.read_weight(lm.model, site.name).shape[0], 2), keys[:2] / 5)
    return found


@pytest.mark.parametrize("kind", tiny.TYPES)
@pytest.mark.parametrize("layers", [(0, 1), (1, 2), (0, 2)])
def test_keys_and_outputs(kind: str, layers: tuple[int, ...]) -> None:
    lm = tiny.lm(kind)
    sites = lm.layout.sites(layers)
    assert walkable(lm, rows(), sites) == ""
    walked = edited(lm, Walk(lm, rows()), sites)
    plain = edited(lm, Anew(lm, rows(), print), sites)
    assert all(relative(a, b) < 1e-4 for a, b in zip(walked, plain, strict=True))
    assert not any("forward" in block.__dict__ for block in lm.layout.module(lm.model, lm.layout.blocks))


def test_less_is_run() -> None:
    lm = tiny.lm("llama", layers=8)
    sites = lm.layout.sites([3, 4, 5, 6])
    counts = []
    for read in (Walk(lm, rows()), Anew(lm, rows(), print)):
        with FlopCounterMode(display=False) as counter:
            for site in sites:
                read.keys(site)
        counts.append(counter.get_total_flops())
    # seven blocks and three again, of half the tokens, against four, five, six and seven
    assert counts[1] > 3.5 * counts[0]


def test_batches_that_do_not_fit_are_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny.lm("llama")
    sites = lm.layout.sites([0, 1])
    plain = [Anew(lm, rows(), print).keys(site) for site in sites]
    own = Walk._pass

    def small(self: Walk, part: Any, past: Any) -> None:
        if len(part) > 3:
            raise torch.OutOfMemoryError
        own(self, part, past)

    monkeypatch.setattr(Walk, "_pass", small)
    warnings: list[str] = []
    walk = Walk(lm, rows(), warnings.append)
    assert all(relative(walk.keys(s), k) < 1e-4 for s, k in zip(sites, plain, strict=True)) and warnings


def test_a_model_that_cannot_be_walked_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, sites = tiny.lm("llama"), tiny.lm("llama").layout.sites([0, 1])
    monkeypatch.setattr(walking, "pad_sequence", lambda states, *_, **__: torch.stack([s[:1] * 0 for s in states]))
    warnings: list[str] = []
    assert isinstance(reader(lm, rows(), sites, warnings.append), Anew)
    assert len(warnings) == 1 and warnings[0].startswith("keys: all rows go through all blocks again for every layer")


def test_a_cache_that_forgets_is_found_out() -> None:
    lm = tiny.lm("gemma3_text")  # a window of 16 tokens
    long = Row(tuple(range(5, 35)), 28, 29)
    assert "does not hold all tokens" in walkable(lm, [long], lm.layout.sites([0, 1]))


def test_a_walk_does_not_go_down() -> None:
    lm = tiny.lm("llama")
    walk = Walk(lm, rows())
    walk.keys(lm.layout.site(1))
    with pytest.raises(ValueError, match=r"the walk stands at block 1, .* is below"):
        walk.keys(lm.layout.site(0))
    assert reading.walkable(lm, rows(), lm.layout.sites([1])) == ""
