"""Hparams files of EasyEdit, ROME, MEMIT, EMMET and AlphaEdit, read as ours.

Every key of theirs ends up in the translation: with the key of ours that it became, or with the reason why
it has no effect here. What those programs do without a setting (absolute scale, one KL text, no refinement)
is listed as well. A required key that is missing or a choice that has no counterpart is an error, because
our defaults would then silently take the place of the published value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from editunlearn.errors import InputError
from editunlearn.hparams.documents import Document, Keys
from editunlearn.hparams.documents import read as read_document
from editunlearn.naming import did_you_mean

ALGORITHMS: Mapping[str, str] = {
    "ROME": "rome",
    "R-ROME": "r_rome",
    "MEMIT": "memit",
    "EMMET": "emmet",
    "AlphaEdit": "alphaedit",
}
FACT_TOKENS: Mapping[str, str] = {"subject_last": "last", "subject_first": "first", "last": "prompt_last"}
TEXTS: Mapping[str, str] = {
    "wikipedia": "wikimedia/wikipedia:20231101.en:train",
    "wikitext": "Salesforce/wikitext:wikitext-103-raw-v1:train",
}
DIRECT: Mapping[str, str] = {
    "layers": "layers",
    "v_lr": "value.lr",
    "v_weight_decay": "value.weight_decay",
    "clamp_norm_factor": "value.clamp",
    "kl_factor": "value.kl",
}
_MODULE = "the modules are found from the model"
_MACHINE = "a path, device or model belongs on the command line"
IGNORED: Mapping[str, str] = {
    "model_name": _MACHINE + " (--model)",
    "device": _MACHINE + " (--device-map)",
    "model_parallel": _MACHINE + " (--device-map)",
    "fp16": _MACHINE + " (--dtype)",
    "bf16": _MACHINE + " (--dtype)",
    "stats_dir": _MACHINE + " (--cache-dir)",
    "P_loc": "the projector is computed and cached under a hash of its inputs (--cache-dir)",
    "results_dir": _MACHINE + " (--out)",
    "rewrite_module_tmp": "always the MLP's output projection; " + _MODULE,
    "layer_module_tmp": _MODULE,
    "mlp_module_tmp": _MODULE,
    "attn_module_tmp": _MODULE,
    "ln_f_module": _MODULE,
    "lm_head_module": _MODULE,
    "layer_selection": "the listed layers are used, all of them",
    "v_loss_layer": "the loss is read from the model's own logits, after its last layer",
    "mom2_n_samples": "counts documents; moments.tokens counts tokens (an article has about 600)",
    "mom2_dtype": "the second moment is summed in float32 or better",
    "batch_size": "their edits per solve; all facts of a run share one solve here",
    "max_length": "sequences are never cut; see moments.length for the statistics",
    "calculate_objective_value": "a report only, it changes no edit",
}
_COMMON = ("layers", "v_num_grad_steps", "v_lr", "v_weight_decay", "clamp_norm_factor", "kl_factor")
REQUIRED: Mapping[str, tuple[str, ...]] = {
    "rome": (*_COMMON, "mom2_adjustment"),
    "r_rome": (*_COMMON, "mom2_adjustment"),
    "memit": (*_COMMON, "mom2_update_weight"),
    "emmet": (*_COMMON, "mom2_update_weight"),
    "alphaedit": (*_COMMON, "nullspace_threshold", "L2"),
}
ALWAYS: Mapping[str, Any] = {
    "value.scale": "absolute",
    "value.penalty": "norm",
    "value.kl_on": "subject",
    "value.stop_loss": 0.05,
    "value.spread": "residual",
    "retain.weight": 0,
    "refine": None,
    "limits.norm": None,
    "limits.condition": None,
    "limits.perplexity": None,
}


class Row(NamedTuple):
    """One line of the translation table."""

    theirs: str
    value: Any
    ours: str  # our dotted key, perhaps with a note after ';', or 'ignored: reason'


@dataclass(frozen=True)
class Translation:
    """Our settings, where each came from, and the table to print."""

    document: Document
    rows: list[Row]

    @property
    def mapping(self) -> dict[str, Any]:
        """Our settings as a nested mapping, ready for ``load_hparams``."""
        return self.document.data


def read(source: str | Path | Mapping[str, Any]) -> Translation:
    """Read and translate one file (YAML or JSON) or mapping of theirs.

    Raises:
        InputError: not readable, unsupported algorithm, required keys missing, no counterpart.
    """
    return translate(read_document(source))


def translate(document: Document) -> Translation:
    """Translate a parsed document of theirs; see :func:`read`."""
    work = _Work(document)
    method = _method(document)
    missing = [key for key in REQUIRED[method] if key not in document.data]
    if missing:
        work.problems.append(
            f"{document.name}: no {', '.join(map(repr, missing))}; a file for {_theirs(method)} must have "
            f"{', '.join(REQUIRED[method])}."
        )
    work.put("method", method, "alg_name")
    if "alg_name" not in document.data:
        work.rows.append(Row("(no alg_name)", "told by its keys", f"method; {method}"))
    for key, value in document.data.items():
        _translate_key(work, method, key, value)
    for ours, value in ALWAYS.items():
        work.put(ours, value)
        work.rows.append(Row("(always theirs)", value, ours))
    _by_method(work, method)
    if work.problems:
        raise InputError(work.problems)
    return Translation(Document(document.name, work.data, work.places), work.rows)


@dataclass
class _Work:
    """The translation as it grows."""

    document: Document
    data: dict[str, Any] = field(default_factory=dict)
    places: dict[Keys, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def put(self, ours: str, value: Any, theirs: str | None = None) -> None:
        """Set one of our dotted keys; errors about it will name their key and its line."""
        path = tuple(ours.split("."))
        tree = self.data
        for part in path[:-1]:
            tree = tree.setdefault(part, {})
        tree[path[-1]] = value
        place = self.document.place((theirs,)) if theirs else self.document.name
        self.places[path] = f"{place} ({theirs})" if theirs else place

    def mapped(self, theirs: str, ours: str, value: Any, note: str = "") -> None:
        """A key of theirs became one of ours."""
        self.put(ours, value, theirs)
        self.rows.append(Row(theirs, self.document.data[theirs], ours + (f"; {note}" if note else "")))

    def ignored(self, theirs: str, reason: str) -> None:
        """A key of theirs has no effect here."""
        self.rows.append(Row(theirs, self.document.data[theirs], f"ignored: {reason}"))

    def problem(self, theirs: str, message: str) -> None:
        """A key of theirs cannot be translated."""
        self.problems.append(f"{self.document.place((theirs,))}: {theirs} {message}")


def _theirs(method: str) -> str:
    return next(name for name, ours in ALGORITHMS.items() if ours == method)


def _method(document: Document) -> str:
    """Our method: from ``alg_name``, or for the original JSON files, which have none, from the keys."""
    data = document.data
    if "alg_name" in data:
        folded = {name.lower().replace("-", "").replace("_", ""): ours for name, ours in ALGORITHMS.items()}
        name = str(data["alg_name"])
        found = folded.get(name.lower().replace("-", "").replace("_", ""))
        if found is None:
            raise InputError(
                f"{document.place(('alg_name',))}: alg_name {name!r} is not supported."
                f"{did_you_mean(name, ALGORITHMS)} Supported: {', '.join(ALGORITHMS)}."
            )
        return found
    if "method" in data:
        raise InputError(
            f"{document.place(('method',))}: 'method' is a key of editunlearn's own files. "
            "Leave out --hparams-format easyedit."
        )
    marks = {
        "alphaedit": {"nullspace_threshold"},
        "emmet": {"emmet_lambda", "update_norm_lambda"},
        "memit": {"mom2_update_weight"},
        "rome": {"context_template_length_params"},
    }
    for method, keys in marks.items():
        if keys & data.keys():
            return method
    raise InputError(
        f"{document.name}: no 'alg_name', and no key tells the algorithm. Add alg_name: one of {', '.join(ALGORITHMS)}."
    )


def _translate_key(work: _Work, method: str, key: str, value: Any) -> None:
    single = method in ("rome", "r_rome")
    if key == "alg_name":
        work.rows.append(Row(key, value, f"method; {method}"))
    elif key in DIRECT:
        work.mapped(key, DIRECT[key], value)
    elif key == "v_num_grad_steps":
        _steps(work, value)
    elif key == "fact_token":
        if not isinstance(value, str) or value not in FACT_TOKENS:
            work.problem(key, f"{value!r} has no counterpart here. Use one of {', '.join(FACT_TOKENS)}.")
        else:
            work.mapped(key, "subject_token", FACT_TOKENS[value])
    elif key == "context_template_length_params" and single:
        _contexts(work, value)
    elif key == "mom2_adjustment":
        _adjustment(work, single, value)
    elif key == "mom2_dataset":
        _dataset(work, single, value)
    elif key == "mom2_update_weight" and method in ("memit", "emmet"):
        work.mapped(key, "moments.weight", value)
    elif key == "mom2_update_weight":
        work.ignored(key, f"{_theirs(method)} itself does not use it")
    elif key in ("nullspace_threshold", "L2") and method == "alphaedit":
        work.mapped(key, {"L2": "nullspace.l2"}.get(key, "nullspace.threshold"), value)
    elif key in ("emmet_lambda", "lambda") and method == "emmet":
        work.mapped(key, "ridge", value)
    elif key == "update_norm_lambda":
        work.ignored(key, "no multiple of the identity is added to the second moment" if value else "0 adds nothing")
    else:
        known = {"context_template_length_params", "nullspace_threshold", "L2", "emmet_lambda", "lambda"}
        unknown = f"not a setting of {_theirs(method)}" if key in known else "not a key this reader knows"
        work.ignored(key, IGNORED.get(key, unknown))


def _steps(work: _Work, value: Any) -> None:
    if type(value) is not int or value < 2:
        work.problem("v_num_grad_steps", f"is {value!r}; it must be a whole number, at least 2.")
        return
    note = f"{value} means at most {value - 1} updates: their last round only evaluates"
    work.mapped("v_num_grad_steps", "value.steps", value - 1, note)


def _contexts(work: _Work, value: Any) -> None:
    """ROME's list of [length, how many]; ours has one length, so the longest stands for all."""
    key = "context_template_length_params"
    pairs = value if isinstance(value, list) else []
    good = [pair for pair in pairs if isinstance(pair, list) and len(pair) == 2 and all(type(n) is int for n in pair)]
    if not pairs or len(good) != len(pairs):
        work.problem(key, f"is {value!r}; it must be a list of [length, how many], for example [[5, 10], [10, 10]].")
        return
    lengths = sorted({length for length, _ in good})
    note = f"their lengths {', '.join(map(str, lengths))} become {lengths[-1]}" if len(lengths) > 1 else ""
    work.put("context_prefixes.tokens", lengths[-1], key)
    work.mapped(key, "context_prefixes.count", sum(count for _, count in good), f"and context_prefixes.tokens; {note}")


