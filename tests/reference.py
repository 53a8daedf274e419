"""The papers' equations, written down literally: float64, d x d matrices, explicit inverses, no tricks.

Notation is that of the papers: ``K`` (d_in, n) and ``R`` (d_out, n) hold one fact a column, ``C`` is ``E[k k^T]``,
``W`` is (d_out, d_in). Slow and plain on purpose: the fast code is compared with this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# --- one layer


def preserved(c: Tensor, weight: float, retain: Tensor | None = None, mu: float = 0.0) -> Tensor:
    """w C + mu K_r K_r^T; ``retain`` (d_in, m)."""
    c = weight * c.double()
    if retain is not None:
        for k in retain.double().T:
            c = c + mu * torch.outer(k, k)
    return c


def rome_update(w: Tensor, c: Tensor, k_mean: Tensor, k_bare: Tensor, v: Tensor) -> Tensor:
    """ROME (arXiv 2202.05262, eq. 2, as in its code): the new key over contexts, the read-out of the bare prompt."""
    u = torch.linalg.inv(c.double()) @ k_mean.double()
    u = u / u.norm()
    r = (v.double() - w.double() @ k_bare.double()) / (u @ k_bare.double())
    return torch.outer(r, u)


def r_rome_update(w: Tensor, c: Tensor, k_mean: Tensor, v: Tensor) -> Tensor:
    """R-ROME (arXiv 2403.07175, eq. 4): one key everywhere."""
    return rome_update(w, c, k_mean, k_mean, v)


def memit_update(c: Tensor, keys: Tensor, residuals: Tensor) -> Tensor:
    """MEMIT (arXiv 2210.07229, eq. 14): dW = R K^T (C + K K^T)^-1, written as its code does; ``c`` holds all that is
    preserved, weights included."""
    k = keys.double()
    adjusted = torch.linalg.solve(c.double() + k @ k.T, k)
    return residuals.double() @ adjusted.T


def emmet_update(c: Tensor, keys: Tensor, residuals: Tensor, ridge: float) -> Tensor:
    """EMMET (arXiv 2403.14236, eq. 10): dW = R (K^T C^-1 K + lambda I)^-1 K^T C^-1."""
    k = keys.double()
    inverse = torch.linalg.inv(c.double())
    d = k.T @ inverse @ k + ridge * torch.eye(k.shape[1], dtype=torch.float64)
    return residuals.double() @ torch.linalg.inv(d) @ k.T @ inverse


def null_space_projector(c: Tensor, threshold: float, *, relative: bool) -> Tensor:
    """AlphaEdit (arXiv 2410.02355, eq. 8): P = U0 U0^T, U0 the eigenvectors of C below the threshold."""
    u, s, _ = torch.linalg.svd(c.double())
    u0 = u[:, s < (threshold * s.mean() if relative else threshold)]
    return u0 @ u0.T


def alphaedit_update(p: Tensor, keys: Tensor, past: Tensor, residuals: Tensor, l2: float) -> Tensor:
    """AlphaEdit (eq. 14, as in its code): [P (K K^T + K_p K_p^T) + l2 I] X = P K R^T, dW = X^T."""
    k, kp = keys.double(), past.double()
    system = p @ (k @ k.T + kp @ kp.T) + l2 * torch.eye(len(p), dtype=torch.float64)
    return torch.linalg.solve(system, p @ k @ residuals.double().T).T


def square_root(moment: Tensor) -> Tensor:
    """Keys, one a column, whose sum of outer products is the moment."""
    values, vectors = torch.linalg.eigh(moment.double())
    return vectors * values.clamp(min=0).sqrt()


# --- losses


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label] of each row."""
    e = (logits.double() - logits.double().max(-1, keepdim=True).values).exp()
    p = e / e.sum(-1, keepdim=True)
    return -torch.stack([row[label] for row, label in zip(p, labels.tolist(), strict=True)]).log()


def kl(base: Tensor, edited: Tensor) -> Tensor:
    """sum_i p_i log(p_i / q_i) of each row."""
    p = base.double().exp() / base.double().exp().sum(-1, keepdim=True)
    q = edited.double().exp() / edited.double().exp().sum(-1, keepdim=True)
    return (p * (p / q).log()).sum(-1)


# --- many layers of a real model


