"""``delta.json``: what a delta is, what it was made from, and which fact each rank column belongs to.

A list of things to forget is itself private, so facts are kept as a count and salted hashes; their text is
stored only on request. The salt is in the same file: the hashes stop a reader from looking a fact up in a
table and from linking two deltas, not from testing a guess.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from editunlearn import __version__
from editunlearn.errors import InputError, StaleError

if TYPE_CHECKING:
    from editunlearn.facts.records import Fact

FORMAT = "editunlearn.delta"
VERSION = 1


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FactSet(_Record):
    """The facts that one run was asked to forget."""

    count: int = Field(ge=0, description="How many facts were asked for.")
    salt: str = Field(description="Hex salt of every hash of this set.")
    sha256: str = Field(description="HMAC-SHA-256, keyed by the salt, of all facts in canonical JSON, sorted.")
    ids: tuple[str, ...] = Field(description="Hashed ids of the facts as asked for (see hash_id).")
    prompts: tuple[str, ...] | None = Field(
        default=None, description="Hashed prompts in the order of ids, to know a fact by; null: not recorded."
    )
    beside: str | None = Field(
        default=None, description="The same hash of the retain facts and past keys given with them; null: not recorded."
    )
    removed: tuple[str, ...] = Field(default=(), description="Hashed ids of facts whose columns were taken out again.")
    text: tuple[dict[str, Any], ...] | None = Field(
        default=None, description="The facts themselves; null unless asked for."
    )

    @property
    def remaining(self) -> int:
        """Facts that the delta still holds."""
        return self.count - len(self.removed)

    def without(self, gone: set[str]) -> FactSet:
        """This set with some facts, by hashed id, marked as removed; their text, if it was kept, goes."""
        removed = tuple(sorted({*self.removed, *(gone & set(self.ids))}))
        text = self.text
        if text is not None:
            text = tuple(fact for fact in text if hash_id(fact["id"], self.salt) not in gone)
        return self.model_copy(update={"removed": removed, "text": text})


class BaseModelRecord(_Record):
    """The model that a delta was made for."""

    name: str = Field(description="Hub id or path the model was loaded from.")
    revision: str | None = Field(default=None, description="Commit or branch; null when not known.")
    model_type: str = Field(description="config.model_type, for example 'llama'.")
    chat: dict[str, Any] | None = Field(
        default=None, description="System prompt and arguments of the chat template; null: the template's own."
    )


class BaseSite(_Record):
    """A module that a delta was made for."""

    shape: tuple[int, int] = Field(description="(out, in) of the weight.")
    transposed: bool = Field(description="True: the checkpoint stores this weight as (in, out), as GPT-2 does.")
    base_sha256: str = Field(description="Hash of the unedited weight's values (see arithmetic.weight_sha256).")
    base_dtype: str = Field(description="dtype of the weight when it was hashed.")


class WeightSite(BaseSite):
    """A module whose weight is changed."""

    base_norm: float | None = Field(ge=0, description="Frobenius norm of W; null for a packed quantised weight.")
    norm: float = Field(ge=0, description="Frobenius norm of dW.")
    gain: float | None = Field(default=None, description="Share of dW left after rounding; null: not measured.")
    gain_error: float | None = Field(
        default=None, ge=0, description="Relative error of dW after rounding; null: not measured."
    )
    gain_dtype: str | None = Field(default=None, description="dtype that gain was measured for.")

    @property
    def relative_norm(self) -> float | None:
        """norm(dW) / norm(W); None when norm(W) is not known or zero."""
        return self.norm / self.base_norm if self.base_norm else None


class SiteRecord(WeightSite):
    """A module with a low-rank change."""

    rank: int = Field(ge=0, description="Columns of the left factor.")
    columns: tuple[str | None, ...] = Field(
        description="For each rank column, the hashed id of its fact; null: the column serves many facts."
    )

    @model_validator(mode="after")
    def _one_id_a_column(self) -> SiteRecord:
        if len(self.columns) != self.rank:
            raise ValueError(f"{len(self.columns)} column ids for rank {self.rank}")
        return self


class DenseSite(WeightSite):
    """A module with a change of any of its entries."""

    changed: int = Field(ge=0, description="Entries of the weight that change.")


class MemorySite(BaseSite):
    """One module with a memory beside it."""

    kind: Literal["codebook", "side"] = Field(description="What the memory is made of.")
    entries: tuple[tuple[str, ...], ...] = Field(description="For each entry the hashed ids of the facts it serves.")
    settings: dict[str, Any] = Field(description="What reading the memory needs beside its tensors.")
    nbytes: int = Field(ge=0, description="Bytes of its tensors.")
    operations: int = Field(ge=0, description="Floating-point operations that it adds to a token of the prompt.")


class BaseManifest(_Record):
    """What every ``delta.json`` has. Written last, so that a folder with a manifest is complete."""

    format: Literal["editunlearn.delta"] = "editunlearn.delta"
    version: Literal[1] = 1
    kind: str = Field(description="What the delta is made of.")
    method: str = Field(description="Editor or unlearner, for example 'memit'.")
    hparams: dict[str, Any] = Field(description="Resolved settings, not the file they came from.")
    base: BaseModelRecord
    sites: Mapping[str, BaseSite] = Field(description="Edited modules by name, sorted.")
    facts: tuple[FactSet, ...] = Field(description="One set a run; a composed delta has several.")
    target_strategy: str = Field(description="What the model says instead: refusal, empty, ...")
    seeds: dict[str, int] = Field(description="Every seed that was used, by purpose.")
    versions: dict[str, str] = Field(description="editunlearn, torch, transformers, python.")
    negated: bool = Field(default=False, description="True: this delta reverts one that was merged.")
    tensors_sha256: str | None = Field(default=None, description="SHA-256 of delta.safetensors; set when saved.")

    @property
    def fact_count(self) -> int:
        """Facts that the delta holds, over all runs."""
        return sum(part.remaining for part in self.facts)

    @property
    def known_ids(self) -> set[str]:
        """Hashed ids of all facts that can be told apart here."""
        raise NotImplementedError

    def hashed(self, ids: Iterable[str]) -> set[str]:
        """The hashes of some facts as they stand here.

        Raises:
            InputError: some are not known here; the message lists them and how many are known.
        """
        wanted = {fact_id: self.hashes_of(fact_id) for fact_id in ids}
        known = self.known_ids
        unknown = [fact_id for fact_id, hashes in wanted.items() if not hashes & known]
        if unknown:
            listed = ", ".join(repr(fact_id) for fact_id in unknown)
            raise InputError(
                f"the delta has no columns of its own for {listed}; it knows {len(known)} fact ids (stored "
                "as hashes). Use the ids of the facts file that the delta was made from."
            )
        return set().union(*wanted.values()) & known

    def hashes_of(self, fact_id: str) -> set[str]:
        """The hashes that a fact id would have here, one for each salt."""
        return {hash_id(fact_id, part.salt) for part in self.facts}

    def held(self, fact: Fact) -> Literal["yes", "other", "no"]:
        """Whether this delta holds a fact; "other": it holds another one of the same id."""
        for part in self.facts:
            fact_id, prompt = hash_id(fact.id, part.salt), _hash_prompt(fact, part.salt)
            for number, there in enumerate(part.ids):
                if there in part.removed:
                    continue
                if part.prompts is not None and part.prompts[number] == prompt:
                    return "yes"
                if there == fact_id:
                    return "yes" if part.prompts is None else "other"
        return "no"

    def stored_facts(self) -> list[Fact]:
        """The facts that this delta holds, as far as their text is in it."""
        return [_fact(plain) for part in self.facts for plain in part.text or ()]

    def with_sites(self, sites: Mapping[str, BaseSite], **changes: Any) -> Self:
        """A copy for changed factors: other sites, no hash of the file yet."""
        return self.model_copy(update={"sites": sites, "tensors_sha256": None, **changes})

    def joined(self, other: BaseManifest, sites: Mapping[str, BaseSite]) -> Self:
        """The manifest of two deltas in one. Settings that differ are kept side by side."""
        method, hparams = self.settings_with(other.method, other.hparams)
        strategies = dict.fromkeys([*self.target_strategy.split("+"), *other.target_strategy.split("+")])
        clash = any(self.seeds[key] != seed for key, seed in other.seeds.items() if key in self.seeds)
        part = len(self.facts) + 1
        extra = {f"{key}.{part}" if clash else key: seed for key, seed in other.seeds.items()}
        return self.with_sites(
            sites,
            method=method,
            hparams=hparams,
            facts=self.facts + other.facts,
            target_strategy="+".join(strategies),
            seeds={**self.seeds, **extra},
        )

    def settings_with(self, method: str, hparams: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Method and settings of this delta and another one together."""
        if (self.method, self.hparams) == (method, hparams):
            return method, hparams
        together = self.method if self.method == method else f"{self.method}+{method}"
        return together, {"parts": [*self.parts(), *_parts(method, hparams)]}

    def parts(self) -> list[dict[str, Any]]:
        """The settings of every run that this delta is composed of."""
        return _parts(self.method, self.hparams)


