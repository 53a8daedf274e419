"""Causal tracing against a literal version that tries one state of one prompt at a time."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from edits import fact

from editunlearn.console import Console
from editunlearn.tracing import effects
from editunlearn.tracing.prompts import TracedPrompt, noise_for, traced
from editunlearn.tracing.states import KINDS, Tracer

QUIET = Console(quiet=True)


def literal(
    lm: Any, prompt: TracedPrompt, noise: Any, puts: list[tuple[str, int, bool]], token: int | None = None
) -> float:
    """Mean probability over noise samples; ``puts`` names modules whose output at ``token`` is the clean run's, or
    stays the corrupted run's.
    """

    def outputs(hooks: list[Any]) -> tuple[dict[str, Any], float]:
        seen: dict[str, Any] = {}

        def keep(name: str) -> Any:
            def hook(_m: Any, _i: Any, out: Any) -> None:
                out = out[0] if isinstance(out, tuple) else out
                seen[name] = out.detach().clone().reshape(len(prompt.ids), -1)

            return hook

        handles = [lm.model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks]
        handles += [lm.model.get_submodule(name).register_forward_hook(keep(name)) for name, _, _ in puts]
        with torch.no_grad():
            logits = lm.model(torch.tensor([prompt.ids]), use_cache=False).logits[0, -1]
        for handle in handles:
            handle.remove()
        return seen, float(logits.softmax(-1)[prompt.answer])

    clean, _ = outputs([])
    found = []
    for sample in noise:

        def corrupt(_m: Any, _i: Any, out: Any, sample: Any = sample) -> Any:
            out = out.clone()
            for position, index in enumerate(prompt.subject):
                out[0, index] += sample[position]
            return out

        base, chance = outputs([(lm.layout.embed, corrupt)])
        if puts:

            def put(name: str, is_clean: bool, base: Any = base) -> Any:
                def hook(_m: Any, _i: Any, out: Any) -> Any:
                    value = (clean if is_clean else base)[name][token]
                    state = out[0] if isinstance(out, tuple) else out
                    flat = state.clone().reshape(len(prompt.ids), -1)
                    flat[token] = value
                    flat = flat.reshape(state.shape)
                    return (flat, *out[1:]) if isinstance(out, tuple) else flat

                return hook

            _, chance = outputs([(lm.layout.embed, corrupt), *((name, put(name, c)) for name, _, c in puts)])
        found.append(chance)
    return sum(found) / len(found)


def name_of(lm: Any, kind: str, layer: int) -> str:
    layout = lm.layout
    by_kind = {"block": layout.block_name, "mlp": lambda i: layout.site(i).name, "attention": layout.attention_name}
    return str(by_kind[kind](layer))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "gemma3_text", "gptj", "bloom", "falcon"])
def test_effects_are_those_of_one_state_at_a_time(model_type: str) -> None:
    lm = tiny.lm(model_type)
    prompt = traced(lm, fact(1))
    settings = effects.Settings(noise=0.3, samples=3, window=2, severed=True)
    got = effects.trace(Tracer.of(lm), prompt, settings, tokens=100, console=QUIET)
    noise = noise_for(prompt, 3, 32, 0) * 0.3
    base = literal(lm, prompt, noise, [])
    assert got.corrupted == pytest.approx(base, rel=1e-4)
    assert abs(got.clean - got.corrupted) > 1e-3 * got.clean
    for kind in KINDS:
        for layer in range(3):
            around = [layer] if kind == "block" else [i for i in (layer - 1, layer) if i >= 0]
            for column, token in enumerate(range(prompt.subject[0], len(prompt.ids))):
                puts = [(name_of(lm, kind, i), i, True) for i in around]
                wanted = literal(lm, prompt, noise, puts, token) - base
                assert float(got.measured[kind][layer, column]) == pytest.approx(wanted, abs=2e-7, rel=1e-3)
    for path in ("mlp", "attention"):
        for layer in range(3):
            puts = [(name_of(lm, "block", layer), layer, True)]
            puts += [(name_of(lm, path, i), i, False) for i in range(layer + 1, 3)]
            wanted = literal(lm, prompt, noise, puts, prompt.subject[-1]) - base
            assert float(got.severed[path][layer]) == pytest.approx(wanted, abs=2e-7, rel=1e-3)
