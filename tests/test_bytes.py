"""Bytes that the stages hold at one time, counted by operation: a guard that does not depend on the machine.

Beside the operations (``test_work.py``): what would hold the logits of all positions, the sums of all layers, or the
activations of two steps fails here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from edits import request, same_delta, settings
from held import Held, peak

from editunlearn import editors, estimate
from editunlearn.console import Console
from editunlearn.editors import contexts, flow, moments, values
from editunlearn.editors.value_batch import tokens_of
from editunlearn.errors import InputError
from editunlearn.facts.readers import load_facts
from editunlearn.facts.targets import fill_targets
from editunlearn.footprint import MATRICES, batches, footprint
from editunlearn.hparams import load_hparams
from editunlearn.lm import free, head
from editunlearn.lm.attention import short_rows
from editunlearn.lm.hooks import frozen
from editunlearn.lm.kept import kept_by_autograd
from editunlearn.lm.room import with_numbers
from editunlearn.resources import shipped_path
from editunlearn.workspace import Workspace

HIDDEN, VOCABULARY, TOKENS = 256, 20_000, 8 * 32
WIDTH = 3 * HIDDEN - 8
MATRIX = 8 * WIDTH**2
"""Bytes of a second moment of one layer in float64."""
QUIET = Console(quiet=True)


def model(*, offload: bool = False, **options: Any) -> Any:
    """Layers whose moments are larger than what a batch of text takes, under a head whose logits are larger still."""
    lm = tiny.lm("llama", **{"layers": 5, "hidden": HIDDEN, "vocab_size": VOCABULARY, **options})
    lm.offload = offload
    return lm


def test_the_counter() -> None:
    def run() -> Any:
        one = torch.zeros(1000)
        view = one.view(10, 100)
        del one
        other = view + 1  # two are there
        del view
        return (other * 2).sum()  # two again, and the sum

    known = torch.nn.Linear(100, 100)
    assert peak(run)[0] == 8004 and peak(lambda: known.weight.sum(), known)[0] == 4
    with Held(known) as held:
        kept = [torch.ones(10), known.weight.detach().T]
        assert held.bytes == 40 and len(kept) == 2
        kept.clear()
        assert (held.bytes, held.peak) == (0, 40)


def statistics(text: str, folder: Path, layers: Sequence[int], *, offload: bool) -> tuple[int, Any]:
    """Most bytes while the second moments of some layers are measured, and what is found."""
    lm, hp = model(offload=offload), settings("memit", text).moments
    with frozen(lm.model):
        return peak(lambda: moments.get(lm, lm.layout.sites(layers), hp, folder, QUIET), lm.model)


def test_statistics(text: str, tmp_path: Path) -> None:
    """All sums in one pass, or with offload those of one layer; the logits, 4 matrices, never."""
    one, _ = statistics(text, tmp_path / "one", (1,), offload=False)
    three, found = statistics(text, tmp_path / "three", (1, 2, 3), offload=False)
    apart, again = statistics(text, tmp_path / "apart", (1, 2, 3), offload=True)
    batch = 8 * TOKENS * 4 * WIDTH  # what an MLP makes of it, what is read, a product of a block
    assert one < 1.5 * MATRIX + batch, one / MATRIX  # the sum, and C in float32
    assert three < one + 2.05 * MATRIX, (three - one) / MATRIX
    assert apart < one + 0.05 * MATRIX, (apart - one) / MATRIX
    assert all(torch.equal(again[name].moment, moment.moment) for name, moment in found.items())


def problems(lm: Any, text: str) -> tuple[list[Any], Any]:
    """Six facts in three contexts."""
    hp = settings("memit", text, "value.steps=3", "value.stop_loss=0", layers=(1, 2))
    asked = request(range(6))
    rows = contexts.forget_rows(lm, asked.facts, ["The house is old. ", "Some of them. "], hp)
    return contexts.problems(lm, asked.facts, rows, [], hp), hp.value


def test_values(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph, that of the tokens that are run, and logits of a few rows, however large the vocabulary."""
    rows, found = 20, dict[int, int]()
    for vocabulary in (2000, 6000):
        monkeypatch.setattr(head, "PIECE", rows * vocabulary)
        lm = model(hidden=64, vocab_size=vocabulary)
        asked, hp = problems(lm, text)
        sites = [site.name for site in lm.layout.sites((1, 2))]
        with frozen(lm.model), short_rows(lm.device), Held(lm.model) as held:
            values.optimise(lm, asked, sites, hp)
        found[vocabulary] = held.peak
        graph = sum(tokens_of(p, skip=True) for p in asked) * kept_by_autograd(lm.model.config, "float32", 1)
        assert held.peak < 2 * graph + 2 * 4 * rows * vocabulary, held.peak / graph
    assert found[6000] - found[2000] < 2 * 4 * rows * (6000 - 2000)
    with frozen(lm.model), short_rows(lm.device), Held(lm.model) as held:
        values.optimise(lm, asked, sites, hp, tokens=64)  # of 304
    assert held.peak < 0.4 * found[6000], held.peak / found[6000]


