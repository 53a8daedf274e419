"""Settings from files and flags: one report with all problems, each with its file and line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hparams_files import problem, problems, write

from editunlearn.hparams import load_hparams


def test_all_problems_with_lines_in_one_report(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "method: memit\n"  # 1
        "value:\n"  # 2
        "  clamp_norm: 0.75\n"  # 3
        "  lr: fast\n"  # 4
        "lr: 0.5\n"  # 5
        "overrides:\n"  # 6
        "  llama:\n"  # 7
        "    value: {step: 3}\n"  # 8
        "  gpt2:\n"  # 9
        "    moments:\n"  # 10
        "      weight: -1\n",  # 11
    )
    found = problems(path, set=["refin.steps=2"])
    assert len(found) == 6
    text = "\n".join(found)
    assert f"{path}:3: unknown key 'value.clamp_norm'. Did you mean 'value.clamp'? Keys of value: steps, lr, " in text
    assert f'{path}:4: value.lr is "fast"; it must be a number above 0' in text
    assert f"{path}:5: unknown key 'lr'. Did you mean 'value.lr'? Keys: method, layers," in text
    assert f"{path}:8 (overrides.llama): unknown key 'value.step'. Did you mean 'value.steps'?" in text
    assert f"{path}:11 (overrides.gpt2): moments.weight is -1; it must be a number above 0" in text
    assert "--set refin.steps=2: unknown key 'refin'. Did you mean 'refine'?" in text


def test_a_bad_value_that_is_replaced_is_not_reported(tmp_path: Path) -> None:
    path = write(tmp_path, "method: memit\nvalue: {lr: fast}\n")
    assert load_hparams(path, set=["value.lr=0.1"]).value.lr == 0.1


def test_shipped_files_are_named_in_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tmp_path / "hparams"
    shipped.mkdir()
    write(shipped, "method: memit\nvalue: {lrr: 1}\n", "memit.yaml")
    monkeypatch.setattr("editunlearn.resources.shipped_dir", lambda kind: shipped)
    assert problem("memit").startswith("hparams/memit.yaml:2: unknown key 'value.lrr'")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "the file is empty"),
        ("# only a comment\n", "the file is empty"),
        ("- memit\n", ":1: expected keys and values"),
        ("memit\n", ":1: expected keys and values"),
        ("method: memit\nvalue: {lr: [1\n", "not valid YAML"),
        ("method: memit\n---\nmethod: rome\n", ":2: not valid YAML"),
        ("method: !!python/object:os.system {}\n", ":1: not valid YAML"),
        ("method: memit\npaper: 2020-13-45\n", "not valid YAML"),
        ("method: memit\npaper: \x01\n", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        ("method: memit\nvalue: *gone\n", ":2: not valid YAML"),
        ("method: memit\nvalue: &a {lr: *a}\n", ":2: an alias (*) refers to the mapping or list"),
        ("method: memit\nmethod: rome\n", ":2: key 'method' is already set on line 1"),
        ("method: memit\nvalue:\n  lr: 1\n  lr: 2\n", ":4: key 'value.lr' is already set on line 3"),
        ("method: memit\n3: 4\n", ":2: key '3' is not text"),
        ("method: memit\non: 4\n", ":2: key 'on' is not text; put it in quotes"),
        ("method: memit\n[a, b]: 4\n", ":2: key 'a sequence' is not text"),
        ("value: {lr: 0.1}\n", "no 'method'. Add 'method: NAME'; methods: rome, r_rome, memit"),
        ("method: memitt\n", ":1: unknown method 'memitt'. Did you mean 'memit'? Methods: rome,"),
        ("method: [memit]\n", ":1: unknown method ['memit']. Methods: rome,"),
        ("method: memit\noverrides: 3\n", ":2: overrides is 3; it must map a model type"),
        ("method: memit\noverrides: {llama: 3}\n", ":2: overrides.llama is 3; it must be a mapping"),
        (
            "method: memit\noverrides: {llama: {method: rome}}\n",
            ":2: overrides.llama.method: one file is for one",
        ),
    ],
)
def test_malformed_files(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, text)
    found = problem(path)
    assert found.startswith(f"{path}:") and expected in found


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_bytes(b"method: memit\npaper: \xff\xfe\n")
    assert "not UTF-8 text (byte 21)" in problem(path)


def test_byte_order_mark_and_merge_keys_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        "method: memit\nvalue: &v {lr: 0.5}\noverrides: {llama: {value: {<<: *v, steps: 2}}}\n", "utf-8-sig"
    )
    assert load_hparams(path, model_type="llama").value.steps == 2


def test_shared_anchors_do_not_share_changes(tmp_path: Path) -> None:
    path = write(tmp_path, "method: memit\noverrides: {llama: &o {value: {lr: 0.5}}, mistral: *o}\n")
    load_hparams(path, model_type="llama", set=["value.lr=0.25"])
    assert load_hparams(path, model_type="mistral").value.lr == 0.5


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "method: memit\n")

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert problem(path) == f"{path}: cannot be read: Permission denied."


def test_unknown_sources(tmp_path: Path) -> None:
    found = problem("mmit")
    assert "'mmit' is neither a file nor a shipped hparams name. Did you mean 'memit'? Shipped: " in found
    assert "paper/memit" in found
    assert "is a folder, not a file" in problem(tmp_path)
    assert "neither a file" in problem("x" * 5000)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("value.lr", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("value..lr=3", "expected KEY=VALUE"),
        ("value.lr=", "no value after '='. Write value.lr=null"),
        ("value.lr=[1", "not valid YAML"),
        ("value={lr: 1, lr: 2}", "key 'value.lr' is already set"),
        ("value.lr=1\nfoo: 2", "more than one line"),
        ("overrides.llama.ridge=1", "overrides is for files"),
        ("value.lr.deep=1", 'value.lr is {"deep": 1}; it must be a number'),
        ("value.klon=subject", "Did you mean 'value.kl_on'?"),
        ("clamp=3", "Did you mean 'value.clamp'?"),
        ("zzz=3", "unknown key 'zzz'. Keys: method,"),
    ],
)
def test_bad_set(setting: str, expected: str) -> None:
    found = problem("memit", set=[setting])
    assert found.startswith("--set ") and expected in found


def test_set_problems_are_all_reported() -> None:
    assert len(problems("memit", set=["value.lr=fast", "nonsense", "value.steps=0", "zzz=1"])) == 4


def test_mapping_sources() -> None:
    source = {"method": "memit", "value": {"lr": "5e-1"}, "overrides": {"llama": {"value": {"lr": 0.25}}}}
    assert load_hparams(source, model_type="llama").value.lr == 0.25
    assert source["value"] == {"lr": "5e-1"} and "overrides" in source
    assert problem({"method": "memit", "lrr": 1}).startswith("hparams: unknown key 'lrr'")
    assert problem({"method": "memit", 3: 1}) == "hparams: key 3 is not text."
    assert "hparams: value.3" in problem({"method": "memit", "value": {3: 1}})


def test_unknown_format() -> None:
    assert "Formats: editunlearn, easyedit" in problem("memit", format="rome")
