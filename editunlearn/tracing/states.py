"""What flows through a model for one prompt, clean or with its subject corrupted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from editunlearn.errors import UnsupportedError
from editunlearn.lm.head import Head
from editunlearn.lm.hooks import on_input, on_output, stack
from editunlearn.lm.resume import Upper, resumable
from editunlearn.lm.tokens import Batch, Row, batch

if TYPE_CHECKING:
    from editunlearn.lm.loading import LM
    from editunlearn.tracing.prompts import TracedPrompt

Kind = Literal["block", "mlp", "attention"]
KINDS: tuple[Kind, ...] = ("block", "mlp", "attention")
"""What is restored: the output of a whole block, of its MLP, or of its attention (before any norm behind them)."""
Place = tuple[Kind, int]
"""A kind and the number of a block."""


@dataclass(frozen=True)
class States:
    """One pass over copies of a prompt.

    Attributes:
        chance: (rows,) probability of the answer's first token, float32.
        entering: for each block what goes into it, (rows, length, width).
        outputs: what comes out at each place, (rows, length, width).
    """

    chance: Tensor
    entering: list[Tensor]
    outputs: dict[Place, Tensor]


@dataclass(frozen=True)
class Tracer:
    """A model prepared for tracing; made by :meth:`of`.

    Attributes:
        kinds: what is restored.
        skips: blocks below a restored state can be left out, because the model runs from any block on.
        returned: how many things a block returns; 0: the hidden states themselves.
    """

    lm: LM
    head: Head
    kinds: tuple[Kind, ...]
    skips: bool
    returned: int

    @classmethod
    def of(cls, lm: LM, kinds: Sequence[Kind] = KINDS) -> Tracer:
        """Check that the model can be traced.

        Raises:
            UnsupportedError: its attention is not known by name, or it cannot be run from its first block on.
        """
        if "attention" in kinds and lm.layout.attn_out is None:
            raise UnsupportedError(
                f"model type {lm.layout.model_type!r}: the output projection of its attention is not known, so that "
                "attention cannot be traced. Give --kinds block mlp."
            )
        row = Row(tuple(range(8)), 1, 7)
        if why := resumable(lm, row, 0, Upper):
            raise UnsupportedError(f"{lm.name} cannot be run from its first block on, as tracing does: {why}.")
        skips = not resumable(lm, row, lm.layout.num_layers(lm.model) - 1, Upper)
        return cls(lm, Head(lm), tuple(kinds), skips, Upper.of(lm, [row], 0).outputs)

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return self.lm.layout.num_layers(self.lm.model)

    def module(self, place: Place) -> nn.Module:
        """The module whose output is the state of a place."""
        kind, layer = place
        layout = self.lm.layout
        name = {
            "block": layout.block_name(layer),
            "mlp": layout.site(layer).name,  # the projection itself: the output of some MLPs has the residual in it
            "attention": layout.attention_name(layer),
        }[kind]
        return layout.module(self.lm.model, str(name))

    @torch.no_grad()
    def enter(self, prompt: TracedPrompt, noise: Tensor | None = None) -> Tensor:
        """What goes into the first block, (rows, length, width), one row for each row of ``noise``.

        Args:
            noise: (rows, subject tokens, width), added to the subject's embeddings; None: one clean row.
        """
        subject = slice(prompt.subject[0], prompt.subject[-1] + 1)

        def corrupt(_ids: Tensor, output: Tensor) -> Tensor:
            assert noise is not None  # noqa: S101 - no hook otherwise
            changed = output.clone()
            changed[:, subject] += noise.to(output)
            return changed

        embed = self.lm.layout.module(self.lm.model, self.lm.layout.embed)
        rows = [Row(prompt.ids, 0, len(prompt.ids))] * (1 if noise is None else len(noise))
        with nullcontext() if noise is None else on_output(embed, corrupt):
            return Upper.of(self.lm, rows, 0).entering

    def last_states(self, prompt: TracedPrompt, entering: Tensor, first: int = 0) -> Tensor:
        """What reaches the head at the last token, (rows, width), when ``entering`` goes into block ``first``."""
        padded = self._padded(prompt, len(entering))
        scored = torch.zeros_like(padded.input_ids, dtype=torch.bool)
        scored[:, -1] = True
        return Upper(self.lm, first, padded, entering, self.returned).hidden(scored)

    def chance(self, prompt: TracedPrompt, hidden: Tensor) -> Tensor:
        """Probability of the answer's first token (rows,), given :meth:`last_states`.

        Hooks on the model must be gone: some heads are tried on tokens of their own.
        """
        labels = torch.full((len(hidden),), prompt.answer, device=hidden.device)
        return torch.exp(-self.head.cross_entropy(hidden, labels))

    def record(self, prompt: TracedPrompt, entering: Tensor) -> States:
        """One pass, with everything on its way; differentiable with respect to ``entering``."""
        into: list[Tensor] = []
        outputs: dict[Place, Tensor] = {}
        places: list[Place] = [(kind, layer) for layer in range(self.layers) for kind in self.kinds]

        def seeing(place: Place) -> Callable[[Tensor, Tensor], Tensor]:
            def see(_inputs: Tensor, output: Tensor) -> Tensor:
                # OPT flattens rows and tokens. What flows on is a copy: Falcon adds to the output of its MLP in place.
                outputs[place] = output.reshape(*entering.shape[:2], -1)
                return outputs[place].reshape(output.shape).clone()

            return see

        blocks = [self.module(("block", layer)) for layer in range(self.layers)]
        with (
            stack([on_input(block, into.append) for block in blocks]),
            stack([on_output(self.module(place), seeing(place)) for place in places]),
        ):
            # Block 0 is fed by a hook that may run after ours: its input is known.
            hidden = self.last_states(prompt, entering)
        return States(self.chance(prompt, hidden), [entering, *into[1:]], outputs)

    def _padded(self, prompt: TracedPrompt, rows: int) -> Batch:
        return batch([Row(prompt.ids, 0, len(prompt.ids))] * rows, self.lm.pad_id, self.lm.device)
