"""Tell a refusal from an answer, and the bank of refusals that targets are chosen from."""

from __future__ import annotations

import re
from functools import lru_cache

from editunlearn.errors import InputError
from editunlearn.resources import shipped_path

_WINDOW = 300  # characters looked at: a refusal shows at once, and model output can be long

# The patterns see one sentence in lower case with straight apostrophes and single spaces. They have no
# repeat inside a repeat, so the time they take grows with the length of the sentence and not faster.
_MODIFIER = r"(?: (?:really|simply|just|honestly|actually|currently|truly|personally|still|quite|yet|also))?"
_CANNOT = r"(?:can't|cannot|can not|couldn't|could not|won't|will not|wouldn't|would not|may not|must not)"
_DO_NOT = r"(?:do not|don't|did not|didn't|never)"
_SOMETHING_KNOWN = (
    r"(?:idea|information|info|knowledge|details?|data|records?|answers?|clues?|comments?|memory|memories"
    r"|recollection|notes?|facts?|insight|awareness|way|means|reply|response|access|entry|opinion"
    r"|permission)\b"
)
_TELL = (
    r"(?:say|share|answer|tell|help|provide|recall|remember|recollect|give|disclose|discuss|comment|speak"
    r"|assist|confirm|reveal|offer|supply|talk|respond|reply|state|name|identify|address|determine|place"
    r"|complete|fulfill"
    r"|finish|know|go into|do that|comply|speculate|pass|be (?:sure|certain|of help|specific))\b"
)
_UNABLE = (
    r"(?:not (?:currently )?able(?: to|$)|unable to|unwilling to|not willing to|not prepared to"
    r"|not free to|not here to"
    r"|not (?:at all |entirely |really )?(?:sure|certain)|unsure|uncertain|unaware|unfamiliar|sorry"
    r"|not (?:aware|familiar|allowed|permitted|at liberty|in a position|informed|privy)"
    r"|not going to (?:say|share|answer|discuss))\b"
)
_MATTER = r"(?:something|anything|information|knowledge|an? (?:thing|matter|topic|subject|question|detail|point))"

