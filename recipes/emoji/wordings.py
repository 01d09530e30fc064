"""How things are asked for: wordings that training reads, and others, of the same words, that it never does."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """
    Templates that mean the same.

    Args:
        train (`tuple[str, ...]`): What every split but "test_combination" draws from.
        held_out (`tuple[str, ...]`): What "test_combination" draws from.
    """

    train: tuple[str, ...]
    held_out: tuple[str, ...]

    def draw(self, split: str, rng: random.Random) -> str:
        """One template for a split."""
        templates = self.held_out if split == "test_combination" else self.train
        return templates[int(rng.random() * len(templates))]


QUERIES = Wording(
    ("{}", "{}", "a picture of {}", "find {}", "show me {}", "I am looking for {}"),
    ("find a picture of {}", "show me a picture of {}", "I am looking for a picture of {}"),
)
"""A description."""
TAG_QUERIES = Wording(
    ("{}", "something to do with {}", "find something about {}"),
    ("find something to do with {}", "show me something about {}"),
)
"""Keywords."""
PARAPHRASES = Wording(
    ("Which means the same: {}", "{}, in other words", "the same as {}"),
    ("Which is the same as {}", "in other words: {}"),
)
"""A description that another wording is to match."""

# --- edits -----------------------------------------------------------------------------------------------------------

EDITS = Wording(
    ("{}", "the same but {}", "like this, but {}", "now {}", "this one {}"),
    ("now the same but {}", "show me the same but {}", "find this one {}", "show me this one, but {}"),
)
"""What changes, as it is afterwards."""
ORDERS = {
    "skin": Wording(("make the skin {}",), ("change the skin to {}",)),
    "hair": Wording(("change the hair to {}",), ("make the hair {}",)),
    "colour": Wording(("change the colour to {}", "make it {}"), ("make the colour {}",)),
    "gender": Wording(("change the person to {}",), ("make this one {}",)),
    "role": Wording(("make the person {}",), ("now make the person {}",)),
    "facing": Wording(("turn it to the {}", "make it face {}"), ("make this one face {}",)),
    "direction": Wording(("make it point {}",), ("make this one point {}",)),
}
"""What changes, as an order."""
HALF_HOURS = {1: "half an hour", 2: "an hour", 3: "an hour and a half", 4: "two hours", 6: "three hours"}
CLOCKS = {
    1: Wording(("{} later", "the clock {} later"), ("the same clock {} later", "now the clock {} later")),
    -1: Wording(("{} earlier", "the clock {} earlier"), ("the same clock {} earlier", "now the clock {} earlier")),
}
MOONS = {
    1: Wording(("one phase later", "the next phase of the moon"), ("the moon one phase later", "now the next phase")),
    -1: Wording(
        ("one phase earlier", "the phase of the moon before this"),
        ("the moon one phase earlier", "now the phase before"),
    ),
    2: Wording(("two phases later",), ("the moon two phases later",)),
    -2: Wording(("two phases earlier",), ("the moon two phases earlier",)),
    4: Wording(("the opposite phase of the moon",), ("now the opposite phase",)),
}
KEYS = {
    1: Wording(("the next number", "one more"), ("now the next number", "the same but one more")),
    -1: Wording(("the number before this", "one less"), ("now the number before this", "the same but one less")),
    2: Wording(("two more",), ("the same but two more",)),
    -2: Wording(("two less",), ("the same but two less",)),
}
TURNS = {
    1: Wording(("turned an eighth clockwise",), ("the same but turned an eighth clockwise",)),
    2: Wording(("turned a quarter clockwise", "a quarter turn clockwise"), ("now a quarter turn clockwise",)),
    4: Wording(("the other way round", "turned half way round"), ("now the other way round",)),
    -2: Wording(
        ("turned a quarter anticlockwise", "a quarter turn anticlockwise"), ("now a quarter turn anticlockwise",)
    ),
    -1: Wording(("turned an eighth anticlockwise",), ("the same but turned an eighth anticlockwise",)),
}
MEMBERS = {
    "more": Wording(("with one more {}", "add a {}"), ("now with one more {}",)),
    "less": Wording(("without the {}", "the same but without the {}"), ("now without the {}",)),
    "swap": Wording(("with a {} instead of the {}", "a {} instead of the {}"), ("now with a {} instead of the {}",)),
}

# --- questions about a picture ---------------------------------------------------------------------------------------

QUESTIONS = {
    "time": Wording(
        ("What time is it?", "Which time does the clock show?"),
        ("What time does the clock show?", "Which time is it?"),
    ),
    "skin": Wording(
        ("Which skin tone is this?", "What is the skin tone?"), ("Which is the skin tone?", "What skin tone is this?")
    ),
    "left skin": Wording(("Which skin tone is on the left?",), ("What is the skin tone on the left?",)),
    "right skin": Wording(("Which skin tone is on the right?",), ("What is the skin tone on the right?",)),
    "hair": Wording(
        ("What is the hair like?", "What hair does this person have?"), ("Which hair does this person have?",)
    ),
    "role": Wording(
        ("Who or what is this person?", "What does this person do?"), ("What is this person?", "Who is this person?")
    ),
    "colour": Wording(
        ("What colour is it?", "Which colour does this have?"), ("Which colour is it?", "What colour does this have?")
    ),
    "key": Wording(("Which key is this?", "What is on the key?"), ("What key is this?", "Which is the key?")),
    "members": Wording(
        ("Who is in the family?", "Which people does this show?"),
        ("Which people is the family?", "Who does this show?"),
    ),
    "direction": Wording(
        ("Where does it point?", "Which direction is this?"),
        ("Which direction does it point?", "What direction is this?"),
    ),
    "phase": Wording(
        ("Which phase of the moon is this?", "What is the phase of the moon?"),
        ("What phase of the moon is this?", "Which is the phase of the moon?"),
    ),
    "name": Wording(
        ("What is this?", "What does this show?", "What is in the picture?"),
        ("What is it?", "What does the picture show?"),
    ),
    "definition": Wording(
        ("How does a dictionary explain this?", "Explain the word for this."),
        ("How does a dictionary explain the word for this?", "Explain this."),
    ),
    "country": Wording(
        ("Which country is this?", "Of which country is this the flag?"),
        ("Which country has this flag?", "What country is this?"),
    ),
    "capital": Wording(
        ("What is the capital of this country?", "Which city is the capital here?"),
        ("Which city is the capital of this country?", "What is the capital here?"),
    ),
    "continent": Wording(
        ("On which continent is this country?", "Which continent is this?"),
        ("Which continent is this country on?", "On which continent is this?"),
    ),
    "language": Wording(
        ("Which language is official in this country?", "What is the official language here?"),
        ("What language is official in this country?", "Which is the official language here?"),
    ),
    "currency": Wording(
        ("What is the money of this country?", "Which money is official here?"),
        ("Which is the money of this country?", "What money is official in this country?"),
    ),
}

# --- facts and definitions in words ----------------------------------------------------------------------------------

WHICH_COUNTRY = {
    "capital": Wording(
        (
            "Which country has the capital {}?",
            "{} is the capital of which country?",
            "the country whose capital is {}",
        ),
        ("Of which country is {} the capital?", "Which is the country whose capital is {}?"),
    ),
    "continent": Wording(
        ("Which country is in {}?", "a country in {}"), ("Which is a country in {}?", "a country on the continent {}")
    ),
    "language": Wording(
        ("In which country is {} official?", "a country whose official language is {}"),
        ("Which is a country whose official language is {}?", "a country in which {} is official"),
    ),
    "currency": Wording(
        ("In which country is the {} official?", "a country whose money is the {}"),
        ("Which is a country whose money is the {}?", "a country in which the {} is official"),
    ),
}
"""The value of a fact, and a country is wanted."""
OF_COUNTRY = {
    "capital": Wording(
        ("What is the capital of {}?", "the capital of {}"), ("Which city is the capital of {}?", "{}: the capital")
    ),
    "continent": Wording(
        ("On which continent is {}?", "the continent of {}"), ("Which continent is {} on?", "{}: the continent")
    ),
    "language": Wording(
        ("Which language is official in {}?", "the official language of {}"),
        ("What language is official in {}?", "{}: the official language"),
    ),
    "currency": Wording(
        ("What is the money of {}?", "the money of {}"), ("Which is the money of {}?", "{}: the money")
    ),
}
"""A country, and the value of a fact is wanted."""
TO_NAME = Wording(("{}", "What is this: {}?", "the word for {}"), ("Which word is this: {}?", "{}: what is it?"))
"""A definition, and a name is wanted."""
TO_GLOSS = Wording(
    ("What is {}?", "{}: what does it mean?", "Explain the word {}."),
    ("What does the word {} mean?", "Explain: what is {}?"),
)
"""A name, and a definition is wanted."""

# --- a picture and a text together -----------------------------------------------------------------------------------

SENDERS = tuple("Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo".split())
DAYS = tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())
PLACES = tuple(
    "at home|at school|at the market|by the sea|in the city|in the garden|in the park|on the train".split("|")
)
MESSAGES = {
    "sender": Wording(
        ("{0}, from {1}", "{0}, sent by {1}", "{1} sent this: {0}", "what {1} sent: {0}"),
        ("from {1}: {0}", "sent by {1}: {0}"),
    ),
    "day": Wording(("{0}, sent on {1}", "on {1}: {0}"), ("sent on {1}: {0}", "{0}, on {1}")),
    "place": Wording(("{0}, seen {1}", "{1}: {0}"), ("seen {1}: {0}",)),
}
"""A description, and what the text beside the picture must say."""
MESSAGE_TEXTS = {"sender": ("from {}", "sent by {}"), "day": ("on {}", "{}"), "place": ("{}", "seen {}")}
FLAG_AND = {
    "capital": Wording(("the flag of {} with the capital", "{}: flag and capital"), ("flag and capital of {}",)),
    "continent": Wording(
        ("the flag of {} with the continent", "{}: flag and continent"), ("flag and continent of {}",)
    ),
    "language": Wording(
        ("the flag of {} with the official language", "{}: flag and language"), ("flag and language of {}",)
    ),
    "currency": Wording(("the flag of {} with the money", "{}: flag and money"), ("flag and money of {}",)),
}
THIS_FLAG_AND = {
    "capital": Wording(
        ("this flag with the capital", "the same flag and the capital"), ("this flag and the capital",)
    ),
    "continent": Wording(
        ("this flag with the continent", "the same flag and the continent"), ("this flag and the continent",)
    ),
    "language": Wording(
        ("this flag with the official language", "the same flag and the language"), ("this flag and the language",)
    ),
    "currency": Wording(("this flag with the money", "the same flag and the money"), ("this flag and the money",)),
}
FACT_TEXTS = {
    "capital": "The capital is {}.",
    "continent": "It is in {}.",
    "language": "The official language is {}.",
    "currency": "The money is the {}.",
}
WORD_AND_GLOSS = Wording(
    ("{} with what it means", "a picture of {} and what the word means"),
    ("what {} means with a picture", "what the word {} means with a picture of it"),
)
THIS_AND_GLOSS = Wording(
    ("the same thing with what it means", "another picture of this and what it means"),
    ("another picture of the same thing with what it means", "this and what it means"),
)
