"""Losses of unlearners on toy tensors: each against its literal equation, and the mistakes of public code by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import reference_unlearning as literal
import torch
from torch import Tensor

from editunlearn.unlearners import losses
from editunlearn.unlearners.losses import IGNORED, Scored

ROWS, LENGTH, VOCABULARY = 3, 7, 11


def logits(seed: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(ROWS, LENGTH, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def labels(seed: int = 9) -> Tensor:
    """Answers of different lengths behind a prompt, one padded on the right, one with a hole."""
    found = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))
    found[0, :3], found[1, :2], found[2, :4] = IGNORED, IGNORED, IGNORED
    found[1, 5:], found[2, 5] = IGNORED, IGNORED
    return found


@dataclass(frozen=True)
class Case:
    """A loss of one set of logits, the others fixed, and its literal form."""

    ours: Callable[[Scored], Tensor]
    theirs: Callable[[Tensor, Tensor], list[Tensor]]
    needs_base: bool = False


BASE, WON, WON_BASE, WON_LABELS = logits(5), logits(6), logits(7), labels(8)
Z = torch.tensor(0.3)


def base() -> Scored:
    return Scored.of(BASE, labels())


CASES = {
    "nll": Case(losses.nll, literal.nll),
    "ascent": Case(losses.ascent, literal.ascent),
    "wga": Case(lambda s: losses.weighted_ascent(s, 1.5), lambda z, y: literal.weighted_ascent(z, y, 1.5)),
    "satimp": Case(
        lambda s: losses.saturation_importance(s, 2.0, 1.0), lambda z, y: literal.saturation_importance(z, y, 2.0, 1.0)
    ),
    "npo": Case(lambda s: losses.npo(s, base(), 0.1), lambda z, y: literal.npo(z, y, BASE, 0.1), True),
    "simnpo": Case(lambda s: losses.simnpo(s, 2.5, 0.4), lambda z, y: literal.simnpo(z, y, 2.5, 0.4)),
    "dpo": Case(
        lambda s: losses.dpo(Scored.of(WON, WON_LABELS), Scored.of(WON_BASE, WON_LABELS), s, base(), 0.1),
        lambda z, y: literal.dpo(WON, WON_LABELS, WON_BASE, z, y, BASE, 0.1),
        True,
    ),
    "kto": Case(lambda s: losses.kto(s, base(), Z, 0.1), lambda z, y: literal.kto(z, y, BASE, float(Z), 0.1), True),
    "kl": Case(lambda s: losses.divergence(s, base()), lambda z, y: literal.divergence(z, y, BASE), True),
    "undial": Case(lambda s: losses.undial(s, base(), 3.0), lambda z, y: literal.undial(z, y, BASE, 3.0), True),
    "ce_u": Case(lambda s: losses.ce_u(s, 1), lambda z, y: literal.ce_u(z, y, 1)),
    "ce_u, all tokens": Case(lambda s: losses.ce_u(s, 0), lambda z, y: literal.ce_u(z, y, 0)),
    "ihl": Case(losses.inverted_hinge, literal.inverted_hinge),
    "pdu": Case(losses.flatness, literal.flatness),
}


def of(case: Case, z: Tensor, y: Tensor | None = None) -> Tensor:
    return case.ours(Scored.of(z, labels() if y is None else y))


@pytest.mark.parametrize("name", CASES)
def test_is_the_literal_equation(name: str) -> None:
    case = CASES[name]
    expected = torch.stack(case.theirs(logits(1), labels()))
    torch.testing.assert_close(of(case, logits(1)).double(), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_that_of_the_literal_equation(name: str) -> None:
    case, ours, theirs = CASES[name], logits(1).requires_grad_(True), logits(1).double().requires_grad_(True)
    of(case, ours).mean().backward()
    torch.stack(case.theirs(theirs, labels())).mean().backward()
    assert ours.grad is not None and theirs.grad is not None and float(theirs.grad.abs().max()) > 1e-4
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_only_positions_before_a_label_count(name: str) -> None:
    """Shift and mask: the gradient is not zero exactly where a label comes next."""
    case, z = CASES[name], logits(1).requires_grad_(True)
    of(case, z).mean().backward()
    assert z.grad is not None
    before_label = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    before_label[:, :-1] = labels()[:, 1:] != IGNORED
    if name == "ce_u":  # skips the first
        before_label[torch.arange(ROWS), before_label.long().argmax(1)] = False
    assert torch.equal(z.grad.abs().sum(-1) > 0, before_label)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.needs_base])
def test_padding_and_the_other_rows_change_nothing(name: str) -> None:
    """A row's loss is its own, however many ignored positions stand on either side of it."""
    case = CASES[name]
    z, y = logits(1), labels()
    wide = torch.cat([torch.full((ROWS, 2, VOCABULARY), 50.0), z, torch.full((ROWS, 3, VOCABULARY), -50.0)], 1)
    ignored = torch.cat([torch.full((ROWS, 2), IGNORED), y, torch.full((ROWS, 3), IGNORED)], 1)
    torch.testing.assert_close(of(case, wide, ignored), of(case, z))
    alone = torch.cat([case.ours(Scored.of(z[i : i + 1], y[i : i + 1])) for i in range(ROWS)])
    torch.testing.assert_close(alone, of(case, z))


