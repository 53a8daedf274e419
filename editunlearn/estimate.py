"""Sites, work and disk of a run, from the configuration and the texts alone: what ``apply --dry-run`` shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from editunlearn.facts.readers import load_facts
from editunlearn.facts.spellings import spelled
from editunlearn.resources import shipped_path

if TYPE_CHECKING:
    from editunlearn.facts.records import Fact
    from editunlearn.hparams import EditorHParams, MethodHParams
    from editunlearn.lm.layout import Site

CHARACTERS = 4
"""Characters of a token of English text, about."""
CPU, GPU = 0.3e12, 300e12
"""Floating-point operations a second: two cores in bfloat16, one large GPU."""


@dataclass(frozen=True)
class Cost:
    """Floating-point operations of a forward pass; one that is trained through its frozen weights takes twice that.

    Attributes:
        token: two for every parameter that a token passes (looking an embedding up costs nothing).
        logits: of the output head, for a position that is scored.
    """

    token: int
    logits: int

    def __call__(self, tokens: float, scored: float) -> float:
        """Of a pass over ``tokens`` tokens, ``scored`` of which the head sees."""
        return tokens * self.token + scored * self.logits


def cost(model: Any) -> Cost:
    """Cost of a model, which may be on the meta device."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    apart = {id(weight): weight.numel() for weight in (embedding, head)}  # tied: one
    body = sum(p.numel() for p in model.parameters()) - sum(apart.values())
    return Cost(2 * body, 2 * head.numel())


