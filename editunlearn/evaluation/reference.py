"""Results that a run is held against: our own files, or open-unlearning's ``TOFU_EVAL.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editunlearn.errors import InputError
from editunlearn.evaluation import open_unlearning, results
from editunlearn.evaluation.results import Measured

COMPARED = ("tofu", "muse")
"""Suites with metrics that compare with a model that never saw what is to be forgotten."""


@dataclass(frozen=True)
class Other:
    """Results of another run.

    Attributes:
        about: what its file says of it, the summary among it.
        measured: its items.
    """

    about: Mapping[str, Any]
    measured: Measured


def read_results(path: Path) -> Other:
    """Read a results file, the folder of one, or open-unlearning's ``TOFU_EVAL.json``.

    Raises:
        InputError: it is none of these.
    """
    try:
        return Other(*results.load(path))
    except InputError as error:
        if not path.is_file():
            raise
        try:
            file = json.loads(path.read_text(encoding="utf-8"))
            return Other(*open_unlearning.from_open_unlearning(file, path.resolve().parent.name))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise error from None


def load_others(path: Path, suites: Sequence[str], flag: str) -> dict[str, Other]:
    """Results for ``--baseline`` or ``--reference``, by the suite that they serve.

    Args:
        suites: that are asked for.
        flag: the one that named the file; a reference serves suites that compare with one only.

    Raises:
        InputError: there are no such results, they are not finished, or of no suite that can use them.
    """
    other = read_results(path)
    suite = str(other.about["suite"])
    if not other.about["complete"]:
        raise InputError(f"{flag} {path}: this evaluation was interrupted. Run its command again to finish it.")
    served = [s for s in suites if s == suite or (suite == open_unlearning.ANY and s.startswith("tofu:"))]
    if not served:
        raise InputError(f"{flag} {path}: results of the suite {suite}, which is not asked for.")
    if flag == "--reference" and suite.partition(":")[0] not in COMPARED:
        raise InputError(
            f"{flag} {path}: the suite {suite} compares with no reference; {' and '.join(COMPARED)} do. Give "
            "--baseline to see these results beside."
        )
    return dict.fromkeys(served, other)
