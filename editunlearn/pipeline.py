"""``forget``: the whole data flow, from facts to a saved delta with what was measured before and after."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editunlearn.errors import NumericalError
from editunlearn.facts.readers import comparable
from editunlearn.facts.records import Fact, ForgetRequest, content_hash
from editunlearn.facts.targets import DEFAULT_TARGETS, fill_targets, strategy
from editunlearn.facts.text import documents
from editunlearn.general import general_facts, without
from editunlearn.lm.freeing import give_back
from editunlearn.naming import first_of
from editunlearn.run_folder import WORK, finish, make_room

if TYPE_CHECKING:
    from editunlearn.console import Console
    from editunlearn.deltas.kinds import Delta
    from editunlearn.editors.earlier import Earlier
    from editunlearn.editors.past import PastKeys
    from editunlearn.evaluation.scoring import Scores
    from editunlearn.hparams import MethodHParams
    from editunlearn.lm.loading import LM

PERPLEXITY_LENGTH = 256


@dataclass
class Stages:
    """Wall time of each stage in seconds, in the order in which they ran."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time of the block to stage ``name``; what was freed in it goes back to the system."""
        start = time.perf_counter()
        try:
            yield
        finally:
            give_back()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Outcome:
    """What ``forget`` returns.

    Attributes:
        delta: the change; the model is as it was.
        request: the facts with their targets, and what was kept.
        past: keys for a next edit that has to preserve this one.
        before, after: measurements, None when they were not asked for.
        stages: wall time by stage.
    """

    delta: Delta
    request: ForgetRequest
    past: PastKeys
    before: Scores | None
    after: Scores | None
    stages: Stages


def forget(
    lm: LM,
    facts: Sequence[Fact],
    hp: MethodHParams,
    *,
    retain: Sequence[Fact] = (),
    targets: str = DEFAULT_TARGETS,
    out: Path | None = None,
    cache: Path | None = None,
    past: PastKeys | None = None,
    earlier: Earlier | None = None,
    evaluate: bool = True,
    fresh: bool = False,
    store_facts: bool = False,
    save_delta: bool = True,
    how: str | None = None,
    console: Console | None = None,
) -> Outcome:
    """Make ``lm`` forget ``facts`` and measure it; the model itself is unchanged when this returns.

    Args:
        retain: facts that must stay; the shipped general facts always count too.
        targets: what to say instead: ``refusal``, ``refusal:TEXT``, ``self``, ``empty``, ``random`` or
            ``counterfactual``.
        out: the delta is saved here, and finished stages kept here, so that the same call goes on after a kill.
        cache: folder for statistics; default :func:`editunlearn.lm.loading.default_cache_dir`.
        past: keys of earlier edits to preserve.
        earlier: edits to go on from. They stay active while this one is made, the delta holds them too, and their facts
            stay measured as far as their text is known: stored in their manifest, or given in ``facts`` once more.
        evaluate: decode and score before and after.
        fresh: start over instead of going on.
        store_facts: keep the text of the facts in ``delta.json``.
        save_delta: False leaves only the finished stages in ``out``, for a caller that has more to write there between
            :func:`editunlearn.run_folder.make_room` and ``finish``.
        how: what the delta says that its targets came of, where the facts bring targets that were made for them.

    Raises:
        InputError: bad facts, targets or settings.
        NumericalError: a number that is not finite, or a model that would be ruined (``limits``); nothing was written.
    """
    from editunlearn import editors, methods
    from editunlearn.console import Console
    from editunlearn.editors import located
    from editunlearn.evaluation import scoring
    from editunlearn.hparams import EditorHParams
    from editunlearn.lm.loading import default_cache_dir
    from editunlearn.workspace import Workspace

    console, stages = console or Console(quiet=True), Stages()
    cache = cache or default_cache_dir()
    if hp.layers == "located":
        hp, why = located.settled(lm, hp, cache, editors.module(hp.method).DEFAULT_LAYERS)
        console.info(f"layers: {hp.layers} ({why})")
    elif isinstance(hp, EditorHParams) and (remark := located.remark(lm, hp, cache)):
        console.info(remark)
    filled = lm.among.by_first(
        lambda: with_targets(
            lm, facts, targets, seed=hp.seed, retain=retain, cache=cache, console=console, stages=stages
        )
    )
    again: list[Fact] = []
    if earlier is not None:
        facts = earlier.divide(facts)[0]
        filled, again = earlier.divide(filled)
        again = earlier.known(again)
    asked = [*filled, *again]
    retain = _not_forgotten(retain, asked, console)
    kept = without(retain, asked, console)
    with stages.timed("known facts"):
        general = lm.among.by_first(lambda: general_facts(lm, asked, kept, cache, console))
    heldout = general.heldout
    request = ForgetRequest(tuple(filled), tuple(kept), tuple(general.known), tuple(general.names), tuple(again))
    text = perplexity_text(lm)
    before = after = None
    if evaluate:
        with stages.timed("before"):
            console.info(f"before: decoding {len(asked)} facts, their paraphrases and {len(heldout)} held-out facts")
            before = _finite(scoring.measure(lm, asked, retain, heldout, text), lm, "before")
        _warn_unknown(asked, before, console)
    inputs = run_inputs(lm, request, hp, targets, past, earlier)
    work = Workspace(out / WORK if out is not None else None, inputs, fresh=fresh and lm.among.first)
    with stages.timed("edit"):
        delta, extended = methods.run(
            lm,
            request,
            hp,
            past=past,
            earlier=earlier,
            work=work,
            cache=cache,
            console=console,
            store_facts=store_facts,
            target_strategy=how or strategy(facts, targets),
        )
    if evaluate:
        with stages.timed("after"), delta.applied(lm):
            console.info("after: the same with the edit merged")
            after = _finite(scoring.measure(lm, asked, retain, heldout, text), lm, "after")
        _check_perplexity(before, after, hp.limits.perplexity)
    if out is not None and save_delta and lm.among.first:
        make_room(out, delta)
        finish(out, delta, extended, asked if store_facts else None)
    return Outcome(delta, request, extended, before, after, stages)


