"""Tasks of the Language Model Evaluation Harness, on the model in memory: ``lm-eval:mmlu,hellaswag``."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from editunlearn.errors import InputError
from editunlearn.evaluation.results import Item, Measured, Value
from editunlearn.evaluation.suites import Part, Source

if TYPE_CHECKING:
    from editunlearn.lm.loading import LM


@dataclass(frozen=True)
class Tasks:
    """What the harness is to run.

    Attributes:
        names: of tasks, groups or YAML files.
        limit: items of each task; None: all.
    """

    names: tuple[str, ...]
    limit: int | None


def read(which: str, source: Source) -> Tasks:
    """The names behind the colon."""
    names = tuple(name.strip() for name in which.split(",") if name.strip())
    if not names:
        raise InputError("lm-eval: name its tasks: lm-eval:hellaswag, or lm-eval:mmlu,arc_easy.")
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError('lm-eval: the harness is not installed: pip install "editunlearn[lm-eval]".')
    return Tasks(names, source.limit)


def parts(lm: LM, data: Tasks) -> list[Part]:  # noqa: ARG001 - as all suites
    """One part for each task, so that finished ones are kept."""
    return [
        Harness(name.rpartition("/")[2].removesuffix(".yaml"), [], (), task=name, limit=data.limit)
        for name in data.names
    ]


@dataclass
class Harness(Part):
    """One task of the harness. Its only item has the numbers that the harness gives, the standard errors left out."""

    task: str = ""
    limit: int | None = None

    @property
    def looks(self) -> int:
        """The harness has its own progress bar."""
        return 0

    def items(self, lm: LM, progress: Callable[[int], None]) -> list[Item]:  # noqa: ARG002 - as all parts
        """See :class:`Part`."""
        harness: Any = importlib.import_module("lm_eval")
        models: Any = importlib.import_module("lm_eval.models.huggingface")
        model = models.HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=8)
        found = harness.simple_evaluate(model=model, tasks=[self.task], limit=self.limit, bootstrap_iters=0)
        numbers = {
            f"{name}.{metric.partition(',')[0]}": float(value)
            for name, values in found["results"].items()
            for metric, value in values.items()
            if isinstance(value, int | float) and "," in metric and "stderr" not in metric
        }
        return [Item(self.task, "", None, "", numbers)]


def totals(measured: Measured, reference: Measured | None) -> dict[str, Value]:  # noqa: ARG001 - as all suites
    """None: an average over tasks would mean nothing."""
    return {}