def stages(text: str, folder: Path, method: str, layers: Sequence[int]) -> int:
    """Most bytes while an edit of some layers is solved; what it needs of their moments is on the disk before."""
    lm = model()
    hp = settings(method, text, "value.steps=1", "refine=null", "retain.lookalikes=4", layers=layers)
    editors.fit(lm, request(), hp, cache=folder)
    found: list[int] = []
    solve = flow.Flow.solve
    with pytest.MonkeyPatch.context() as patch:

        def watched(self: Any, *args: Any) -> Any:
            most, made = peak(lambda: solve(self, *args), lm.model)
            found.append(most)
            return made

        patch.setattr(flow.Flow, "solve", watched)
        editors.fit(lm, request(), hp, cache=folder)
    return found[0]


@pytest.mark.parametrize("method", ["memit", "alphaedit"])
def test_solves(method: str, text: str, tmp_path: Path) -> None:
    """Moments and factors of one layer at a time, read from the disk."""
    one, three = (stages(text, tmp_path / str(len(layers)), method, layers) for layers in ((1,), (1, 2, 3)))
    assert one < MATRICES * MATRIX, one / MATRIX
    assert three < one + 0.1 * MATRIX, (three - one) / MATRIX


def test_an_edit_with_offload(text: str, tmp_path: Path) -> None:
    """A third of the model at most, and the statistics of one layer, whichever stage it is; the same edit."""
    hp = settings("memit", text, "batch_tokens=1", "refine.batch_tokens=1", "value.steps=2", layers=(1, 2, 3))
    wanted = editors.fit(model(vocab_size=2000), request(), hp, cache=tmp_path / "plain")
    lm = model(vocab_size=2000, offload=True)
    most, delta = peak(lambda: editors.fit(lm, request(), hp, cache=tmp_path / "offload"), lm.model)
    size = sum(p.nbytes for p in lm.model.parameters())
    assert most < 0.3 * size + MATRICES * MATRIX, (most / size, most / MATRIX)
    assert same_delta(wanted, delta)


def test_offload_needs_a_place(text: str) -> None:
    with pytest.raises(InputError, match="offload keeps second moments on the disk"):
        moments.get(model(offload=True), [], settings("memit", text).moments, None, QUIET)


@pytest.mark.parametrize("killed_with", [False, True])
def test_offload_goes_on_and_leaves_nothing(killed_with: bool, text: str, tmp_path: Path) -> None:
    """A run that was killed one way goes on the other way: finished layers are not measured again."""
    hp, layers = settings("memit", text).moments, (1, 2)

    def measure(*, offload: bool) -> list[str]:
        lm = model(offload=offload, hidden=32)
        return list(moments.get(lm, lm.layout.sites(layers), hp, tmp_path, QUIET))

    put, seen = Workspace.put, []

    def killed(self: Any, name: str, tensors: Any) -> None:
        seen.append(name)
        if seen.count("moment") == 2:
            raise KeyboardInterrupt
        put(self, name, tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workspace, "put", killed)
        with pytest.raises(KeyboardInterrupt):
            measure(offload=killed_with)
    measured = measure(offload=not killed_with)
    files = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert len(measured) == 2 and files == ["moment.safetensors"] * 2


def llama_8b() -> Any:
    from transformers import LlamaConfig

    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    return LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, vocab_size=128_256, dtype="bfloat16", **heads
    )


def test_an_8b_model_fits_in_a_third_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak at most 1.3 times the model's size and the statistics of one layer, by the estimate of the dry run."""
    monkeypatch.setattr(free, "free_memory", lambda _: 100e9)
    facts = fill_targets(load_facts(shipped_path("data", "general_facts.jsonl"))[:100], "refusal", seed=0)
    for method in ("memit", "alphaedit"):
        hp = load_hparams(method)
        target = estimate.target(llama_8b(), hp)
        numbers = batches(target, hp, "bfloat16", torch.device("cuda"), offload=True)
        most = footprint(target, with_numbers(hp, numbers), "bfloat16", facts, offload=True)
        one_layer = most.stages["solving"]
        assert one_layer == MATRICES * 8 * 14336**2 and set(numbers.values()) == {256}
        assert most.peak - most.program < 1.3 * most.model + one_layer
        plain = footprint(target, hp, "bfloat16", facts)
        assert most.stages["reading text"] == plain.stages["reading text"] / len(target.layers)
