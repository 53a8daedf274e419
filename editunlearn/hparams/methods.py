"""Settings that all methods of a kind have: those that change weights, and those that put a memory beside them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from editunlearn.hparams.fields import Layers, Piece, Whole
from editunlearn.hparams.pieces import (
    Chunks,
    ContextPrefixes,
    EditLimits,
    Limits,
    Merge,
    Moments,
    Refine,
    Retain,
    Value,
)


class MethodHParams(Piece):
    """What every method has."""

    method: str = Field(description="Name of the method.")
    layers: Layers = Field(
        default="auto",
        description="Blocks whose MLP output projection is edited. auto: by depth, the same for every model. located: "
        "as many neighbours, where `editunlearn locate` found the largest effects in these very weights.",
    )
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
