"""A folder with a model and its memories that opens with transformers alone, wherever it is taken.

The code in the folder is this package's own: :mod:`remembering` and the few files that it imports, side by side. So
there is one way to read a memory, and the folder gives the very tokens that ``applied()`` gives.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict

from editunlearn.artifacts import atomic_dir, atomic_write_json, atomic_write_text
from editunlearn.deltas.card import Rows, model_card
from editunlearn.deltas.files import check_base
from editunlearn.deltas.kinds import Delta
from editunlearn.deltas.lowrank import LoadedModel
from editunlearn.deltas.memory import MemoryDelta, parts_of
from editunlearn.errors import UnsupportedError

READER = "editunlearn.deltas.remembering"
CODE = "modeling_memory"
PROMPT, STEPS, REPEATS = 64, 16, 5
"""What is timed: tokens of a prompt, tokens decoded behind it, how often."""

_CODE = '''\
"""{config} and {model} with memories beside some layers; the code is that of editunlearn (MIT)."""

from {config_module} import {config}
from {model_module} import {model}

from .{reader} import Remembering


class MemoryConfig({config}):
    # Not the name of the base's type: opened without this code, the model would say again what it is to forget.
    model_type = "{model_type}_memory"


class MemoryForCausalLM(Remembering, {model}):
    config_class = MemoryConfig
    _keep_in_fp32_modules_strict = [*({model}._keep_in_fp32_modules_strict or []), "memories"]
'''


def check(delta: Delta) -> MemoryDelta:
    """``delta``, if it is a memory.

    Raises:
        UnsupportedError: it is a change of weights, for which merging makes such a folder.
    """
    if isinstance(delta, MemoryDelta):
        return delta
    raise UnsupportedError(
        f"--to standalone: {delta.manifest.method} changes weights, and a merged model needs no code beside it. "
        "Use --to merged."
    )


def export_standalone(lm: Any, delta: MemoryDelta, out: Path, *, force: bool = False) -> Rows:
    """Write the model with its memories to the folder ``out``, which appears when it is complete.

    ``AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)`` then gives the tokens that ``delta.applied``
    gives, without this package. Without that flag it refuses to open.

    Args:
        lm: the base model with its tokenizer, unchanged.
        force: also beside other weights than the memories were made for.

    Returns:
        What the memories cost, by :func:`cost`.

    Raises:
        InputError, StaleError: the delta does not fit the model, or was made for other weights.
        UnsupportedError: a model with code of its own, or with quantised weights.
    """
    check_base(delta, lm, force=force)
    model = lm.model
    if not type(model).__module__.startswith("transformers."):
        raise UnsupportedError(
            f"--to standalone: {type(model).__name__} is not a class of transformers, and code of its own cannot be "
            "brought along. Use the delta itself (--to delta)."
        )
    if getattr(model.config, "quantization_config", None):
        raise UnsupportedError(
            "--to standalone: the weights are quantised. Give the checkpoint in bfloat16 (--model), or use the delta."
        )
    found = cost(lm, delta)
    with atomic_dir(out) as folder:
        _weights(model, delta, folder)
        _config(model, delta, folder)
        lm.tokenizer.save_pretrained(folder)
        for name, text in bundle(READER).items():
            atomic_write_text(folder / f"{name}.py", text)
        atomic_write_text(folder / f"{CODE}.py", _entry(model))
        atomic_write_text(folder / "README.md", model_card(delta.manifest, None, [], kind="standalone", cost=found))
    return found


def _weights(model: Any, delta: MemoryDelta, folder: Path) -> None:
    """The weights by the names that they have in the model, and the memories'."""
    own = {
        f"memories.{number}.{part}": tensor.contiguous()
        for number, memory in enumerate(delta.memories.values())
        for part, tensor in parts_of(memory)
    }
    tied = list(model.all_tied_weights_keys) if model.config.tie_word_embeddings else []
    save_torch_state_dict(
        {**model.state_dict(), **own}, folder, metadata={"format": "pt"}, shared_tensors_to_discard=tied or None
    )


