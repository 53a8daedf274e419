"""Values: for every fact, the change of a projection's output at the lookup token that makes the model say the target.

Many facts are optimised in one masked forward pass. Each has its own change, its own norm limit and its own stop;
nothing is shared between facts, so that a fact alone gives what it gives in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from editunlearn.editors.value_batch import Together, Way, tokens_of
from editunlearn.editors.value_types import Problem, Replacing, Store, Values
from editunlearn.hparams.pieces import BATCH_TOKENS
from editunlearn.lm.batching import by_length, halving
from editunlearn.lm.head import Head
from editunlearn.lm.resume import Tail, Upper, resumable
from editunlearn.lm.tokens import Row

if TYPE_CHECKING:
    from editunlearn.hparams.pieces import OneValue
    from editunlearn.lm.loading import LM


def optimise(
    lm: LM,
    problems: Sequence[Problem],
    modules: Sequence[str],
    hparams: OneValue,
    *,
    replacing: Replacing | None = None,
    tokens: int = BATCH_TOKENS,
    store: Store | None = None,
    progress: Callable[[int], None] = lambda _: None,
    warn: Callable[[str], None] = lambda _: None,
) -> Values:
    """Optimise the change of the outputs of ``modules`` for every problem, jointly over the modules.

    Loss of a fact (MEMIT, arXiv 2210.07229, eq. 16, with scale-free units): mean NLL of the target over contexts
    + ``kl`` * KL(unedited || edited) on its pinned prompts + ``weight_decay`` * relative norm of the change (squared,
    or as published not). With ``scale="relative"`` Adam steps in units of the root mean square of the clean output,
    else in absolute units. The relative norm is limited to ``clamp``.

    Processes (``lm.among``) share the batches, and each gets all values.

    Args:
        replacing: the outputs are replaced by clean output + change, at more tokens if it says so.
        tokens: padded tokens of one batch of facts.
        store: keeps finished batches, so that an interrupted run goes on after them.

    Raises:
        NumericalError: a loss that is not finite; names the problem's index.
    """
    store = store or Store(None)
    results: dict[int, Values] = {}  # of this process's share
    first = _first(lm, modules)
    way: Way = Tail if replacing is None or replacing.where == "last" else Upper
    why = resumable(lm, _telling(problems), first, way) if problems else ""
    head = Head(lm)
    if why:
        warn(f"values: all tokens go through all blocks at every step, because {why}")

    def run(part: Sequence[int]) -> None:
        kept = store.get(part)
        if kept is None:
            own = replacing.of(part) if replacing is not None else None
            start = None if why else (way, first)
            kept = Together(lm, head, [problems[i] for i in part], modules, hparams, start, own).solve(part)
            store.put(part, kept)
        for k, i in enumerate(part):
            results[i] = kept.at(k)
        progress(len(part))

    skip = way is Tail and not why
    batches = by_length([tokens_of(p, skip=skip) for p in problems], tokens)

    def share() -> dict[int, Values]:
        halving(lm.among.share(batches), run, warn)
        return results

    found = {i: values for part in lm.among.each(share) for i, values in part.items()}
    return Values.of([found[i] for i in range(len(problems))])


def _first(lm: LM, modules: Sequence[str]) -> int:
    """Number of the first block that has to be run again when the outputs of ``modules`` change."""
    blocks = lm.layout.num_layers(lm.model)
    after = [lm.layout.layer_of(name) + (name == lm.layout.block_name(lm.layout.layer_of(name))) for name in modules]
    return min(*after, blocks - 1)


def _telling(problems: Sequence[Problem]) -> Row:
    """A row with a token before its subject, if there is one: the others have nothing that could be resumed."""
    return next((row for problem in problems for row in problem.rows if row.lookup), problems[0].rows[0])
