"""Trace many facts, each kept when it is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from editunlearn.editors.moments import tokenizer_hash
from editunlearn.errors import NumericalError
from editunlearn.lm.fingerprint import model_fingerprint
from editunlearn.tracing import estimate, restore
from editunlearn.tracing.prompts import TracedPrompt, noise_for
from editunlearn.tracing.states import KINDS, Kind, Tracer
from editunlearn.workspace import Workspace

if TYPE_CHECKING:
    from pathlib import Path

    from editunlearn.console import Console
    from editunlearn.lm.loading import LM

PATHS: tuple[Kind, ...] = ("mlp", "attention")
"""What can be severed."""


@dataclass(frozen=True)
class Settings:
    """How facts are traced.

    Attributes:
        noise: standard deviation of what is added to the subject's embeddings, absolute.
        samples: draws of the noise.
        window: blocks whose MLPs, or attentions, are restored together.
        kinds: what is restored.
        measured: False leaves only the gradient's estimate.
        severed: also restore blocks with the MLPs, and the attentions, above them cut off.
        seed: of the noise.
    """

    noise: float
    samples: int = 10
    window: int = 1
    kinds: tuple[Kind, ...] = KINDS
    measured: bool = True
    severed: bool = False
    seed: int = 0

    def trials(self, prompt: TracedPrompt, layers: int) -> list[restore.Trial]:
        """All that is tried on a prompt: kind by kind, block by block, token by token; the severed paths last."""
        found = [
            restore.restoring(kind, layer, token, self.window, layers)
            for kind in self.kinds
            for layer in range(layers)
            for token in prompt.tokens
        ]
        last = prompt.subject[-1]
        cut = [restore.severed(path, layer, last, layers) for path in self.paths for layer in range(layers)]
        return (found if self.measured else []) + cut

    @property
    def paths(self) -> tuple[Kind, ...]:
        """What is severed."""
        return tuple(path for path in PATHS if path in self.kinds) if self.severed else ()


@dataclass(frozen=True)
class Effects:
    """Indirect effects of one fact's states: probability of the answer with a state restored, less that without.

    Attributes:
        clean, corrupted: probability of the answer's first token, averaged over the noise samples.
        measured: by kind (layers, tokens from the subject's first one on); empty if only estimated.
        estimated: likewise, by gradient.
        severed: by path that is cut (layers,), at the subject's last token.
    """

    prompt: TracedPrompt
    clean: float
    corrupted: float
    measured: Mapping[Kind, Tensor]
    estimated: Mapping[Kind, Tensor]
    severed: Mapping[Kind, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """All numbers, to be kept in one file."""
        parts = {"measured": self.measured, "estimated": self.estimated, "severed": self.severed}
        named = {f"{part}.{kind}": value for part, by_kind in parts.items() for kind, value in by_kind.items()}
        return {**named, "chances": torch.tensor([self.clean, self.corrupted], dtype=torch.float64)}

    @classmethod
    def of(cls, prompt: TracedPrompt, tensors: Mapping[str, Tensor]) -> Effects:
        """What :meth:`tensors` gave."""
        parts: dict[str, dict[Any, Tensor]] = {"measured": {}, "estimated": {}, "severed": {}}
        for name, value in tensors.items():
            part, _, kind = name.partition(".")
            if part in parts:
                parts[part][kind] = value
        clean, corrupted = tensors["chances"].tolist()
        return cls(prompt, clean, corrupted, **parts)


def trace(tracer: Tracer, prompt: TracedPrompt, settings: Settings, *, tokens: int, console: Console) -> Effects:
    """The effects of one prompt's states.

    Raises:
        NumericalError: a probability is not finite.
    """
    with torch.no_grad():
        entering = tracer.enter(prompt)
        clean = tracer.record(prompt, entering)
        noise = noise_for(prompt, settings.samples, entering.shape[-1], settings.seed) * settings.noise
        corrupted = tracer.record(prompt, tracer.enter(prompt, noise))
    found = restore.chances(
        tracer, prompt, settings.trials(prompt, tracer.layers), clean, corrupted, tokens=tokens, warn=console.warn
    )
    base = corrupted.chance.double().cpu()
    effects = (found - base).mean(1)
    shape = (tracer.layers, len(prompt.tokens))
    measured = _cut(effects, settings.kinds if settings.measured else (), shape)
    rest = effects[len(measured) * shape[0] * shape[1] :]
    made = Effects(
        prompt,
        float(clean.chance.double()),
        float(base.mean()),
        measured,
        estimate.first_order(tracer, prompt, clean, corrupted, settings.window),
        _cut(rest, settings.paths, (tracer.layers,)),
    )
    if not all(bool(torch.isfinite(value).all()) for value in made.tensors().values()):
        raise NumericalError(f"{tracer.lm.name}: effects of fact {prompt.id!r} are not finite. Try --dtype float32.")
    return made


def _cut(flat: Tensor, kinds: Sequence[Kind], shape: tuple[int, ...]) -> dict[Kind, Tensor]:
    """The first pieces of ``shape`` of a vector, one for each kind."""
    size = torch.Size(shape).numel()
    return {kind: flat[i * size : (i + 1) * size].reshape(shape) for i, kind in enumerate(kinds)}


def trace_all(
    lm: LM,
    prompts: Sequence[TracedPrompt],
    settings: Settings,
    *,
    tokens: int,
    root: Path | None,
    fresh: bool,
    console: Console,
) -> list[Effects]:
    """Trace every prompt; those that an earlier run with these settings has done are taken from ``root``.

    A prompt's effects depend on nothing but the model, the settings and itself, so that more facts can be added later.
    """
    from editunlearn import __version__

    inputs = {
        **asdict(settings),
        "version": __version__,
        "model": model_fingerprint(lm),
        "tokenizer": tokenizer_hash(lm),
        "dtype": str(lm.dtype),
        "device": lm.device.type,
        "tokens": tokens,
    }
    work = Workspace(root, inputs, fresh=fresh)
    tracer = Tracer.of(lm, settings.kinds)
    total = sum(max(1, len(settings.trials(prompt, tracer.layers))) for prompt in prompts)
    found = []
    with console.progress(total, "tracing (states)") as bar:
        for prompt in prompts:
            kept = work.get(prompt.key)
            if kept is None:
                made = trace(tracer, prompt, settings, tokens=tokens, console=console)
                work.put(prompt.key, made.tensors())
            else:
                made = Effects.of(prompt, kept)
            found.append(made)
            bar.update(max(1, len(settings.trials(prompt, tracer.layers))))
    return found
