"""Most memory that a run has at one time, by stage, from the configuration and the texts alone.

What autograd keeps is counted (``lm.kept``); the rest follows from shapes. On a CPU the program itself counts too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from editunlearn.estimate import Target
    from editunlearn.facts.records import Fact
    from editunlearn.hparams import BlockHParams, EditorHParams, MemoryHParams, MethodHParams, UnlearnerHParams
    from editunlearn.hparams.methods import InContextHParams

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
ROUNDED = {"nf4": 0.5 + 4 / 64, "int8": 1.0}
"""Bytes of a number of a linear map as bitsandbytes stores it, scales included."""
PROGRAM, WORD = 0.5e9, 600.0
"""Python with torch, transformers and the rest, and a word of the tokenizer: resident bytes, about (torch 2.13)."""
DECODED = 128
"""Prompts that are decoded at once (``lm.generation``)."""
MATRICES = 5
"""Float64 matrices of a solve at one time: the moment, what is factored, the factor, its inverse, room to work in."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of a run.

    Attributes:
        program: Python, libraries, tokenizer.
        model: its weights.
        held: by name, what is there from beginning to end.
        stages: by name, what comes on top of all that; one after the other.
    """

    program: float
    model: float
    held: dict[str, float]
    stages: dict[str, float]

    def rows(self, dtype: str) -> dict[str, float]:
        """For a table, the whole last."""
        parts = {"the program": self.program, f"model in {dtype}": self.model, **self.held}
        stages = {f"while {name}": size for name, size in self.stages.items()}
        return {**parts, **stages, "at the same time, about": self.peak}

    @property
    def peak(self) -> float:
        """On a CPU, all that is there at the same time."""
        return self.program + self.model + sum(self.held.values()) + max(self.stages.values())


def footprint(
    target: Target, hp: MethodHParams, dtype: str, facts: Sequence[Fact], rounded: str = "", *, offload: bool = False
) -> Footprint:
    """Of ``apply``, or of ``stats`` where there are no facts.

    Args:
        rounded: as for :func:`weights`.
        offload: as of the ``LM``: second moments of one layer at a time.
    """
    from editunlearn.hparams import BlockHParams, EditorHParams, UnlearnerHParams

    at = _At.of(target, dtype, facts)
    stages: dict[str, float] = {}
    if facts:
        stages["measuring"] = at.decoding()
    if isinstance(hp, EditorHParams):
        held, more = _editor(at, hp, offload=offload)
    elif isinstance(hp, UnlearnerHParams):
        held, more = _unlearner(at, hp)
    elif isinstance(hp, BlockHParams):
        held, more = _block(at, hp)
    else:
        held, more = _memory(at, hp)  # type: ignore[arg-type]
    return Footprint(PROGRAM + WORD * at.vocabulary, weights(target, at.width, rounded), held, stages | more)


def batches(
    target: Target, hp: MethodHParams, dtype: str, device: torch.device, rounded: str = "", *, offload: bool = False
) -> dict[str, int]:
    """By name what each ``batch_tokens: auto`` would be in a run that began now on a device without the model.

    Args:
        rounded: as for :func:`weights`.
        offload: as of the ``LM``.
    """
    from editunlearn.hparams import UnlearnerHParams
    from editunlearn.lm import room
    from editunlearn.lm.free import free_memory
    from editunlearn.lm.recognise import layout_of

    width = BYTES.get(dtype, 4)
    held, trained = weights(target, width, rounded), list[str]()
    if isinstance(hp, UnlearnerHParams):
        from editunlearn.unlearners.cost import nbytes

        held += nbytes(hp, target.shapes, width)
        trained = [] if hp.train.what == "lora" else [site.name for site in target.sites]
    about = (target.model, layout_of(target.model, target.config), target.config, dtype, device.type)
    there = room.room_of(*about, free_memory(device), trained=trained, held=held, offload=offload)
    return {name: there.tokens(*how) for name, how in room.open_numbers(hp, target.layers).items()}


def weights(target: Target, width: int, rounded: str = "") -> float:
    """Bytes of the model's weights, of ``width`` bytes each.

    Args:
        rounded: nf4 or int8: the linear maps of the blocks are.
    """
    from editunlearn.lm.recognise import layout_of
    from editunlearn.lm.weights import linear_maps, shape

    whole = float(width * sum(p.numel() for p in target.model.parameters()))
    if not rounded:
        return whole
    names = linear_maps(target.model, layout_of(target.model, target.config).blocks)
    maps = sum(out * inner for out, inner in (shape(target.model, name) for name in names))
    return whole - maps * (width - ROUNDED[rounded])


def rounded_to(config: Any, asked: str) -> str:
    """nf4 or int8 where bitsandbytes rounds, or has rounded, the weights; else nothing."""
    own: Any = getattr(config, "quantization_config", None) or {}
    own = own if isinstance(own, dict) else own.to_dict()
    if asked in ROUNDED:
        return asked
    return "nf4" if own.get("load_in_4bit") else "int8" if own.get("load_in_8bit") else ""


@dataclass(frozen=True)
class _At:
    """A model in a dtype, and the lengths of the texts, in tokens.

    Attributes:
        width: bytes of a number.
        prompt, answer: of the longest fact; ``said``: of the longest target.
    """

    target: Target
    dtype: str
    width: int
    vocabulary: int
    facts: int
    prompt: int
    answer: int
    said: int

    @classmethod
    def of(cls, target: Target, dtype: str, facts: Sequence[Fact]) -> _At:
        from editunlearn.estimate import tokens_of

        vocabulary = int(target.model.get_output_embeddings().weight.shape[0])
        longest = [
            max([tokens_of([text]) for text in texts], default=0)
            for texts in ([f.prompt for f in facts], [f.answer for f in facts], [f.target or "" for f in facts])
        ]
        return cls(target, dtype, BYTES.get(dtype, 4), vocabulary, len(facts), *longest)

    def graph(self, tokens: float, first: int, trained: Sequence[str] = ()) -> float:
        """Of a forward pass that is differentiated, over that many tokens."""
        from editunlearn.lm.kept import HOLES, kept_by_autograd

        return HOLES * tokens * kept_by_autograd(self.target.config, self.dtype, first, trained)

    def logits(self, rows: float) -> float:
        """The buffer for as many positions."""
        from editunlearn.lm.head import PIECE

        return self.width * min(PIECE, rows * self.vocabulary)

    def decoding(self) -> float:
        """Decoding and scoring many prompts: their last logits, as they are and in float32, and the buffer."""
        return DECODED * self.vocabulary * (self.width + 4) + self.logits(DECODED * 4)


def _editor(at: _At, hp: EditorHParams, *, offload: bool) -> tuple[dict[str, float], dict[str, float]]:
    from editunlearn.lm.room import values_from

    widths = [width for _, width in at.target.shapes]
    read = hp.moments.text != "none"
    held: dict[str, float] = {}  # second moments stay on the disk
    if at.facts and hp.retain.weight > 0:
        held["keys to keep, twice"] = 2 * 4.0 * _kept(hp) * sum(widths)
    sums = [8.0 * width * width for width in widths]
    stages = {"reading text": max(sums) if offload else sum(sums)} if read else {}
    if not at.facts:
        return held, stages
    row = _row(at, hp)
    rows = at.facts * (hp.value.contexts or contexts(hp))
    tokens = min(hp.tokens_at_once, behind(at, row) * rows * row)
    first = values_from(hp, at.target.layers)
    stages["optimising values"] = at.graph(tokens, first) + at.logits(rows * at.said)
    stages["solving"] = MATRICES * 8.0 * max(widths) ** 2
    if hp.refine is not None:
        r = hp.refine
        forget = min(at.facts, r.forget_batch) * r.contexts * row
        tokens = min(r.tokens_at_once, max(forget, r.prompts(at.facts) * at.prompt, r.text_batch * r.text_length))
        stages["refining"] = at.graph(tokens, min(at.target.layers)) + at.logits(2 * r.text_batch * r.text_length)
    return held, stages


def _unlearner(at: _At, hp: UnlearnerHParams) -> tuple[dict[str, float], dict[str, float]]:
    from editunlearn.unlearners.cost import nbytes

    held = {"what is trained, with the optimiser": float(nbytes(hp, at.target.shapes, at.width))}
    rows = min(at.facts, hp.train.batch)
    tokens = min(hp.tokens_at_once, rows * (at.prompt + max(at.answer, at.said)))
    names = () if hp.train.what == "lora" else [site.name for site in at.target.sites]
    return held, {"training": at.graph(tokens, min(at.target.layers), names) + at.logits(rows * at.answer)}


def _block(at: _At, hp: BlockHParams) -> tuple[dict[str, float], dict[str, float]]:
    numbers = sum(out * width for out, width in at.target.shapes)
    row = _row(at, hp)
    rows = at.facts * contexts(hp)
    tokens = min(hp.tokens_at_once, behind(at, row) * rows * row)
    stages = {"optimising values": at.graph(tokens, _last(at)) + at.logits(rows * at.said)}
    return {"the block, with the optimiser": float(numbers * (4 * 4 + at.width))}, stages


def _memory(at: _At, hp: MemoryHParams) -> tuple[dict[str, float], dict[str, float]]:
    from editunlearn.estimate import disk
    from editunlearn.hparams.training import PASSAGE

    (_, width), row = at.target.shapes[0], _row(at, hp)
    step = at.facts * min(contexts(hp), hp.contexts_per_step or contexts(hp))
    tokens = min(hp.tokens_at_once, step * row)
    seen = 4.0 * width * (at.prompt * (hp.keep + at.facts * contexts(hp)) + PASSAGE * hp.texts)
    graph = at.graph(tokens, at.target.layers[0]) + at.logits(step * at.said)
    return {"the memory, trained": 4.0 * disk(hp, at.facts, at.target.shapes)}, {"training": seen + graph}


def _kept(hp: EditorHParams) -> int:
    """Keys to keep, at most: nearly all shipped facts, and what the text has that is alike."""
    from editunlearn.facts.readers import load_facts
    from editunlearn.resources import shipped_path

    shipped = len(load_facts(shipped_path("data", "general_facts.jsonl")))
    return min(hp.retain.max_keys, shipped) + hp.retain.lookalikes


def contexts(hp: InContextHParams) -> int:
    """Texts that a prompt is put behind, the bare one among them."""
    return hp.context_prefixes.count + 1


def _row(at: _At, hp: InContextHParams) -> int:
    """Longest row of a fact, in tokens."""
    return (hp.context_prefixes.tokens if hp.context_prefixes.count else 0) + at.prompt + at.said


def behind(at: _At, row: int) -> float:
    """Share of a row that is run at every step: the target, and what stands behind the subject, half of the prompt."""
    return (at.said + at.prompt / 2) / row


def _last(at: _At) -> int:
    return max(at.target.layers)
