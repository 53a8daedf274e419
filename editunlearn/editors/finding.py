"""Values of all facts, or of all chunks of their targets, kept for an interrupted run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from editunlearn.editors import chunks, values
from editunlearn.editors.value_types import Problem, Store, Values

if TYPE_CHECKING:
    from editunlearn.console import Console
    from editunlearn.editors.chunks import Parts
    from editunlearn.facts.records import Fact
    from editunlearn.hparams import Valued
    from editunlearn.lm.loading import LM
    from editunlearn.workspace import Workspace

HARD = 2.0
"""A loss above which a value says something else."""


def find(
    lm: LM,
    make: Callable[[], list[Problem]],
    parts: Parts | None,
    at: Sequence[str],
    hp: Valued,
    work: Workspace,
    console: Console,
    *,
    unit: str,
    finish: Callable[[Values], Values] = lambda found: found,
) -> Values:
    """The values, from the interrupted run if that finished them.

    Args:
        make: the problems.
        parts: what the problems are of, chunks of one fact in turn; None: each stands alone.
        at: modules whose outputs they change.
        unit: what a problem is, for people.
        finish: from the values of the problems to those that count.
    """
    kept = lm.among.by_first(lambda: work.get("values"))
    if kept is not None:
        console.info(f"values: {len(kept['loss'])} from the interrupted run")
        return Values(**kept)
    problems = make()
    stores: list[Store] = []
    with console.progress(len(problems), f"values ({unit})") as bar:

        def optimise(some: list[Problem], turn: int) -> Values:
            stores.append(Store(work, turn))
            return values.optimise(
                lm,
                some,
                at,
                hp.value,
                tokens=hp.tokens_at_once,
                store=stores[-1],
                progress=bar.update,
                warn=console.warn,
            )

        each = parts if parts is not None else chunks.whole(range(len(problems)))
        found = finish(chunks.in_turn(problems, each, optimise))
    lm.among.by_first(lambda: work.put("values", vars(found)))
    for store in stores:
        store.clear()
    return found


def warn_if_hard(found: Values, owners: Sequence[Fact], console: Console) -> None:
    """Say which values do not make the model say their target."""
    hard = [fact.id for fact, loss in zip(owners, found.loss.tolist(), strict=True) if loss > HARD]
    if hard:
        console.warn(
            f"{len(hard)} of {len(found.loss)} values did not converge (loss above {HARD:g}), first {hard[0]!r}; "
            "try more value.steps"
        )
