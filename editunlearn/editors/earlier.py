"""What a run goes on from: one delta of all earlier edits and the keys that they wrote."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editunlearn.deltas.files import MANIFEST, check_base, load, save
from editunlearn.deltas.kinds import Delta
from editunlearn.deltas.lowrank import LowRankDelta
from editunlearn.deltas.memory import MemoryDelta
from editunlearn.editors.past import PastKeys
from editunlearn.errors import InputError, StaleError, UnsupportedError
from editunlearn.facts.readers import comparable
from editunlearn.facts.records import Fact
from editunlearn.lm.chat import Chat

if TYPE_CHECKING:
    from editunlearn.hparams import MethodHParams
    from editunlearn.lm.loading import LM

PAST = "past_keys.safetensors"
"""File of the past keys beside a delta."""


@dataclass(frozen=True)
class Earlier:
    """Earlier edits of one model.

    Attributes:
        delta: all of them in one.
        past: the keys that they wrote; none for memories.
        where: what messages call it.
    """

    delta: Delta
    past: PastKeys
    where: str = "the earlier edits"

    @classmethod
    def load(cls, folder: str | Path) -> Earlier:
        """Read a finished run, or a session that was saved; needs no model.

        Raises:
            InputError: not such a folder, or damaged; a delta that takes an edit out; keys that are not those of the
                delta's modules.
        """
        where = Path(folder)
        if not (where / MANIFEST).is_file():
            raise InputError(f"{where}: no {MANIFEST}, so not a finished run. Give the --out folder of a finished one.")
        delta = load(where)
        if delta.manifest.negated:
            raise InputError(f"{where}: takes an edit out again; there is nothing to go on from. Give the edit itself.")
        try:
            delta.manifest.stored_facts()
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{where / MANIFEST}: the text of its facts has other fields than this editunlearn's ({error}). Set "
                "'text' to null there, and give the facts in --facts once more."
            ) from error
        if not isinstance(delta, LowRankDelta):
            return cls(delta, PastKeys(), str(where))
        if not (where / PAST).is_file() and not delta.manifest.known_ids:
            raise UnsupportedError(
                f"{where}: was made by {delta.manifest.method}, which learned all facts together and has no keys that "
                "a next edit could preserve. Merge it (export --to merged), and edit the merged model."
            )
        if not (where / PAST).is_file():
            raise InputError(
                f"{where}: has no {PAST}, without which a next edit would overwrite this one. Give the folder that "
                "apply, a session or export --to delta has written, with all of its files."
            )
        past = PastKeys.load(where / PAST)
        widths = {name: keys.shape[1] for name, keys in past.keys.items()}
        if wrong := [n for n, site in delta.manifest.sites.items() if widths.get(n) != site.shape[1]]:
            raise InputError(f"{where / PAST}: has no keys of {wrong[0]}; it is of another run than {MANIFEST}.")
        return cls(delta, past, str(where))

    def save(self, folder: str | Path, facts: Sequence[Fact] | None = None) -> None:
        """Write what :meth:`load` reads, the manifest last; ``facts``: keep their text in it."""
        if self.past.keys:
            self.past.save(Path(folder) / PAST)
        save(self.delta, folder, facts)

    def without(self, ids: Iterable[str]) -> Earlier:
        """These edits less some facts, whose keys stay past keys: what the model says there again shall stay, too."""
        return Earlier(self.delta.without(ids), self.past, self.where)

    def digest(self) -> str:
        """Hash of everything that a next edit depends on."""
        total = hashlib.sha256(self.past.digest().encode())
        for name, tensor in sorted(self.delta.tensors().items()):
            total.update(name.encode())
            total.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        manifest = self.delta.manifest
        total.update(manifest.with_sites(manifest.sites).model_dump_json().encode())
        return total.hexdigest()

    def active(self, lm: LM) -> AbstractContextManager[Any]:
        """The model with the earlier change of weights in it, for the length of a ``with`` block.

        Memories stay out: each decides by itself, at inputs that none of them changes, so that a new one is the same
        whether the others are there or not.
        """
        return nullcontext() if isinstance(self.delta, MemoryDelta) else self.delta.applied(lm)

    def divide(self, facts: Sequence[Fact]) -> tuple[list[Fact], list[Fact]]:
        """Facts that are new, and those that are already held: asked again, they are measured and not edited.

        Raises:
            InputError: nothing is new, or an id is that of another fact here.
        """
        held = [(fact, self.delta.manifest.held(fact)) for fact in facts]
        problems = [
            f"{self.where}: fact id {fact.id!r} is already that of another fact there; give this one another id, so "
            "that each can be taken out by its own."
            for fact, there in held
            if there == "other"
        ]
        new = [fact for fact, there in held if there == "no"]
        if not new and not problems:
            problems = [
                f"{self.where}: already holds all {len(facts)} facts; there is nothing to add. For another target, "
                "take a fact out first: editunlearn export --without ID --to delta."
            ]
        if problems:
            raise InputError(problems)
        return new, [fact for fact, there in held if there == "yes"]

    def known(self, again: Sequence[Fact]) -> list[Fact]:
        """The facts held here whose text is known: ``again`` and those that the manifest keeps."""
        prompts = {comparable(fact.prompt) for fact in again}
        stored = self.delta.manifest.stored_facts()
        return [*again, *(fact for fact in stored if comparable(fact.prompt) not in prompts)]

    def check_method(self, hp: MethodHParams, sites: Iterable[str]) -> None:
        """The next edit can be one delta with these.

        Args:
            sites: modules that it will edit.

        Raises:
            UnsupportedError: a memory and a change of weights, or different memories.
            InputError: other modules, where the keys of the earlier facts are not known.
        """
        from editunlearn.hparams import BlockHParams, MemoryHParams, UnlearnerHParams

        if isinstance(hp, UnlearnerHParams):
            raise UnsupportedError(
                f"{self.where}: {hp.method} trains a model and cannot go on from a delta. Merge it (export --to "
                "merged), and give the merged model."
            )
        there, memory = self.delta.manifest, isinstance(hp, MemoryHParams)
        if there.kind == "dense" and there.method != hp.method:
            raise UnsupportedError(
                f"{self.where}: was made by {there.method}, whose change is in all of its weights and has no keys that "
                f"{hp.method} could preserve. Merge it (export --to merged), and edit the merged model."
            )
        other_kind = memory != (there.kind == "memory")
        if other_kind or (memory and there.method != hp.method):
            what = "a memory and a change of weights" if other_kind else "different memories"
            raise UnsupportedError(
                f"{self.where}: was made by {there.method}, which {hp.method} cannot go on from: {what} cannot be one "
                f"delta. Go on with {there.method}, or start from a merged model."
            )
        if isinstance(hp, BlockHParams) and there.kind == "low_rank":
            raise UnsupportedError(
                f"{self.where}: was made by {there.method}, a low-rank change that {hp.method}'s whole matrices would "
                "swallow. Merge it (export --to merged), and edit the merged model."
            )
        sites = sorted(sites)
        if there.sites and sites != sorted(there.sites):
            raise InputError(
                f"{self.where}: edits {', '.join(there.sites)}, this run {', '.join(sites)}; what the earlier facts' "
                "keys are there is not known, so that they could not be preserved. Set the layers of the earlier run."
            )

    def check_model(self, lm: LM) -> None:
        """The model is the one that these edits were made for.

        Raises:
            InputError: it has other modules. StaleError: other weights, another dtype, or another way to ask.
        """
        from editunlearn.deltas.arithmetic import dtype_name

        check_base(self.delta, lm)
        if Chat.of(self.delta.manifest.base.chat) != lm.chat:
            raise StaleError(
                f"{self.where}: made with another system prompt or other arguments of the chat template than this "
                "model is loaded with."
            )
        found = {dtype_name(lm.dtype)}
        wanted = self.dtypes()
        if wanted and found != wanted:
            raise StaleError(f"{self.where}: made in {', '.join(wanted)}, this model is {', '.join(found)}.")

    def dtypes(self) -> set[str]:
        """dtypes of the weights that were edited; empty where they were packed."""
        named = {site.base_dtype for site in self.delta.manifest.sites.values()}
        return named & {"float32", "bfloat16", "float16", "float64"}
