"""The strict loader: what is shipped, precedence, coercion by declared type, schemas."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from edits import CLOSED_FORM
from hparams_files import problem, write
from pydantic import BaseModel, ValidationError

from editunlearn import editors, methods, unlearners
from editunlearn.errors import InputError
from editunlearn.hparams import MethodHParams, Piece, UnlearnerHParams, Value, describe, load_hparams, resolved
from editunlearn.resources import shipped_names

MODEL_TYPES = (None, "gpt2", "gptj", "gpt_neox", "llama", "qwen2", "mistral", "gemma3_text")


# --- what is shipped ---

RECIPES = {
    "anyedit": "memit",
    "paper/anyedit": "memit",
    "seven/gradient_ascent": "ga",
    "seven/ascent_descent_general": "graddiff",
    "seven/ascent_descent_in_distribution": "graddiff",
    "seven/ascent_kl_general": "kl",
    "seven/ascent_kl_in_distribution": "kl",
}
"""Settings of a method under a name of their own."""


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("name", shipped_names("hparams"))
def test_every_shipped_file_loads_for_every_model_type(name: str, model_type: str | None) -> None:
    hp = load_hparams(name, model_type=model_type)
    assert hp.method == RECIPES.get(name.removesuffix(".yaml"), Path(name).stem)
    assert load_hparams(resolved(hp)) == hp


@pytest.mark.parametrize("method", CLOSED_FORM)
def test_every_method_has_a_tuned_and_a_published_file(method: str) -> None:
    tuned, paper = load_hparams(method), load_hparams(f"paper/{method}")
    assert tuned.value.scale == "relative" and tuned.refine is not None
    where = "joint" if method in ("rome", "r_rome") else "residual"  # ROME's value is of the MLP's output
    assert (paper.value.scale, paper.value.penalty, paper.value.spread) == ("absolute", "norm", where)
    assert paper.value.kl_on == "subject" and paper.refine is None and paper.retain.weight == 0


def test_published_memit_follows_the_model_type() -> None:
    assert load_hparams("paper/memit").layers == [3, 4, 5, 6, 7, 8]
    llama = load_hparams("paper/memit", model_type="llama")
    assert (llama.layers, llama.value.lr, llama.value.clamp) == ([4, 5, 6, 7, 8], 0.1, 0.75)
    xl = load_hparams("paper/memit", model_type="gpt2")
    assert (xl.moments.weight, xl.value.steps) == (20000, 19)


@pytest.mark.parametrize("name", ["memit", "memit.yaml", Path("memit")])
def test_shipped_names_with_and_without_suffix(name: str | Path) -> None:
    assert load_hparams(name).method == "memit"


def test_an_existing_file_goes_before_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "method: memit\nvalue: {steps: 3}\n", "memit")
    monkeypatch.chdir(tmp_path)
    assert load_hparams("memit").value.steps == 3


def test_a_folder_does_not_hide_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memit").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_hparams("memit").method == "memit"


# --- precedence and coercion ---


def test_precedence(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "method: memit\nvalue: {lr: 0.1, clamp: 1.0, steps: 7}\n"
        "overrides:\n  llama: {value: {clamp: 2.0, steps: 8}}\n  gpt2: {value: {clamp: 9.0}}\n",
    )
    value = load_hparams(path, model_type="llama", set=["value.steps=9", "value.kl=0.5", "value.kl=0.25"]).value
    assert (value.lr, value.clamp, value.steps, value.kl) == (0.1, 2.0, 9, 0.25)
    assert value.stop_loss == Value().stop_loss
    assert load_hparams(path).value.clamp == 1.0
    assert load_hparams(path, model_type="mistral").value.clamp == 1.0


def test_overrides_are_applied_not_kept(tmp_path: Path) -> None:
    path = write(tmp_path, "method: memit\noverrides: {llama: {ridge: 0.5}}\n")
    assert "overrides" not in resolved(load_hparams(path, model_type="llama"))


def test_a_section_can_be_switched_off_and_on() -> None:
    off = load_hparams("memit", set=["refine=null"])
    assert off.refine is None
    on = load_hparams("paper/memit", set=["refine.steps=5"])
    assert on.refine is not None and on.refine.most(1000) == 5
    assert load_hparams("memit", set=["value={steps: 2, lr: 1e-2}"]).value.lr == 0.01


@pytest.mark.parametrize(
    ("text", "number"), [("5e-1", 0.5), ("1e-3", 0.001), ("1.5e4", 15000.0), ("+.5", 0.5), ("3", 3)]
)
def test_floats_that_pyyaml_reads_as_text(tmp_path: Path, text: str, number: float) -> None:
    path = write(tmp_path, f"method: memit\nvalue: {{lr: {text}, clamp: {text}}}\n")
    hp = load_hparams(path, set=[f"moments.weight={text}"])
    assert hp.value.lr == hp.value.clamp == hp.moments.weight == number
    assert type(hp.value.lr) is float


def test_only_float_fields_are_coerced() -> None:
    assert load_hparams("memit", set=["moments.text=1e-3"]).moments.text == "1e-3"
    assert "must be a whole number" in problem("memit", set=["value.steps=2e1"])
    assert "must be a whole number" in problem("memit", set=["value.steps=2.0"])
    assert "must be a number above 0" in problem("memit", set=["value.lr=true"])
    assert "must be text" in problem("memit", set=["moments.text=3"])
    assert "must be true or false" in problem("alphaedit", set=["nullspace.relative=maybe"])
    assert "must be true or false" in problem("alphaedit", set=["nullspace.relative=1"])


def test_layers_are_block_numbers_or_depths() -> None:
    assert load_hparams("memit", set=["layers=[4, 5]"]).layers == [4, 5]
    depths = load_hparams("memit", set=["layers=[0.25, 5e-1, 1.0]"]).layers
    assert depths == [0.25, 0.5, 1.0] and all(type(depth) is float for depth in depths)
    for wrong in ("[0, 0.5, 1]", "[]", "5", "[-1]", "[true]", "[1.5]", "all", "[.nan]"):
        assert "not both in one list" in problem("memit", set=[f"layers={wrong}"]), wrong
    assert "ascending" in problem("memit", set=["layers=[5, 4]"])
    assert "ascending" in problem("memit", set=["layers=[4, 4]"])


def test_batch_tokens_and_seed() -> None:
    hp = load_hparams("memit", set=["batch_tokens=4", "seed=7", "refine.batch_tokens=5"])
    assert (hp.batch_tokens, hp.seed) == (4, 7) and hp.refine is not None and hp.refine.batch_tokens == 5
    for wrong in ("0", "true", "big", "1.5", "null"):
        for key in ("batch_tokens", "refine.batch_tokens"):
            assert "must be auto, or a whole number of at least 1" in problem("memit", set=[f"{key}={wrong}"])
    plain = load_hparams("memit")
    assert (plain.batch_tokens, plain.tokens_at_once, hp.tokens_at_once) == ("auto", 2048, 4)
    assert "must be a whole number, at least 0" in problem("memit", set=["seed=-1"])
    assert "unknown key 'batch_size'. Did you mean 'batch_tokens'?" in problem("memit", set=["batch_size=4"])


@pytest.mark.parametrize(
    ("method", "key"),
    [("rome", "ridge"), ("r_rome", "ridge"), ("alphaedit", "ridge"), ("memit", "nullspace"), ("emmet", "nullspace")],
)
def test_a_method_has_only_the_settings_that_it_uses(method: str, key: str) -> None:
    assert f"unknown key '{key}'" in problem(method, set=[f"{key}=1"])
    assert not hasattr(load_hparams(method), key)


def test_tokens_of_the_second_moment() -> None:
    auto = load_hparams("memit").moments
    assert (auto.budget(640), auto.budget(14336)) == (40_000, 143_360)
    assert load_hparams("memit", set=["moments.tokens=7"]).moments.budget(640) == 7
    assert "moments.tokens is 'all'; it must be auto, or" in problem("memit", set=["moments.tokens=all"])


def test_what_refine_has() -> None:
    auto = load_hparams("memit").refine
    assert auto is not None and [auto.most(n) for n in (1, 20, 22, 1000)] == [80, 80, 80, 9840]
    assert (auto.planned(20, 20), auto.most(20, 20), auto.planned(20, 1)) == (120, 240, 40)
    fixed = load_hparams("memit", set=["refine.steps=7"]).refine
    assert fixed is not None and (fixed.planned(20, 20), fixed.most(20, 20)) == (7, 7)
    assert "it must be auto, or" in problem("memit", set=["refine.steps=many"])
    assert [auto.prompts(n) for n in (1, 20, 30, 40, 1000)] == [32, 32, 48, 64, 64]
    assert "refine.retain_batch is 0; it must be auto, or" in problem("memit", set=["refine.retain_batch=0"])
    assert [auto.keeping(n) for n in (1, 26, 30, 40, 1000)] == [80.0, 80.0, 90.0, 120.0, 120.0]
    for wrong in ("-1", "all", "true", ".nan", ".inf"):
        assert "it must be auto, or a number from 0" in problem("memit", set=[f"refine.kl={wrong}"]), wrong
    own = load_hparams("memit", set=["refine.kl=7"]).refine
    assert own is not None and own.keeping(1000) == 7.0
    refine = load_hparams("memit", set=["refine={steps: 3, text_kl: 0, floor: 0, contexts: 1}"]).refine
    assert refine is not None and (refine.steps, refine.text_kl, refine.floor, refine.contexts) == (3, 0, 0, 1)
    for wrong in ("steps=0", "lr=0", "text_kl=-1", "kept_keys=-1", "floor=-1", "forget_batch=0", "text_length=1"):
        assert "it must be a" in problem("memit", set=[f"refine.{wrong}"]), wrong


@pytest.mark.parametrize(
    ("setting", "allowed"),
    [
        ("value.lr=0", "a number above 0"),
        ("value.lr=.nan", "a number above 0"),
        ("value.lr=.inf", "a number above 0"),
        ("value.lr=0,5", "a number above 0"),
        ("value.clamp=-1", "a number above 0, or null"),
        ("value.kl_on=retain", "one of prompts, subject"),
        ("value.lr=null", "a number above 0"),
        ("moments.weight=0", "a number above 0"),
        ("moments.text=''", "text"),
        ("value=3", "a mapping with keys steps, lr"),
        ("value=null", "a mapping with keys steps, lr"),
        ("paper=2", "text, or null"),
        ("subject_token=middle", "one of last_word, last, first, prompt_last"),
    ],
)
def test_bad_values_say_what_is_allowed(setting: str, allowed: str) -> None:
    found = problem("memit", set=[setting])
    assert f"it must be {allowed}" in found and found.startswith(f"--set {setting}: {setting.split('=')[0]} is ")


def test_a_long_value_is_cut() -> None:
    assert len(problem("memit", set=[f"value.lr={'x' * 500}"]).split("is ")[1]) < 200


def test_method_rules() -> None:
    assert "null space" in problem("alphaedit", set=["moments.text=none"])
    assert "must be a number above 0" in problem("alphaedit", set=["nullspace.threshold=0"])
    assert load_hparams("alphaedit", set=["nullspace.threshold=2", "nullspace.relative=false"])
    assert load_hparams("memit", set=["moments.text=none"]).moments.text == "none"
    assert "chunks and merge do not go together" in problem("anyedit", set=["merge.by=all"])
    assert "chunks.size" in problem("memit", set=["chunks.size=0"])


# --- schemas ---


def pieces(model: type[BaseModel] = Piece) -> list[type[BaseModel]]:
    return [model, *(deep for sub in model.__subclasses__() for deep in pieces(sub))]


def test_every_field_has_a_one_sentence_description() -> None:
    for method in methods.names():
        methods.schema(method)
    for model in pieces():
        for name, field in model.model_fields.items():
            assert field.description and field.description.endswith("."), f"{model.__name__}.{name}"


def test_schemas_are_frozen_and_strict() -> None:
    hp = load_hparams("memit")
    with pytest.raises(ValidationError):
        hp.method = "rome"
    with pytest.raises(ValidationError):
        Value(lrr=1)  # type: ignore[call-arg]


def test_describe_names_every_setting_once() -> None:
    rows = describe(load_hparams("memit", set=["value.lr=0.125"]))
    keys = [row.key for row in rows]
    assert len(keys) == len(set(keys)) and {"value.clamp", "refine.steps", "layers"} <= set(keys)
    by_key = {row.key: row for row in rows}
    assert by_key["value.lr"].value == 0.125 and not by_key["value.lr"].is_default
    assert by_key["value.clamp"].is_default
    assert by_key["value.clamp"].description.endswith("Allowed: a number above 0, or null.")
    closed = {row.key: row for row in describe(load_hparams("memit", set=["refine=null"]))}
    assert closed["refine"].value is None and not closed["refine"].is_default


def test_registry() -> None:
    assert editors.names() == ["rome", "r_rome", "memit", "emmet", "alphaedit", "grace", "wise", "unke"]
    for method in editors.names():
        schema = editors.schema(method)
        assert issubclass(schema, MethodHParams) and schema().method == method  # type: ignore[call-arg]
        assert editors.module(method).HParams is schema
    with pytest.raises(InputError, match="unknown method 'r-rome'. Did you mean 'r_rome'"):
        editors.module("r-rome")
    with pytest.raises(InputError, match="Methods: rome, r_rome, memit, emmet, alphaedit, grace, wise, unke"):
        editors.schema("zzz")


def test_registry_of_all_methods() -> None:
    assert methods.names() == [*editors.names(), *unlearners.names()] and len(set(methods.names())) >= 25
    for method in unlearners.names():
        schema = methods.schema(method)
        assert issubclass(schema, UnlearnerHParams) and schema().method == method  # type: ignore[call-arg]
        assert load_hparams(method).paper, f"hparams/{method}.yaml"
    with pytest.raises(InputError, match="unknown method 'nop'. Did you mean 'npo'.*memit.*simnpo"):
        methods.schema("nop")


def test_what_is_trained_is_checked() -> None:
    with pytest.raises(InputError, match="layers is 'located', which chooses the few blocks of an editor"):
        load_hparams("npo", set=["layers=located"])
    assert load_hparams("memit", set=["layers=located"]).layers == "located"
    with pytest.raises(InputError, match="train.modules is .*needs the ends of some names"):
        load_hparams("npo", set=["train.what=modules"])
    with pytest.raises(InputError, match="`what: full` all are trained"):
        load_hparams("npo", set=["train.modules=[mlp.down_proj]"])
    assert load_hparams({"method": "kl", "retain": {"weight": 3.0}}).retain.loss == "kl"  # type: ignore[attr-defined]


def test_defaults_of_the_methods() -> None:
    defaults = {method: resolved(editors.schema(method)()) for method in editors.names()}  # type: ignore[call-arg]
    assert {method: hp["ridge"] for method, hp in defaults.items() if "ridge" in hp} == {"memit": 1, "emmet": 0.1}
    assert {method for method, hp in defaults.items() if "nullspace" in hp} == {"alphaedit"}
    solved = [defaults[method] for method in CLOSED_FORM]
    assert all(hp["value"]["kl_on"] == "prompts" and hp["refine"] is not None for hp in solved)


def test_loading_settings_imports_nothing_heavy() -> None:
    code = (
        "import sys; from editunlearn.hparams import load_hparams; from editunlearn import console; "
        "load_hparams('memit'), load_hparams('npo'), load_hparams('rmu'); "
        "print({'torch', 'transformers', 'datasets', 'numpy', 'rich', 'tqdm'} & set(sys.modules))"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "set()"
