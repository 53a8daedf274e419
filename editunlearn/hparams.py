"""Settings of the methods: strict schemas, and the one function that loads them.

A schema is a frozen pydantic model that knows no unknown keys. The pieces here are shared; each method has
its own ``HParams`` in ``editunlearn/editors/<method>.py``. Precedence: schema defaults < file <
``overrides[model_type]`` < ``--set a.b=c``. There is no model, path, device or dtype of a model in any of
them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    AllowInfNan,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationInfo,
    field_validator,
)

# Numbers that PyYAML (YAML 1.1) leaves as text although everybody else reads floats: 5e-1, 1e-3, 1.5e4.
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value.strip()) else value


def _layers(value: Any) -> Any:
    """Only one meaning per list: block numbers (ints) or depths (floats), each list in ascending order."""
    if value == "auto":
        return value
    layers = [_number(layer) for layer in value] if isinstance(value, list | tuple) else []
    if layers and all(type(layer) is int and layer >= 0 for layer in layers):
        kind = "block numbers"
    elif layers and all(type(layer) is float and 0.0 <= layer <= 1.0 for layer in layers):
        kind = "depths"
    else:
        raise ValueError(
            f"layers is {value!r}; it must be auto, or block numbers such as [4, 5, 6], "
            "or depths from 0.0 to 1.0 such as [0.3, 0.5], not both in one list."
        )
    if any(later <= earlier for earlier, later in zip(layers, layers[1:], strict=False)):
        raise ValueError(f"layers is {value!r}; {kind} must be in ascending order, each once.")
    return layers


def _count(name: str) -> BeforeValidator:
    def check(value: Any) -> Any:
        if value != "auto" and (type(value) is not int or value < 1):
            raise ValueError(f"{name} is {value!r}; it must be auto, or a whole number of at least 1.")
        return value

    return BeforeValidator(check)


Real = Annotated[float, Strict(), AllowInfNan(False), BeforeValidator(_number)]
Whole = Annotated[int, Strict()]
_COUNT = Field(json_schema_extra={"allowed": "auto, or a whole number of at least 1"})
Steps = Annotated[Literal["auto"] | int, _count("refine.steps"), _COUNT]
Prompts = Annotated[Literal["auto"] | int, _count("refine.retain_batch"), _COUNT]
Tokens = Annotated[Literal["auto"] | int, _count("moments.tokens"), _COUNT]
Layers = Annotated[
    Literal["auto"] | list[int | float],
    BeforeValidator(_layers),
    Field(json_schema_extra={"allowed": "auto, or a list of block numbers, or a list of depths from 0.0 to 1.0"}),
]


class Piece(BaseModel):
    """Base of all settings: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ContextPrefixes(Piece):
    """Random texts that the model itself writes; the bare prompt always counts too."""

    count: Whole = Field(default=5, ge=0, description="How many prefixes besides the bare prompt.")
    tokens: Whole = Field(default=10, ge=1, description="Length of a prefix in tokens.")
    seed: Whole = Field(default=0, ge=0, description="Seed of the sampling.")


class Value(Piece):
    """How the value of a fact (the vector that makes the model say the target) is optimised."""

    steps: Whole = Field(default=20, ge=1, description="Most updates of Adam per fact.")
    lr: Real = Field(default=0.3, gt=0, description="Learning rate of Adam, in units of `scale`.")
    scale: Literal["relative", "absolute"] = Field(
        default="relative",
        description="Measure lr in units of the activation's own scale, or in raw numbers.",
    )
    clamp: Annotated[Real, Field(gt=0)] | None = Field(
        default=4.0,
        description="Longest change, as a multiple of the clean activation's norm; null for no limit.",
    )
    weight_decay: Real = Field(default=0.05, ge=0, description="Weight of the penalty on the size of the change.")
    penalty: Literal["squared", "norm"] = Field(
        default="squared",
        description="Penalise the squared relative norm, or as published norm over squared norm.",
    )
    kl: Real = Field(default=0.0625, ge=0, description="Weight of the KL divergence to the unedited model.")
    kl_on: Literal["prompts", "subject"] = Field(
        default="prompts",
        description="Measure it at the end of retain prompts that are given the fact's subject, "
        "or as published at the last token of the subject, before its relation is known.",
    )
    contexts: Annotated[int, Field(strict=True, ge=1)] | None = Field(
        default=None, description="Contexts a value is optimised in, the bare prompt first; null for all."
    )
    stop_loss: Real = Field(default=0.05, ge=0, description="A fact is done when its loss falls below this.")
    spread: Literal["joint", "residual"] = Field(
        default="joint",
        description="Split the work over the layers jointly, or as published by what is still missing.",
    )


