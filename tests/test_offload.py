"""Models of which a part is offloaded to the CPU or the disk by accelerate: the same edits and measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import delta_samples as samples
import edits
import pytest
import runs
import saved
import tiny
import torch

from editunlearn import editors, methods
from editunlearn.console import Console
from editunlearn.deltas.files import check_base
from editunlearn.deltas.merge import merge
from editunlearn.editors import moments
from editunlearn.errors import UnsupportedError
from editunlearn.hparams import load_hparams
from editunlearn.lm.fingerprint import fingerprint, model_fingerprint
from editunlearn.lm.likelihood import perplexity
from editunlearn.lm.loading import LM, load
from editunlearn.workspace import Workspace

accelerate = pytest.importorskip("accelerate")


def offloaded(how: str, folder: Path) -> LM:
    """A tiny model: all of it, or block 1 and the head, are not in memory between passes."""
    lm = tiny.lm()
    if how == "cpu":
        accelerate.cpu_offload(lm.model, execution_device=torch.device("cpu"))
    elif how == "disk":
        accelerate.disk_offload(lm.model, str(folder / "weights"), execution_device=torch.device("cpu"))
    else:
        saved.model(lm, folder / "model")
        parts = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
        parts |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}
        return load(folder / "model", device_map=parts, cache_dir=folder / "cache")
    return lm


WAYS = ("cpu", "disk", "a block")


@pytest.mark.parametrize("how", WAYS)
def test_statistics_and_fingerprints(how: str, text: str, tmp_path: Path) -> None:
    plain, apart = tiny.lm(), offloaded(how, tmp_path)
    sites = plain.layout.sites([0, 1])
    assert any(p.is_meta for p in apart.model.parameters()) and apart.device == torch.device("cpu")
    if how != "a block":  # a loaded configuration says more
        assert model_fingerprint(apart) == model_fingerprint(plain)
    names = [site.name for site in sites]
    assert fingerprint(apart, names) == fingerprint(plain, names)
    hp = edits.settings("memit", text).moments
    mine, theirs = (moments.get(lm, sites, hp, None, Console(quiet=True)) for lm in (plain, apart))
    for name, one in mine.items():
        torch.testing.assert_close(theirs[name].moment, one.moment)
    piece = [list(range(3, 40))]
    assert perplexity(apart, piece) == pytest.approx(perplexity(plain, piece), rel=1e-4)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("method", ["memit", "alphaedit"])
def test_the_edit_is_the_same(method: str, how: str, text: str, tmp_path: Path) -> None:
    plain, apart = tiny.lm(), offloaded(how, tmp_path)
    hp = edits.settings(method, text)
    wanted, _ = editors.run(plain, edits.request(), hp)
    found, _ = editors.run(apart, edits.request(), hp)
    for name, factors in wanted.factors.items():
        one, other = (f.left @ f.right for f in (factors, found.factors[name]))
        assert edits.relative(other, one) < 1e-3
    assert {n: s.base_sha256 for n, s in found.manifest.sites.items()} == {
        n: s.base_sha256 for n, s in wanted.manifest.sites.items()
    }
    check_base(wanted, apart)
    before = samples.logits(apart.model)
    with wanted.applied(plain), wanted.applied(apart):
        torch.testing.assert_close(samples.logits(apart.model), samples.logits(plain.model), atol=1e-4, rtol=1e-4)
    assert torch.equal(samples.logits(apart.model), before)
    assert any(p.is_meta for p in apart.model.parameters())


def test_what_would_write_into_it_is_refused_with_the_way_out(tmp_path: Path) -> None:
    apart = offloaded("disk", tmp_path)
    with pytest.raises(UnsupportedError, match=r"is offloaded.*editunlearn export.*train\.what=lora"):
        merge(apart, samples.delta(tiny.lm()))


@pytest.mark.parametrize(
    ("method", "more"),
    [("npo", ["train.what=lora", "train.epochs=2"]), ("grace", []), ("wise", [])],
)
def test_other_methods(method: str, more: list[str], tmp_path: Path) -> None:
    plain, apart = tiny.lm(), offloaded("disk", tmp_path)
    hp = load_hparams({"method": method, **edits.MEMORY.get(method, {})}, set=more)
    wanted, found = (fitted(lm, hp) for lm in (plain, apart))
    with wanted.applied(plain), found.applied(apart):
        one, other = (samples.logits(lm.model) for lm in (plain, apart))
    torch.testing.assert_close(other, one, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(samples.logits(plain.model), one, atol=1e-3) or method != "npo"


def fitted(lm: LM, hp: Any) -> Any:
    work = Workspace(None, {})
    options: dict[str, Any] = {"past": None, "earlier": None, "work": work, "cache": None, "store_facts": False}
    return methods.run(lm, edits.request(), hp, console=Console(quiet=True), target_strategy="refusal", **options)[0]


def test_statistics_one_layer_at_a_time(tmp_path: Path) -> None:
    """`--offload`: the same moments in less memory and more passes, and the estimate says so."""
    world = runs.build(tmp_path / "world")
    asked = ["--model", str(world.model), "--hparams", "memit", "--layers", "0", "1", "--json"]

    def told(*more: str) -> dict[str, Any]:
        done = runs.call("stats", *asked, *more)
        assert done.code == 0, done.err
        return json.loads(done.out)  # type: ignore[no-any-return]

    folders = [["--cache-dir", str(tmp_path / how)] for how in ("once", "apart")]
    assert told(*folders[0]) == told(*folders[1], "--offload")
    once, apart = told("--dry-run"), told("--dry-run", "--offload")
    key = "while reading text"
    assert apart["memory_bytes"][key] == once["memory_bytes"][key] / 2
    assert apart["flop"]["second moments"] == 1.5 * once["flop"]["second moments"]


def test_commands_with_a_device_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--device-map auto` on a machine that has room for a part of the model only."""
    world = runs.build(tmp_path / "world")
    from transformers.integrations import accelerate as theirs

    small = sum(path.stat().st_size for path in world.model.glob("*.safetensors")) // 2
    monkeypatch.setattr(theirs, "get_max_memory", lambda *_: {"cpu": small})
    done = runs.call("apply", *world.flags(tmp_path / "apart", "--device-map", "auto", "--save", "lora,merged"))
    assert done.code == 0, done.err
    alone = runs.call("apply", *world.flags(tmp_path / "alone"))
    assert alone.code == 0, alone.err
    one, other = (json.loads((tmp_path / run / "results.json").read_text()) for run in ("alone", "apart"))
    assert one.keys() == other.keys()
    assert (tmp_path / "apart" / "merged" / "model.safetensors").is_file()
