"""Causal tracing: the subject is corrupted, one state put back as it was, and the answer's probability measured.

After Meng et al. 2022 (arXiv 2202.05262): noise on the embeddings of the subject's tokens takes the answer away; the
indirect effect of a state is how much of its probability comes back when that state alone is the clean run's. MLP and
attention are restored in windows of blocks, since one of them adds little by itself.

All states of one prompt have rows of the same length, so that many are tried in one pass; the blocks below the lowest
restored one are not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from editunlearn.lm.batching import chunks, halving
from editunlearn.lm.hooks import on_output, stack

if TYPE_CHECKING:
    from editunlearn.tracing.prompts import TracedPrompt
    from editunlearn.tracing.states import Kind, Place, States, Tracer


class Patch(NamedTuple):
    """One state that is set: to the clean run's, or held at the corrupted run's."""

    place: Place
    token: int
    clean: bool


Trial = tuple[Patch, ...]
"""All that is set in one row."""


def window(layer: int, width: int, layers: int) -> range:
    """``width`` blocks around ``layer``, cut at the ends of the model; of an even width one more lies below."""
    return range(max(0, layer - width // 2), min(layers, layer + (width + 1) // 2))


def restoring(kind: Kind, layer: int, token: int, width: int, layers: int) -> Trial:
    """Put the states of one kind back at one token, in a window of blocks; whole blocks always one at a time."""
    where = range(layer, layer + 1) if kind == "block" else window(layer, width, layers)
    return tuple(Patch((kind, one), token, True) for one in where)


def severed(kind: Kind, layer: int, token: int, layers: int) -> Trial:
    """Put a block's output back while the MLPs (or attention) above see nothing of it at that token.

    They are held at what they gave in the corrupted run: what is then lost of the effect went through them.
    """
    above = [Patch((kind, one), token, False) for one in range(layer + 1, layers)]
    return (Patch(("block", layer), token, True), *above)


@torch.no_grad()
def chances(
    tracer: Tracer,
    prompt: TracedPrompt,
    trials: Sequence[Trial],
    clean: States,
    corrupted: States,
    *,
    tokens: int,
    done: Callable[[int], None] = lambda _: None,
    warn: Callable[[str], None] = lambda _: None,
) -> Tensor:
    """Probability of the answer in each trial with each noise sample, (trials, samples) float64 on the CPU.

    Args:
        clean: of one row.
        corrupted: of one row for each sample.
        tokens: padded tokens of one pass, about.
        done: called with the number of trials of each pass.
    """
    samples = len(corrupted.chance)
    found = torch.empty(len(trials), samples, dtype=torch.float64)
    # In the order of their lowest block, so that a pass leaves out as many blocks as all its trials allow.
    order = sorted(range(len(trials)), key=lambda i: _lowest(trials[i]))

    def run(part: Sequence[int]) -> None:
        first = min(_lowest(trials[i]) for i in part) if tracer.skips else 0
        entering = corrupted.entering[first].repeat(len(part), 1, 1)
        with _set(tracer, [trials[i] for i in part], clean, corrupted):
            hidden = tracer.last_states(prompt, entering, first)
        found[list(part)] = tracer.chance(prompt, hidden).double().cpu().reshape(len(part), samples)
        done(len(part))

    halving(list(chunks(order, max(1, tokens // (samples * len(prompt.ids))))), run, warn)
    return found


def _lowest(trial: Trial) -> int:
    return min(patch.place[1] for patch in trial)


@contextmanager
def _set(tracer: Tracer, trials: Sequence[Trial], clean: States, corrupted: States) -> Iterator[None]:
    """Set the states of trials whose rows follow each other, one for each noise sample."""
    samples = torch.arange(len(corrupted.chance), device=corrupted.chance.device)
    wanted: dict[Place, list[tuple[Tensor, int, Tensor]]] = {}
    for number, trial in enumerate(trials):
        rows = number * len(samples) + samples
        for place, token, is_clean in trial:
            source = clean.outputs[place][:, token] if is_clean else corrupted.outputs[place][:, token]
            wanted.setdefault(place, []).append((rows, token, source.expand(len(samples), -1)))

    def setting(place: Place) -> Callable[[Tensor, Tensor], Tensor]:
        rows = torch.cat([rows for rows, _, _ in wanted[place]])
        tokens = torch.cat([torch.full_like(rows, token) for rows, token, _ in wanted[place]])
        values = torch.cat([value for _, _, value in wanted[place]])
        length = clean.outputs[place].shape[1]

        def put(_inputs: Tensor, output: Tensor) -> Tensor:
            flat = output.reshape(-1, length, output.shape[-1]).clone()
            flat[rows.to(flat.device), tokens.to(flat.device)] = values.to(flat)
            return flat.reshape(output.shape)

        return put

    with stack([on_output(tracer.module(place), setting(place)) for place in wanted]):
        yield