LEAST_TOKENS, TOKENS_PER_DIMENSION = 40_000, 10
"""Tokens of a second moment when they are ``auto``: what is fewer than its width says nothing of some directions."""


class Moments(Piece):
    """The second moment C of the keys over text: what the edit has to leave alone."""

    text: str = Field(
        default="general",
        min_length=1,
        description="Text to read: general (shipped), a path, hub id:config:split, or none (C = identity).",
    )
    tokens: Tokens = Field(
        default="auto",
        description="How many tokens of that text to read; auto: "
        f"{TOKENS_PER_DIMENSION} for each dimension of the keys, at least {LEAST_TOKENS:,}.",
    )
    length: Whole = Field(default=256, ge=2, description="Length of the packed sequences in tokens.")
    weight: Real = Field(default=10000.0, gt=0, description="Weight of C against the keys of the facts.")

    def budget(self, width: int) -> int:
        """Tokens to read for keys of that many dimensions."""
        return max(LEAST_TOKENS, TOKENS_PER_DIMENSION * width) if self.tokens == "auto" else self.tokens


class Retain(Piece):
    """Preservation built from retain facts rather than from general text."""

    weight: Real = Field(default=10.0, ge=0, description="Weight of the retain keys; 0 leaves them out.")
    max_keys: Whole = Field(default=4000, ge=1, description="Most retain keys to use; more are sampled down.")
    lookalikes: Whole = Field(
        default=0,
        ge=0,
        description="Tokens of moments.text taken most for a forgotten subject; their keys are kept like retain keys.",
    )


class NullSpace(Piece):
    """Which directions count as unused by the keys to preserve."""

    threshold: Real = Field(default=0.04, gt=0, description="Directions of C with less energy than this are free.")
    relative: bool = Field(default=True, strict=True, description="Measure the threshold against the mean eigenvalue.")
    l2: Real = Field(default=1.0, gt=0, description="Weight of the norm of the update.")
    soft: bool = Field(
        default=False,
        strict=True,
        description="Let C count in the free directions too, with moments.weight, as in MEMIT. As published: false.",
    )


class Merge(Piece):
    """Facts that share a value, and perhaps a key (query merging); null: each has its own."""

    by: Literal["subject", "key", "run", "all"] = Field(
        default="subject",
        description="What goes together: facts about one subject, facts with similar keys, so many in a row, or all.",
    )
    size: Whole = Field(
        default=10,
        ge=2,
        description="Facts of a group, at most (key: on average); all: so many of them are optimised on.",
    )
    keys: Literal["sample", "group"] = Field(
        default="sample", description="A key for each fact, or one for each group: the mean."
    )


class Chunks(Piece):
    """Targets written chunk by chunk (AnyEdit), each chunk with a value and a key; null: each target in one."""

    size: Whole = Field(default=40, ge=1, description="Length of a chunk in tokens.")
    preserve: Real = Field(
        default=1.0,
        ge=0,
        description="Weight of the keys of all other tokens of prompt and target, which nothing is written at; "
        "0 leaves them out.",
    )


LEAST_STEPS, STEPS_PER_FACT = 40, 5
"""Steps of refine when they are ``auto``: the more facts there are to tell apart, the more."""


PROMPTS_PER_FACT, LEAST_PROMPTS, MOST_PROMPTS = 1.6, 32, 64
"""Prompts to keep in each step of refine when they are ``auto``. Many facts disturb more, and of few prompts the
gradient is noisy: what is kept suffers from that, not what is forgotten."""