def with_targets(
    lm: LM,
    facts: Sequence[Fact],
    targets: str,
    *,
    seed: int,
    retain: Sequence[Fact] = (),
    cache: Path | None = None,
    console: Console,
    stages: Stages | None = None,
) -> list[Fact]:
    """``facts`` with what is to be said instead, for which the model itself may be asked."""
    from editunlearn.recipes import self_refusals

    own = facts
    if targets == self_refusals.TARGETS:
        with (stages or Stages()).timed("refusals"):
            own = self_refusals.write(lm, facts, seed=seed, cache=cache, console=console)
    return fill_targets(own, targets, seed=seed, pool=[*facts, *retain] if targets == "random" else None)


def _not_forgotten(retain: Sequence[Fact], asked: Sequence[Fact], console: Console) -> list[Fact]:
    """The retain facts less those that are to be forgotten: the same prompt cannot be both."""
    prompts = {comparable(f.prompt) for f in asked}
    both = [f.id for f in retain if comparable(f.prompt) in prompts]
    if both:
        console.warn(f"{len(both)} retain facts are to be forgotten as well, and are left out: {first_of(both, 10)}")
    return [f for f in retain if comparable(f.prompt) not in prompts]


def _check_perplexity(before: Scores | None, after: Scores, limit: float | None) -> None:
    """Raises NumericalError when text became ``limit`` times as unlikely; None: no limit."""
    if limit is not None and before is not None and after.perplexity > limit * before.perplexity:
        raise NumericalError(
            f"the perplexity of held-out text rose from {before.perplexity:.4g} to {after.perplexity:.4g}, above "
            f"limits.perplexity ({limit:g} times): the edit ruins the model. Nothing was written. Ask for fewer facts, "
            "raise moments.weight, lower value.clamp or train.lr, or --set limits.perplexity=null."
        )


def _finite(scores: Scores, lm: LM, when: str) -> Scores:
    """``scores``, if all of them are numbers.

    Raises:
        NumericalError: one is not; nothing was written.
    """
    bad = [name for name, value in scores.summary().items() if value is not None and not math.isfinite(value)]
    if bad:
        raise NumericalError(f"{lm.name}: {', '.join(bad)} {when} the edit is not finite; nothing was written.")
    return scores


def _warn_unknown(facts: Sequence[Fact], before: Scores, console: Console) -> None:
    unknown = [f.id for f, answered in zip(facts, before.forget, strict=True) if not answered.leaked]
    if unknown:
        console.warn(
            f"the model does not answer {len(unknown)} of {len(facts)} facts; nothing to forget there: "
            + first_of(unknown, 10)
        )


def run_inputs(
    lm: LM,
    request: ForgetRequest,
    hp: MethodHParams,
    targets: str,
    past: PastKeys | None,
    earlier: Earlier | None = None,
) -> dict[str, Any]:
    """Everything that a delta depends on, for the key of its workspace."""
    import torch

    from editunlearn import __version__
    from editunlearn.artifacts import sha256_file
    from editunlearn.editors.moments import tokenizer_hash
    from editunlearn.hparams import EditorHParams, Keeping, resolved
    from editunlearn.lm.fingerprint import model_fingerprint

    parts = (request.facts, request.retain, request.general, request.names, request.earlier)
    retain = getattr(hp, "retain", None)
    text = retain.text if isinstance(retain, Keeping) and retain.data == "text" else "none"
    if isinstance(hp, EditorHParams):
        text = hp.moments.text
    return {
        "version": __version__,
        "torch": str(torch.__version__),
        "device": lm.device.type,
        "dtype": str(lm.dtype),
        "model": model_fingerprint(lm),
        "tokenizer": tokenizer_hash(lm),
        "facts": [content_hash(part) for part in parts],
        "hparams": resolved(hp),
        "text": sha256_file(text) if Path(text).is_file() else text,
        "targets": targets,
        "past": past.digest() if past else "",
        "earlier": earlier.digest() if earlier else "",
    }


def perplexity_text(lm: LM) -> list[list[int]]:
    """Windows of the held-out part of the shipped text."""
    from editunlearn.lm.windows import windows

    return list(windows(lm, documents("general", "heldout"), PERPLEXITY_LENGTH, 1 << 30))


def result_rows(outcome: Outcome) -> dict[str, dict[str, float | None]]:
    """Metric -> {"base": ..., "edited": ...}; empty when nothing was measured."""
    if outcome.before is None or outcome.after is None:
        return {}
    before, after = outcome.before.summary(), outcome.after.summary()
    return {name: {"base": before[name], "edited": after[name]} for name in before}


def environment() -> Mapping[str, str]:
    """Versions and hardware, for files that hold measured times."""
    import platform

    import torch
    import transformers

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "gpu": gpu,
    }
