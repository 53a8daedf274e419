"""Requests in parts against one request: what is exact in the equations, and how far a model is from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import reference
import tiny
import torch
from edits import MEMORY, TAUGHT, fact, nll, relative, same_delta, settings
from runs import listing
from torch import Tensor

import editunlearn
from editunlearn import editors
from editunlearn.deltas.lowrank import LowRankDelta
from editunlearn.editors.closed_form import SiteProblem
from editunlearn.editors.earlier import Earlier
from editunlearn.editors.past import PastKeys
from editunlearn.errors import InputError, NumericalError, StaleError, UnsupportedError
from editunlearn.facts.records import ForgetRequest
from editunlearn.session import EditSession

IN, OUT = 24, 9
EXACT = 1e-8
"""Rounding, and the jitter of a Cholesky factor."""


def in_parts(method: str, hp: Any, keys: Tensor, wanted: Tensor, moment: Tensor, keep: Tensor, parts: int) -> Tensor:
    """dW (out, in): every part writes what is still missing at its keys, those of the earlier parts being past keys."""
    change = torch.zeros(OUT, IN, dtype=torch.float64)
    past = keys[:0]
    for k, z in zip(keys.chunk(parts), wanted.chunk(parts), strict=True):
        missing = z - k @ change.T
        left, right = editors.module(method).solve(SiteProblem(k, k, missing, moment, keep, past), hp)
        change, past = change + left @ right, torch.cat([past, k])
    return change


@pytest.mark.parametrize("parts", [2, 10])
@pytest.mark.parametrize("seed", range(4))
def test_parts_give_what_one_request_gives(seed: int, parts: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    mix, count = torch.eye(IN, dtype=torch.float64) + 0.1 * normal(IN, IN), 10
    keys, wanted, keep, text = normal(count, IN) @ mix, normal(count, OUT), normal(5, IN) @ mix, normal(90, IN) @ mix
    moment = text.T @ text / len(text)
    memit = settings("memit", "general", "moments.weight=30.0", "retain.weight=3.0")
    literal = reference.one_request(keys, wanted, 30 * moment + 3 * keep.T @ keep)
    found = in_parts("memit", memit, keys, wanted, moment, keep, parts)
    assert relative(found, literal) < EXACT
    for soft in ("false", "true"):
        alpha = settings("alphaedit", "general", f"nullspace.soft={soft}", "nullspace.threshold=0.4")
        whole = in_parts("alphaedit", alpha, keys, wanted, moment, keep, 1)
        assert relative(in_parts("alphaedit", alpha, keys, wanted, moment, keep, parts), whole) < EXACT


def told(number: int) -> Any:
    """A fact with another one's answer as its target, which a tiny model can be made to say."""
    return fact(number, TAUGHT[(number + 1) % 4][2])


def one_after_another(lm: Any, hp: Any, parts: list[list[int]], keep: tuple[int, ...] = (4, 5)) -> Earlier:
    """What is left of requests for a few facts each."""
    earlier = None
    for part in parts:
        asked = ForgetRequest(tuple(map(told, part)), tuple(fact(i, None) for i in keep))
        earlier = Earlier(*editors.run(lm, asked, hp, earlier=earlier))
    assert earlier is not None
    return earlier


@pytest.fixture(scope="module")
def taught() -> Any:
    return tiny.taught_lm([(prompt, answer) for prompt, _, answer in TAUGHT])


def closed(text: str, layer: int = 0) -> Any:
    return settings("memit", text, "refine=null", "value.steps=60", layers=(layer,))


@pytest.fixture(scope="module")
def four(taught: Any, text: str) -> Earlier:
    return one_after_another(taught, closed(text), [[0], [1], [2], [3]])


def change(delta: Any) -> Tensor:
    (factors,) = delta.factors.values()
    return factors.left.double() @ factors.right.double()


def losses(lm: Any, delta: Any) -> Tensor:
    """NLL of each fact's target with a delta."""
    with delta.applied(lm):
        return torch.tensor([nll(lm, [told(i)]) for i in range(4)])


