"""Causal tracing against a literal version that tries one state of one prompt at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from edits import TAUGHT, fact

from editunlearn.console import Console
from editunlearn.editors import located
from editunlearn.errors import InputError, UnsupportedError
from editunlearn.lm.hooks import on_output
from editunlearn.numerics.ranks import rank_correlation
from editunlearn.tracing import averages, effects, restore
from editunlearn.tracing.estimate import first_order
from editunlearn.tracing.prompts import ROLES, TracedPrompt, embedding_spread, known, noise_for, traced
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


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "opt", "falcon", "gptj"])
def test_the_estimate_is_the_slope_towards_the_clean_state(model_type: str) -> None:
    """Against finite differences: a state moved a little of the way from corrupted to clean, every hook by hand."""
    lm = tiny.lm(model_type)
    prompt = traced(lm, fact(0))
    tracer = Tracer.of(lm)
    noise = noise_for(prompt, 2, 32, 0) * 0.3
    with torch.no_grad():
        clean, corrupted = (tracer.record(prompt, tracer.enter(prompt, n)) for n in (None, noise))
    got = first_order(tracer, prompt, clean, corrupted, 1)
    step = 0.002  # short: OPT has kinks
    for kind in KINDS:
        for layer in (0, 2):
            for token in (prompt.subject[-1], len(prompt.ids) - 1):
                moved = []
                for share in (-step, step):
                    target = corrupted.outputs[kind, layer].clone()
                    target[:, token] += share * (clean.outputs[kind, layer] - target)[:, token]
                    module = tracer.module((kind, layer))
                    with torch.no_grad(), on_output(module, lambda _, out, t=target: t.reshape(out.shape)):
                        hidden = tracer.last_states(prompt, corrupted.entering[0])
                    moved.append(tracer.chance(prompt, hidden).double().mean())
                slope = float(moved[1] - moved[0]) / (2 * step)
                found = float(got[kind][layer, token - prompt.subject[0]])
                assert found == pytest.approx(slope, abs=5e-6, rel=2e-2)


def test_windows_of_the_estimate_add_up() -> None:
    lm = tiny.lm()
    prompt = traced(lm, fact(0))
    tracer = Tracer.of(lm)
    with torch.no_grad():
        clean, corrupted = (
            tracer.record(prompt, tracer.enter(prompt, n)) for n in (None, 0.3 * noise_for(prompt, 2, 32, 0))
        )
    single, double = (first_order(tracer, prompt, clean, corrupted, width) for width in (1, 2))
    torch.testing.assert_close(double["mlp"][2], single["mlp"][1] + single["mlp"][2])
    torch.testing.assert_close(double["mlp"][0], single["mlp"][0])
    torch.testing.assert_close(double["block"], single["block"])


def test_windows() -> None:
    assert [list(restore.window(i, 4, 6)) for i in (0, 2, 5)] == [[0, 1], [0, 1, 2, 3], [3, 4, 5]]
    assert list(restore.window(3, 1, 6)) == [3] and list(restore.window(3, 3, 6)) == [2, 3, 4]


@pytest.mark.parametrize("tokens", [1, 10**6])
def test_how_many_states_share_a_pass_does_not_matter(tokens: int) -> None:
    lm = tiny.lm("gemma3_text")
    prompt = traced(lm, fact(2))
    settings = effects.Settings(noise=0.5, samples=2, window=2, severed=True)
    wanted, got = (effects.trace(Tracer.of(lm), prompt, settings, tokens=n, console=QUIET) for n in (150, tokens))
    for name, value in wanted.tensors().items():
        torch.testing.assert_close(got.tensors()[name], value, atol=1e-7, rtol=1e-4)


def test_a_model_that_cannot_skip_blocks_gives_the_same() -> None:
    lm = tiny.lm("qwen3")
    prompt = traced(lm, fact(0))
    settings = effects.Settings(noise=0.5, samples=2)
    tracer = Tracer.of(lm)
    assert tracer.skips
    whole = effects.trace(replace(tracer, skips=False), prompt, settings, tokens=300, console=QUIET)
    for name, value in effects.trace(tracer, prompt, settings, tokens=300, console=QUIET).tensors().items():
        torch.testing.assert_close(whole.tensors()[name], value, atol=1e-7, rtol=1e-4)


def test_tracing_leaves_the_model_as_it_was() -> None:
    lm = tiny.lm()
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    prompt = traced(lm, fact(0))
    effects.trace(Tracer.of(lm), prompt, effects.Settings(noise=1.0, samples=1), tokens=100, console=QUIET)
    assert all(torch.equal(before[name], value) for name, value in lm.model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())
    assert all(p.grad is None and p.requires_grad for p in lm.model.parameters())


def test_an_attention_that_is_not_known_is_refused_with_the_way_out() -> None:
    lm = tiny.lm()
    lm.layout = replace(lm.layout, attn_out=None)
    with pytest.raises(UnsupportedError, match="Give --kinds block mlp"):
        Tracer.of(lm)
    assert Tracer.of(lm, ("block", "mlp")).kinds == ("block", "mlp")


def prompt_of_length(length: int, subject: tuple[int, ...]) -> TracedPrompt:
    return TracedPrompt("x", tuple(range(length)), subject, 5)


@pytest.mark.parametrize(
    ("length", "subject", "roles"),
    [
        (8, (1, 2, 3, 4), [0, 1, 1, 2, 3, 4, 5]),
        (5, (1,), [2, 3, 4, 5]),
        (4, (1, 2), [0, 2, 5]),
        (4, (2, 3), [0, 2]),
    ],
)
def test_roles(length: int, subject: tuple[int, ...], roles: list[int]) -> None:
    prompt = prompt_of_length(length, subject)
    assert [prompt.role(token) for token in prompt.tokens] == [ROLES[i] for i in roles]


def test_averages_by_hand() -> None:
    prompts = [prompt_of_length(6, (1, 2, 3, 4)), prompt_of_length(3, (1,))]
    one = torch.tensor([[1.0, 2.0, 4.0, 6.0, 8.0]], dtype=torch.float64)  # first, middle x 2, last, END
    other = torch.tensor([[10.0, 20.0]], dtype=torch.float64)  # last, END
    found = averages.averages(prompts, [one, other])
    assert {role: by_layer[0].value for role, by_layer in found.items()} == {
        "first subject token": 1.0,
        "middle subject tokens": 3.0,
        "last subject token": 8.0,
        "last token": 14.0,
    }
    assert found["middle subject tokens"][0].items == 1 and found["last token"][0].items == 2
    assert (found["last token"][0].low, found["last token"][0].high) == (8.0, 20.0)
    assert averages.cell(found["first subject token"][0]) == [1.0, None, None, 1]
    assert averages.peak(found)["role"] == "last token"


def test_agreement_by_hand() -> None:
    measured = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 1.0, 1.0])]
    estimated = [torch.tensor([10.0, 20.0, 70.0]), torch.tensor([3.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 3.0])]
    found = averages.agreement(measured, estimated)
    assert found is not None and (found.value, found.items) == (0.0, 2)  # 1 and -1; all equal says nothing


@pytest.mark.parametrize(
    ("one", "other", "wanted"),
    [
        ([1, 2, 3, 4], [10, 20, 40, 30], 0.8),  # 1 - 6 * (0 + 0 + 1 + 1) / (4 * 15)
        ([1, 2, 2, 3], [1, 2, 3, 4], 0.9486832980505138),
        ([1.0], [2.0], None),
        ([1.0, 1.0], [2.0, 3.0], None),
    ],
)
def test_rank_correlation(one: list[float], other: list[float], wanted: float | None) -> None:
    assert rank_correlation(one, other) == (None if wanted is None else pytest.approx(wanted))


def test_rank_correlation_refuses() -> None:
    with pytest.raises(ValueError, match="1 and 2"):
        rank_correlation([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="not finite"):
        rank_correlation([1.0, float("nan")], [1.0, 2.0])


def test_strongest_neighbours() -> None:
    assert located.strongest([0.0, 3.0, 1.0, 4.0, 4.0], 2) == [3, 4]
    assert located.strongest([1.0, 1.0, 1.0], 2) == [0, 1]
    assert located.strongest([1.0, 5.0], 4) == [0, 1]


def test_noise_depends_on_the_prompt_and_the_seed_alone() -> None:
    one, other = (TracedPrompt(name, (0, 5, 6), (1,), 9) for name in "ab")
    assert torch.equal(noise_for(one, 2, 8, 0), noise_for(other, 2, 8, 0))
    assert not torch.equal(noise_for(one, 2, 8, 0), noise_for(one, 2, 8, 1))
    assert noise_for(one, 2000, 8, 0).std() == pytest.approx(1.0, abs=0.02)


def test_the_spread_is_that_of_the_embeddings() -> None:
    plain, scaled = tiny.lm("llama"), tiny.lm("gemma3_text")
    assert embedding_spread(plain) == pytest.approx(0.1, rel=0.1)  # as the weights were drawn
    assert embedding_spread(scaled) == pytest.approx(0.1 * 32**0.5, rel=0.1)  # Gemma scales by the root of the width


def test_only_what_the_model_knows_is_traced() -> None:
    lm = tiny.taught_lm([(prompt, answer) for prompt, _, answer in TAUGHT[:3]])
    facts = [fact(i) for i in (4, 0, 5, 1, 2)]
    found, asked = known(lm, facts, 2)
    assert ([f.id for f in found], asked) == (["f0", "f1"], 4)
    with pytest.raises(InputError, match="answers none of the 2 facts"):
        known(lm, [fact(4), fact(5)], 2)