def _adjustment(work: _Work, single: bool, value: Any) -> None:
    if not isinstance(value, bool):
        work.problem("mom2_adjustment", f"is {value!r}; it must be true or false.")
    elif not single:
        work.ignored("mom2_adjustment", "this algorithm uses the second moment either way")
    elif value:
        work.rows.append(Row("mom2_adjustment", value, "moments.text; the second moment is measured"))
    else:
        work.mapped("mom2_adjustment", "moments.text", "none", "no second moment: the identity in its place")


def _dataset(work: _Work, single: bool, value: Any) -> None:
    if single and work.document.data.get("mom2_adjustment") is False:
        work.ignored("mom2_dataset", "mom2_adjustment is false, so no text is read")
    elif not isinstance(value, str) or value not in TEXTS:
        work.problem(
            "mom2_dataset",
            f"{value!r} is not known. Known: {', '.join(TEXTS)}. "
            "For another text write wikipedia here and add --set moments.text=PATH.",
        )
    else:
        work.mapped("mom2_dataset", "moments.text", TEXTS[value], TEXTS[value])


def _by_method(work: _Work, method: str) -> None:
    """What each algorithm does without a setting for it."""
    always: dict[str, Any] = {}
    if method in ("rome", "r_rome"):
        always |= {"moments.weight": 1, "value.spread": "joint"}
    else:
        always |= {"context_prefixes.count": 5, "context_prefixes.tokens": 10}
    if method == "alphaedit":
        always["nullspace.relative"] = False
    if method == "emmet" and "ridge" not in work.data:
        always["ridge"] = 0.1
    for ours, value in always.items():
        work.put(ours, value)
        work.rows.append(Row("(always theirs)", value, ours))