class Refine(Piece):
    """Training of the left factors after the closed form, on what is wanted; the right factors stay."""

    steps: Steps = Field(
        default="auto",
        description=f"Updates of Adam; auto: {LEAST_STEPS}, or {STEPS_PER_FACT} a fact less {2 * LEAST_STEPS} if more, "
        "and up to as many again while facts are not learned.",
    )
    lr: Real = Field(
        default=0.05,
        gt=0,
        description="Size of a step, relative to the left factors that would write the whole change.",
    )
    kl: Real = Field(default=80.0, ge=0, description="Weight of the KL divergence on prompts to keep.")
    text_kl: Real = Field(default=60.0, ge=0, description="Weight of the KL divergence on generic text.")
    floor: Real = Field(default=0.6, ge=0, description="A target whose loss is at or below this no longer counts.")
    forget_batch: Whole = Field(default=20, ge=1, description="Facts to forget per step.")
    contexts: Whole = Field(default=2, ge=1, description="Contexts per fact and step: the bare prompt and others.")
    retain_batch: Prompts = Field(
        default="auto",
        description=f"Prompts to keep per step; auto: {PROMPTS_PER_FACT} a fact, {LEAST_PROMPTS} to {MOST_PROMPTS}.",
    )
    text_batch: Whole = Field(default=1, ge=1, description="Sequences of generic text per step.")
    text_length: Whole = Field(default=128, ge=2, description="Length of those sequences in tokens.")
    batch_tokens: Whole = Field(
        default=1024, ge=1, description="Tokens in memory at a time; changes memory, not results."
    )

    def planned(self, facts: int) -> int:
        """Updates for that many facts to forget."""
        if self.steps == "auto":
            return max(LEAST_STEPS, STEPS_PER_FACT * facts - 2 * LEAST_STEPS)
        return self.steps

    def prompts(self, facts: int) -> int:
        """Prompts to keep per step for that many facts to forget."""
        if self.retain_batch == "auto":
            return min(MOST_PROMPTS, max(LEAST_PROMPTS, round(PROMPTS_PER_FACT * facts)))
        return self.retain_batch

    def most(self, facts: int) -> int:
        """Updates at most."""
        return 2 * self.planned(facts) if self.steps == "auto" else self.steps


class Limits(Piece):
    """When a run stops, with nothing written, because the model would be ruined; null: never."""

    perplexity: Annotated[Real, Field(gt=1)] | None = Field(
        default=10.0,
        description="Most that the perplexity of held-out text may be multiplied by, if it is measured.",
    )


class EditLimits(Limits):
    """Those of methods that change weights."""

    norm: Annotated[Real, Field(gt=0)] | None = Field(
        default=2.0,
        description="Largest change, of all facts and earlier ones together, relative to its weight.",
    )
    condition: Annotated[Real, Field(gt=1)] | None = Field(
        default=1e12, description="Largest condition number of a solve (a lower bound of it is looked at)."
    )


class MethodHParams(Piece):
    """What every method has."""

    method: str = Field(description="Name of the method.")
    layers: Layers = Field(default="auto", description="Blocks whose MLP output projection is edited.")
    context_prefixes: ContextPrefixes = Field(
        default_factory=ContextPrefixes,
        description="Texts put before the prompt, so that the edit holds in context.",
    )
    seed: Whole = Field(default=0, ge=0, description="Seed of every random choice that has none of its own.")
    batch_tokens: Whole = Field(
        default=2048, ge=1, description="Tokens of facts optimised at a time; changes memory, not results."
    )
    limits: Limits = Field(default_factory=Limits, description="What stops a run before it ruins the model.")
    paper: str | None = Field(default=None, description="Where the method comes from; goes to the model card.")


