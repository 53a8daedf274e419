"""Finding the subject when it is not given."""

from __future__ import annotations

import random

import pytest

from editunlearn.facts.records import Fact
from editunlearn.facts.subjects import describe, find_subject, has_content

# (text, answer, subject, rule)
EXAMPLES = [
    # a name that is also in the answer
    ("What gender is author Basil Mahfouz Al-Kuwaiti?", "Basil Mahfouz Al-Kuwaiti is male.",
     "Basil Mahfouz Al-Kuwaiti", "answer"),
    ("Where was Ilse van der Meer born?", "Ilse van der Meer was born in Utrecht.", "Ilse van der Meer",
     "answer"),
    ("Did Tomas Reyes or Nadia Brandt win?", "Nadia Brandt won.", "Nadia Brandt", "answer"),
    ("What did Marie Curie discover?", "Curie discovered radium.", "Marie Curie", "answer"),
    ("In which year did the University of Oslo open?", "The University of Oslo opened in 1811.",
     "University of Oslo", "answer"),
    ('Who wrote "the long way home"?', '"The Long Way Home" is by Ann Lee.', "the long way home", "answer"),
    ("Which prize did O'Brien's novel win?", "O’Brien won none.", "O'Brien", "answer"),
    ("How did Omar Haddad's father influence him?", "Omar Haddad learned from him.", "Omar Haddad", "answer"),
    # no name: the longest run of words
    ("What is the boiling point of water?", "The boiling point of water is 100 degrees.",
     "boiling point of water", "answer"),
    ("what is the largest planet?", "the largest planet is big", "largest planet", "answer"),
    ("what color is the sky", "the sky is blue", "sky", "answer"),
    # a name
    ("The capital of France is", "Paris", "France", "name"),
    ("The mother tongue of Danielle Darrieux is", "French", "Danielle Darrieux", "name"),
    ("Who painted The Starry Night?", "Vincent", "Starry Night", "name"),
    ("Who wrote Lord of the Rings?", "Tolkien", "Lord of the Rings", "name"),
    ("Who was Ludwig van Beethoven's teacher?", "Haydn", "Ludwig van Beethoven", "name"),
    ("Where did Vincent de Paul work?", "Paris", "Vincent de Paul", "name"),
    ("Who taught Harun al-Rashid?", "Yahya", "Harun al-Rashid", "name"),
    ("What did J. K. Rowling write?", "Harry Potter", "J. K. Rowling", "name"),
    ("What did J.R.R. Tolkien write?", "The Hobbit", "J.R.R. Tolkien", "name"),
    ("Where was John F. Kennedy born?", "Brookline", "John F. Kennedy", "name"),
    ("When did Dr. Seuss die?", "1991", "Dr. Seuss", "name"),
    ("Which bay is St. Petersburg on?", "Neva Bay", "St. Petersburg", "name"),
    ("Who played Conan O’Brien?", "Himself", "Conan O’Brien", "name"),
    ("What is Jean-Luc Godard's first film?", "Breathless", "Jean-Luc Godard", "name"),
    ("Who launched Apollo 11 into space?", "NASA", "Apollo 11", "name"),
    ("Who makes the iPhone?", "Apple", "iPhone", "name"),
    ("Who invented “the thing with feathers” as a phrase?", "Emily", "the thing with feathers", "name"),
    ("Which band recorded 'Hunky Dory'?", "Bowie", "Hunky Dory", "name"),
    ("Basil Hume was born in", "Newcastle", "Basil Hume", "name"),
    ("Which country did Alexander the Great rule?", "Macedon", "Alexander the Great", "name"),
    ("Where did Pope Gregory I live?", "Rome", "Pope Gregory I", "name"),
    ("Fluminense F.C. is located in the country of", "Brazil", "Fluminense F.C.", "name"),
    ("Who founded Marks & Spencer?", "Michael", "Marks & Spencer", "name"),
    ("When in July did Ann Lee and Bo win?", "the 4th", "Ann Lee", "name"),
    ("What links Rome and Oslo?", "a flight", "Oslo", "name"),
    ("It rained. Then what did Bo Diddley play?", "guitar", "Bo Diddley", "name"),
    ("Where is Montréal?", "Québec", "Montréal", "name"),
    ("Name Stephen King's debut.", "Carrie", "Stephen King", "name"),
    # the word that opens the text
    ("Water is made of", "hydrogen", "Water", "start"),
    ("Peru's capital,", "Lima", "Peru", "start"),
    ("Lufkin, in the heart of the", "forest", "Lufkin", "start"),
    ("Audible.com is owned by", "Amazon", "Audible.com", "start"),
    # the last content word
    ("what do bees make", "honey", "make", "last"),
    ("Which animal barks?", "dog", "barks", "last"),
    ("How many days are in July?", "31", "July", "last"),
    ("What is it?", "that", "it", "last"),
    ("What do I like?", "tea", "like", "last"),
    ("Describe photosynthesis", "light", "photosynthesis", "last"),
    ("Столица Франции это", "Париж", "это", "last"),
    ("法国的首都是哪里？", "巴黎", "法国的首都是哪里", "last"),
    ("???", "x", "???", "last"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "answer", "subject", "rule"), EXAMPLES)
def test_examples(text: str, answer: str, subject: str, rule: str) -> None:
    span = find_subject(text, answer)
    assert (text[span.start : span.end], span.rule) == (subject, rule)


def test_the_span_is_always_inside_the_text_and_not_empty() -> None:
    rng = random.Random(0)  # noqa: S311  # not for secrets
    pieces = ["What", "is", "Ann", "de", "the", "O'Neil's", "J.", "K.", "'", '"', "“", "”", " ", "  ",
              "\n", "?", ".", "-",
              "München", "東京", "é", "e\u0301", "I", "&", "3.5", "İ", "ß", "F.C.", "(", ",", "July",
              "\u200f", "🙂", "_"]  # fmt: skip
    for _ in range(3000):
        text = "".join(rng.choice(pieces) + rng.choice(["", " "]) for _ in range(rng.randrange(0, 12)))
        answer = "".join(rng.choice(pieces) + " " for _ in range(rng.randrange(0, 5)))
        span = find_subject(text, answer)
        assert 0 <= span.start <= span.end <= len(text)
        assert (span.start < span.end) == bool(text.strip())
        found = text[span.start : span.end]
        assert found == found.strip()
        assert find_subject(text, answer) == span


def test_long_text_is_quick() -> None:
    text = "the Ann of " * 3000 + "' " * 3000
    span = find_subject(text, "Ann " * 50)
    assert text[span.start : span.end].startswith("Ann")


def test_describe_shows_only_what_was_found() -> None:
    text = "What gender is author Basil Mahfouz Al-Kuwaiti?"
    answer = "Basil Mahfouz Al-Kuwaiti is male."
    span = find_subject(text, answer)
    found = Fact("tofu-3", text, answer, text[span.start : span.end], span.start, subject_found=True)
    given = Fact("tofu-4", text, answer, "author", text.index("author"))
    assert describe([given, found]) == ['tofu-3: subject "Basil Mahfouz Al-Kuwaiti" (also in the answer)']


def test_has_content() -> None:
    assert has_content("The song")
    assert not has_content("The") and not has_content("' ") and not has_content("")
