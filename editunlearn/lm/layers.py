"""The ``layers`` field of the hyperparameters: which blocks it means in a model of so many."""

from __future__ import annotations

from collections.abc import Sequence

from editunlearn.errors import InputError


def resolve_layers(
    spec: str | Sequence[int | float], n_layers: int, default: Sequence[int | float]
) -> tuple[list[int], str]:
    """Block numbers for the ``layers`` field.

    Args:
        spec: ``auto``, ``located`` (whose blocks are known only with the weights: until then those of ``auto``), or
            a list of block numbers (ints, 0 is the first) and depths (floats from 0 to 1, where
            0.5 is the middle).
        n_layers: number of blocks of the model.
        default: what ``auto`` stands for, in the same notation.

    Returns:
        The block numbers, sorted, each once; and one phrase that says where they come from.

    Raises:
        InputError: not a list of numbers, out of range, or a block number given twice.
    """
    if isinstance(spec, str):
        if spec not in ("auto", "located"):
            raise InputError(f"layers: {spec!r} is neither 'auto' nor 'located' nor a list such as [3, 4] or [0.2].")
        layers, why = resolve_layers(default, n_layers, default)
        return layers, f"auto: {why}" if spec == "auto" else "located: known when the weights are; as many as these"
    problems: list[str] = []
    numbers: set[int] = set()
    depths: list[int] = []
    for item in spec:
        if isinstance(item, bool) or not isinstance(item, (int, float)):
            problems.append(f"layers: {item!r} is not a number. Give block numbers (3) or depths (0.2).")
        elif isinstance(item, int):
            if not 0 <= item < n_layers:
                problems.append(f"layers: block {item} does not exist; there are blocks 0 to {n_layers - 1}.")
            elif item in numbers:
                problems.append(f"layers: block {item} is given twice.")
            numbers.add(item)
        elif not 0.0 <= item <= 1.0:
            problems.append(f"layers: depth {item} is not from 0.0 to 1.0. Write a block number without a point.")
        else:
            depths.append(min(int(item * n_layers + 1e-9), n_layers - 1))  # 0.29 * 100 is 28.999...
    if not spec:
        problems.append("layers: the list is empty. Give block numbers, depths, or 'auto'.")
    if problems:
        raise InputError(problems)
    layers = sorted(numbers | set(depths))
    if not depths:
        return layers, f"given, of {n_layers} blocks"
    given = ", ".join(f"{item:g}" for item in spec)
    merged = "" if len(layers) == len(spec) else " (those that fall on one block count once)"
    return layers, f"depth {given} of {n_layers} blocks{merged}"
