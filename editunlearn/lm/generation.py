"""Greedy decoding of many prompts at once, and prefixes that the model writes itself."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from editunlearn.lm.batching import chunks, halving
from editunlearn.lm.configs import context_length
from editunlearn.lm.hooks import contiguous_input
from editunlearn.lm.tokens import Prompt, encode_prompt

if TYPE_CHECKING:
    from editunlearn.lm.loading import LM

PREFIX_SEEDS = ("The", "Therefore", "Because", "I", "You", "Yesterday", "In", "It")
"""First words of the prefixes that the model continues (after ROME and MEMIT, with three more)."""


def generate(
    lm: LM,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 16,
    batch_size: int = 128,
    top_k: int = 0,
    seed: int = 0,
    ended: Callable[[str], bool] | None = None,
    done: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """Greedy continuations, without special tokens, each ended by the model itself or after ``max_new_tokens``.

    With ``ended`` a row also ends where that is True of its text so far; the text is not cut.
    With ``top_k`` they are sampled, seeded (and depend on what is in one batch). Prompts are sorted by length into
    left-padded batches; the order of the results is that of ``prompts``. ``done`` is called with the number of prompts
    of every batch. Of a prompt that does not fit the model with what is to follow, the beginning is cut.
    """
    most = (context_length(lm.model.config) or sys.maxsize) - max_new_tokens
    encoded = [encode_prompt(lm, p, "prompt_last")[0][-max(1, most) :] for p in prompts]
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    texts = [""] * len(encoded)

    def run(part: Sequence[int]) -> None:
        found = _continue(lm, [encoded[i] for i in part], max_new_tokens, top_k=top_k, seed=seed + part[0], ended=ended)
        for i, text in zip(part, found, strict=True):
            texts[i] = text
        done(len(part))

    halving(list(chunks(order, batch_size)), run, lambda _: None)
    return texts


def _continue(
    lm: LM,
    rows: list[list[int]],
    max_new_tokens: int,
    *,
    top_k: int = 0,
    seed: int = 0,
    ended: Callable[[str], bool] | None = None,
) -> list[str]:
    from transformers import GenerationConfig

    model: Any = lm.model
    width = max(map(len, rows))
    ids = torch.tensor([[lm.pad_id] * (width - len(r)) + r for r in rows], device=lm.device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=lm.device)
    sampling = {"do_sample": True, "top_k": top_k} if top_k else {"do_sample": False}
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens, pad_token_id=lm.pad_id, eos_token_id=sorted(lm.eos_ids), **sampling
    )
    stop = [_Ended(lm, width, ended)] if ended is not None else None
    devices = [lm.device] if lm.device.type == "cuda" else []
    with (
        torch.no_grad(),
        torch.random.fork_rng(devices=devices),
        contiguous_input(lm.head),
    ):
        torch.manual_seed(seed)
        # generate() fills what a config leaves open (repetition penalty, ...) from the checkpoint's own
        own, model.generation_config = model.generation_config, config
        try:
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, stopping_criteria=stop)
        finally:
            model.generation_config = own
    return lm.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)


class _Ended:
    """Tells ``generate`` of transformers which rows have ended, by their text; asked once after every step.

    Args:
        width: of the prompts with their padding.
    """

    def __init__(self, lm: LM, width: int, ended: Callable[[str], bool]) -> None:
        self._lm, self._width, self._ended = lm, width, ended
        self._found: list[bool] | None = None

    def __call__(self, ids: Tensor, *_: Any, **__: Any) -> Tensor:
        """(rows,) bool, for token ids (rows, width + steps)."""
        found = self._found or [False] * len(ids)
        going = [i for i, over in enumerate(found) if not over]
        texts = self._lm.tokenizer.batch_decode(ids[going, self._width :], skip_special_tokens=True)
        for i, text in zip(going, texts, strict=True):
            found[i] = self._ended(text)
        self._found = found
        return torch.tensor(found, device=ids.device)


def context_prefixes(lm: LM, count: int, tokens: int, seed: int) -> list[str]:
    """``count`` short texts in the model's own words, to be put before a prompt: each ends in a full stop and a space.

    Sampled (top-k 5) with its own seed; the global random state is left as it was. The lengths vary around ``tokens``.
    """
    prefixes = []
    for i in range(count):
        start = PREFIX_SEEDS[i % len(PREFIX_SEEDS)]
        length = max(2, tokens - 3 + (3 * i) % 7)
        mixed = int.from_bytes(hashlib.sha256(f"{seed}:{i}".encode()).digest()[:4], "big")
        ids = encode_prompt(lm, Prompt(start, (0, len(start))), "prompt_last")[0]
        text = start + _continue(lm, [ids], length, top_k=5, seed=mixed)[0]
        prefixes.append(" ".join(text.split()).rstrip(".,;:!? ") + ". ")
    return prefixes