@pytest.mark.parametrize(("layer", "near", "alike"), [(0, 0.5, 0.1), (1, 0.15, 0.02)])
def test_four_requests_on_a_model_are_nearly_one(
    taught: Any, text: str, four: Earlier, layer: int, near: float, alike: float
) -> None:
    """Unlike in the equations, the values are found anew on the model as it has become by then."""
    parts = four if layer == 0 else one_after_another(taught, closed(text, 1), [[0], [1], [2], [3]])
    whole = one_after_another(taught, closed(text, layer), [[0, 1, 2, 3]])
    assert relative(change(parts.delta), change(whole.delta)) < near
    one, other = losses(taught, parts.delta), losses(taught, whole.delta)
    assert float(((one - other).abs() / other).max()) < alike
    assert parts.past.keys.keys() == whole.past.keys.keys()
    for name, keys in parts.past.keys.items():
        torch.testing.assert_close(keys, whole.past.keys[name], atol=1e-5, rtol=1e-4)


def test_refine_leaves_what_earlier_edits_wrote(taught: Any, text: str) -> None:
    more = ("refine.steps=15", "refine.kl=80", "refine.text_kl=60", "refine.lr=0.05", "value.steps=25")
    hp = settings("memit", text, *more, layers=(0,))
    keep = (fact(4, None), fact(5, None))
    first = Earlier(*editors.run(taught, ForgetRequest((told(0), told(1)), keep), hp))
    asked = ForgetRequest((told(2), told(3)), keep, earlier=(told(0), told(1)))
    both = losses(taught, editors.run(taught, asked, hp, earlier=first)[0])
    whole = losses(taught, one_after_another(taught, hp, [[0, 1, 2, 3]]).delta)
    assert float((both / losses(taught, first.delta))[:2].max()) < 1.2
    assert float((both / whole).max()) < 1.2


def test_any_fact_can_be_taken_out_after_later_edits(taught: Any, four: Earlier) -> None:
    assert isinstance(four.delta, LowRankDelta) and [p.count for p in four.delta.manifest.facts] == [1] * 4
    less = four.delta.without(["f0"])
    for name, factors in four.delta.factors.items():
        assert torch.equal(less.factors[name].left, factors.left[:, 1:])
        assert torch.equal(less.factors[name].right, factors.right[1:])
    none = four.delta.without(["f0", "f1", "f2", "f3"])
    before, with_all, without = (losses(taught, d) for d in (none, four.delta, less))
    assert float(((without - with_all).abs() / with_all)[1:].max()) < 0.2
    assert abs(without[0] - before[0]) < 0.5 * abs(with_all[0] - before[0])
    assert less.manifest.fact_count == 3 and less.manifest.held(told(0)) == "no"
    assert less.manifest.held(told(1)) == "yes"


def test_earlier_edits_bring_their_gain_norm_and_hashes(taught: Any, four: Earlier) -> None:
    (site,) = four.delta.manifest.sites.values()
    assert site.gain is not None and site.gain > 0.99 and site.rank == 4  # type: ignore[union-attr]
    four.check_model(taught)
    with four.delta.applied(taught), pytest.raises(StaleError, match="made for other weights"):
        four.check_model(taught)
    with pytest.raises(StaleError, match="made for other weights"):
        four.check_model(tiny.lm(layers=3, hidden=48))


def test_what_cannot_be_gone_on_from(taught: Any, text: str, four: Earlier, tmp_path: Path) -> None:
    asked = ForgetRequest((told(4),), ())
    for method, hp, kind, what in (
        ("memit", closed(text, 1), InputError, "Set the layers of the earlier run"),
        ("grace", settings("grace", ""), UnsupportedError, "a memory and a change of weights cannot be one delta"),
    ):
        with pytest.raises(kind, match=what):
            editors.run(taught, asked, hp, earlier=four)
        assert method == hp.method
    with pytest.raises(InputError, match="bring their own keys"):
        editors.run(taught, asked, closed(text), earlier=four, past=PastKeys({"x": torch.ones(1, 2)}))
    with pytest.raises(InputError, match="already holds all 2 facts"):
        four.divide([told(0), told(1)])
    new, again = four.divide([told(0), told(4)])
    assert ([f.id for f in new], [f.id for f in again]) == (["f4"], ["f0"])
    other = told(4)
    object.__setattr__(other, "id", "f0")
    with pytest.raises(InputError, match="'f0' is already that of another fact"):
        four.divide([other])
    with pytest.raises(InputError, match="not a finished run"):
        Earlier.load(tmp_path)
    four.save(tmp_path, [told(0)])
    assert Earlier.load(tmp_path).known([]) == [told(0)]
    manifest = tmp_path / "delta.json"
    whole = manifest.read_text()
    manifest.write_text(whole.replace('"paraphrases"', '"wordings"'))
    with pytest.raises(InputError, match="has other fields than"):
        Earlier.load(tmp_path)
    manifest.write_text(whole)
    (tmp_path / "past_keys.safetensors").unlink()
    with pytest.raises(InputError, match="without which a next edit would overwrite"):
        Earlier.load(tmp_path)