class Manifest(BaseManifest):
    """Of a low-rank change."""

    kind: Literal["low_rank"] = "low_rank"
    sites: dict[str, SiteRecord] = Field(description="Edited modules by name, sorted.")

    @property
    def known_ids(self) -> set[str]:
        """Hashed ids of all facts that have a column of their own."""
        return {column for site in self.sites.values() for column in site.columns if column is not None}


class DenseManifest(BaseManifest):
    """Of a change of any entries of some weights."""

    kind: Literal["dense"] = "dense"
    sites: dict[str, DenseSite] = Field(description="Edited modules by name, sorted.")

    @property
    def known_ids(self) -> set[str]:
        """None: all facts were learned together."""
        return set()


class MemoryManifest(BaseManifest):
    """Of a memory beside the weights."""

    kind: Literal["memory"] = "memory"
    sites: dict[str, MemorySite] = Field(description="Modules with a memory by name, sorted.")

    @property
    def known_ids(self) -> set[str]:
        """Hashed ids of all facts that a memory serves."""
        return {fact for site in self.sites.values() for entry in site.entries for fact in entry}


def hash_id(fact_id: str, salt: str) -> str:
    """Salted hash of a fact's id, 16 hex digits: what a rank column is labelled with."""
    return _hmac(fact_id, salt)[:16]