def _config(model: Any, delta: MemoryDelta, folder: Path) -> None:
    """``config.json`` that names the class and says what memories there are."""
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {
        "model_type": f"{model.config.model_type}_memory",
        "architectures": ["MemoryForCausalLM"],
        "auto_map": {"AutoConfig": f"{CODE}.MemoryConfig", "AutoModelForCausalLM": f"{CODE}.MemoryForCausalLM"},
        "dtype": str(model.dtype).removeprefix("torch."),
        "memories": [
            {
                "module": name,
                "kind": memory.KIND,
                "settings": memory.settings(),
                "parts": {part: list(tensor.shape) for part, tensor in parts_of(memory)},
            }
            for name, memory in delta.memories.items()
        ],
    }
    atomic_write_json(path, config)


def _entry(model: Any) -> str:
    """Code of the model's class, made for its base."""
    config, base = type(model.config), type(model)
    return _CODE.format(
        config=config.__name__,
        config_module=config.__module__,
        model=base.__name__,
        model_module=base.__module__,
        model_type=model.config.model_type,
        reader=_flat(READER),
    )


def _flat(module: str) -> str:
    """Name of a module's file in the folder."""
    return "_".join(module.split(".")[1:])


def bundle(module: str) -> dict[str, str]:
    """Sources of a module and of all that it imports from this package, by flat names, importing each other."""
    found: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if _flat(name) not in found:
            found[_flat(name)], more = _loose(name)
            waiting += more
    return found


def _loose(module: str) -> tuple[str, list[str]]:
    """A module's source without imports for type checkers, importing its neighbours; and their names."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None  # noqa: S101 - a module of this package
    source = Path(spec.origin).read_text(encoding="utf-8")
    lines, used = source.splitlines(keepends=True), []
    for node in ast.parse(source).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for number in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[number] = ""
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("editunlearn."):
            used.append(str(node.module))
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = line.replace(f"from {node.module} ", f"from .{_flat(str(node.module))} ", 1)
    return "".join(lines), used


@torch.no_grad()
def cost(lm: LoadedModel, delta: MemoryDelta) -> Rows:
    """What memories cost on this machine: MB, and milliseconds of a prompt and of each token behind it (medians).

    Of a prompt that wakes none of them, and of one that wakes one in every layer that has any.
    """
    memories = {name: memory.awake() for name, memory in delta.memories.items()}
    weights = sum(tensor.nbytes for tensor in lm.model.state_dict(keep_vars=True).values())
    rows: dict[str, dict[str, float | int | str | None]] = {
        "weights and memories, MB": {},
        f"a prompt of {PROMPT} tokens, ms": {},
        "each token behind it, ms": {},
    }
    times(lm)  # the first passes of a process are slow
    for column, there in (
        ("base", None),
        ("with the memory", delta),
        ("with it, awake", MemoryDelta(memories, delta.manifest)),
    ):
        if there is None:
            spent = times(lm)
        else:
            with there.applied(lm):
                spent = times(lm)
        values = ((weights + (there.nbytes if there is not None else 0)) / 1e6, *spent)
        for row, value in zip(rows.values(), values, strict=True):
            row[column] = value
    return rows


@torch.no_grad()
def times(lm: LoadedModel) -> tuple[float, float]:
    """Milliseconds of a prompt of ``PROMPT`` tokens, and of a token behind it; medians."""
    model: Any = lm.model
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(PROMPT, device=device)[None] % int(model.config.get_text_config().vocab_size)
    prompts, steps = [], []
    for _ in range(REPEATS):
        spent, output = _timed(device, lambda: model(input_ids=ids, use_cache=True))
        prompts.append(spent)
        for _ in range(STEPS):
            cache, token = output.past_key_values, output.logits[:, -1:].argmax(-1)
            spent, output = _timed(device, lambda c=cache, t=token: model(input_ids=t, past_key_values=c))  # type: ignore[misc]
            steps.append(spent)
    return statistics.median(prompts), statistics.median(steps)


def _timed(device: torch.device, run: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds of a call, and what it gave."""
    start = time.perf_counter()
    found = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start), found
