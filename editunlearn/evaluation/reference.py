"""Results of a model that never saw what is to be forgotten: our own files, or open-unlearning's."""

from __future__ import annotations

import json
from pathlib import Path

from editunlearn.errors import InputError
from editunlearn.evaluation import results
from editunlearn.evaluation.results import Measured
from editunlearn.evaluation.suites import tofu


def load_reference(path: Path) -> Measured:
    """Read a results file, the folder of one, or open-unlearning's ``TOFU_EVAL.json``.

    Raises:
        InputError: it is none of these.
    """
    try:
        return results.load(path)[1]
    except InputError as error:
        if not path.is_file():
            raise
        try:
            return tofu.from_open_unlearning(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise error from None
