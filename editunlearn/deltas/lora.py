"""A delta as a LoRA adapter that PEFT and vLLM load: exact factors, scale 1, one rank for all modules.

vLLM reads one ``r`` and one ``lora_alpha`` for the whole adapter and no rank pattern, so that all modules are
padded with zeros to one rank that its ``--max-lora-rank`` accepts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from editunlearn.artifacts import atomic_path, atomic_write_json
from editunlearn.deltas.build import check_finite
from editunlearn.deltas.kinds import Delta, written
from editunlearn.deltas.lowrank import Factors, LoadedModel, Update
from editunlearn.errors import InputError

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank accepts


@dataclass(frozen=True)
class LoraExport:
    """What was written.

    Attributes:
        rank: the padded rank ``r`` of every module.
        max_lora_rank: the smallest value of vLLM's ``--max-lora-rank`` that loads the adapter.
        discarded: by module, the share of norm(dW)^2 that was cut off to meet the rank limit; empty when
            exact.
        target_modules: as in ``adapter_config.json``.
    """

    rank: int
    max_lora_rank: int
    discarded: dict[str, float]
    target_modules: list[str]

    @property
    def vllm_flags(self) -> str:
        """The flags that vLLM needs to serve the adapter."""
        return f"--enable-lora --max-lora-rank {self.max_lora_rank}"


def check_rank(limit: int) -> None:
    """Raise InputError unless a LoRA may have this largest rank."""
    if not RANKS[0] <= limit <= RANKS[-1]:
        raise InputError(f"the rank limit of a LoRA must be from {RANKS[0]} to {RANKS[-1]}, not {limit}.")


def export_lora(
    delta: Delta,
    directory: str | Path,
    base_model_name: str,
    *,
    revision: str | None = None,
    lm: LoadedModel | None = None,
    max_rank: int = RANKS[-1],
    dtype: torch.dtype = torch.float32,
) -> LoraExport:
    """Writes ``adapter_model.safetensors`` and ``adapter_config.json``, the latter last.

    Args:
        directory: made when missing.
        base_model_name: hub id or path that the adapter is loaded onto.
        revision: of the base model.
        lm: the model, to look for a short description of the edited modules (``down_proj`` and layer numbers)
            that matches no others. Without it they are listed by full name, which is as exact but longer.
        max_rank: larger ranks are cut off by SVD, with the loss reported. At least 8, at most 512.
        dtype: of the adapter's tensors.

    Raises:
        InputError: an empty delta, modules of which only some are stored transposed, or a rank limit out of
            range.
        UnsupportedError: the delta changes no weights.
        NumericalError: a factor is not finite; nothing is written.
    """
    delta = written(delta, "LoRA")
    check_finite(delta.tensors())
    if not delta.factors:
        raise InputError("the delta is empty: there is nothing to export as a LoRA.")
    check_rank(max_rank)
    transposed = {site.transposed for site in delta.manifest.sites.values()}
    if len(transposed) > 1:
        raise InputError("some edited modules are stored transposed and some are not; one adapter cannot say both.")
    limit = max(rank for rank in RANKS if rank <= max_rank)
    discarded: dict[str, float] = {}
    cut: dict[str, Factors] = {}
    for name, update in delta.factors.items():
        factors = factored(update)
        cut[name] = factors
        if factors.rank > limit:
            cut[name], discarded[name] = truncate(factors, limit)
    rank = min(size for size in RANKS if size >= max(f.rank for f in cut.values()))
    tensors: dict[str, torch.Tensor] = {}
    for name, factors in sorted(cut.items()):
        padded = pad(factors, rank)
        tensors[f"base_model.model.{name}.lora_A.weight"] = padded.right.to(dtype).cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = padded.left.to(dtype).cpu().contiguous()
    names = [name for name, _ in lm.model.named_modules()] if lm is not None else []
    targets = describe_targets(list(delta.factors), names)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "revision": revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed.pop(),
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        **targets,
    }
    folder = Path(directory)
    with atomic_path(folder / "adapter_model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    atomic_write_json(folder / "adapter_config.json", settings)
    return LoraExport(rank, rank, discarded, targets["target_modules"])


def factored(update: Update) -> Factors:
    """The change as factors; of a dense one the right factor is the identity."""
    if isinstance(update, Factors):
        return update
    return Factors(update.left, torch.eye(update.shape[1], device=update.left.device))


@torch.no_grad()
def truncate(factors: Factors, rank: int) -> tuple[Factors, float]:
    """The best update of a smaller rank, and the share of norm(dW)^2 that it leaves out.

    QR on both sides leaves an SVD of at most (r, r): dW is never formed. Computed in float64.
    """
    q_left, r_left = torch.linalg.qr(factors.left.double())  # (out, k), (k, r)
    q_right, r_right = torch.linalg.qr(factors.right.double().T)  # (in, k'), (k', r)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    energy = s.square()
    total = float(energy.sum())
    root = s[:rank].sqrt()
    left = (q_left @ u[:, :rank]) * root
    right = root[:, None] * (vh[:rank] @ q_right.T)
    lost = float(energy[rank:].sum()) / total if total else 0.0
    return Factors(left.float().contiguous(), right.float().contiguous()), lost


def pad(factors: Factors, rank: int) -> Factors:
    """The same update with columns of zeros up to the given rank."""
    missing = rank - factors.rank
    left = torch.nn.functional.pad(factors.left, (0, missing))
    right = torch.nn.functional.pad(factors.right, (0, 0, 0, missing))
    return Factors(left, right)


def describe_targets(edited: list[str], all_names: Iterable[str]) -> dict[str, Any]:
    """The fields of ``adapter_config.json`` that pick out the edited modules and no others.

    Either a module suffix with layer numbers (what people write by hand and what vLLM shows), when the names
    of all modules of the model show that it is exact, or the full names.
    """
    full: dict[str, Any] = {
        "target_modules": sorted(edited),
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    names = list(all_names)
    split = [re.fullmatch(r"(?:.*\.)?([^.]+)\.(\d+)\.(.+)", name) for name in edited]
    if not names or None in split:
        return full
    found = [match.groups() for match in split if match is not None]
    containers, inner = {container for container, _, _ in found}, {rest for _, _, rest in found}
    if len(containers) > 1 or len(inner) > 1:
        return full
    container, parts = containers.pop(), inner.pop().split(".")
    layers = sorted(int(number) for _, number, _ in found)
    for length in range(1, len(parts) + 1):
        suffix = ".".join(parts[-length:])
        if {name for name in names if _peft_matches(name, suffix, container, layers)} == set(edited):
            return {"target_modules": [suffix], "layers_to_transform": layers, "layers_pattern": container}
    return full


def _peft_matches(name: str, suffix: str, container: str, layers: list[int]) -> bool:
    """Whether PEFT would adapt a module, given one target module, one layers pattern and layer numbers."""
    if name != suffix and not name.endswith(f".{suffix}"):
        return False
    if name == suffix:
        return True
    number = re.match(rf"(?:^|.*?\.){re.escape(container)}\.(\d+)\.", name)
    return number is not None and int(number.group(1)) in layers