def _seen(lm: Any, ids: Sequence[int], at: int, name: str, *, output: bool) -> Tensor:
    """What goes into (or comes out of) a module at one token of one unpadded prompt, (width,) float64."""
    found: list[Tensor] = []

    def hook(_module: Any, args: tuple[Any, ...], result: Any) -> None:
        value = (result[0] if isinstance(result, tuple) else result) if output else args[0]
        found.append(value.detach().reshape(len(ids), -1)[at].double())

    handle = lm.model.get_submodule(name).register_forward_hook(hook)
    try:
        with torch.no_grad():
            lm.model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    finally:
        handle.remove()
    return found[0]


Update = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, keys over contexts (d_in, n), keys of the bare prompts (d_in, n), R (d_out, n)) -> dW (d_out, d_in)."""


def locate_then_edit(
    lm: Any,
    layers: Sequence[int],
    prompts: Sequence[Sequence[tuple[Sequence[int], int]]],
    wanted: Callable[[int, Callable[[str], Tensor]], Tensor],
    update: Update,
) -> dict[int, Tensor]:
    """MEMIT (arXiv 2210.07229, algorithm 1) on a model, writing into its weights layer by layer and taking them back.

    Args:
        prompts: for each fact (ids, index of the subject's last token), the bare prompt first, then the prefixed ones.
        wanted: (index of the layer, function: module name -> its outputs of the bare prompts now (d_out, n)) -> ``R``
            (d_out, n).
        update: the method's closed form at one layer.

    Returns:
        dW by layer, (d_out, d_in) float64.
    """
    updates: dict[int, Tensor] = {}
    saved: dict[int, Tensor] = {}
    try:
        for index, layer in enumerate(layers):
            name = lm.layout.site(layer).name
            columns, bare = [], []
            for fact in prompts:
                each = [_seen(lm, ids, at, name, output=False) for ids, at in fact]
                columns.append(each[0] if len(each) == 1 else each[0] / 2 + sum(each[1:]) / (2 * (len(each) - 1)))
                bare.append(each[0])

            def now(module: str) -> Tensor:
                return torch.stack([_seen(lm, f[0][0], f[0][1], module, output=True) for f in prompts], dim=1)

            keys, residuals = torch.stack(columns, dim=1), wanted(index, now)
            updates[layer] = update(layer, keys, torch.stack(bare, dim=1), residuals)
            weight = lm.layout.read_weight(lm.model, name)
            saved[layer] = weight.clone()
            weight += updates[layer].to(weight.dtype)
    finally:
        for layer, weight in saved.items():
            lm.layout.read_weight(lm.model, lm.layout.site(layer).name).copy_(weight)
    return updates


def rome_sequence(c: Tensor, keys: Tensor, written: Tensor, residuals: Tensor) -> Tensor:
    """ROME for each fact in turn on the weight that the earlier ones left; W drops out, so that it starts at 0."""
    w = torch.zeros(len(residuals), len(keys), dtype=torch.float64)
    for mean, key, wanted in zip(keys.T, written.T, residuals.double().T, strict=True):
        w = w + rome_update(w, c, mean, key, wanted)
    return w


def keys_at(lm: Any, layer: int, prompts: Sequence[tuple[Sequence[int], int]]) -> Tensor:
    """Keys of single prompts at one layer, (d_in, n)."""
    name = lm.layout.site(layer).name
    return torch.stack([_seen(lm, ids, at, name, output=False) for ids, at in prompts], dim=1)


def second_moment(lm: Any, layer: int, pieces: Sequence[Sequence[int]]) -> Tensor:
    """C = E[k k^T] over every token of every piece."""
    columns = [keys_at(lm, layer, [(p, at) for at in range(len(p))]) for p in pieces]
    every = torch.cat(columns, dim=1)
    return every @ every.T / every.shape[1]


def residual_spread(
    lm: Any, layers: Sequence[int], targets: Tensor
) -> Callable[[int, Callable[[str], Tensor]], Tensor]:
    """MEMIT, eq. 20: R = (Z - h_L) / (L - l + 1) with ``targets`` Z (d, n), h_L the output of the last edited block."""
    last = lm.layout.block_name(layers[-1])
    return lambda index, now: (targets.double() - now(last)) / (len(layers) - index)


def one_request(keys: Tensor, wanted: Tensor, preserved: Tensor) -> Tensor:
    """dW (out, in) that minimises ``||K dW^T - Z||^2 + tr(dW A dW^T)`` over all keys (n, in) at once."""
    k, z, a = keys.double(), wanted.double(), preserved.double()
    return torch.linalg.solve(a + k.T @ k, k.T @ z).T
