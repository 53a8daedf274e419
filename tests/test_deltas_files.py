"""Saving and loading deltas, killed saves, damaged folders, and the check of the base weights."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import delta_samples as samples
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from editunlearn.deltas.files import MANIFEST, TENSORS, check_base, load, load_manifest, save
from editunlearn.deltas.lowrank import Factors, LowRankDelta
from editunlearn.errors import InputError, NumericalError, StaleError


def _same(a: LowRankDelta, b: LowRankDelta) -> bool:
    return a.factors.keys() == b.factors.keys() and all(
        torch.equal(a.factors[n].left, b.factors[n].left) and torch.equal(a.factors[n].right, b.factors[n].right)
        for n in a.factors
    )


@pytest.mark.parametrize("kind", samples.TYPES)
def test_save_load_apply_is_exact(kind: str, tmp_path: Path) -> None:
    lm = tiny.lm(kind)
    delta = samples.delta(lm)
    written = save(delta, tmp_path / "run")
    loaded = load(tmp_path / "run", lm)
    assert _same(delta, loaded)
    assert loaded.manifest == written
    assert loaded.manifest.with_sites(loaded.manifest.sites) == delta.manifest
    with delta.applied(lm):
        expected = samples.logits(lm.model)
    with loaded.applied(lm):
        assert torch.equal(samples.logits(lm.model), expected)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [MANIFEST, TENSORS]


def test_the_tensor_file_is_as_documented(tmp_path: Path) -> None:
    delta = samples.delta(tiny.lm("gpt2"))
    save(delta, tmp_path)
    with safe_open(tmp_path / TENSORS, framework="pt") as file:
        assert file.metadata() == {"format": "editunlearn.delta", "version": "1"}
        keys = list(file.keys())
        assert keys == sorted(keys)
        assert keys[0] == "transformer.h.0.mlp.c_proj.left"
        assert file.get_tensor(keys[0]).dtype == torch.float32
    raw = json.loads((tmp_path / MANIFEST).read_text())
    assert (raw["format"], raw["version"]) == ("editunlearn.delta", 1)
    assert "secret" not in json.dumps(raw)


def test_the_text_of_facts_only_on_request_and_only_of_facts_still_held(tmp_path: Path) -> None:
    lm = tiny.lm("llama")
    save(samples.delta(lm).without(["bob-1"]), tmp_path, facts=samples.facts())
    text = load(tmp_path).manifest.facts[0].text
    assert text is not None
    assert [fact["id"] for fact in text] == ["ada-1", "cyd-1", "dan-1"]


def test_values_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    delta = samples.delta(tiny.lm("llama"))
    save(delta, tmp_path / "old")
    name = next(iter(delta.factors))
    delta.factors[name].right[0, 0] = torch.inf
    for folder in ("old", "new"):
        with pytest.raises(NumericalError, match=r"right.*Nothing was written"):
            save(delta, tmp_path / folder)
    assert not (tmp_path / "new").exists()
    load(tmp_path / "old")


@pytest.mark.parametrize("killed_at", [0, 1])
@pytest.mark.parametrize("links", [True, False])
def test_a_save_killed_between_writes_leaves_the_old_delta(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int, links: bool
) -> None:
    lm = tiny.lm("llama")
    old, new, third = (samples.delta(lm, seed=seed) for seed in (1, 2, 3))
    save(old, tmp_path)

    class Killed(BaseException):
        pass

    def no_links(*_: object) -> None:
        raise OSError("not supported")

    def kill(delta: LowRankDelta) -> None:
        """Saves, but dies in one of the renames of the two files."""
        real, calls = os.replace, []

        def replace(source: Any, destination: Any) -> None:
            if Path(destination).name in (TENSORS, MANIFEST):
                calls.append(destination)
                if len(calls) > killed_at:
                    raise Killed
            real(source, destination)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            if not links:
                patch.setattr(os, "link", no_links)
            with pytest.raises(Killed):
                save(delta, tmp_path)

    kill(new)
    assert _same(load(tmp_path), old)
    kill(third)  # killed again, on top of what the first left behind
    assert _same(load(tmp_path), old)
    save(new, tmp_path)
    assert _same(load(tmp_path), new)
    assert sorted(p.name for p in tmp_path.iterdir()) == [MANIFEST, TENSORS]


def test_a_first_save_that_was_killed_is_no_delta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, data: bytes) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("editunlearn.deltas.files.atomic_write_bytes", fail)
    with pytest.raises(KeyboardInterrupt):
        save(samples.delta(tiny.lm("llama")), tmp_path)
    with pytest.raises(InputError, match=r"delta\.json does not exist"):
        load(tmp_path)


def _saved(tmp_path: Path) -> Path:
    save(samples.delta(tiny.lm("llama")), tmp_path)
    return tmp_path


def _edit(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**raw, **changes}))


def test_damaged_folders_are_refused_with_the_reason(tmp_path: Path) -> None:
    folder = _saved(tmp_path)
    keep = tmp_path.with_name("keep")
    shutil.copytree(folder, keep)

    def restored() -> None:
        shutil.copytree(keep, folder, dirs_exist_ok=True)

    (folder / TENSORS).unlink()
    with pytest.raises(InputError, match=r"delta\.safetensors does not exist"):
        load(folder)
    restored()
    with (folder / TENSORS).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    with pytest.raises(InputError, match="do not belong together"):
        load(folder)
    restored()
    _edit(folder, format="peft")
    with pytest.raises(InputError, match="format is 'peft'"):
        load(folder)
    restored()
    _edit(folder, version=2)
    with pytest.raises(InputError, match=r"version is 2, this editunlearn reads 1\. It was made by a newer"):
        load(folder)
    restored()
    _edit(folder, method=None, colour="red")
    with pytest.raises(InputError) as caught:
        load_manifest(folder)
    assert len(caught.value.problems) == 2
    (folder / MANIFEST).write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        load(folder)
    with pytest.raises(InputError, match="does not exist"):
        load(tmp_path / "nowhere")


def test_tensors_that_are_not_those_of_the_manifest(tmp_path: Path) -> None:
    from editunlearn.artifacts import sha256_file

    folder = _saved(tmp_path)
    path = folder / TENSORS
    tensors = load_file(path)
    metadata = {"format": "editunlearn.delta", "version": "1"}

    def rewrite(changed: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        save_file(changed, path, metadata=metadata)
        _edit(folder, tensors_sha256=sha256_file(path))

    rewrite(tensors, {"format": "pt"})
    with pytest.raises(InputError, match="metadata"):
        load(folder)
    rewrite({key: value for key, value in tensors.items() if "layers.2" not in key}, metadata)
    with pytest.raises(InputError, match=r"different: model\.layers\.2\.mlp\.down_proj\.left"):
        load(folder)
    rewrite(
        {key: value[:-1] if key.endswith("0.mlp.down_proj.left") else value for key, value in tensors.items()},
        metadata,
    )
    with pytest.raises(InputError, match="manifest describes"):
        load(folder)
    rewrite({key: value.half() for key, value in tensors.items()}, metadata)
    with pytest.raises(InputError, match="float32"):
        load(folder)
    path.write_bytes(b"nothing")
    _edit(folder, tensors_sha256=sha256_file(path))
    with pytest.raises(InputError, match="not a readable"):
        load(folder)


def test_loading_for_a_model_that_it_does_not_fit(tmp_path: Path) -> None:
    folder = _saved(tmp_path)
    with pytest.raises(InputError, match="made for tiny-llama"):
        load(folder, tiny.lm("llama", hidden=48))


@pytest.mark.parametrize("kind", samples.TYPES)
def test_the_base_weights_are_checked(kind: str) -> None:
    lm = tiny.lm(kind, dtype=torch.bfloat16)
    delta = samples.delta(lm)
    check_base(delta, lm)
    wider = tiny.lm(kind, dtype=torch.bfloat16)
    wider.model.float()  # the same numbers, held in float32
    check_base(delta, wider)
    check_base(delta, tiny.lm(kind, dtype=torch.float32))  # loading it in bfloat16 gives the same numbers
    other = tiny.lm(kind, seed=1, dtype=torch.bfloat16)
    with pytest.raises(StaleError) as caught:
        check_base(delta, other)
    assert len(caught.value.problems) == 2
    name, site = next(iter(delta.manifest.sites.items()))
    assert name in caught.value.problems[0]
    assert site.base_sha256 in caught.value.problems[0]
    assert samples.delta(other).manifest.sites[name].base_sha256 in caught.value.problems[0]
    check_base(delta, other, force=True)


def test_a_delta_made_in_float32_is_not_for_a_model_loaded_in_bfloat16() -> None:
    delta = samples.delta(tiny.lm("llama"))
    with pytest.raises(StaleError, match="made in float32, this weight is bfloat16"):
        check_base(delta, tiny.lm("llama", dtype=torch.bfloat16))


def test_a_revert_is_refused_where_there_is_nothing_to_revert() -> None:
    lm = tiny.lm("llama")
    delta = samples.delta(lm)
    with pytest.raises(StaleError, match="nothing to revert"):
        check_base(delta.negated(), lm)
    with delta.applied(lm):
        check_base(delta.negated(), lm)


def test_an_empty_delta_can_be_saved(tmp_path: Path) -> None:
    lm = tiny.lm("llama")
    empty = samples.delta(lm).without(samples.IDS)
    assert (empty.rank, empty.nbytes, empty.factors) == (0, 0, {})
    save(empty, tmp_path)
    plain = samples.logits(lm.model)
    with load(tmp_path, lm).applied(lm):
        assert torch.equal(samples.logits(lm.model), plain)


def test_factors_that_are_views_are_saved_as_they_look(tmp_path: Path) -> None:
    lm = tiny.lm("llama")
    delta = samples.delta(lm)
    viewed = {name: Factors(f.left.t().contiguous().t(), f.right) for name, f in delta.factors.items()}
    save(LowRankDelta(viewed, delta.manifest), tmp_path)
    assert _same(load(tmp_path), delta)
