"""Settings that all methods of a kind have: editors of weights, memories beside them, unlearners that train."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from editunlearn.hparams import pieces
from editunlearn.hparams.fields import BatchTokens, Layers, Piece, Spellings, Whole
from editunlearn.hparams.training import PASSAGE, BlockTrain, Stop, Train

if TYPE_CHECKING:
    from editunlearn.facts.records import ForgetRequest
    from editunlearn.lm.loading import LM
    from editunlearn.unlearners.terms import Objective


class MethodHParams(Piece):
    """What every method has."""

    method: str = Field(description="Name of the method.")
    layers: Layers = Field(
        default="auto",
        description="Blocks whose MLP output projection is edited. auto: by depth, the same for every model. located: "
        "as many neighbours, where `editunlearn locate` found the largest effects in these very weights.",
    )
    seed: Whole = Field(default=0, ge=0, description="Seed of every random choice that has none of its own.")
    batch_tokens: BatchTokens = Field(
        default="auto", description=pieces.batches(pieces.BATCH_TOKENS, "of facts optimised")
    )
    limits: pieces.Limits = Field(
        default_factory=pieces.Limits, description="What stops a run before it ruins the model."
    )
    paper: str | None = Field(default=None, description="Where the method comes from; goes to the model card.")

    @property
    def tokens_at_once(self) -> int:
        """Padded tokens of one batch; the usual number where ``auto`` was not settled for a model."""
        return pieces.BATCH_TOKENS if self.batch_tokens == "auto" else self.batch_tokens


class InContextHParams(MethodHParams):
    """What every editor has."""

    context_prefixes: pieces.ContextPrefixes = Field(
        default_factory=pieces.ContextPrefixes,
        description="Texts put before the prompt, so that the edit holds in context.",
    )


class EditorHParams(InContextHParams):
    """What every closed-form editor has; a method's own schema adds to it and sets the defaults."""

    subject_token: Literal["last_word", "last", "first", "prompt_last"] = Field(
        default="last",
        description="Token whose activation is key and value: of the subject (last_word: the last with a letter or "
        "digit, not a closing bracket or full stop), or the prompt's last.",
    )
    merge: pieces.Merge | None = Field(
        default=None, description="Query merging; null: every fact has its own value and key."
    )
    chunks: pieces.Chunks | None = Field(default=None, description="Long targets in chunks; null: in one piece.")
    spellings: Spellings = Field(
        default_factory=list,
        description="Other letters in which a subject is forgotten as well, each with a key and a value of its own.",
    )
    limits: pieces.EditLimits = Field(
        default_factory=pieces.EditLimits, description="What stops a run before it ruins the model."
    )
    value: pieces.Value = Field(default_factory=pieces.Value, description="How the new values are optimised.")
    moments: pieces.Moments = Field(default_factory=pieces.Moments, description="Second moment of the keys over text.")
    retain: pieces.Retain = Field(default_factory=pieces.Retain, description="Preservation of retain facts.")
    solve: pieces.Solve = Field(default_factory=pieces.Solve, description="How its systems are solved.")
    refine: pieces.Refine | None = Field(
        default_factory=pieces.Refine, description="Training after the closed form; null for the closed form alone."
    )

    @field_validator("chunks", "spellings")
    @classmethod
    def _not_merged(cls, value: Any, info: ValidationInfo) -> Any:
        if value and info.data.get("merge") is not None:
            raise ValueError(
                f"{info.field_name} and merge do not go together: merged facts share one value. Leave one of them out."
            )
        return value


def _one_layer(value: Any) -> Any:
    if value != "auto" and len(value) != 1:
        raise ValueError(f"layers is {value!r}; this method is of one layer: auto, or a list of one.")
    return value


class MemoryHParams(InContextHParams):
    """What every method has that puts a memory beside one layer and leaves the weights alone."""

    layers: Annotated[Layers, AfterValidator(_one_layer)] = Field(
        default="auto", description="The block whose MLP output projection gets the memory."
    )
    keep: Whole = Field(
        default=1000, ge=0, description="Prompts to keep, at most, that the memory is made to leave alone; 0 for none."
    )
    texts: Whole = Field(
        default=32, ge=0, description=f"Passages of general text, of {PASSAGE} tokens, that it leaves alone as well."
    )

    @property
    def subject_token(self) -> Literal["prompt_last"]:
        """A memory is asked at the end of the prompt."""
        return "prompt_last"

    @property
    def training_steps(self) -> int:
        """Times that a fact is trained on, at most."""
        raise NotImplementedError

    @property
    def contexts_per_step(self) -> int | None:
        """In how many contexts a step sees a fact; None: in all."""
        return None


class BlockHParams(InContextHParams):
    """What every method has that trains one whole block until it gives the values by itself."""

    layers: Annotated[Layers, AfterValidator(_one_layer)] = Field(
        default="auto", description="The block whose linear maps are trained."
    )
    limits: pieces.ChangeLimits = Field(
        default_factory=pieces.ChangeLimits, description="What stops a run before it ruins the model."
    )
    chunks: pieces.Chunks | None = Field(default=None, description="Long targets in chunks; null: in one piece.")
    value: pieces.OneValue = Field(
        default_factory=pieces.OneValue, description="How the new values, of the block's output, are optimised."
    )
    train: BlockTrain = Field(default_factory=BlockTrain, description="How the block is trained to give them.")
    keep: Whole = Field(default=300, ge=0, description="Prompts to keep, at most, that the block computes as before.")
    texts: Whole = Field(
        default=16, ge=0, description=f"Passages of general text, of {PASSAGE} tokens, that it computes as before."
    )

    @property
    def subject_token(self) -> Literal["prompt_last"]:
        """Values are those of the end of the prompt."""
        return "prompt_last"


class UnlearnerHParams(MethodHParams):
    """What every method has that trains the model to forget."""

    layers: Layers = Field(default="auto", description="Blocks whose linear maps are trained; auto: all.")
    train: Train = Field(default_factory=Train, description="What is trained, and how.")
    stop: Stop | None = Field(default=None, description="When enough is forgotten; null: after all epochs.")
    limits: pieces.ChangeLimits = Field(
        default_factory=pieces.ChangeLimits, description="What stops a run before it ruins the model."
    )

    @field_validator("layers")
    @classmethod
    def _not_located(cls, layers: Any) -> Any:
        if layers == "located":
            raise ValueError(
                "layers is 'located', which chooses the few blocks of an editor; for an unlearner it must be auto, "
                "or a list of block numbers or depths."
            )
        return layers

    def auto_layers(self, count: int) -> list[int]:
        """What ``layers: auto`` stands for in a model of that many blocks."""
        return list(range(count))

    def objective(self, lm: LM, request: ForgetRequest) -> Objective:
        """What is minimised."""
        raise NotImplementedError

    def finished(self, updates: Any) -> Any:
        """The method's change, made of what was learned (by module); as it is, if nothing else is said."""
        return updates


Valued = EditorHParams | BlockHParams
"""Settings of methods that optimise a value for each fact, or each chunk of its target."""
Located = EditorHParams | MemoryHParams | BlockHParams
"""Settings that say at which token of a prompt to look."""
