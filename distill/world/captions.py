"""Captions of the tiny world: writes them, parses them, and lists their vocabulary."""

import re

import numpy as np

from distill.world.scenes import Kind, Relation, Requirement, World, WorldError

OPENINGS = ("a picture of", "a drawing of", "an image of")
COUNT_WORDS = {2: ("two", "2"), 3: ("three", "3"), 4: ("four", "4")}
RELATION_WORDS: dict[Relation, tuple[str, ...]] = {
    "left": ("to the left of", "left of", "on the left of"),
    "right": ("to the right of", "right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
SYNONYMS = {"small": ("small", "little"), "big": ("big", "large"), "gray": ("gray", "grey")}
BACKGROUND_PHRASES = ("on a {} background", "on {}", "with a {} background")

_PLAIN = 0.64  # share of captions without an opening
_TERSE = 0.12  # share of captions without articles, among those without an opening


def _choose(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _spellings(word: str) -> tuple[str, ...]:
    return SYNONYMS.get(word, (word,))


def _with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def caption_of(requirement: Requirement, rng: np.random.Generator) -> str:
    """Phrases a requirement at random: lower case, no punctuation, at most 20 words."""
    opening = "" if rng.random() < _PLAIN else _choose(rng, OPENINGS)
    terse = not opening and rng.random() < _TERSE
    first, count = requirement.things[0], len(requirement.things)
    if count > 1 and len(set(requirement.things)) == 1:
        subject = f"{_choose(rng, COUNT_WORDS[count])} {first.colour} {first.shape}s"
    else:
        size = f"{_choose(rng, _spellings(requirement.size))} " if requirement.size else ""
        nouns = [f"{size}{thing.colour} {thing.shape}" for thing in requirement.things]
        if not terse:
            nouns = [_with_article(noun) for noun in nouns]
            if count == 1 and rng.random() < 0.15:
                nouns = [f"one {size}{first.colour} {first.shape}"]
        link = _choose(rng, RELATION_WORDS[requirement.relation]) if requirement.relation else "and"
        subject = f" {link} ".join(nouns)
    words = [opening, subject] if opening else [subject]
    if requirement.background:
        words.append(_choose(rng, BACKGROUND_PHRASES).format(_choose(rng, _spellings(requirement.background))))
    return " ".join(words)


def vocabulary(world: World) -> list[str]:
    """Returns every word of this world's captions, sorted, for a word-level tokenizer."""
    phrases = [*OPENINGS, "a an one and", *BACKGROUND_PHRASES]
    phrases += [word for relation in world.relations for word in RELATION_WORDS[relation]]
    phrases += [word for layout in world.count_layouts for word in COUNT_WORDS[len(layout)]]
    phrases += [f"{shape} {shape}s" for shape in world.shapes]
    names = [name for name, _ in (*world.colours, *world.backgrounds, *world.sizes)]
    phrases += [word for name in names for word in _spellings(name)]
    return sorted(set(" ".join(phrases).replace("{}", "").split()))


def parse_caption(caption: str, world: World | None = None) -> Requirement:
    """Parses any caption that `caption_of` writes, in any case, with or without a final stop.

    Raises WorldError for other captions. The world is the shipped one when None.
    """
    world = world or World()
    text = " ".join(caption.lower().replace(",", " ").strip(" .!").split())
    for opening in OPENINGS:
        text = text.removeprefix(f"{opening} ")
    text, background = _split_background(text, world)
    for relation, phrases in RELATION_WORDS.items():
        for phrase in sorted(phrases, key=len, reverse=True):
            sides = text.split(f" {phrase} ")
            if relation in world.relations and len(sides) == 2:
                things = tuple(_parse_thing(side, caption, world)[0] for side in sides)
                return Requirement(things, relation=relation, background=background)
    if " and " in text:
        things = tuple(_parse_thing(side, caption, world)[0] for side in text.split(" and "))
        return Requirement(things, background=background)
    for layout in world.count_layouts:
        for word in COUNT_WORDS[len(layout)]:
            if text.startswith(f"{word} ") and text.endswith("s"):
                kind, _ = _parse_thing(text[len(word) + 1 : -1], caption, world)
                return Requirement((kind,) * len(layout), background=background)
    kind, size = _parse_thing(text, caption, world)
    return Requirement((kind,), size=size, background=background)


def _split_background(text: str, world: World) -> tuple[str, str | None]:
    names = {word: name for name, _ in world.backgrounds for word in _spellings(name)}
    for phrase in BACKGROUND_PHRASES:
        match = re.fullmatch(f"(.+) {phrase.format('(' + '|'.join(names) + ')')}", text)
        if match:
            return match.group(1), names[match.group(2)]
    return text, None


def _parse_thing(text: str, caption: str, world: World) -> tuple[Kind, str | None]:
    """Parses "[a|an|one] [size] colour shape" into colour and shape, and the size or None."""
    words = text.split()
    if words and words[0] in ("a", "an", "one"):
        words = words[1:]
    sizes = {word: name for name, _ in world.sizes for word in _spellings(name)}
    size = sizes[words.pop(0)] if words and words[0] in sizes else None
    colours = [name for name, _ in world.colours]
    if len(words) != 2 or words[0] not in colours or words[1] not in world.shapes:
        raise WorldError(
            f"caption: got {caption!r}; {text!r} is not [a] [{'|'.join(sizes)}] colour shape "
            f"with colours {', '.join(colours)} and shapes {', '.join(world.shapes)}"
        )
    return Kind(words[0], words[1]), size