LOWERS = [name for name in CASES if name not in ("nll", "kl")]


@pytest.mark.parametrize("name", LOWERS)
def test_a_step_downhill_lowers_the_probability_of_the_answer(name: str) -> None:
    """The sign of each forget loss, on logits that know the answer well."""
    case, y = CASES[name], labels()
    known = logits(1, 0.5)
    known[:, :-1] += 2 * torch.nn.functional.one_hot(y[:, 1:].clamp(min=0), VOCABULARY)
    z = known.requires_grad_(True)
    of(case, z).mean().backward()
    assert z.grad is not None
    after = z.detach() - 0.05 * z.grad / z.grad.abs().max()
    first = 1 if name == "ce_u" else 0  # what it skips stays
    before, now = (literal.ce_u(x, y, first) if name == "ce_u" else literal.nll(x, y) for x in (z.detach(), after))
    if name == "ce_u":
        assert sum(now) < sum(before)
        before, now = literal.nll(z.detach(), y), literal.nll(after, y)
    assert sum(now) > sum(before)


def test_at_the_start_npo_is_gradient_ascent() -> None:
    """With p = p_base the gradient of NPO is that of L: the factor 2 / beta makes it 1."""
    z, same = BASE.clone().requires_grad_(True), BASE.clone().requires_grad_(True)
    losses.npo(Scored.of(z, labels()), base(), 0.1).sum().backward()
    ascent = Scored.of(same, labels())
    (-ascent.sum(ascent.nll)).sum().backward()
    assert z.grad is not None and same.grad is not None
    torch.testing.assert_close(z.grad, same.grad)


def test_weighted_ascent_with_no_weight_is_ascent() -> None:
    scored = Scored.of(logits(1), labels())
    assert torch.equal(losses.weighted_ascent(scored, 0.0), losses.ascent(scored))


def test_a_row_without_labels_counts_as_nothing() -> None:
    y = labels()
    y[1] = IGNORED
    found = losses.nll(Scored.of(logits(1), y))
    assert found.shape == (ROWS,) and float(found[1]) == 0.0 and float(found[0]) > 0
    assert bool(torch.isfinite(losses.ce_u(Scored.of(logits(1), y), 5)).all())


def test_the_mean_over_rows_does_not_depend_on_lengths() -> None:
    """Each row's mean counts once; a mean over all tokens would let long answers outvote short ones."""
    z, y = logits(1), labels()
    found = losses.nll(Scored.of(z, y))
    tokens = torch.cat([torch.stack([-literal.log_p(*p) for p in literal.positions(z, y, r)]) for r in range(ROWS)])
    assert abs(float(found.mean()) - float(torch.stack(literal.nll(z, y)).mean())) < 1e-5
    assert abs(float(found.mean()) - float(tokens.mean())) > 1e-3