def fact_set(
    facts: Sequence[Fact],
    *,
    retain: Sequence[Fact] = (),
    past: str = "",
    salt: str | None = None,
    store_text: bool = False,
) -> FactSet:
    """Summary of the facts of one run.

    Args:
        facts: the facts to forget.
        retain: the user's facts to keep.
        past: hash of the keys of earlier edits, "" for none.
        salt: hex; default: derived from the facts, so that the same run writes the same bytes.
        store_text: keep the facts themselves too.
    """
    plain = [plain_fact(fact) for fact in facts]
    lines, kept = _lines(plain), _lines([plain_fact(fact) for fact in retain])
    salt = salt or hashlib.sha256("\n".join(["salt", *lines]).encode()).hexdigest()[:32]
    text = tuple(plain) if store_text else None
    ids = tuple(hash_id(fact.id, salt) for fact in facts)
    return FactSet(
        count=len(plain),
        salt=salt,
        sha256=_hmac("\n".join(lines), salt),
        ids=ids,
        prompts=tuple(_hash_prompt(fact, salt) for fact in facts),
        beside=_hmac("\n".join([*kept, past]), salt),
        text=text,
    )


def _lines(plain: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted(json.dumps(fact, sort_keys=True, ensure_ascii=False) for fact in plain)


def plain_fact(fact: Fact) -> dict[str, Any]:
    """A fact as plain JSON values."""
    value: dict[str, Any] = json.loads(json.dumps(asdict(fact), ensure_ascii=False))
    return value


def _fact(plain: Mapping[str, Any]) -> Fact:
    """What :func:`plain_fact` was given."""
    from editunlearn.facts.records import Fact, Neighbor

    lists = {key: tuple(plain[key]) for key in ("paraphrases", "aliases")}
    return Fact(**{**plain, **lists, "neighbors": tuple(Neighbor(**n) for n in plain["neighbors"])})


def _hash_prompt(fact: Fact, salt: str) -> str:
    from editunlearn.facts.readers import comparable

    return hash_id(comparable(fact.prompt), salt)


def _parts(method: str, hparams: Mapping[str, Any]) -> list[dict[str, Any]]:
    composed = hparams.get("parts")
    return list(composed) if isinstance(composed, list) else [{"method": method, **hparams}]


def hash_columns(
    columns: Sequence[str | None] | Mapping[str, Sequence[str | None]], modules: Sequence[str], salt: str
) -> dict[str, tuple[str | None, ...]]:
    """Hashes the fact ids of rank columns; one list serves all modules, or each has its own."""
    per_module = columns if isinstance(columns, Mapping) else dict.fromkeys(modules, columns)
    return {
        name: tuple(None if column is None else hash_id(column, salt) for column in per_module[name])
        for name in modules
    }


def installed_versions() -> dict[str, str]:
    """Versions that a delta was made with."""
    packages = {name: metadata.version(name) for name in ("torch", "transformers")}
    return dict(sorted({"editunlearn": __version__, "python": platform.python_version(), **packages}.items()))


def check_composable(first: BaseManifest, second: BaseManifest, sequential: bool) -> None:
    """Makes sure that two deltas may become one; see ``lowrank.compose`` for the arguments and errors."""
    problems: list[str] = []
    if first.base.model_type != second.base.model_type:
        problems.append(
            f"one delta is for {first.base.name} ({first.base.model_type}), the other for {second.base.name}."
        )
    if first.negated != second.negated:
        problems.append("one delta reverts a merge and the other does not; apply them one after the other.")
    shared = sorted(first.sites.keys() & second.sites.keys())
    problems += [
        f"{name}: shapes {first.sites[name].shape} and {second.sites[name].shape} differ."
        for name in shared
        if first.sites[name].shape != second.sites[name].shape
    ]
    if problems:
        raise InputError(problems)
    stale = [name for name in shared if first.sites[name].base_sha256 != second.sites[name].base_sha256]
    if stale and not sequential:
        a, b = (part.sites[stale[0]].base_sha256[:12] for part in (first, second))
        raise StaleError(
            f"{stale[0]}: the two deltas were made for different weights (sha256 {a}.. and {b}..). If the "
            "second was fitted with the first applied, pass sequential=True."
        )


def _hmac(text: str, salt: str) -> str:
    return hmac.new(bytes.fromhex(salt), text.encode("utf-8"), hashlib.sha256).hexdigest()
