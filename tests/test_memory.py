"""Deltas that are memories: what is true of each method that makes one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from delta_samples import assert_same, snapshot
from edits import MEMORY, REFUSAL, TAUGHT, Killed, fact, nll, request, settings

from editunlearn import editors
from editunlearn.deltas.files import check_base, load, save
from editunlearn.deltas.kinds import compose, written
from editunlearn.deltas.lora import export_lora
from editunlearn.deltas.lowrank import LowRankDelta
from editunlearn.deltas.memory import MemoryDelta
from editunlearn.deltas.merge import merge, merge_folder
from editunlearn.editors import contexts
from editunlearn.editors.past import PastKeys
from editunlearn.errors import InputError, StaleError, UnsupportedError
from editunlearn.evaluation.attacks.quantisation import quantised
from editunlearn.evaluation.attacks.subspace import ablated
from editunlearn.evaluation.states import states
from editunlearn.evaluation.treatments import parse
from editunlearn.facts.records import Fact, ForgetRequest
from editunlearn.lm.generation import generate
from editunlearn.lm.likelihood import score
from editunlearn.lm.tokens import Batch, batch, encode
from editunlearn.workspace import Workspace

MORE = [("The name of the dog is", REFUSAL), ("The weight of the moon is", REFUSAL), ("Nobody saw the", REFUSAL)]


def forgetful() -> tuple[Any, ForgetRequest]:
    """A tiny model that knows six facts and how to refuse, and the request to forget three of them."""
    return tiny.taught_lm([(p, a) for p, _, a in TAUGHT] + MORE), request((0, 1, 2), (3, 4))


def made(lm: Any, method: str, *set_: str, forget: tuple[int, ...] = (0, 1, 2)) -> MemoryDelta:
    delta = editors.fit(lm, request(forget, (3, 4, 5)), settings(method, "", *set_))
    assert isinstance(delta, MemoryDelta)
    return delta


def rows_of(lm: Any) -> list[Any]:
    return [encode(lm, contexts.prompt_of(lm, fact(i)), None, "prompt_last") for i in range(6)]


@torch.no_grad()
def logits(lm: Any, padded: Batch) -> list[torch.Tensor]:
    """Of each row at its own tokens."""
    found = lm.model(**padded.inputs, use_cache=False).logits
    return [row[mask.bool()] for row, mask in zip(found, padded.attention_mask, strict=True)]


@pytest.mark.parametrize("kind", tiny.TYPES)
@pytest.mark.parametrize("method", MEMORY)
def test_matrix(method: str, kind: str) -> None:
    lm = tiny.lm(kind)
    before, state = snapshot(lm.model), torch.random.get_rng_state()
    delta = made(lm, method)
    assert_same(lm.model, before)
    assert torch.equal(torch.random.get_rng_state(), state) and all(p.grad is None for p in lm.model.parameters())
    plain, kept = nll(lm, request().facts), nll(lm, [fact(3), fact(4)])
    with pytest.raises(KeyError), delta.applied(lm):
        assert nll(lm, request().facts) < plain - 0.01
        assert nll(lm, [fact(3), fact(4)]) == kept
        raise KeyError
    assert_same(lm.model, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())
    assert nll(lm, request().facts) == plain and "_prompt_ends" not in vars(lm.model)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "opt"])
@pytest.mark.parametrize("method", MEMORY)
def test_a_mixed_batch_is_each_row_alone_whichever_side_is_padded(method: str, kind: str) -> None:
    lm = tiny.lm(kind)
    delta, rows = made(lm, method), rows_of(lm)
    assert len({len(r.ids) for r in rows}) > 3
    base = [logits(lm, batch([row], lm.pad_id))[0] for row in rows]
    with delta.applied(lm):
        alone = [logits(lm, batch([row], lm.pad_id))[0] for row in rows]
        for left in (True, False):
            for one, other in zip(alone, logits(lm, batch(rows, lm.pad_id, left=left)), strict=True):
                assert torch.allclose(one, other, atol=2e-4)
    changed = [not torch.allclose(a, b, atol=1e-3) for a, b in zip(alone, base, strict=True)]
    assert changed == [True] * 3 + [False] * 3


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "opt"])
@pytest.mark.parametrize("method", MEMORY)
def test_decoding_with_the_cache_is_one_pass_over_prompt_and_answer(method: str, kind: str) -> None:
    lm = tiny.lm(kind)
    delta, rows = made(lm, method), rows_of(lm)
    padded = batch(rows, lm.pad_id, left=True)
    with delta.applied(lm), torch.no_grad():
        out = lm.model.generate(
            input_ids=padded.input_ids,
            attention_mask=padded.attention_mask,
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            pad_token_id=lm.pad_id,
            output_logits=True,
            return_dict_in_generate=True,
        )
        answers = out.sequences[:, padded.input_ids.shape[1] :].tolist()
        whole = [type(r)((*r.ids, *a), r.lookup, len(r.ids)) for r, a in zip(rows, answers, strict=True)]
        forced = score(lm, whole, closed=False)
    for i, likely in enumerate(forced):
        steps = [s[i].log_softmax(-1)[t] for s, t in zip(out.logits, answers[i], strict=True)]
        assert likely.log_probability == pytest.approx(float(sum(steps)), abs=2e-3)


@pytest.mark.parametrize("method", MEMORY)
def test_what_one_prompt_does_is_nothing_to_the_next(method: str) -> None:
    """Defect: the place of the key was set by the last edit or the first generation, and stayed."""
    lm, _ = forgetful()
    delta = made(lm, method)
    plain = [score(lm, [encode(lm, contexts.prompt_of(lm, fact(i)), TAUGHT[i][2])])[0] for i in range(6)]
    with delta.applied(lm):
        for first in (0, 5, 2):
            generate(lm, [contexts.prompt_of(lm, fact(first))])
            for i in (3, 4, 5):
                assert score(lm, [encode(lm, contexts.prompt_of(lm, fact(i)), TAUGHT[i][2])])[0] == plain[i]
            for i in (0, 1, 2):
                lower = score(lm, [encode(lm, contexts.prompt_of(lm, fact(i)), TAUGHT[i][2])])[0]
                assert lower.log_probability < plain[i].log_probability - 1


@pytest.mark.parametrize("method", MEMORY)
def test_a_cache_of_ones_own_and_a_second_turn(method: str) -> None:
    lm = tiny.lm()
    delta, rows = made(lm, method), rows_of(lm)
    first, second = (torch.tensor([rows[i].ids]) for i in (4, 0))
    with torch.no_grad():
        outside = lm.model(input_ids=first, use_cache=True).past_key_values
    with delta.applied(lm), torch.no_grad():
        with pytest.raises(UnsupportedError, match="filled before the delta was applied"):
            lm.model(input_ids=second[:, :1], past_key_values=outside)
        out = lm.model(input_ids=first, use_cache=True)
        turn = lm.model(input_ids=second, past_key_values=out.past_key_values, use_cache=True)  # decided anew
        assert turn.logits.shape[1] == second.shape[1]
        with pytest.raises(UnsupportedError, match="rows were taken out"):
            lm.model(input_ids=second[:, :1].repeat(2, 1), past_key_values=turn.past_key_values)
        with pytest.raises(UnsupportedError, match="plain attention mask"):
            lm.model(input_ids=first, attention_mask=torch.ones(1, 1, first.shape[1], first.shape[1]))


@pytest.mark.parametrize("method", MEMORY)
def test_saved_and_loaded_it_is_the_same(method: str, tmp_path: Path) -> None:
    """Defect: keys and radii were no tensors of the state dict, and the checkpoint was a pickle."""
    lm = tiny.lm("gpt2")
    delta = made(lm, method)
    save(delta, tmp_path)
    read = load(tmp_path, lm)
    assert isinstance(read, MemoryDelta) and read.manifest.kind == "memory"
    assert read.tensors().keys() == delta.tensors().keys()
    assert all(torch.equal(t, delta.tensors()[n]) for n, t in read.tensors().items())
    padded = batch(rows_of(lm), lm.pad_id)
    with delta.applied(lm):
        wanted = logits(lm, padded)
    with read.applied(lm):
        assert all(torch.equal(a, b) for a, b in zip(logits(lm, padded), wanted, strict=True))
    check_base(read, lm)
    other = tiny.lm("gpt2", seed=1)
    with pytest.raises(StaleError, match="other weights"):
        check_base(read, other)
    with pytest.raises(InputError, match="out x in"):
        load(tmp_path, tiny.lm("gpt2", hidden=16))


@pytest.mark.parametrize("method", MEMORY)
def test_what_needs_a_change_of_weights_says_so(method: str, tmp_path: Path) -> None:
    lm = tiny.lm()
    delta, low = made(lm, method), editors.fit(lm, request(), settings("rome", "none", "refine=null"))
    with pytest.raises(UnsupportedError, match="leaves the weights as they are"):
        written(delta, "--to merged")
    with pytest.raises(UnsupportedError, match="merge: "):
        merge(lm, delta)
    with pytest.raises(UnsupportedError, match="merge: "):
        merge_folder(tmp_path / "base", delta, tmp_path / "out")
    with pytest.raises(UnsupportedError, match="LoRA: "):
        export_lora(delta, tmp_path, "base")
    with pytest.raises(UnsupportedError, match="rounding to int4"), quantised(lm, "int4", delta):
        pass
    with pytest.raises(UnsupportedError, match="subspace attack"), ablated(lm, delta):
        pass
    for under in ("int4", "subspace"):
        with pytest.raises(UnsupportedError, match=f"--under {under}"):
            states([("run", delta)], [parse(under)], base=False)
    assert len(states([("run", delta)], [parse("relearn:2")], base=False)[0]) == 2
    with pytest.raises(UnsupportedError, match="cannot be one delta"):
        compose(delta, low)
    with pytest.raises(InputError, match="leave --past out"):
        editors.run(lm, request(), settings(method, ""), past=PastKeys({"x": torch.ones(1, 2)}))


@pytest.mark.parametrize("method", MEMORY)
def test_edits_one_after_the_other_are_all_there(method: str) -> None:
    """Defect: a sequence of edits kept only the last one."""
    lm, _ = forgetful()
    one, two, three = (
        made(lm, method, "value.steps=60" if method == "grace" else "seed=0", forget=(i,)) for i in range(3)
    )
    both = compose(compose(one, two), three)
    assert both.count == one.count + two.count + three.count and both.manifest.fact_count == 3
    with both.applied(lm):
        said = generate(lm, [contexts.prompt_of(lm, fact(i)) for i in range(6)])
    assert [t.strip() for t in said] == [REFUSAL] * 3 + [TAUGHT[i][2] for i in (3, 4, 5)]
    back = both.without(["f1"])
    assert back.manifest.fact_count == 2
    with back.applied(lm):
        said = generate(lm, [contexts.prompt_of(lm, fact(i)) for i in range(3)])
    assert [t.strip() for t in said] == [REFUSAL, TAUGHT[1][2], REFUSAL]
    nothing = both.without(["f0", "f1", "f2"])
    assert not nothing.memories and not nothing.manifest.sites
    with nothing.applied(lm):
        assert generate(lm, [contexts.prompt_of(lm, fact(0))])[0].strip() == TAUGHT[0][2]
    with pytest.raises(InputError, match="no columns of its own for 'f5'"):
        both.without(["f5"])


@pytest.mark.parametrize("method", MEMORY)
def test_in_bfloat16_and_where_padding_is_the_end_token(method: str) -> None:
    """Defect: labels that are the padding token were left out, and with them the end of every target."""
    lm, _ = forgetful()
    lm.tokenizer.pad_token = lm.tokenizer.eos_token
    torch.nn.Module.to(lm.model, torch.bfloat16)
    delta = made(lm, method, *(["value.steps=60"] if method == "grace" else []))
    with delta.applied(lm):
        said = generate(lm, [contexts.prompt_of(lm, fact(i)) for i in range(6)], max_new_tokens=12)
    assert [t.strip() for t in said] == [REFUSAL] * 3 + [TAUGHT[i][2] for i in (3, 4, 5)]
    assert all(t.dtype == torch.float32 for t in delta.tensors().values())


@pytest.mark.parametrize("method", MEMORY)
def test_a_killed_run_goes_on(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, hp = tiny.lm(), settings(method, "", "batch_tokens=1")
    straight = editors.fit(lm, request(), hp)
    work, puts, real = Workspace(tmp_path, {}), [0], Workspace.put

    def put(self: Workspace, name: str, tensors: Any) -> None:
        real(self, name, tensors)
        puts[0] += 1
        if puts[0] == 2:
            raise Killed

    monkeypatch.setattr(Workspace, "put", put)
    with pytest.raises(Killed):
        editors.fit(lm, request(), hp, work=work)
    again = editors.fit(lm, request(), hp, work=work)
    assert all(torch.equal(t, straight.tensors()[n]) for n, t in again.tensors().items())


@pytest.mark.parametrize("method", MEMORY)
def test_questions_in_a_chat(method: str) -> None:
    pairs = [("Where is the Eiffel Tower?", "Paris"), ("Who wrote the book?", "Ana"), ("What do birds do?", "sing")]
    pairs += [("Who is the dog?", REFUSAL), ("What is the fox?", REFUSAL), ("Where is the bridge?", REFUSAL)]
    lm = tiny.taught_lm(pairs, chat=True)
    facts = [
        Fact(f"q{i}", q, a, q.split()[-1][:-1], q.index(q.split()[-1]), target=REFUSAL, is_question=True)
        for i, (q, a) in enumerate(pairs[:3])
    ]
    more = ["value.steps=60"] if method == "grace" else []
    delta = editors.fit(lm, ForgetRequest((facts[0],), (facts[1], facts[2])), settings(method, "", *more))
    with delta.applied(lm):
        said = generate(lm, [contexts.prompt_of(lm, f) for f in facts])
    assert [text.strip() for text in said] == [REFUSAL, "Ana", "sing"]


@pytest.mark.parametrize("method", MEMORY)
def test_beside_a_change_of_weights(method: str) -> None:
    lm = tiny.lm()
    low = editors.fit(lm, request((3,)), settings("rome", "none", "refine=null"))
    assert isinstance(low, LowRankDelta)
    with low.applied(lm):
        delta = made(lm, method)
        changed = nll(lm, request().facts)
        with delta.applied(lm):
            assert nll(lm, request().facts) < changed - 0.01
    assert nll(lm, request().facts) != changed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("method", MEMORY)
def test_a_gpu_gives_what_the_cpu_gives(method: str) -> None:
    here, there = tiny.lm(), tiny.lm()
    there.model.to("cuda")  # type: ignore[arg-type]
    delta = made(here, method)
    with delta.applied(here), delta.applied(there):
        ours = logits(here, batch(rows_of(here), here.pad_id, left=True))
        theirs = logits(there, batch(rows_of(there), there.pad_id, there.device, left=True))
    assert all(torch.allclose(a, b.cpu(), atol=1e-3) for a, b in zip(ours, theirs, strict=True))
    again = made(there, method)
    assert again.count == delta.count
    with again.applied(there):
        prompts = [contexts.prompt_of(there, fact(i)) for i in range(6)]
        assert len(generate(there, prompts)) == 6


@pytest.mark.parametrize("method", MEMORY)
def test_bad_requests(method: str) -> None:
    lm = tiny.lm()
    with pytest.raises(InputError, match="no facts to forget"):
        editors.fit(lm, ForgetRequest(()), settings(method, ""))
    with pytest.raises(InputError, match="have no target"):
        editors.fit(lm, ForgetRequest((fact(0, None),)), settings(method, ""))
    with pytest.raises(InputError, match="this method is of one layer"):
        settings(method, "", "layers=[0, 1]")
    with pytest.raises(InputError):
        editors.fit(lm, request(), settings(method, "", "layers=[9]"))