@pytest.mark.parametrize("method", MEMORY)
def test_memories_go_on_too(taught: Any, method: str) -> None:
    hp = settings(method, "")
    first = one_after_another(taught, hp, [[0, 1]])
    both = one_after_another(taught, hp, [[0, 1], [2, 3]])
    assert both.delta.manifest.fact_count == 4 and not both.past.keys
    name = next(iter(first.delta.tensors()))
    assert torch.equal(both.delta.tensors()[name][: len(first.delta.tensors()[name])], first.delta.tensors()[name])
    less = both.delta.without(["f0", "f1"])
    assert less.manifest.held(told(2)) == "yes" and less.manifest.held(told(0)) == "no"
    kept, all_of_them, base = (losses(taught, d) for d in (less, both.delta, less.without(["f2", "f3"])))
    torch.testing.assert_close(kept[2:], all_of_them[2:], atol=0.05, rtol=0.05)
    assert float(all_of_them.sum()) < 0.5 * float(base.sum())
    other = settings("wise" if method == "grace" else "grace", "")
    with pytest.raises(UnsupportedError, match="different memories cannot be one delta"):
        editors.run(taught, ForgetRequest((told(4),), ()), other, earlier=first)


def test_a_session_is_saved_and_goes_on(taught: Any, text: str, tmp_path: Path) -> None:
    hp, cache = closed(text), tmp_path / "cache"
    session = editunlearn.EditSession(taught, hp)
    with pytest.raises(InputError, match="nothing to save"):
        session.save(tmp_path / "empty")
    session.forget([told(0)], cache=cache)
    session.save(tmp_path / "one")
    (tmp_path / "one" / "merged").mkdir()
    (tmp_path / "one" / "README.md").write_text("of one fact")
    session.save(tmp_path / "one")
    assert (tmp_path / "one" / "merged").is_dir()  # of the same delta
    session.forget([told(0), told(1)], cache=cache, evaluate=False)
    again = EditSession.load(tmp_path / "one", taught)
    assert again.hp == hp.model_copy(update={"batch_tokens": 2048})
    made = again.forget([told(0), told(1)], cache=cache, store_facts=True)
    assert same_delta(again.delta, session.delta) and made.request.earlier == (told(0),)
    made = again.forget([told(2), told(0)], cache=cache, evaluate=True)
    assert [f.id for f in made.request.forgotten] == ["f2", "f0", "f1"]  # f1 by the manifest, f0 as given again
    assert made.after is not None and len(made.after.forget) == 3
    again.save(tmp_path / "one")
    assert listing(tmp_path / "one") == {"delta.json", "delta.safetensors", "past_keys.safetensors"}
    again.remove(["f0"])
    again.save(tmp_path / "two")
    with again.applied(), pytest.raises(StaleError):
        EditSession.load(tmp_path / "two", taught)
    assert EditSession.load(tmp_path / "two", taught).forget([told(0)], cache=cache).delta.manifest.fact_count == 3


def test_limits_stop_a_run(taught: Any, text: str, four: Earlier) -> None:
    asked = ForgetRequest((told(4),), ())
    (norm,) = (n for n in four.delta.norms().values() if n is not None)  # type: ignore[union-attr]
    tight = settings("memit", text, "refine=null", f"limits.norm={0.9 * norm}", layers=(0,))
    with pytest.raises(NumericalError, match=r"change of 5 facts is .* above limits\.norm"):
        editors.run(taught, asked, tight, earlier=four)
    for method in ("memit", "rome", "alphaedit"):
        hp = settings(method, text, "refine=null", "limits.condition=1.000001", layers=(0,))
        with pytest.raises(NumericalError, match="down_proj: the condition number of the solve is at least"):
            editors.run(taught, ForgetRequest((told(0), told(1)), ()), hp)
    hp = settings("memit", text, "refine=null", "limits.perplexity=1.00001", "limits.norm=null", layers=(0,))
    with pytest.raises(NumericalError, match=r"the perplexity of held-out text rose from .* limits\.perplexity"):
        editunlearn.forget(taught, [told(0), told(1)], hp)
