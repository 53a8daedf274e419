"""An editing session: forget requests one after another, kept as one delta from which each fact can go again."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editunlearn.facts.targets import DEFAULT_TARGETS
from editunlearn.pipeline import forget
from editunlearn.run_folder import WORK, remove_derived

if TYPE_CHECKING:
    from editunlearn.deltas.kinds import Delta
    from editunlearn.editors.earlier import Earlier
    from editunlearn.facts.records import Fact
    from editunlearn.hparams import MethodHParams
    from editunlearn.lm.loading import LM
    from editunlearn.pipeline import Outcome


class EditSession:
    """Edits of one model that follow each other; the model itself stays as it is.

    ``session.forget(facts)`` any number of times, ``session.save(folder)``, later ``EditSession.load(folder, lm)``. A
    folder of ``apply`` can be loaded, and ``apply --continue`` goes on from a saved session.

    Args:
        lm: the unedited model.
        hp: settings of the next requests.
        earlier: edits to go on from.
    """

    def __init__(self, lm: LM, hp: MethodHParams, *, earlier: Earlier | None = None) -> None:
        self.lm, self.hp, self.earlier = lm, hp, earlier
        self._unfinished: set[Path] = set()

    @property
    def delta(self) -> Delta | None:
        """All edits so far in one; None before the first."""
        return self.earlier.delta if self.earlier is not None else None

    def forget(
        self,
        facts: Sequence[Fact],
        *,
        retain: Sequence[Fact] = (),
        targets: str = DEFAULT_TARGETS,
        work: Path | None = None,
        cache: Path | None = None,
        evaluate: bool = False,
        store_facts: bool = False,
    ) -> Outcome:
        """Forget more facts; what was forgotten before stays so, and the session holds all of them afterwards.

        Args:
            facts: those that the session already holds are measured and not edited again.
            work: folder for finished stages, so that the same call goes on after a kill; :meth:`save` empties it.
            retain, targets, cache, evaluate, store_facts: as for :func:`editunlearn.pipeline.forget`.

        Raises:
            InputError: bad facts, targets or settings; nothing is new; another method or other layers than before.
            StaleError: the model has other weights than the earlier edits were made for.
            NumericalError: a number that is not finite, or a model that would be ruined; the session is as it was.
        """
        from editunlearn.editors.earlier import Earlier

        made = forget(
            self.lm,
            facts,
            self.hp,
            retain=retain,
            targets=targets,
            out=work,
            cache=cache,
            earlier=self.earlier,
            evaluate=evaluate,
            store_facts=store_facts,
            save_delta=False,
        )
        self.earlier = Earlier(made.delta, made.past)
        if work is not None:
            self._unfinished.add(work / WORK)
        return made

    def remove(self, ids: Iterable[str]) -> None:
        """Let the model say some facts again; the edits of all others stay bit for bit.

        Raises:
            InputError: the session does not hold them. UnsupportedError: they share an entry with facts that stay.
        """
        from editunlearn.errors import InputError

        if self.earlier is None:
            raise InputError("the session has no edits yet, so that none can be taken out. Call forget first.")
        self.earlier = self.earlier.without(ids)

    def applied(self) -> AbstractContextManager[Any]:
        """The model with all edits, for the length of a ``with`` block."""
        return self.delta.applied(self.lm) if self.delta is not None else nullcontext(self.lm)

    def save(self, folder: str | Path) -> None:
        """Write the delta, the past keys and the manifest; atomically, the manifest last.

        In the folder of an earlier run, what that says of another delta goes: card, results, LoRA, merged model.

        Raises:
            InputError: there is nothing to save.
        """
        from editunlearn.errors import InputError

        if self.earlier is None:
            raise InputError(f"{folder}: the session has no edits yet; nothing to save. Call forget first.")
        remove_derived(Path(folder), self.earlier.delta)
        self.earlier.save(folder)
        for stages in self._unfinished:
            shutil.rmtree(stages, ignore_errors=True)
        self._unfinished.clear()

    @classmethod
    def load(cls, folder: str | Path, lm: LM, hp: MethodHParams | None = None) -> EditSession:
        """Go on from what :meth:`save` or ``apply`` wrote.

        Args:
            lm: the unedited model.
            hp: settings of the next requests; default: those of the last one, with the batches that it had.

        Raises:
            InputError: not such a folder, or the model has other modules. StaleError: it has other weights.
        """
        from editunlearn.editors.earlier import Earlier
        from editunlearn.hparams import load_hparams

        earlier = Earlier.load(folder)
        earlier.check_model(lm)
        return cls(lm, hp or load_hparams(earlier.delta.manifest.parts()[-1]), earlier=earlier)
