"""Errors with the exit code that a command returns for them.

Every message names the place, the value, what is allowed and what to do about it.
"""

from __future__ import annotations

from collections.abc import Iterable


class EditUnlearnError(Exception):
    """Something went wrong that the user can read about in one or a few lines."""

    exit_code = 1


class InputError(EditUnlearnError):
    """Bad input. Collects every problem found, so that one run shows them all.

    Args:
        problems: one message, or several; each is complete on its own line.
    """

    exit_code = 2

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class UnsupportedError(InputError):
    """The model or format is one that this package cannot edit, and why."""


class StaleError(InputError):
    """An artifact (statistics, delta, resume state) belongs to other weights, data or settings."""


class NumericalError(EditUnlearnError):
    """A number that is not finite, or a system that cannot be solved; nothing was written."""


class HubError(EditUnlearnError):
    """The Hugging Face hub cannot be reached, or refuses what it is asked for."""


class GateError(EditUnlearnError):
    """Something that was required of the results is not so. The results are saved.

    Args:
        failed: one line for each requirement that is not met.
    """

    exit_code = 3

    def __init__(self, failed: Iterable[str]) -> None:
        super().__init__("\n".join(failed))
