"""Turn a saved delta into something else: ``python -m editunlearn.export --delta runs/memit --to merged --out DIR``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editunlearn.cli import (
    Checks,
    add_model_flags,
    add_run_flags,
    check_model,
    check_writable,
    load_model,
    parser,
    run_command,
    try_command,
)
from editunlearn.errors import InputError

if TYPE_CHECKING:
    from editunlearn.console import Console
    from editunlearn.deltas.dense import DenseDelta
    from editunlearn.deltas.kinds import Delta
    from editunlearn.deltas.lowrank import LowRankDelta
    from editunlearn.deltas.manifest import BaseManifest, BaseModelRecord
    from editunlearn.deltas.memory import MemoryDelta
    from editunlearn.editors.past import PastKeys
    from editunlearn.hub import Push

EXAMPLES = """\
  editunlearn export --delta runs/memit --to merged --out merged/            an ordinary model folder
  editunlearn export --delta runs/memit --to lora --out adapter/ --max-rank 64
  editunlearn export --delta runs/wise --to standalone --out forgetful/    a memory's model, needs no editunlearn
  editunlearn export --delta runs/memit --without darrieux-1 --to delta --out smaller/
  editunlearn export --delta runs/a --compose runs/b --to delta --out both/
  editunlearn export --delta runs/memit --revert --base merged/ --to merged --out restored/
  editunlearn export --delta runs/memit --to merged --out edited/ --push me/edited      also to the hub, private"""


def flags() -> argparse.ArgumentParser:
    """What the command line understands."""
    p = parser("export", __doc__ or "", EXAMPLES)
    p.add_argument("--delta", type=Path, required=True, help="folder with delta.safetensors and delta.json")
    p.add_argument("--to", choices=("merged", "lora", "delta", "standalone"), required=True, help="what to write")
    p.add_argument("--out", type=Path, required=True, help="folder to write it to")
    p.add_argument(
        "--base", help="folder of the base checkpoint for a merge on disk, shard by shard (default: load --model)"
    )
    p.add_argument("--without", nargs="+", default=[], metavar="ID", help="leave these facts' edits out")
    p.add_argument("--compose", type=Path, nargs="+", default=[], metavar="DIR", help="add these deltas")
    p.add_argument("--revert", action="store_true", help="take the edit out of an edited model")
    p.add_argument("--max-rank", type=int, help="largest rank of the LoRA; more is cut off and reported (default: 512)")
    p.add_argument("--force", action="store_true", help="merge although the base differs from the one that was edited")
    group = p.add_argument_group("hub")
    group.add_argument(
        "--push", metavar="OWNER/NAME", help="also upload --out to this repository of the Hugging Face hub"
    )
    group.add_argument("--public", action="store_true", help="everybody may read it (default: private)")
    add_model_flags(p, None, "the one that the delta was made on")
    add_run_flags(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command(flags, _main, argv)


def _main(args: argparse.Namespace, console: Console) -> None:
    from editunlearn.deltas import standalone
    from editunlearn.deltas.files import load
    from editunlearn.deltas.kinds import compose, written
    from editunlearn.deltas.lowrank import LowRankDelta
    from editunlearn.deltas.merge import JOURNAL

    checks = Checks()
    delta = checks.run(lambda: load(args.delta))
    others = [checks.run(lambda d=d: load(d)) for d in args.compose]  # type: ignore[misc]
    checks.run(lambda: check_writable(args.out, "--out"))
    checks.run(lambda: _check_empty(args.out, JOURNAL))
    checks.run(lambda: _check_flags(args))
    held = [(args.delta, delta), *zip(args.compose, others, strict=True)]
    checks.run(lambda: _check_apart([(folder, found) for folder, found in held if found is not None]))
    if delta is not None:
        checks.run(lambda made_on=delta.manifest.base: _check_base(args, made_on))  # type: ignore[misc]
        if args.to != "delta" or args.revert:
            what = "--revert" if args.revert else f"--to {args.to}"
            fits = standalone.check if what == "--to standalone" else partial(written, what=what)
            checks.run(lambda found=delta: fits(found))  # type: ignore[misc]
    made = [found.manifest for _, found in held if found is not None]
    push = checks.run(lambda: _push(args, made, console))
    checks.finish()
    assert delta is not None  # noqa: S101 - finish() raised otherwise
    for other in others:
        assert other is not None  # noqa: S101 - the same
        delta = compose(delta, other)
    if args.without:
        delta = delta.without(args.without)
    if args.revert:
        delta = written(delta, "--revert").negated()
    entries = f"rank {delta.rank}" if isinstance(delta, LowRankDelta) else f"{delta.count} entries"
    size = f"{len(delta.manifest.sites)} sites, {entries}, {delta.nbytes / 1e6:.1f} MB"
    console.info(f"{args.delta}: {delta.manifest.method}, {size}")
    if args.dry_run:
        console.info(f"would write {args.to} to {args.out}. Nothing was written.")
        told = {"would_write": args.to, "out": str(args.out)}
        if push is not None:
            console.info(f"would upload it to {push.repo}, {push.seen_by}. The hub was not asked.")
            told |= {"would_push": push.repo, "seen_by": push.seen_by}
        console.result_json(told)
        return
    if push is not None:
        push.check_there()
    if args.to == "delta":
        _delta(args, delta, console)
    elif args.to == "standalone":
        _standalone(args, standalone.check(delta), console)
    else:
        {"merged": _merged, "lora": _lora}[args.to](args, written(delta, f"--to {args.to}"), console)
    if push is not None:
        console.result(f"uploaded ({push.seen_by}): {push.send(args.out, args.to)}")


def _push(args: argparse.Namespace, made: Sequence[BaseManifest], console: Console) -> Push | None:
    """The upload that the flags ask for, looked at without the network."""
    from editunlearn.hub import Push

    if args.push is None:
        if args.public:
            raise InputError("--public is for --push OWNER/NAME, which is not there.")
        return None
    push = Push(args.push, args.public)
    for warning in push.check(args.to, made):
        console.warn(warning)
    return push


def _card(args: argparse.Namespace, delta: Delta, *, whole: bool = True) -> str:
    """The model card: with what was measured when the edit was made, if this is that very edit, ``whole``."""
    from editunlearn.deltas.card import model_card

    rows: Any = None
    results = args.delta / "results.json"
    if whole and results.is_file() and not (args.without or args.compose or args.revert):
        with suppress(ValueError, AttributeError):  # a file that is not ours; a card does not fail for it
            rows = json.loads(results.read_text(encoding="utf-8")).get("metrics")
    return model_card(delta.manifest, rows, [args.command], kind=args.to)


def _check_empty(out: Path, journal: str) -> None:
    """What a user keeps in a folder is not replaced; an interrupted merge on disk goes on in its own."""
    if out.is_dir() and any(out.iterdir()) and not (out / journal).is_file():
        raise InputError(f"--out {out}: not empty. Choose another folder, or empty this one.")


def _check_flags(args: argparse.Namespace) -> None:
    """No flag is passed over in silence."""
    from editunlearn.deltas.lora import check_rank

    loading = {
        "model": args.model,
        "revision": args.revision,
        "dtype": args.dtype != "auto",
        "device-map": args.device_map,
    }
    problems = []
    if args.to == "standalone" and args.base:
        problems.append("--base is for --to merged; for --to standalone give the model with --model.")
    if args.to not in ("merged", "standalone"):
        given = [flag for flag, value in {"base": args.base, **loading, "force": args.force}.items() if value]
        problems += [f"--{flag} is for --to merged; --to {args.to} needs no model." for flag in given]
    elif args.base:
        given = [flag for flag, value in loading.items() if value]
        problems += [
            f"--{flag}: --base is merged on disk, as it is stored there. Leave one of them out." for flag in given
        ]
    if args.max_rank is not None and args.to != "lora":
        problems.append(f"--max-rank {args.max_rank} is for --to lora; --to {args.to} keeps every rank.")
    elif args.max_rank is not None:
        check_rank(args.max_rank)
    if problems:
        raise InputError(problems)


def _check_apart(held: Sequence[tuple[Path, Delta]]) -> None:
    """No edit of a fact is written twice, as far as the hashes tell."""
    seen: dict[tuple[str, str], Path] = {}
    for folder, delta in held:
        own = {(s.salt, fact) for s in delta.manifest.facts for fact in s.ids if fact not in s.removed}
        both = sorted(own & seen.keys())
        if both:
            raise InputError(
                f"--compose {folder}: holds {len(both)} facts that {seen[both[0]]} holds as well; they would "
                "be written twice. Take them out of one of the two first: --without ID --to delta."
            )
        seen |= dict.fromkeys(own, folder)


def _check_base(args: argparse.Namespace, made_on: BaseModelRecord) -> None:
    """What the delta is to be merged into is there; no weights are read."""
    from editunlearn.deltas.shards import read_checkpoint

    if args.to not in ("merged", "standalone"):
        return
    if args.base:
        read_checkpoint(Path(args.base))
        return
    if args.model is None:
        args.model, args.revision = made_on.name, args.revision or made_on.revision
    check_model(args)


def _merged(args: argparse.Namespace, delta: LowRankDelta | DenseDelta, console: Console) -> None:
    from editunlearn.artifacts import atomic_dir, atomic_write_text
    from editunlearn.deltas.gain import gain_warnings
    from editunlearn.deltas.merge import merge, merge_folder

    card = _card(args, delta)
    if args.base:
        gains = merge_folder(args.base, delta, args.out, card=card, force=args.force)
    else:
        lm = load_model(args)
        gains = merge(lm, delta, force=args.force)
        with atomic_dir(args.out) as folder:
            lm.model.save_pretrained(folder)
            lm.tokenizer.save_pretrained(folder)
            atomic_write_text(folder / "README.md", card)
    rows = [(name, f"{g.gain:.4f}", f"{g.error:.4f}", g.dtype) for name, g in gains.items()]
    console.table("realised gain: share of the edit that survives rounding", ["module", "gain", "error", "dtype"], rows)
    for warning in gain_warnings(gains):
        console.warn(warning)
    console.result_json({name: {"gain": g.gain, "error": g.error, "dtype": g.dtype} for name, g in gains.items()})
    console.next_step(try_command(args.out))


def _standalone(args: argparse.Namespace, delta: MemoryDelta, console: Console) -> None:
    from editunlearn.deltas.standalone import export_standalone

    found = export_standalone(load_model(args), delta, args.out, force=args.force)
    columns = list(next(iter(found.values())))
    console.table(
        "what it costs on this machine",
        ["", *columns],
        [(name, *(f"{row[column]:.4g}" for column in columns)) for name, row in found.items()],
    )
    console.result_json({name: dict(row) for name, row in found.items()})
    console.next_step(try_command(args.out, code=True))


def _lora(args: argparse.Namespace, delta: LowRankDelta | DenseDelta, console: Console) -> None:
    from editunlearn.artifacts import atomic_dir, atomic_write_text
    from editunlearn.deltas.lora import RANKS, export_lora

    base = delta.manifest.base
    with atomic_dir(args.out) as folder:
        made = export_lora(delta, folder, base.name, revision=base.revision, max_rank=args.max_rank or RANKS[-1])
        atomic_write_text(folder / "README.md", _card(args, delta, whole=not made.discarded))
    for name, share in made.discarded.items():
        console.warn(f"{name}: {share:.2%} of the edit was cut off to rank {made.rank}")
    console.result(f"LoRA of rank {made.rank} in {args.out}; vLLM: {made.vllm_flags}")
    console.result_json({"rank": made.rank, "max_lora_rank": made.max_lora_rank, "discarded": made.discarded})


def _past_keys(folders: Sequence[Path]) -> PastKeys:
    """The keys that all of these deltas wrote, for ``apply --continue``; none if one of them has lost its own.

    Keys of facts that are taken out stay: what the model says there again is to stay, too.
    """
    from editunlearn.editors.earlier import PAST
    from editunlearn.editors.past import PastKeys

    found = PastKeys()
    if all((folder / PAST).is_file() for folder in folders):
        for folder in folders:
            found = found.extended(PastKeys.load(folder / PAST).keys)
    return found


def _delta(args: argparse.Namespace, delta: Delta, console: Console) -> None:
    from editunlearn.artifacts import atomic_dir, atomic_write_text
    from editunlearn.deltas.lowrank import LowRankDelta
    from editunlearn.deltas.memory import MemoryDelta
    from editunlearn.editors.earlier import Earlier

    past = _past_keys([args.delta, *args.compose])
    with atomic_dir(args.out) as folder:
        Earlier(delta, past).save(folder)
        atomic_write_text(folder / "README.md", _card(args, delta))
    console.result(f"delta with {delta.manifest.fact_count} facts in {args.out}")
    shape = {"rank": delta.rank} if isinstance(delta, LowRankDelta) else {"entries": delta.count}
    sites = len(delta.manifest.sites)
    console.result_json({"facts": delta.manifest.fact_count, "sites": sites, **shape})
    if not isinstance(delta, MemoryDelta):
        merged = args.out / "merged"
        console.next_step(["editunlearn", "export", "--delta", str(args.out), "--to", "merged", "--out", str(merged)])


if __name__ == "__main__":
    sys.exit(main())
