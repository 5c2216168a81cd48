"""BABILong, tasks qa1 to qa5: facts of a small world among the sentences of a long text.

From the public files, or from worlds of our own with the same places, people and phrases. Source:
arXiv 2406.10149 (prompts and scorer: booydar/babilong); bAbI, arXiv 1502.05698, section 3.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from star_attention.evals import metrics
from star_attention.evals.maker import Draft, SampleMaker
from star_attention.evals.prompts import PromptTokenizer
from star_attention.evals.sample import Sample, Task
from star_attention.evals.texts import field_of, find_haystack, read_rows, split_sentences

MAX_TOKENS = 128

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk")
GIVERS = ("Bill", "Fred", "Jeff", "Mary")
PEOPLE = ("Daniel", "John", "Mary", "Sandra")
MOVES = ("moved to", "went to", "went back to", "journeyed to", "travelled to")
TAKES = ("took", "got", "grabbed", "picked up")
DROPS = ("left", "dropped", "discarded", "put down")
GIVES = ("gave", "handed", "passed")
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}

_CARRYING = (
    "You need to answer the question based only on the information from the facts.\n"
    "If a person got an item in the first location and travelled to the second location the item "
    "is also in the second location. If a person dropped an item in the first location and moved "
    "to the second location the item remains in the first location."
)
# Task -> instruction, examples, what to write.
PROMPTS = {
    "qa1": (
        "I will give you context with the facts about positions of different persons hidden in "
        "some random text and a question. You need to answer the question based only on the "
        "information from the facts. If a person was in different locations, use the latest "
        "location to answer the question.",
        "<example>\nCharlie went to the hallway. Judith come back to the kitchen. Charlie "
        "travelled to balcony. Where is Charlie?\nAnswer: The most recent location of Charlie is "
        "balcony.\n</example>\n\n<example>\nAlan moved to the garage. Charlie went to the beach. "
        "Alan went to the shop. Rouse travelled to balcony. Where is Alan?\nAnswer: The most "
        "recent location of Alan is shop.\n</example>",
        "Always return your answer in the following format: The most recent location of ’person’ "  # noqa: RUF001
        "is ’location’. Do not write anything else after that.",  # noqa: RUF001
    ),
    "qa2": (
        "I give you context with the facts about locations and actions of different persons hidden "
        f"in some random text and a question.{_CARRYING}",
        "<example>\nCharlie went to the kitchen. Charlie got a bottle. Charlie moved to the "
        "balcony. Where is the bottle?\nAnswer: The bottle is in the balcony.\n</example>\n"
        "<example>\nAlan moved to the garage. Alan got a screw driver. Alan moved to the kitchen. "
        "Where is the screw driver?\nAnswer: The screw driver is in the kitchen.\n</example>",
        "Always return your answer in the following format: The ’item’ is in ’location’. Do not "  # noqa: RUF001
        "write anything else after that.",
    ),
    "qa3": (
        "I give you context with the facts about locations and actions of different persons hidden "
        f"in some random text and a question. {_CARRYING}",
        "<example>\nJohn journeyed to the bedroom. Mary grabbed the apple. Mary went back to the "
        "bathroom. Daniel journeyed to the bedroom. Daniel moved to the garden. Mary travelled to "
        "the kitchen. Where was the apple before the kitchen?\nAnswer: Before the kitchen the "
        "apple was in the bathroom.\n</example>\n<example>\nJohn went back to the bedroom. John "
        "went back to the garden. John went back to the kitchen. Sandra took the football. Sandra "
        "travelled to the garden. Sandra journeyed to the bedroom. Where was the football before "
        "the bedroom?\nAnswer: Before the bedroom the football was in the garden.\n</example>",
        "Always return your answer in the following format: Before the $location_1$ the $item$ was "
        "in the $location_2$. Do not write anything else after that.",
    ),
    "qa4": (
        "I will give you context with the facts about different people, their location and "
        "actions, hidden in some random text and a question. You need to answer the question based "
        "only on the information from the facts.",
        "<example>\nThe hallway is south of the kitchen. The bedroom is north of the kitchen. What "
        "is the kitchen south of?\nAnswer: bedroom\n</example>\n<example>\nThe garden is west of "
        "the bedroom. The bedroom is west of the kitchen. What is west of the bedroom?\nAnswer: "
        "garden\n</example>",
        "Your answer should contain only one word - location. Do not write anything else after "
        "that.",
    ),
    "qa5": (
        "I will give you context with the facts about locations and their relations hidden in some "
        "random text and a question. You need to answer the question based only on the information "
        "from the facts.",
        "<example>\nMary picked up the apple there. Mary gave the apple to Fred. Mary moved to the "
        "bedroom. Bill took the milk there. Who did Mary give the apple to?\nAnswer: Fred\n"
        "</example>\n<example>\nJeff took the football there. Jeff passed the football to Fred. "
        "Jeff got the milk there. Bill travelled to the bedroom. Who gave the football?\nAnswer: "
        "Jeff\n</example>\n<example>\nFred picked up the apple there. Fred handed the apple to "
        "Bill. Bill journeyed to the bedroom. Jeff went back to the garden. What did Fred give to "
        "Bill?\nAnswer: apple\n</example>",
        "Your answer should contain only one word. Do not write anything else after that. Do not "
        "explain your answer.",
    ),
}
TASKS = dict.fromkeys(PROMPTS, MAX_TOKENS)
LABELS = {**dict.fromkeys(PROMPTS, PLACES), "qa5": GIVERS + THINGS}


@dataclass(frozen=True)
class Story:
    """Facts in the order they happen, a question about them, and its answer."""

    facts: list[str]
    question: str
    answer: str


@dataclass
class World:
    """People who move about and carry things; writes each thing that happens as a fact.

    Attributes:
        at: where a person is.
        holder: who carries a thing.
        path: the places a thing has been in, in order.
        gifts: (giver, thing, receiver), in order.
    """

    rng: random.Random
    people: Sequence[str]
    facts: list[str] = field(default_factory=list)
    at: dict[str, str] = field(default_factory=dict)
    holder: dict[str, str] = field(default_factory=dict)
    path: dict[str, list[str]] = field(default_factory=dict)
    gifts: list[tuple[str, str, str]] = field(default_factory=list)

    def move(self) -> None:
        person = self.rng.choice(self.people)
        place = self.rng.choice([place for place in PLACES if place != self.at.get(person)])
        self.at[person] = place
        self.facts.append(f"{person} {self.rng.choice(MOVES)} the {place}.")
        for thing, holder in self.holder.items():
            if holder == person:
                self.path[thing].append(place)

    def take(self) -> None:
        """Someone takes a thing that lies where they are, or that nobody has seen yet."""
        options = [
            (person, thing)
            for person, place in self.at.items()
            for thing in THINGS
            if thing not in self.holder and self.path.get(thing, [place])[-1] == place
        ]
        if options:
            person, thing = self.rng.choice(options)
            self.holder[thing] = person
            self.path.setdefault(thing, [self.at[person]])
            self.facts.append(f"{person} {self.rng.choice(TAKES)} the {thing} there.")

    def drop(self) -> None:
        if self.holder:
            thing, person = self.rng.choice(list(self.holder.items()))
            del self.holder[thing]
            self.facts.append(f"{person} {self.rng.choice(DROPS)} the {thing}.")

    def give(self) -> None:
        """Someone gives a thing to a person in the same place."""
        options = [
            (giver, thing, receiver)
            for thing, giver in self.holder.items()
            for receiver, place in self.at.items()
            if receiver != giver and place == self.at[giver]
        ]
        if options:
            giver, thing, receiver = self.rng.choice(options)
            self.holder[thing] = receiver
            self.gifts.append((giver, thing, receiver))
            self.facts.append(f"{giver} {self.rng.choice(GIVES)} the {thing} to {receiver}.")

    def live(
        self, events: Sequence[Callable[[], None]], facts: int, ask: Callable[[], Story | None]
    ) -> Story:
        """Lets things happen, `facts` of them at least, until there is something to ask."""
        while True:
            self.rng.choice(events)()
            story = ask() if len(self.facts) >= facts else None
            if story is not None:
                return story


def tell(task: str, rng: random.Random) -> Story:
    """A story of task `qa1` to `qa5`, with one right answer."""
    if task == "qa4":
        return _directions(rng)
    world = World(rng, GIVERS if task == "qa5" else PEOPLE)

    def where_is_person() -> Story:
        person = rng.choice(list(world.at))
        return Story(world.facts, f"Where is {person}?", world.at[person])

    def where_is_thing() -> Story | None:
        if not world.path:
            return None
        thing = rng.choice(list(world.path))
        return Story(world.facts, f"Where is the {thing}?", world.path[thing][-1])

    def where_was_thing() -> Story | None:
        options = [
            (thing, before, place)
            for thing, path in world.path.items()
            for before, place in pairwise(path)
            if path.count(place) == 1
        ]
        if not options:
            return None
        thing, before, place = rng.choice(options)
        return Story(world.facts, f"Where was the {thing} before the {place}?", before)

    def who_gave() -> Story | None:
        options = [
            (question, answer)
            for gift in world.gifts
            for question, answer, known in _about(gift)
            if len({other for other in world.gifts if known <= set(other)}) == 1
        ]
        if not options:
            return None
        question, answer = rng.choice(options)
        return Story(world.facts, question, answer)

    carrying = [world.move, world.move, world.take, world.drop]
    if task == "qa1":
        return world.live([world.move], rng.randint(2, 10), where_is_person)
    if task == "qa2":
        return world.live(carrying, rng.randint(2, 16), where_is_thing)
    if task == "qa3":
        return world.live(carrying, rng.randint(4, 24), where_was_thing)
    events = [world.move, world.take, world.give, world.give, world.drop]
    return world.live(events, rng.randint(2, 16), who_gave)


def _about(gift: tuple[str, str, str]) -> list[tuple[str, str, set[str]]]:
    """Questions about a gift: (question, answer, what the question names)."""
    giver, thing, receiver = gift
    return [
        (f"What did {giver} give to {receiver}?", thing, {giver, receiver}),
        (f"Who did {giver} give the {thing} to?", receiver, {giver, thing}),
        (f"Who gave the {thing} to {receiver}?", giver, {thing, receiver}),
        (f"Who gave the {thing}?", giver, {thing}),
        (f"Who received the {thing}?", receiver, {thing}),
    ]


def _directions(rng: random.Random) -> Story:
    """Two rooms on opposite sides of a third, in either wording."""
    first, middle, last = rng.sample(PLACES, 3)
    side = rng.choice(list(OPPOSITE))

    def fact(place: str, direction: str, of: str) -> str:
        if rng.random() < 0.5:
            place, direction, of = of, OPPOSITE[direction], place
        return f"The {place} is {direction} of the {of}."

    facts = [fact(first, side, middle), fact(middle, side, last)]
    rng.shuffle(facts)
    answer, direction = (first, side) if rng.random() < 0.5 else (last, OPPOSITE[side])
    question = f"What is {direction} of the {middle}?"
    if rng.random() < 0.5:
        question = f"What is the {middle} {OPPOSITE[direction]} of?"
    return Story(facts, question, answer)


def hidden_story(task: str, data_dir: Path | None) -> Draft:
    """The facts of a story, in order, between the sentences of a text that begins anywhere. The
    size of the haystack is in characters."""
    haystack = find_haystack(data_dir)

    def draft(rng: random.Random, index: int, size: int) -> Sample:
        story = tell(task, rng)
        start = haystack.text.find(" ", rng.randrange(len(haystack.text) // 2)) + 1
        sentences = split_sentences(haystack.cut(size, start))
        places = sorted(rng.randrange(len(sentences) + 1) for _ in story.facts)
        for place, fact in sorted(zip(places, range(len(places)), strict=True), reverse=True):
            sentences.insert(place, story.facts[fact])
        return _sample(task, index, " ".join(sentences), story.question, story.answer)

    return draft


def load_task(
    name: str, prompts: PromptTokenizer, length: int, seed: int, data_dir: Path | None
) -> Task:
    """A task of BABILong: from the public file of this length, `data/qa1/16k.json` in `data_dir`,
    where it exists; otherwise generated, `length` tokens long, answer included.

    Raises:
        UserError: the length is below what the task needs, or the file is not as expected.
    """

    def score(prediction: str, sample: Sample) -> float:
        question = sample.query.removeprefix("Question: ")
        return metrics.only_label(prediction, sample.outputs[0], question, LABELS[name])

    path = public_file(name, length, data_dir)
    if path is None:
        draft = hidden_story(name, data_dir)
        maker = SampleMaker(name, draft, prompts, length, MAX_TOKENS, 500, f"babilong/{seed}")
        return Task(name, length, MAX_TOKENS, score, maker)
    rows = read_rows(path)

    def from_file(index: int) -> Sample:
        fields = (field_of(rows[index], key, path) for key in ("input", "question", "target"))
        return _sample(name, index, *fields)

    return Task(name, length, MAX_TOKENS, score, from_file, range(len(rows)))


def data_label(data_dir: Path | None) -> str:
    label = f"text: {find_haystack(data_dir).label}"
    has_files = data_dir is not None and (data_dir / "data").is_dir()
    return f"public files where there are, else {label}" if has_files else label


def public_file(name: str, length: int, data_dir: Path | None) -> Path | None:
    size = f"{length >> 20}M" if length >= 1 << 20 else f"{length >> 10}k"
    path = (data_dir or Path()) / "data" / name / f"{size}.json"
    return path if data_dir is not None and path.exists() else None


def _sample(task: str, index: int, text: str, question: str, answer: str) -> Sample:
    instruction, examples, form = PROMPTS[task]
    context = f"{instruction}\n\n{examples}\n\n{form}\n\n<context>\n{text.strip()}\n</context>\n\n"
    return Sample(index, context, f"Question: {question.strip()}", [answer])
