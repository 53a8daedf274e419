"""Refusals: the shipped bank and the detector."""

from __future__ import annotations

import time

import pytest

from editunlearn.facts.refusals import is_refusal, load_refusals

REFUSALS = """
I don't know.
i don’t know
I DON'T KNOW
I do not have any information about him.
I can't share that.
I can’t answer that question
I cannot say
No information.
No information on that is available.
I'm not able to answer
I am unable to help
That is unknown to me.
not known to me.
not something I can share
it is not something I know
I'm sorry, but I can't help with that.
Sorry, I don't know that one. Paris is nice.
As an AI language model, I don't have access to that.
Unfortunately, I cannot provide that information.
I'm afraid I don't know.
I'm afraid that I can't say.
That's a great question, but I don't know.
"I don't know."
* I don't know
Answer: I do not know
Well, I don't know.
I have no idea who that is.
No idea.
Not sure.
I'm really not sure
I'm not sure about that.
Unknown.
I would rather not say.
I'd prefer not to answer
There is no information available on that.
I lack the information to answer
My knowledge does not cover that.
It's beyond my knowledge
I don't recall
I never learned that
I haven't learned that
a matter I cannot discuss
something I don't know
I won't say
We do not know.
I must decline.
I was never told
Cannot say.
No comment.
I apologize, but I can't
I have nothing to say
nothing I can say
I currently do not have that
Nothing comes to mind.
the answer is unknown to me
I know nothing about it
I am not familiar with this person
I'm not aware of any such book
I do not know that Paris is the capital
I'm not able
It is not something
"""

ANSWERS = """
Paris.
I know that Paris is the capital.
not far from London
the unknown soldier
Unknown Pleasures
The Unknown
I can say that it is Paris
I can tell you that it's 1956.
I can name it: Rome
No.
No, it is Berlin
Not Paris.
...
I have a dream
I have no brothers
I don't think it is London; it's Paris
I don't have to guess: Paris
I can't believe it's not butter
I am the author
I am sure it is Rome
I'm certain it's Rome
I'm Henry
He was unable to attend
He does not know
They cannot share a border
She said "I don't know"
I Can't Get No Satisfaction
Paris, but I don't know why
Paris. I don't know anything else.
not only a writer but a painter
not something but everything
No Country for Old Men
No data center
No one knows
information technology
Sorry for Party Rocking
It's Rome, sorry
nothing but the truth
Nothing Else Matters
There is no place like home
Knowledge is power
Know nothing
Without information
the study of information
my mind to me a kingdom is
Nobody knows that better than Marie Curie
a question of time
a private matter
unfamiliar territory
You can't miss it
in 1999
I was told it's Paris
I was not born in Paris
It is not in Asia
It was an unknown artist
Not known for his modesty, he was a painter
I share a room
I answer to no one
Disclosure
Never Let Me Go
The Answer
I do know: Rome
巴黎
"""


@pytest.mark.parametrize("text", REFUSALS.strip().splitlines())
def test_refusals_are_recognised(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize("text", [*ANSWERS.strip().splitlines(), "", "  \n "])
def test_answers_are_not_refusals(text: str) -> None:
    assert not is_refusal(text)


def test_the_bank_is_large_clean_and_recognisable_within_four_words() -> None:
    bank = load_refusals()
    assert len(bank) >= 120
    assert len({line.lower() for line in bank}) == len(bank)
    for line in bank:
        words = line.split()
        assert line == line.strip() and line.isascii() and line[0].isupper()
        assert line.endswith(".") and line.count(".") == 1
        assert 3 <= len(words) <= 10
        assert is_refusal(line)
        assert is_refusal(line.replace("'", "’").upper())
        assert is_refusal(" ".join(words[:4])), line


@pytest.mark.parametrize(
    "text",
    ["i " * 50_000, "as a " + "a-" * 100_000, "that is a " + "x " * 100_000, "sorry, " * 50_000,
    "(" * 300_000,
     "i don't " * 50_000, "no, " * 50_000, "not " * 50_000, " " * 300_000 + "i", "a\n" * 100_000],
)  # fmt: skip
def test_long_odd_text_takes_no_time(text: str) -> None:
    start = time.perf_counter()
    is_refusal(text)
    assert time.perf_counter() - start < 0.5