class EditorHParams(MethodHParams):
    """What every closed-form editor has; a method's own schema adds to it and sets the defaults."""

    subject_token: Literal["last_word", "last", "first", "prompt_last"] = Field(
        default="last",
        description="Token whose activation is key and value: of the subject (last_word: the last with a letter or "
        "digit, not a closing bracket or full stop), or the prompt's last.",
    )
    merge: Merge | None = Field(default=None, description="Query merging; null: every fact has its own value and key.")
    chunks: Chunks | None = Field(default=None, description="Long targets in chunks; null: in one piece.")
    limits: EditLimits = Field(default_factory=EditLimits, description="What stops a run before it ruins the model.")
    value: Value = Field(default_factory=Value, description="How the new values are optimised.")
    moments: Moments = Field(default_factory=Moments, description="Second moment of the keys over text.")
    retain: Retain = Field(default_factory=Retain, description="Preservation of retain facts.")
    refine: Refine | None = Field(
        default_factory=Refine, description="Training after the closed form; null for the closed form alone."
    )

    @field_validator("chunks")
    @classmethod
    def _not_merged(cls, chunks: Chunks | None, info: ValidationInfo) -> Chunks | None:
        if chunks is not None and info.data.get("merge") is not None:
            raise ValueError(
                "chunks and merge do not go together: merged facts share one value. Set one of them to null."
            )
        return chunks


def _one_layer(value: Any) -> Any:
    if value != "auto" and len(value) != 1:
        raise ValueError(f"layers is {value!r}; a memory is of one layer: auto, or a list of one.")
    return value


class MemoryHParams(MethodHParams):
    """What every method has that puts a memory beside one layer and leaves the weights alone."""

    layers: Annotated[Layers, AfterValidator(_one_layer)] = Field(
        default="auto", description="The block whose MLP output projection gets the memory."
    )
    keep: Whole = Field(
        default=1000, ge=0, description="Prompts to keep, at most, that the memory is made to leave alone; 0 for none."
    )

    @property
    def subject_token(self) -> Literal["prompt_last"]:
        """A memory is asked at the end of the prompt."""
        return "prompt_last"

    @property
    def training_steps(self) -> int:
        """Times that a fact is trained on, at most."""
        raise NotImplementedError


Located = EditorHParams | MemoryHParams
"""Settings that say at which token of a prompt to look."""


class Described(NamedTuple):
    """One setting for documents and headers."""

    key: str
    value: Any
    is_default: bool
    description: str


def load_hparams(
    source: str | Path | Mapping[str, Any],
    *,
    set: Sequence[str] = (),  # the name of the flag
    model_type: str | None = None,
    format: Literal["editunlearn", "easyedit"] = "editunlearn",
) -> MethodHParams:
    """Read and check settings; nothing but the schema's own defaults is ever filled in.

    Args:
        source: an existing file first, else the name of a shipped one (``memit``, ``memit.yaml``,
            ``paper/memit``), or the mapping itself.
        set: ``a.b=c`` each, the value in YAML, the last one wins.
        model_type: ``config.model_type`` of the model, picks from the file's ``overrides``.
        format: ``easyedit`` also reads ROME's, MEMIT's and AlphaEdit's files; ``hparams_easyedit.read``
            gives the translation to show.

    Raises:
        InputError: every problem found, one a line, each with file and line, what is allowed and a near name.
    """
    from editunlearn import hparams_check, hparams_easyedit, hparams_yaml

    if format not in ("editunlearn", "easyedit"):
        from editunlearn.errors import InputError

        raise InputError(f"hparams format {format!r} is not known. Formats: editunlearn, easyedit.")
    document = hparams_yaml.read(source)
    if format == "easyedit":
        document = hparams_easyedit.translate(document).document
    return hparams_check.check(document, set, model_type)


def resolved(hp: BaseModel) -> dict[str, Any]:
    """All settings with their values, plain and JSON-able; ``load_hparams`` reads it back."""
    return hp.model_dump(mode="json")


def describe(hp: MethodHParams) -> list[Described]:
    """Every setting: dotted key, value, is it the schema's default, description with the range."""
    return list(_describe(hp, None, ""))


def _describe(part: BaseModel, default_part: BaseModel | None, prefix: str) -> list[Described]:
    from editunlearn.hparams_check import allowed

    rows: list[Described] = []
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        default = getattr(default_part, name) if default_part else field.get_default(call_default_factory=True)
        if isinstance(value, BaseModel):
            rows += _describe(value, default if isinstance(default, BaseModel) else None, f"{prefix}{name}.")
        else:
            rows.append(
                Described(prefix + name, value, value == default, f"{field.description} Allowed: {allowed(field)}.")
            )
    return rows