def tokens_of(texts: Iterable[str]) -> int:
    """Tokens of some texts, about; at least one each."""
    return sum(len(text) // CHARACTERS + 1 for text in texts)


def work(cost: Cost, hp: MethodHParams, facts: Sequence[Fact], retain: Sequence[Fact], at: Target) -> dict[str, float]:
    """Floating-point operations of each stage.

    Args:
        at: what would be edited.
    """
    from editunlearn.hparams import BlockHParams, EditorHParams, MemoryHParams, UnlearnerHParams
    from editunlearn.hparams.methods import InContextHParams
    from editunlearn.hparams.training import PASSAGE
    from editunlearn.unlearners import cost as unlearning

    depth, width = at.depth, at.width
    general = load_facts(shipped_path("data", "general_facts.jsonl"))
    asked, kept = tokens_of(f.prompt for f in facts), tokens_of(f.prompt for f in retain)
    targets = tokens_of(f.target or "" for f in facts)
    contexts, rows = 1, float(asked + targets)
    if isinstance(hp, InContextHParams):
        contexts = hp.context_prefixes.count + 1
        rows = contexts * rows + len(facts) * hp.context_prefixes.count * hp.context_prefixes.tokens
    stages = {"general facts, once per model": cost(tokens_of(f.prompt + f.answer for f in general), 2 * len(general))}
    if isinstance(hp, UnlearnerHParams):
        answers = tokens_of(f.answer for f in facts)
        stages["training, at most"] = unlearning.flops(hp, len(facts), asked + answers, answers, cost)
    elif isinstance(hp, MemoryHParams):
        stages["keys of prompts to keep"] = depth * cost(16 * hp.keep + PASSAGE * hp.texts, 0)
        seen = min(1.0, (hp.contexts_per_step or contexts) / contexts)
        stages["training, at most"] = 2 * hp.training_steps * seen * cost(rows, contexts * targets)
    elif isinstance(hp, BlockHParams):
        values = 2 * hp.value.steps * cost(rows, contexts * targets)
        held = rows + 16 * hp.keep + PASSAGE * hp.texts
        stages |= {"values, at most": values, "block": 3 * hp.train.steps * cost(held, 0) / at.blocks}
    elif isinstance(hp, EditorHParams):
        seen = min(1.0, (hp.value.contexts or contexts) / contexts)
        pinned = 3 * asked if hp.value.kl > 0 else 0
        lookalikes = hp.retain.lookalikes and hp.retain.weight
        row, target = rows / max(1, len(facts) * contexts), targets / max(1, len(facts))
        stages |= {
            "second moments, once per model": statistics(cost, hp, depth, width),
            "lookalikes": statistics(cost, hp, depth, width) if lookalikes else 0.0,
            "values, at most": ways(hp, facts)
            * 2
            * hp.value.steps
            * cost(rows * seen + pinned, contexts * seen * targets + pinned / 8),
            "refine": _refine(cost, hp, row, target, len(facts), len({f.target for f in facts})),
        }
    prompts = [
        p
        for f in facts
        for p in (f.prompt, f.prompt, *f.paraphrases, *f.other_questions, *(n.prompt for n in f.neighbors))
    ]
    decoded = 24 * len(prompts) + 8 * (len(retain) + len(general) // 10)
    read = tokens_of(prompts) + kept + tokens_of(f.prompt for f in general) / 10
    text = shipped_path("data", "general_text.jsonl").stat().st_size / CHARACTERS / 10
    stages["measuring before and after"] = 2 * cost(2 * read + decoded + text, decoded + text)
    return stages


@dataclass(frozen=True)
class Target:
    """What would be edited, from a configuration alone.

    Attributes:
        config: of the model.
        model: on the meta device.
        shapes: (out, in) of each site.
        depth: share of the blocks up to the last edited one.
        blocks: that there are.
    """

    config: Any
    model: Any
    layers: list[int]
    why: str
    sites: list[Site]
    shapes: list[tuple[int, int]]
    depth: float
    blocks: int

    @property
    def width(self) -> int:
        """Of the widest site's input."""
        return max(width for _, width in self.shapes)


def target(config: Any, hp: MethodHParams, layers: Sequence[int] | None = None) -> Target:
    """The sites of a model of this configuration; ``layers`` goes before those of ``hp``."""
    from editunlearn import editors
    from editunlearn.hparams import UnlearnerHParams
    from editunlearn.lm.layers import resolve_layers
    from editunlearn.lm.layout import Site
    from editunlearn.lm.recognise import layout_of
    from editunlearn.lm.sources import meta_model

    model = meta_model(config)
    layout = layout_of(model, config)
    blocks = layout.num_layers(model)
    if isinstance(hp, UnlearnerHParams):
        from editunlearn.unlearners.parameters import trained_modules

        names, why = trained_modules(model, layout, hp)
        sites = [Site(name, layout.layer_of(name)) for name in names]
        chosen = sorted({site.layer for site in sites})
    else:
        chosen, why = resolve_layers(layers or hp.layers, blocks, editors.module(hp.method).DEFAULT_LAYERS)
        sites = editors.edited(model, layout, hp, chosen)
    shapes = [(int(out), int(width)) for out, width in (layout.read_weight(model, s.name).shape for s in sites)]
    return Target(config, model, chosen, why, sites, shapes, (chosen[-1] + 1) / blocks, blocks)


def dtype_of(config: Any, asked: str) -> str:
    """Name of the dtype that the weights would be in, or all but those of linear maps that are rounded."""
    own = asked in ("auto", "nf4", "int8")
    name = str(getattr(config, "dtype", None) or "float32") if own else asked
    return name.removeprefix("torch.")


def statistics(cost: Cost, hp: EditorHParams, depth: float, width: int) -> float:
    """Floating-point operations of one pass over the text of the second moments."""
    return depth * cost(min(hp.moments.budget(width), _most(hp, width)), 0)


def _most(hp: EditorHParams, width: int) -> float:
    """Tokens that there are in the text for second moments."""
    if hp.moments.text == "none":
        return 0
    shipped = hp.moments.text == "general"
    return (
        shipped_path("data", "general_text.jsonl").stat().st_size / CHARACTERS if shipped else hp.moments.budget(width)
    )


def _refine(cost: Cost, hp: EditorHParams, row: float, target: float, facts: int, targets: int) -> float:
    """Every step trains on the three parts; the unedited model's logits are one more use of the head."""
    if hp.refine is None:
        return 0.0
    r = hp.refine
    forget = min(facts, r.forget_batch) * r.contexts
    prompts = r.prompts(facts)
    keep, text = prompts * 2, r.text_batch * r.text_length
    trained = 2 * cost(forget * row + prompts * 16 + text, forget * target + keep + text)
    return r.planned(facts, targets) * (trained + (keep + text) * cost.logits)


def columns(hp: MethodHParams, facts: Sequence[Fact]) -> int:
    """Facts in all spellings, or chunks of their targets, about."""
    from editunlearn.hparams import EditorHParams

    if not isinstance(hp, EditorHParams):
        return len(facts)
    parts = len(facts) if hp.chunks is None else sum(tokens_of([f.target or ""]) // hp.chunks.size + 1 for f in facts)
    return round(ways(hp, facts) * parts)


def ways(hp: EditorHParams, facts: Sequence[Fact]) -> float:
    """In how many spellings a fact is written, on average."""
    return 1 + sum(len(spelled(f, hp.spellings)) for f in facts) / max(1, len(facts))


def disk(hp: MethodHParams, facts: int, shapes: Sequence[tuple[int, int]]) -> int:
    """Bytes of the delta.

    Args:
        facts: or what else has a column of its own.
    """
    from editunlearn import editors
    from editunlearn.hparams import BlockHParams, MemoryHParams, UnlearnerHParams

    if isinstance(hp, UnlearnerHParams):
        from editunlearn.unlearners.cost import numbers

        return 4 * numbers(hp, shapes)
    if isinstance(hp, MemoryHParams):
        return int(editors.module(hp.method).size(hp, facts, shapes[0]))
    if isinstance(hp, BlockHParams):
        return sum(4 * out * width for out, width in shapes)
    return sum(4 * facts * (out + width) for out, width in shapes)


def shown(flops: dict[str, float], memory: dict[str, float], disk: float, what: str = "delta") -> list[tuple[str, str]]:
    """Rows of a table for people; ``what`` takes the room on the disk."""
    total = sum(flops.values())
    return [
        *((f"memory: {name}", f"{size / 1e9:,.2f} GB") for name, size in memory.items()),
        (f"disk: {what}", f"{disk / 1e6:,.1f} MB"),
        *((f"work: {name}", f"{count / 1e12:,.1f} TFLOP") for name, count in flops.items()),
        (f"time at {CPU / 1e12:g} TFLOP/s (2 cores, bfloat16)", f"about {max(1, total / CPU / 60):,.0f} min"),
        (f"time at {GPU / 1e12:g} TFLOP/s (one large GPU)", f"about {max(1, total / GPU):,.0f} s"),
    ]
