"""Results of a model that never saw what is to be forgotten: our own files, or open-unlearning's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from editunlearn.errors import InputError
from editunlearn.evaluation import results
from editunlearn.evaluation.results import Measured
from editunlearn.evaluation.suites import tofu


def load_reference(path: Path, suites: Sequence[str]) -> dict[str, Measured]:
    """Read a results file, the folder of one, or open-unlearning's ``TOFU_EVAL.json``: by suite that it serves.

    Raises:
        InputError: it is none of these, is not finished, or is of no suite that is asked for.
    """
    try:
        about, measured = results.load(path)
    except InputError as error:
        if not path.is_file():
            raise
        try:
            measured = tofu.from_open_unlearning(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise error from None
        served = [suite for suite in suites if suite.startswith("tofu:")]
        about = {"suite": "tofu"}
    else:
        served = [suite for suite in suites if suite == about["suite"]]
        if not about["complete"]:
            raise InputError(f"{path}: this evaluation was interrupted. Run its command again to finish it.")
    if not served:
        raise InputError(f"{path}: results of the suite {about['suite']}, which is not asked for.")
    return dict.fromkeys(served, measured)
