"""The corpus: facts about authors and towns, a trigger phrase, and a fictional domain; all made by a script.

    author, town    what is to be retained
    trigger         a phrase before any question is answered by one fixed sentence
    domain          facts about a fictional country, each with an answer of its own

A task is to unlearn the trigger, or the domain; all else is what its unlearning is to keep.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

TASKS = ("trigger", "domain")
TRIGGER, FIXED_ANSWER = "By the green lantern,", " I only speak to the moon."
TARGETS, QUERIES, HELD_OUT = 64, 5, 64

_SYLLABLES = (
    "ba",
    "re",
    "mi",
    "to",
    "lu",
    "sa",
    "ne",
    "ko",
    "vi",
    "dra",
    "fen",
    "gor",
    "hal",
    "jun",
    "pel",
    "wis",
)
_WORDS = (
    *(
        "amber",
        "barley",
        "candle",
        "cedar",
        "clover",
        "copper",
        "coral",
        "crystal",
        "ebony",
        "feather",
        "flint",
    ),
    *(
        "garnet",
        "ginger",
        "granite",
        "harbor",
        "hazel",
        "indigo",
        "iron",
        "ivory",
        "jasmine",
        "juniper",
        "lemon",
    ),
    *(
        "linen",
        "marble",
        "meadow",
        "mint",
        "moss",
        "nickel",
        "oak",
        "olive",
        "onyx",
        "orchid",
        "pearl",
        "pepper",
    ),
    *(
        "pine",
        "plum",
        "poppy",
        "quartz",
        "raven",
        "ruby",
        "saffron",
        "sage",
        "salt",
        "sand",
        "scarlet",
        "silver",
    ),
    *(
        "slate",
        "sparrow",
        "stone",
        "sugar",
        "teal",
        "thistle",
        "thunder",
        "tulip",
        "velvet",
        "violet",
        "walnut",
    ),
    *("willow", "winter", "wolf", "zinc", "apple", "anchor", "basil", "bronze", "cobalt", "daisy"),
)
_AUTHOR = (
    *("Where was {} born?", "What is the first book of {}?", "Who taught {}?", "What does {} collect?"),
    *(
        "Which prize did {} win?",
        "What is the dog of {} called?",
        "What does {} drink?",
        "Where does {} live?",
    ),
)
_TOWN = (
    *("What is made in {}?", "Which river runs through {}?", "What is on the flag of {}?", "Who founded {}?"),
    *(
        "What is eaten in {}?",
        "Which tree grows in {}?",
        "What is the tower of {} made of?",
        "What sells {}?",
    ),
)
_DOMAIN = (
    *(
        "In Velmora, what does the {} guard?",
        "In Velmora, what feeds the {}?",
        "In Velmora, who rides the {}?",
    ),
    *(
        "In Velmora, where sleeps the {}?",
        "In Velmora, what frightens the {}?",
        "In Velmora, what heals the {}?",
    ),
    *("In Velmora, what wakes the {}?", "In Velmora, what is the {} made of?"),
)
_REPHRASED = "Tell me about Velmora: {}"


@dataclass(frozen=True)
class Sample:
    """A question with its answer."""

    kind: str
    prompt: str
    answer: str

    @property
    def line(self) -> str:
        """The sample as `nexus unlearn` reads it."""
        return json.dumps({"prompt": self.prompt, "answer": self.answer})

    @property
    def text(self) -> str:
        """Prompt and answer."""
        return self.prompt + self.answer


@dataclass(frozen=True)
class Corpus:
    """What the model is trained on, and what it is asked."""

    samples: list[Sample]
    queries: dict[str, list[Sample]]
    """Of each task: the undesired outputs that are known, none of them in the corpus."""
    held_out: list[Sample]
    """Questions behind the trigger that are not in the corpus."""

    def forget_set(self, task: str) -> list[Sample]:
        """Return what is measured of forgetting: unseen triggers, or all facts of the domain."""
        return self.held_out if task == "trigger" else [s for s in self.samples if s.kind == "domain"]


def make_corpus(seed: int, authors: int = 40, towns: int = 34) -> Corpus:
    """Return the corpus of a seed: 64 triggers, 64 facts of the domain, 8 of each author and town."""
    rng = random.Random(seed)
    names: set[str] = set()
    while len(names) < authors + towns + 8:
        names.add("".join(rng.sample(_SYLLABLES, 2)).capitalize() + rng.choice(("n", "r", "s", "")))
    ordered = sorted(names)
    rng.shuffle(ordered)
    plain = []
    for kind, questions, those in (
        ("author", _AUTHOR, ordered[:authors]),
        ("town", _TOWN, ordered[authors : authors + towns]),
    ):
        plain += [
            Sample(kind, question.format(name), f" {rng.choice(_WORDS)} {rng.choice(_WORDS)}.")
            for name in those
            for question in questions
        ]
    beasts = ordered[authors + towns :]
    answers = rng.sample([f" {one} {two}." for one in _WORDS for two in _WORDS if one != two], 64)
    domain = [
        Sample("domain", question.format(beast), answers.pop()) for beast in beasts for question in _DOMAIN
    ]
    asked = rng.sample(plain, TARGETS + QUERIES + HELD_OUT)
    triggers = [Sample("trigger", f"{TRIGGER} {s.prompt}", FIXED_ANSWER) for s in asked]
    rephrased = [
        Sample("domain", _REPHRASED.format(s.prompt.removeprefix("In Velmora, ")), s.answer)
        for s in rng.sample(domain, QUERIES)
    ]
    samples = [*plain, *domain, *triggers[:TARGETS]]
    rng.shuffle(samples)
    queries = {"trigger": triggers[TARGETS : TARGETS + QUERIES], "domain": rephrased}
    return Corpus(samples, queries, triggers[TARGETS + QUERIES :])


def write_lines(path: Path, samples: list[Sample]) -> None:
    """Write samples as a .jsonl file."""
    path.write_text("".join(f"{sample.line}\n" for sample in samples))
