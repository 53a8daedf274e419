"""Keys and outputs at the lookup tokens, site after site, each on the model as the edits below have left it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from editunlearn.editors import keys, spread
from editunlearn.lm.resume import CLOSE
from editunlearn.lm.walk import Walk

if TYPE_CHECKING:
    from editunlearn.lm.layout import Site
    from editunlearn.lm.loading import LM
    from editunlearn.lm.tokens import Row


class Reader(Protocol):
    """Rows that are read at one site after the other, from the lowest up."""

    def keys(self, site: Site) -> Tensor:
        """Input of ``site`` at the lookup tokens, (rows, d_in) float32 on the CPU."""

    def outputs(self, rows: Sequence[int], names: Sequence[str]) -> dict[str, Tensor]:
        """Outputs of modules at the lookup tokens of some rows, each (len(rows), width) float32 on the CPU.

        They stand at or above the site that was read last; the one that is named first is the last to run.
        """


@dataclass(frozen=True)
class Anew:
    """The plain way: every pass begins at the first block and at the first token."""

    lm: LM
    rows: Sequence[Row]
    warn: Callable[[str], None]

    def keys(self, site: Site) -> Tensor:
        """See :class:`Reader`."""
        return keys.collect(self.lm, self.rows, [site], warn=self.warn)[site.name]

    def outputs(self, rows: Sequence[int], names: Sequence[str]) -> dict[str, Tensor]:
        """See :class:`Reader`."""
        return spread.outputs_at_lookup(self.lm, [self.rows[i] for i in rows], names)


def reader(lm: LM, rows: Sequence[Row], sites: Sequence[Site], warn: Callable[[str], None]) -> Reader:
    """The fast way if it gives this model's keys, else the plain one, which is said."""
    why = walkable(lm, rows, sites)
    if why:
        warn(f"keys: all rows go through all blocks again for every layer, because {why}")
        return Anew(lm, rows, warn)
    return Walk(lm, rows, warn)


def walkable(lm: LM, rows: Sequence[Row], sites: Sequence[Site]) -> str:
    """ "" when walking to the first two of ``sites`` gives their keys, else why it does not; tried on a longest row."""
    longest = max(rows, key=lambda row: row.lookup)
    few, near = [longest, longest, rows[0]], sites[:2]
    try:
        walk = Walk(lm, few)
        found = torch.cat([walk.keys(site) for site in near], 1)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a model's code does not like, the plain way remains
        return str(error) or type(error).__name__
    plain = torch.cat(list(keys.collect(lm, few, near).values()), 1)
    apart = float((found - plain).square().mean().sqrt() / plain.std().clamp(min=1e-30))
    return "" if apart <= CLOSE.get(lm.dtype, 1e-3) else f"its keys differ by {apart:.2g} of their spread"
