"""Files of EasyEdit, ROME, MEMIT, EMMET and AlphaEdit: every key of theirs is accounted for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from editunlearn.errors import InputError
from editunlearn.hparams import easyedit, load_hparams, resolved

MODULES = {
    "rewrite_module_tmp": "transformer.h.{}.mlp.fc_out",
    "layer_module_tmp": "transformer.h.{}",
    "mlp_module_tmp": "transformer.h.{}.mlp",
    "attn_module_tmp": "transformer.h.{}.attn",
    "ln_f_module": "transformer.ln_f",
    "lm_head_module": "lm_head",
    "mom2_dataset": "wikipedia",
    "mom2_n_samples": 100000,
    "mom2_dtype": "float32",
}
COMMON = {
    "fact_token": "subject_last",
    "v_num_grad_steps": 25,
    "v_lr": "5e-1",
    "v_loss_layer": 27,
    "v_weight_decay": 0.5,
    "clamp_norm_factor": 0.75,
    "kl_factor": 0.0625,
    "mom2_adjustment": True,
    **MODULES,
}
ROME = {
    **COMMON,
    "layers": [5],
    "v_num_grad_steps": 20,
    "clamp_norm_factor": 4,
    "context_template_length_params": [[5, 10], [10, 10]],
}
MEMIT = {**COMMON, "layers": [3, 4, 5, 6, 7, 8], "layer_selection": "all", "mom2_update_weight": 15000}
EMMET = {**MEMIT, "layers": [5], "mom2_update_weight": 1, "update_norm_lambda": 0, "emmet_lambda": 0.1}
ALPHAEDIT = {**MEMIT, "nullspace_threshold": "2e-2", "L2": 10}
EASYEDIT = {
    "alg_name": "R-ROME",
    "model_name": "./hugging_cache/gpt-j-6B",
    "stats_dir": "./data/stats",
    "device": 0,
    "model_parallel": False,
    "fp16": False,
    "batch_size": 1,
    "max_length": 40,
    **ROME,
    "mom2_adjustment": False,
}


def problems(source: Any) -> list[str]:
    with pytest.raises(InputError) as caught:
        easyedit.read(source)
    return caught.value.problems


def without(source: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in source.items() if key not in keys}


@pytest.mark.parametrize(
    ("method", "theirs"), [("rome", ROME), ("memit", MEMIT), ("emmet", EMMET), ("alphaedit", ALPHAEDIT)]
)
def test_the_original_json_files_equal_our_published_files(tmp_path: Path, method: str, theirs: dict[str, Any]) -> None:
    path = tmp_path / "gpt-j-6B.json"
    path.write_text(json.dumps(theirs, indent="\t"))  # tabs are JSON, though not YAML
    hp = load_hparams(path, format="easyedit", set=["moments.text=general"])
    assert resolved(hp) == resolved(load_hparams(f"paper/{method}"))


@pytest.mark.parametrize("theirs", [ROME, MEMIT, EMMET, ALPHAEDIT, EASYEDIT])
def test_every_key_of_theirs_is_in_the_table(theirs: dict[str, Any]) -> None:
    translation = easyedit.read(theirs)
    shown = [row.theirs for row in translation.rows]
    assert sorted(key for key in shown if not key.startswith("(")) == sorted(theirs)
    assert all(
        row.ours and (not row.ours.startswith("ignored") or len(row.ours) > len("ignored: "))
        for row in translation.rows
    )
    named = {row.ours.split(";")[0] for row in translation.rows}
    flat = {f"{key}.{sub}" for key, part in translation.mapping.items() if isinstance(part, dict) for sub in part}
    flat |= {key for key, part in translation.mapping.items() if not isinstance(part, dict)}
    assert flat - named <= {"context_prefixes.tokens"}  # named in the note of its row


def test_yaml_with_alg_name(tmp_path: Path) -> None:
    path = tmp_path / "r-rome.yaml"
    path.write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in EASYEDIT.items()))
    hp = load_hparams(path, format="easyedit")
    assert hp.method == "r_rome" and "ridge" not in resolved(hp)
    assert hp.moments.text == "none" and hp.value.lr == 0.5 and hp.value.steps == 19
    assert (hp.context_prefixes.count, hp.context_prefixes.tokens) == (20, 10)


def test_no_second_moment_means_no_text() -> None:
    rows = {row.theirs: row.ours for row in easyedit.read(EASYEDIT).rows}
    assert rows["mom2_adjustment"].startswith("moments.text; no second moment")
    assert rows["mom2_dataset"] == "ignored: mom2_adjustment is false, so no text is read"
    with_text = easyedit.read({**EASYEDIT, "mom2_adjustment": True}).mapping
    assert with_text["moments"]["text"] == "wikimedia/wikipedia:20231101.en:train"


def test_steps_are_updates() -> None:
    translation = easyedit.read(MEMIT)
    row = next(row for row in translation.rows if row.theirs == "v_num_grad_steps")
    assert row.value == 25 and row.ours.startswith("value.steps; 25 means at most 24 updates")
    assert translation.mapping["value"]["steps"] == 24


def test_what_they_always_do_is_listed() -> None:
    translation = easyedit.read(ALPHAEDIT)
    always = {row.ours: row.value for row in translation.rows if row.theirs == "(always theirs)"}
    assert always["value.scale"] == "absolute" and always["refine"] is None
    assert always["value.spread"] == "residual" and always["value.penalty"] == "norm"
    assert always["value.kl_on"] == "subject" and always["nullspace.relative"] is False
    assert easyedit.read(ROME).mapping["value"]["spread"] == "joint"  # its value is of the MLP's output
    assert ("(no alg_name)", "method; alphaedit") in [(row.theirs, row.ours) for row in translation.rows]


def test_emmet_lambda_has_their_default() -> None:
    assert easyedit.read(without(EMMET, "emmet_lambda")).mapping["ridge"] == 0.1
    assert easyedit.read({**without(EMMET, "emmet_lambda"), "lambda": 0.5}).mapping["ridge"] == 0.5


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"some_new_key": 1}, "ignored: not a key this reader knows"),
        ({"L2": 1}, "ignored: not a setting of MEMIT"),
        ({"update_norm_lambda": 2}, "ignored: no multiple of the identity"),
        ({"update_norm_lambda": 0}, "ignored: 0 adds nothing"),
        ({"P_loc": "p.pt"}, "ignored: the projector is computed"),
        ({"layer_selection": "random"}, "ignored: the listed layers are used"),
        ({"batch_size": 10}, "ignored: their edits per solve"),
        ({"mom2_adjustment": False}, "ignored: this algorithm uses the second moment either way"),
    ],
)
def test_ignored_keys_have_a_reason(extra: dict[str, Any], reason: str) -> None:
    rows = {row.theirs: row.ours for row in easyedit.read({"alg_name": "MEMIT", **MEMIT, **extra}).rows}
    assert rows[next(iter(extra))].startswith(reason)


def test_a_weight_that_alphaedit_does_not_use() -> None:
    rows = {row.theirs: row.ours for row in easyedit.read(ALPHAEDIT).rows}
    assert rows["mom2_update_weight"] == "ignored: AlphaEdit itself does not use it"


@pytest.mark.parametrize(("theirs", "ours"), [("subject_first", "first"), ("last", "prompt_last")])
def test_fact_tokens(theirs: str, ours: str) -> None:
    assert easyedit.read({**MEMIT, "fact_token": theirs}).mapping["subject_token"] == ours


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"alg_name": "WISE"}, "alg_name 'WISE' is not supported. Supported: ROME, R-ROME, MEMIT"),
        ({"alg_name": "MEMT"}, "Did you mean 'MEMIT'?"),
        (
            {"fact_token": "subject_first_after_last"},
            "fact_token 'subject_first_after_last' has no counterpart",
        ),
        ({"fact_token": ["last"]}, "has no counterpart"),
        ({"v_num_grad_steps": 1}, "v_num_grad_steps is 1; it must be a whole number, at least 2"),
        ({"v_num_grad_steps": "many"}, "v_num_grad_steps is 'many'; it must be a whole number"),
        ({"v_num_grad_steps": True}, "it must be a whole number"),
        (
            {"mom2_dataset": "c4"},
            "mom2_dataset 'c4' is not known. Known: wikipedia, wikitext. For another text",
        ),
        ({"mom2_dataset": ["c4"]}, "is not known"),
        ({"mom2_adjustment": "no"}, "mom2_adjustment is 'no'; it must be true or false"),
        ({"alg_name": "ROME", "context_template_length_params": 5}, "must be a list of [length, how many]"),
        (
            {"alg_name": "ROME", "context_template_length_params": [[5]]},
            "must be a list of [length, how many]",
        ),
        ({"alg_name": "ROME", "context_template_length_params": []}, "must be a list of [length, how many]"),
    ],
)
def test_what_has_no_counterpart_is_an_error(changes: dict[str, Any], expected: str) -> None:
    found = problems({**MEMIT, **changes})
    assert len(found) == 1 and expected in found[0]


def test_missing_keys_and_wrong_values_come_in_one_report() -> None:
    found = problems({**without(ALPHAEDIT, "v_lr", "layers"), "fact_token": "x"})
    assert len(found) == 2
    assert found[0].startswith("hparams: no 'layers', 'v_lr'; a file for AlphaEdit must have layers, v_num_grad_steps")


def test_a_file_that_tells_no_algorithm() -> None:
    plain = without(MEMIT, "mom2_update_weight")
    assert "no 'alg_name', and no key tells the algorithm" in problems(plain)[0]


def test_our_own_file_is_recognised() -> None:
    with pytest.raises(InputError, match="key of editunlearn's own files. Leave out --hparams-format"):
        load_hparams("memit", format="easyedit")


def test_bad_values_name_their_key_and_line(tmp_path: Path) -> None:
    path = tmp_path / "memit.yaml"
    path.write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in {**MEMIT, "v_lr": "fast"}.items()))
    with pytest.raises(InputError) as caught:
        load_hparams(path, format="easyedit")
    line = list(MEMIT).index("v_lr") + 1
    assert str(caught.value).startswith(f'{path}:{line} (v_lr): value.lr is "fast"; it must be a number above 0.')


def test_unknown_key_with_set_still_applies() -> None:
    hp = load_hparams(MEMIT, format="easyedit", set=["value.clamp=2"])
    assert hp.value.clamp == 2.0
