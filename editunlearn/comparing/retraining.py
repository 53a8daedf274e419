"""What training a model anew would take, beside forgetting: the claim of "Machine Unlearning of Pre-trained LLMs"
(Yao et al. 2024, arXiv 2402.15159) that its seven methods are more than 10^5 times cheaper, from counted operations.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

SEVEN: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "gradient_ascent": (1, 0),
        "random_labels": (1, 0),
        "adversarial_samples": (1, 1),
        "ascent_descent_general": (2, 0),
        "ascent_descent_in_distribution": (2, 0),
        "ascent_kl_general": (2, 1),
        "ascent_kl_in_distribution": (2, 1),
    }
)
"""For each passage to forget: passages that are trained on, and those that are only read (the unedited model's
predictions). A retain passage stands beside each passage to forget, and each is seen once."""


PASSAGE = 1024
"""Tokens of a passage that a model is taken to have been trained on."""


@dataclass(frozen=True)
class Token:
    """Floating-point operations for a token of a passage of some length.

    Attributes:
        read: of a forward pass. trained: of a forward and a backward pass to all weights.
    """

    read: float
    trained: float


def per_token(config: Any, length: int) -> Token:
    """Counted on fake tensors, so that a model of any size takes no memory; attention is written out as products.

    Args:
        config: of a causal language model of transformers.
        length: tokens of a passage.
    """
    from transformers import AutoModelForCausalLM

    with FakeTensorMode():
        auto: Any = AutoModelForCausalLM
        model = auto.from_config(copy.deepcopy(config), attn_implementation="eager")
        ids = torch.zeros(1, length, dtype=torch.long)
        with FlopCounterMode(display=False) as read, torch.no_grad():
            model(input_ids=ids, use_cache=False)
        with FlopCounterMode(display=False) as trained:
            model(input_ids=ids, use_cache=False).logits.sum().backward()
    return Token(read.get_total_flops() / length, trained.get_total_flops() / length)


def times_cheaper(token: Token, pretraining: float, forgotten: float, passes: tuple[int, int]) -> float:
    """How many times more operations the pretraining takes than one pass of a method over what is to be forgotten.

    Args:
        pretraining: tokens. forgotten: tokens.
        passes: as in ``SEVEN``.
    """
    trained, read = passes
    return pretraining * token.trained / (forgotten * (trained * token.trained + read * token.read))
