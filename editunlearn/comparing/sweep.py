"""What is tried: the arms of a comparison, and the settings that every method's trials go through.

Every method gets the same number of trials, and each trial changes one number, the method's strength: the first is the
settings as they came, the others multiply that number by ``FACTORS``, in this order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from types import MappingProxyType
from typing import Any

from editunlearn.errors import InputError
from editunlearn.hparams import EditorHParams, MethodHParams, UnlearnerHParams, load_hparams, resolved

FACTORS = (1.0, 0.3, 3.0, 0.1, 10.0, 0.03, 30.0)
"""What a trial multiplies a method's strength by; there are as many trials at most."""
STRENGTH: Mapping[str, str] = MappingProxyType(
    {"alphaedit": "nullspace.threshold", "grace": "radius.start", "wise": "side.lr", "task_vector": "factor"}
)
"""The number that the trials of a method change, where its family's is not its strength."""
CONTROL = "random"
"""Name of the control that is run beside a localised unlearner: as much is trained, at places drawn at random."""


@dataclass(frozen=True)
class Arm:
    """One method of a comparison.

    Attributes:
        name: in tables.
        trials: its settings, trial by trial.
    """

    name: str
    trials: tuple[MethodHParams, ...]

    @property
    def folder(self) -> str:
        """Its name as one of a folder."""
        return re.sub(r"[^A-Za-z0-9_.-]+", "-", self.name).strip("-.")


def strength(hp: MethodHParams) -> str:
    """The dotted key of the number that says how hard a method works at its task.

    The weight of text in the solve of an editor; the learning rate of what trains.
    """
    if hp.method in STRENGTH:
        return STRENGTH[hp.method]
    return "moments.weight" if isinstance(hp, EditorHParams) else "train.lr"


def arms(names: Sequence[str], trials: int, model_type: str | None = None) -> list[Arm]:
    """The methods, each with its trials, and beside every localised unlearner its control.

    Args:
        names: of shipped hparams (``memit``, ``paper/memit``), or files.
        trials: of each method.

    Raises:
        InputError: everything that is wrong: no such method, one twice, too many trials, settings that are not allowed.
    """
    problems: list[str] = []
    if not 1 <= trials <= len(FACTORS):
        problems.append(
            f"--trials {trials}: from 1 (the settings as they are) to {len(FACTORS)} (one for each factor that is "
            f"declared: {', '.join(f'{factor:g}' for factor in FACTORS)})."
        )
    if not names:
        problems.append("--methods: none is named. Give some, such as memit,npo.")
    found: dict[str, MethodHParams] = {}
    for name in names:
        try:
            hp = load_hparams(name, model_type=model_type)
        except InputError as error:
            problems += [f"--methods {name}: {problem}" for problem in error.problems]
            continue
        label = Path(name).stem if Path(name).is_file() else name.removesuffix(".yaml")
        if label in found:
            problems.append(f"--methods: {label} is named twice.")
        found[label] = hp
        if getattr(hp, "random", None) is False:
            found[f"{label}:{CONTROL}"] = load_hparams({**resolved(hp), "random": True})
    made = []
    for label, hp in found.items() if not problems else ():
        try:
            made.append(Arm(label, tuple(scaled(hp, factor) for factor in FACTORS[:trials])))
        except InputError as error:
            problems += [f"--trials {trials}, {label}: {problem}" for problem in error.problems]
    if problems:
        raise InputError(problems)
    return made


def scaled(hp: MethodHParams, factor: float) -> MethodHParams:
    """The same settings with another strength.

    Raises:
        InputError: it is not allowed.
    """
    key = strength(hp)
    value = setting(hp, key)
    return hp if factor == 1 else load_hparams(resolved(hp), set=[f"{key}={float(f'{value * factor:.6g}')!r}"])


def setting(hp: MethodHParams, key: str) -> Any:
    """The value of a dotted key."""
    return reduce(getattr, key.split("."), hp)


def seeded(hp: MethodHParams, seed: int) -> MethodHParams:
    """The same with another seed, also of the texts that go before the prompts."""
    more = [f"seed={seed}"]
    if not isinstance(hp, UnlearnerHParams):
        more.append(f"context_prefixes.seed={seed}")
    return load_hparams(resolved(hp), set=more)
