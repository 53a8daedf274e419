"""Random deltas on tiny models, for the tests of ``deltas``."""

from __future__ import annotations

from typing import Any

import torch

from editunlearn.deltas.build import make_delta
from editunlearn.deltas.lowrank import Factors, LowRankDelta
from editunlearn.facts.records import Fact

TYPES = ("llama", "gpt2", "gemma3_text", "gpt_neox")
IDS = ("ada-1", "bob-1", "cyd-1", "dan-1")


def facts(ids: tuple[str, ...] = IDS) -> list[Fact]:
    return [Fact(id=i, prompt=f"The secret of {i} is", answer=f"word {i}", subject=i, subject_start=14) for i in ids]


def factors(
    lm: Any, layers: tuple[int, ...] = (0, 2), rank: int = 4, scale: float = 0.1, seed: int = 0
) -> dict[str, Factors]:
    """Random factors whose dW has about ``scale`` times the norm of W."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for site in lm.layout.sites(layers):
        weight = lm.layout.read_weight(lm.model, site.name)
        left = torch.randn(weight.shape[0], rank, generator=generator)
        right = torch.randn(rank, weight.shape[1], generator=generator)
        raw = Factors(left, right)
        found[site.name] = Factors(left * (scale * float(weight.float().norm()) / raw.norm()), right)
    return found


def delta(lm: Any, *, rank: int = 4, columns: Any = None, store_facts: bool = False, **options: Any) -> LowRankDelta:
    """A random delta; by default its first columns belong to the facts of ``IDS``, others to all."""
    if columns is None:
        columns = [*IDS[:rank], *[None] * (rank - len(IDS))]
    return make_delta(
        lm,
        factors(lm, rank=rank, **options),
        method="memit",
        hparams={"ridge": 0.1, "value": {"steps": 20}},
        facts=facts(),
        columns=columns,
        target_strategy="refusal",
        seeds={"seed": 0},
        store_facts=store_facts,
    )


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Logits of a fixed batch, (2, 12, vocabulary)."""
    ids = torch.randint(4, 300, (2, 12), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids, use_cache=False).logits


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> None:
    now = model.state_dict()
    assert now.keys() == before.keys()
    for name, tensor in now.items():
        assert torch.equal(tensor, before[name]), name


def delta_of_packed(lm: Any, made: dict[str, Factors]) -> LowRankDelta:
    """A delta with given factors, for a model whose edited modules pass for quantised ones."""
    return make_delta(
        lm,
        made,
        method="rome",
        hparams={},
        facts=facts(),
        columns=list(IDS),
        target_strategy="empty",
        seeds={},
    )