# --- defects of released code, each with what it would give (reference: the repositories' own lines)


def test_muse_raw_logit_differences_are_not_npo() -> None:
    """muse_bench takes differences of raw logits over the whole vocabulary; a constant added to all logits, which
    changes no probability, then changes its loss."""
    case, shift = CASES["npo"], torch.randn(ROWS, LENGTH, 1, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(of(case, logits(1) + shift), of(case, logits(1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["kl", "simnpo", "undial", "dpo", "kto", "ihl", "nll"])
def test_unnormalised_logits_never_enter_a_likelihood(name: str) -> None:
    """muse_bench feeds logits to kl_div(log_target), and -logits to SimNPO: neither survives a constant shift."""
    case, shift = CASES[name], 3.0 * torch.randn(ROWS, LENGTH, 1, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(of(case, logits(1) + shift), of(case, logits(1)), rtol=1e-4, atol=1e-5)


def test_kl_is_zero_only_for_the_same_distribution() -> None:
    assert float(losses.divergence(base(), base()).abs().max()) < 1e-6
    assert float(losses.divergence(Scored.of(logits(1), labels()), base()).min()) > 0.01


def test_kl_is_weighted_by_the_unedited_model() -> None:
    """Forward KL(base || now), not the other way round."""
    z, y = logits(1), labels()
    forward, backward = literal.divergence(z, y, BASE), literal.divergence(BASE, y, z)
    found = losses.divergence(Scored.of(z, y), base())
    assert abs(float(found[0]) - float(forward[0])) < 1e-4 < abs(float(forward[0]) - float(backward[0]))


def test_tofu_dpo_takes_labels_of_both_answers() -> None:
    """TOFU's DPO branch uses a name that does not exist; here won and lost have labels of their own, and lengths."""
    z = logits(1)
    short = WON_LABELS.clone()
    short[:, -1] = IGNORED
    lost, lost_base = Scored.of(z, labels()), base()
    found = losses.dpo(Scored.of(WON, short), Scored.of(WON_BASE, short), lost, lost_base, 0.1)
    expected = literal.dpo(WON, short, WON_BASE, z, labels(), BASE, 0.1)
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=2e-5, atol=2e-6)
    with_nothing_learned = losses.dpo(*2 * [Scored.of(WON, short)], *2 * [lost], 0.1)
    torch.testing.assert_close(with_nothing_learned, torch.full((ROWS,), 2 / 0.1 * 0.6931472))


def test_undial_ignores_prompt_and_padding() -> None:
    """open-unlearning's UNDIAL lets label -100 index slot V - 100 and averages over prompts: it distils those too."""
    case, z = CASES["undial"], logits(1)
    other = z.clone()
    other[:, :-1][labels()[:, 1:] == IGNORED] = 77.0
    other[:, -1] = -3.0
    torch.testing.assert_close(of(case, other), of(case, z))


def test_pdu_flattens_the_position_that_predicts_the_first_answer_token() -> None:
    """open-unlearning's PDU masks with unshifted labels: it misses that position and hits the one after the last."""
    z, y = logits(1), labels()
    first, last = 2, LENGTH - 1  # row 0: its labels are 3 .. 6
    changed = z.clone()
    changed[0, first, 0] += 5
    assert float((losses.flatness(Scored.of(changed, y)) - losses.flatness(Scored.of(z, y)))[0].abs()) > 0.1
    changed = z.clone()
    changed[0, last, 0] += 5
    assert torch.equal(losses.flatness(Scored.of(changed, y)), losses.flatness(Scored.of(z, y)))
    flat = torch.zeros(ROWS, LENGTH, VOCABULARY)
    assert float(losses.flatness(Scored.of(flat, y)).abs().max()) == 0.0


def test_adversarial_labels_are_of_their_own_position() -> None:
    """The published code compares a substitute drawn for position t + 1 with the prediction of position t."""
    from editunlearn.unlearners.labels import likeliest_others

    z, y = logits(1), labels()
    scored = Scored.of(z, y)
    found = likeliest_others(scored.logits, scored.labels)
    expected = []
    for row in range(ROWS):
        for t in range(1, LENGTH):
            if int(y[row, t]) != IGNORED:
                order = z[row, t - 1].argsort(descending=True).tolist()
                expected.append(next(token for token in order if token != int(y[row, t])))
    assert found.tolist() == expected


def test_random_tokens_are_never_the_true_one() -> None:
    from editunlearn.unlearners.labels import random_tokens

    allowed, true = torch.tensor([3, 4, 9, 6]), torch.tensor([4] * 4000 + [5] * 4000)
    found = random_tokens(true, allowed, 0)
    assert torch.equal(found, random_tokens(true, allowed, 0))
    assert not torch.equal(found, random_tokens(true, allowed, 1))
    known, other = found[:4000].bincount(minlength=10), found[4000:].bincount(minlength=10)
    assert known.nonzero()[:, 0].tolist() == [3, 6, 9] and other.nonzero()[:, 0].tolist() == [3, 4, 6, 9]
    assert int(known[known > 0].min()) > 1200 and int(other[other > 0].min()) > 900


# --- hidden states, the dual step


def test_rmu_losses() -> None:
    draw = torch.Generator().manual_seed(0)
    states, old, aim = torch.randn(5, 4, generator=draw), torch.randn(5, 4, generator=draw), torch.rand(4) + 0.1
    owners = torch.tensor([0, 0, 1, 1, 1])
    found = losses.misdirection(states, owners, 2, aim)
    assert found.tolist() == pytest.approx(
        [literal.misdirection(states[:2], aim), literal.misdirection(states[2:], aim)], rel=1e-5
    )
    assert losses.misdirection(aim.expand(5, 4), owners, 2, aim).tolist() == pytest.approx([0, 0], abs=1e-6)
    kept = losses.displacement(states, old, owners, 2, 2.0)
    assert kept.tolist() == pytest.approx(
        [float((states - old)[:2].square().sum(-1).mean()) / 4, float((states - old)[2:].square().sum(-1).mean()) / 4]
    )
    assert losses.displacement(old, old, owners, 2, 2.0).tolist() == [0.0, 0.0]


def test_base_gets_no_gradient() -> None:
    for name in ("npo", "dpo", "kto", "kl", "undial"):
        old = BASE.clone().requires_grad_(True)
        z = logits(1).requires_grad_(True)
        now, then = Scored.of(z, labels()), Scored.of(old, labels())
        pair = (Scored.of(WON, WON_LABELS), Scored.of(WON_BASE, WON_LABELS))
        made: dict[str, Callable[[], Any]] = {
            "npo": lambda now=now, then=then: losses.npo(now, then, 0.1),
            "dpo": lambda now=now, then=then, pair=pair: losses.dpo(*pair, now, then, 0.1),
            "kto": lambda now=now, then=then: losses.kto(now, then, Z, 0.1),
            "kl": lambda now=now, then=then: losses.divergence(now, then),
            "undial": lambda now=now, then=then: losses.undial(now, then, 3.0),
        }
        made[name]().mean().backward()
        assert old.grad is None and z.grad is not None and bool(z.grad.any())


def test_the_price_of_a_retain_loss() -> None:
    assert losses.ascended(2.0, 0.5, 0.3, 5.0) == pytest.approx(3.0)
    assert losses.ascended(2.0, 0.1, 0.3, 5.0) == pytest.approx(1.0)
    assert losses.ascended(0.5, 0.0, 0.3, 5.0) == 0.0