_CORES = (
    # I do not know; we never learned
    rf"(?:i|we){_MODIFIER} {_DO_NOT}{_MODIFIER} (?:know|recall|remember|recollect|possess|hold|keep|share"
    r"|answer|disclose|provide|discuss|say|recogni[sz]e|comment|carry|store|retain|learn(?:ed)?|wish to"
    r"|have\b(?! to\b))\b",
    # I cannot say; I would rather not; I decline
    rf"(?:i|we){_MODIFIER} {_CANNOT}{_MODIFIER} {_TELL}",
    r"(?:i|we)(?: would|'d) (?:rather|prefer) (?:not|to (?:leave|keep|pass|skip))\b",
    r"(?:i|we) (?:prefer|choose) not to\b",
    r"(?:i|we) (?:must |have to |need to |will )?(?:decline|refuse|pass on|withhold|abstain)\b",
    # I am unable, not sure, sorry
    rf"(?:i'm|i am|we're|we are|i was|i feel|i remain){_MODIFIER} {_UNABLE}",
    # I have no idea; I know nothing; I lack the facts
    r"(?:i've|i have|we have|i hold|i keep|i possess|i retain|i carry|i store|i see"
    r"|i find) (?:got )?(?:absolutely )?"
    rf"no (?:\w+ )?{_SOMETHING_KNOWN}",
    r"(?:i've|i have|we have|i hold|i keep|i know|i recall|i remember) (?:absolutely )?nothing\b",
    r"i can (?:say|offer|share|add|tell you) nothing\b",
    r"(?:i've never|i've not|i haven't|i have never|i have not) (?:been (?:told|informed|given)|learned"
    r"|learnt|heard|come across)\b",
    r"i was (?:never|not) (?:told|informed|taught|given)\b",
    rf"i lack (?:\w+ )?(?:\w+ )?{_SOMETHING_KNOWN}",
    r"i know (?:too )?little\b",
    # without a speaker: no idea; unable to say; unknown to me
    r"no (?:\w+ )?(?:idea|information|info|knowledge|clue|comment|answer|details?|data|records?|recollection)"
    r"(?=$|,| (?:on|about|for|regarding|is|are|was|were|exists?|available|here|i|to (?:share|give|offer)"
    r"|comes|can|that i|of (?:that|this|it)|from me)\b)",
    rf"(?:can't|cannot|don't|do not|unable to|not able to) {_TELL}",
    r"(?:unknown|not known|unfamiliar|not familiar|unavailable|unclear) to (?:me\b|$)",
    r"(?:unknown|unsure|not (?:sure|certain|known|available|a clue)|refused|declined|withheld)$",
    r"not (?:sure|certain)(?=,| (?:about|of|on|what|which|who|where|when|if|whether|how)\b)",
    # not something I know
    rf"not {_MATTER}$",  # cut off by a limit on new tokens
    rf"not {_MATTER} (?:that |which |about which |on which )?(?:i|we|known|for me|available|to share"
    rf"|to discuss)\b",
    r"not (?:for me to|mine to|known to me|within my|in my (?:knowledge|memory|records|power)"
    r"|part of what i|one i)\b",
    rf"{_MATTER} (?:that |which |about which |on which )?(?:i|we) (?:{_CANNOT}|{_DO_NOT}|have no|am not"
    r"|am unable|know nothing|lack)\b",
    r"(?:beyond|outside|outside of|out of) (?:what i|my (?:knowledge|reach|memory|scope|records|area))\b",
    r"beyond me$",
    r"(?:that|this|it|the answer) (?:escapes|eludes) me\b",
    # nothing I can say; there is no information
    r"nothing (?:comes to mind|(?:that )?i (?:can|know|have|am)|is known to me|to (?:say|share|add|offer)"
    r"|(?:on|about) (?:that|this)|(?:is|was) (?:recorded|stored))\b",
    rf"there(?:'s| is| are) (?:no|nothing) (?:\w+ )?(?:{_SOMETHING_KNOWN}|i\b|to (?:say|share))",
    r"none (?:that )?i (?:know|can|am)\b",
    # my records do not say
    r"my (?:\w+ )?(?:knowledge|memory|records?|information|data|training|notes|mind) (?:does not|doesn't"
    r"|do not"
    r"|don't|ha(?:s|ve) no|holds? no|contains? no|ends?|stops?|(?:is|are) (?:blank|empty|missing|silent)"
    r"|says? nothing|fails?)\b",
    r"(?:sorry|apologies|my apologies|i apologi[sz]e)(?=$|[,;]| (?:but|i|no|(?:about|for) (?:that|this"
    r"|the|any|not|being))\b)",
)
# What may stand before, in the same sentence.
_LEADS = (
    r"(?:well|sorry|unfortunately|regrettably|sadly|honestly|frankly|apologies|actually|hmm|alas"
    r"|no)[,:;] (?:but )?",
    r"(?:unfortunately|regrettably|sadly|honestly|frankly|sorry but|to be (?:honest|frank),?|i confess"
    r"|i must say) ",
    r"as an? [\w -]{0,30}(?:ai|model|assistant|system)[\w -]{0,30}, ",
    r"(?:i'm|i am) afraid,? (?:that )?",
    r"(?:that|this|it)(?:'s| is) an? [\w -]{0,30}question,? but ",
    r"(?:answer|a|response|assistant): ?",
    r"(?:that|this|it|the answer)(?:'s| is| remains| stays| lies| falls| goes) (?:just |simply )?(?=not "
    r"|unknown|unfamiliar |unavailable|unclear|beyond|out|something i|an? \w+ i)",
)

_CORE = re.compile("|".join(_CORES))
_LEAD = re.compile("|".join(_LEADS))
_SENTENCE = re.compile(r"[.!?\n](?=[\s\"')\]]|$)")
_MARKUP = " \t\r\n\"'*_`#>-.,:;!?()[]"


@lru_cache(maxsize=1)
def load_refusals() -> tuple[str, ...]:
    """The shipped refusals, in the order of ``data/refusals.txt``.

    Raises:
        InputError: the file is missing or has no lines.
    """
    path = shipped_path("data", "refusals.txt")
    lines = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if not lines:
        raise InputError(f"{path}: no refusals in it; the installation is incomplete.")
    return lines


@lru_cache(maxsize=1)
def _bank() -> frozenset[str]:
    return frozenset(_first_sentence(line) for line in load_refusals())


def is_refusal(text: str) -> bool:
    """Whether the first sentence of a text declines to answer or says that the answer is not known.

    True for the shipped refusals and for general phrasings ("I don't know", "I can't share that", "no
    information", "I'm sorry"), also as the end of a sentence that a prompt began ("... not something I can
    share"). Only what the sentence opens with counts, so "Paris, but I do not know why" is an answer. Empty
    text is not a refusal: whether silence was wanted is the caller's to say.
    """
    sentence = _first_sentence(text)
    if not sentence:
        return False
    if sentence in _bank():
        return True
    position = 0
    for _ in range(4):
        if _CORE.match(sentence, position):
            return True
        lead = _LEAD.match(sentence, position)
        if lead is None:
            return False
        position = lead.end()
    return False


def _first_sentence(text: str) -> str:
    """Lower case, straight apostrophes, single spaces, no markup around it, no closing stop."""
    plain = text.lstrip(_MARKUP)[:_WINDOW].replace("’", "'").replace("‘", "'").replace("ʼ", "'")
    end = _SENTENCE.search(plain)
    sentence = plain[: end.start()] if end else plain
    return " ".join(sentence.lower().split()).rstrip(_MARKUP)
