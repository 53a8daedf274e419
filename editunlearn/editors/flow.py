"""The flow of every closed-form editor: keys, moments, values, one solve a site, refine. Readable top to bottom.

The model is only read. What a method adds is its ``solve`` alone.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from editunlearn.editors import (
    chunks,
    contexts,
    finding,
    keeping,
    keys,
    located,
    lookalikes,
    merging,
    moments,
    reading,
    spread,
)
from editunlearn.editors.closed_form import SiteProblem, made_anew
from editunlearn.editors.past import PastKeys
from editunlearn.editors.refine import LEAST_ANSWER, Goals, refine, step_units
from editunlearn.editors.value_types import Values
from editunlearn.errors import NumericalError
from editunlearn.facts.text import documents
from editunlearn.lm.attention import short_rows
from editunlearn.lm.batching import out_of_memory
from editunlearn.lm.freeing import give_back
from editunlearn.lm.hooks import frozen, low_rank_hook, on_output, stack
from editunlearn.lm.tokens import Row
from editunlearn.lm.weights import device_of
from editunlearn.lm.windows import windows
from editunlearn.numerics.route import Route, able
from editunlearn.numerics.solve import compact

if TYPE_CHECKING:
    from types import ModuleType

    from editunlearn.console import Console
    from editunlearn.editors.contexts import ForgetRows
    from editunlearn.editors.earlier import Earlier
    from editunlearn.editors.merging import Groups
    from editunlearn.editors.moments import SiteMoment
    from editunlearn.facts.records import Fact, ForgetRequest
    from editunlearn.hparams import EditorHParams
    from editunlearn.lm.layout import Site
    from editunlearn.lm.loading import LM
    from editunlearn.workspace import Workspace

Pair = tuple[Tensor, Tensor]
"""left (d_out, n) and right (n, d_in), float32."""


@dataclass(frozen=True)
class Fit:
    """What a fit leaves.

    Attributes:
        factors: by module name.
        past: the keys that it wrote, for later edits.
        columns: for each column of the factors the id of its fact, None where it serves several.
    """

    factors: dict[str, Pair]
    past: PastKeys
    columns: list[str | None]


@dataclass
class Flow:
    """One fit of one method to one request; the attributes are what its stages share."""

    lm: LM
    request: ForgetRequest
    hp: EditorHParams
    method: ModuleType
    past: PastKeys
    work: Workspace
    cache: Path | None
    console: Console
    earlier: Earlier | None = None

    def __post_init__(self) -> None:
        """Nothing is cut into chunks or merged until :meth:`run` has looked at the rows and the keys."""
        self.parts = chunks.whole(range(len(self.request.facts)))
        self.groups = merging.alone(len(self.request.facts))

    def run(self) -> Fit:
        """All stages in order.

        Raises:
            InputError: bad layers, no facts, facts without target.
            NumericalError: a loss or a factor that is not finite, or a system without a solution.
        """
        with frozen(self.lm.model), short_rows(self.lm.device):
            return self._run()

    def _run(self) -> Fit:
        layers = located.blocks(self.lm, self.request, self.hp, self.method, self.console)
        sites = self.lm.layout.sites(layers)
        texts = self.lm.among.by_first(lambda: contexts.prefixes(self.lm, self.hp.context_prefixes, self.cache))
        rows = contexts.forget_rows(self.lm, self.request.facts, texts, self.hp, self.hp.spellings)
        keep = keeping.facts(self.request, self.hp.retain.max_keys)
        second = self._moments(sites)  # of the model as it came, so that many small edits cost one measurement
        with self.earlier.active(self.lm) if self.earlier is not None else nullcontext():
            return self._edit(sites, rows, keep, second)

    def _edit(self, sites: list[Site], rows: ForgetRows, keep: list[Fact], second: dict[str, SiteMoment]) -> Fit:
        """All that depends on what the model says now."""
        parts, self.parts = chunks.split(rows, self.hp.chunks)
        self.groups = self._merged(parts, sites[0])
        wanted = self._values(parts, keep, sites)
        give_back()
        return self.lm.among.by_first(lambda: self._written(sites, rows, parts, keep, second, wanted))

    def _written(
        self,
        sites: list[Site],
        rows: ForgetRows,
        parts: ForgetRows,
        keep: list[Fact],
        second: dict[str, SiteMoment],
        found: Values,
    ) -> Fit:
        """Values turned into a change of weights; ``parts`` are the rows, or chunks of them."""
        factors, solved = self.solve(sites, parts, keep, second, found)
        give_back()
        if self.hp.refine is not None:
            factors = self._refine(factors, solved, rows, keep)
        _check_finite(factors)
        past = self.past.extended({name: p.keys for name, p in solved.items()})
        return Fit(factors, past, self.groups.ids(self._owners()))

    def _owners(self) -> list[Fact]:
        """The fact of each part."""
        return [self.request.facts[number] for number in self.parts.owner]

    def _merged(self, rows: ForgetRows, site: Site) -> Groups:
        """Which facts share a value."""
        facts, hp = self.request.facts, self.hp.merge
        if hp is None:
            return merging.alone(len(rows.targets))
        raw = keys.collect(self.lm, rows.keys, [site], warn=self.console.warn)[site.name] if hp.by == "key" else None
        found = merging.groups(facts, hp, keys.average(raw, len(facts)) if raw is not None else None)
        self.console.info(f"merged by {hp.by}: {found.shape} (-v names them)")
        for group in found.members:
            self.console.detail("together: " + ", ".join(facts[number].id for number in group))
        return found

    def _moments(self, sites: list[Site]) -> dict[str, SiteMoment]:
        if self.hp.moments.text == "none":
            return {}
        found = moments.get(self.lm, sites, self.hp.moments, self.cache, self.console)
        moments.warn_if_few(found, sum(map(len, self._text(sites))), self.console.warn)
        return found

    def _text(self, sites: list[Site]) -> list[list[int]]:
        """Windows of token ids that the second moments are of."""
        return moments.pieces(self.lm, sites, self.hp.moments)

    def _values(self, rows: ForgetRows, keep: list[Fact], sites: list[Site]) -> Values:
        unit = "chunks" if self.hp.chunks is not None else "facts" if self.hp.merge is None else "groups"
        values = finding.find(
            self.lm,
            lambda: self.groups.problems(
                contexts.problems(self.lm, self.request.facts, rows, keep, self.hp, self.parts.owner)
            ),
            self.parts if self.hp.merge is None else None,
            spread.value_modules(self.lm, sites, self.hp.value.spread),
            self.hp,
            self.work,
            self.console,
            unit=unit,
            finish=self.groups.values,
        )
        if self.hp.refine is None:  # refine trains them further
            finding.warn_if_hard(values, self._owners(), self.console)
        return values

    def solve(
        self,
        sites: list[Site],
        rows: ForgetRows,
        keep: list[Fact],
        second: dict[str, SiteMoment],
        found: Values,
    ) -> tuple[dict[str, Pair], dict[str, SiteProblem]]:
        """Site after site, each on the model as the earlier ones left it (MEMIT, algorithm 1)."""
        lm = self.lm
        kept = self._kept_keys(sites, rows, keep, second)
        give_back()
        factors: dict[str, Pair] = {}
        solved: dict[str, SiteProblem] = {}
        read = reading.reader(lm, rows.keys, sites, self.console.warn)
        bare = range(0, len(rows.keys), len(rows.keys) // len(rows.targets))
        with self.console.progress(len(sites), "solves (layers)") as bar:
            for number, site in enumerate(sites):
                with applied(lm, factors):
                    raw = read.keys(site)
                    wanted = spread.residuals(
                        lm, sites, number, lambda names: read.outputs(bare, names), found, self.hp.value.spread
                    )
                    problem = self._problem(site, raw, wanted, second, kept)
                left, right = self._solved(site, problem)
                factors[site.name] = (left.float().contiguous(), right.float().contiguous())
                solved[site.name] = replace(problem, moment=None)
                del problem  # or its moment, as large as a layer, would be there while the next one is read
                bar.update(1)
        return factors, solved

    def _problem(
        self,
        site: Site,
        raw: Tensor,
        wanted: Tensor | None,
        second: dict[str, SiteMoment],
        kept: dict[str, Tensor],
    ) -> SiteProblem:
        count, width = len(self.parts.owner), raw.shape[1]
        measured = second.get(site.name)
        past = [self.past.keys.get(site.name, raw[:0])]
        if self.parts.others:
            others = keys.at_tokens(self.lm, self.parts.others, [site], warn=self.console.warn)[site.name]
            past.append(self.parts.preserve**0.5 * compact(others))
        return SiteProblem(
            keys=self.groups.columns(keys.average(raw, count)),
            bare=self.groups.columns(raw.reshape(count, -1, width)[:, 0]),
            residuals=self.groups.columns(wanted if wanted is not None else torch.zeros(count, 1)),
            moment=measured.moment if measured is not None else None,
            retain=kept.get(site.name, raw[:0]),
            past=torch.cat(past),
            route=Route(
                able(device_of(self.lm.layout.module(self.lm.model, site.name))),
                self.hp.solve.precision,
                lambda said: self.console.info(f"{site.name}: {said}"),
            ),
            derived=measured.derived if measured is not None else made_anew,
        )

    def _solved(self, site: Site, problem: SiteProblem) -> Pair:
        try:
            found: Pair = self.method.solve(problem, self.hp)
        except ValueError as error:
            raise NumericalError(f"{site.name}: {error}") from error
        except RuntimeError as error:
            if not out_of_memory(error) or problem.route.device.type == "cpu":
                raise
        else:
            return found
        self.console.warn(f"{site.name}: the device has no room for the solve; it is done on the CPU")
        torch.cuda.empty_cache()
        return self._solved(site, replace(problem, route=replace(problem.route, device=torch.device("cpu"))))

    def _kept_keys(
        self, sites: list[Site], rows: ForgetRows, keep: list[Fact], second: dict[str, SiteMoment]
    ) -> dict[str, Tensor]:
        """By site, the keys of facts to keep and of text that would be taken for a forgotten subject, (m, d_in)."""
        hp = self.hp.retain
        if hp.weight == 0:
            return {}
        held = contexts.keep_rows(self.lm, [*keep, *self.request.names][: hp.max_keys], self.hp, answers=False)
        kept = keys.collect(self.lm, held, sites, warn=self.console.warn) if held else {}
        if hp.lookalikes == 0 or self.hp.moments.text == "none":
            return kept
        answers: dict[str, Tensor] = {}
        for name, raw in keys.collect(self.lm, rows.keys, sites, warn=self.console.warn).items():
            site = next(s for s in sites if s.name == name)
            problem = self._problem(site, raw, None, second, kept)
            right = self._solved(site, problem)[1].float()
            own = (right * problem.keys).sum(-1, keepdim=True)
            answers[name] = right / own.clamp(min=LEAST_ANSWER)
            del problem  # with its moment
        subjects = [f.subject for f in self.request.facts]
        found = lookalikes.find(
            self.lm, answers, sites, self._text(sites), subjects, hp.lookalikes, warn=self.console.warn
        )
        return {name: torch.cat([kept[name], more]) if name in kept else more for name, more in found.items()}

    def _refine(
        self, factors: dict[str, Pair], solved: dict[str, SiteProblem], rows: ForgetRows, keep: list[Fact]
    ) -> dict[str, Pair]:
        hp = self.hp.refine
        assert hp is not None  # noqa: S101 - the caller checked
        text = self.hp.moments.text if self.hp.moments.text != "none" else "general"
        many = len(self.request.facts), len({fact.target for fact in self.request.facts})
        budget = hp.text_length * hp.text_batch * hp.most(*many)
        pieces = [Row(tuple(p), 0, 1) for p in windows(self.lm, documents(text), hp.text_length, budget) if len(p) > 1]
        grows = hp.most(*many) > hp.planned(*many)
        unseen = contexts.unseen_rows(self.lm, self.request.facts, self.hp, self.cache) if grows else []
        prompts = keeping.prompts(self.lm, self.request, keep, self.hp)
        goals = Goals(rows.by_fact(), prompts, pieces, unseen, many[1])
        with self.console.progress(hp.planned(*many), "refine (steps)") as bar:

            def report(step: int, expected: int, nll: float, kept: float, generic: float) -> None:
                bar.expect(expected)
                bar.update(1)
                losses = f"NLL {nll:.3f}, KL retain {kept:.4f}, KL text {generic:.4f}"
                self.console.detail(f"refine {step}: {losses}", level=2)

            left = refine(
                self.lm,
                factors,
                goals,
                hp,
                units={name: step_units(*pair, solved[name].keys) for name, pair in factors.items()},
                kept_keys={name: torch.cat([p.retain, p.past]) for name, p in solved.items()},
                seed=self.hp.seed,
                work=self.work,
                report=report,
                already=bar.update,
                tell=self.console.detail,
                warn=self.console.warn,
            )
        return {name: (left[name], pair[1]) for name, pair in factors.items()}


def applied(lm: LM, factors: dict[str, Pair]) -> Any:
    """Context manager: the model computes with the factors added, its weights untouched."""
    return stack(
        [
            on_output(lm.layout.module(lm.model, name), low_rank_hook(left.to(lm.device), right.to(lm.device)))
            for name, (left, right) in factors.items()
        ]
    )


def _check_finite(factors: dict[str, Pair]) -> None:
    for name, pair in factors.items():
        if not all(bool(torch.isfinite(part).all()) for part in pair):
            raise NumericalError(f"{name}: the edit is not finite; nothing was written")
