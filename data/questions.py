"""Questions about scenes and their answers, in CLEVR's manner (arXiv:1612.06890), and how far a blind guesser gets.

Five families with answers of one word: count, exist, attribute, compare, spatial. Whatever "the" speaks of is the only
object of that description. Left, right, behind and in front are those of the picture, of the objects' centres, and only
asked about where they differ by more than half a place. The sixth, describe, asks for everything, because a word teaches
a model too little about a picture: every conversation has it, as its last turn, so that it gives no answer away.

    python data/scenes.py --qa                       # scenes with questions -> data/qa64
    python data/questions.py                         # from these, the blind guesser's table in data/frozen/README.md
"""
import functools
import itertools
import re
import sys
from collections import Counter, defaultdict

import numpy as np

import shards
import tokenizer
from raycaster import COLORS, MATERIALS, SHAPES, SIZES
from reports import write_sections
from texts import noun

VERSION = 2  # of what is asked about a scene; raise it and every frozen number of the qa set is void
VALUES = {"size": SIZES, "color": tuple(COLORS), "material": MATERIALS, "shape": SHAPES}  # in the order they are said
KIND = {word: name for name, words in VALUES.items() for word in words}
RELATIONS = {"left of": ("x", -1), "right of": ("x", 1), "behind": ("y", -1), "in front of": ("y", 1)}
MARGIN = 100 / 8 / 2  # percent of the frame, half a place
FEWEST, MOST = 2, 4  # turns per scene with answers of one word, each of another family
DESCRIBE_FIRST = 4  # in one training conversation of so many describe is the first turn, as users ask it
TRIES = 12  # questions drawn from a template for each one asked, the one with the rarest answer
# {a}, {b}: descriptions; {q}: one of VALUES; {r}: one of RELATIONS; {t}: object or thing
PHRASES = {
    "count": {"count": ("How many {a}s are there?", "What number of {a}s are there?", "How many {a}s can you see?"),
              "count like": ("How many other {t}s have the {q} of the {a}?",
                             "What number of other {t}s have the {q} of the {a}?")},
    "exist": {"exist": ("Is there a {a}?", "Are there any {a}s?", "Can you see a {a}?"),
              "exist like": ("Does another {t} have the {q} of the {a}?",
                             "Are there other {t}s that have the {q} of the {a}?")},
    "attribute": {"attribute": ("What {q} is the {a}?", "What is the {q} of the {a}?", "The {a} has what {q}?")},
    "compare": {"more": ("Are there more {a}s than {b}s?", "Is the number of {a}s greater than the number of {b}s?",
                         "Are there fewer {b}s than {a}s?", "Is the number of {b}s less than the number of {a}s?"),
                "equal": ("Are there exactly as many {a}s as {b}s?",
                          "Is the number of {a}s the same as the number of {b}s?"),
                "alike": ("Does the {a} have the same {q} as the {b}?", "Do the {a} and the {b} have the same {q}?",
                          "Is the {q} of the {a} the same as the {q} of the {b}?"),
                "larger": ("Is the {a} larger than the {b}?", "Is the {b} smaller than the {a}?")},
    "spatial": {"beside": ("Is the {a} {r} the {b}?", "Does the {a} stand {r} the {b}?"),
                "exist beside": ("Is there any {t} {r} the {a}?", "Are there any {t}s {r} the {a}?"),
                "count beside": ("How many {t}s are {r} the {a}?", "How many {t}s can you see {r} the {a}?"),
                "attribute beside": ("What {q} is the {t} {r} the {a}?", "The {t} {r} the {a} has what {q}?")},
    "describe": {"describe": ("What is there?", "What do you see?", "What is in the picture?")},
}
FAMILIES = tuple(PHRASES)  # numbered from 1 on in the shards


# ------------------------------------------------------------------------------------------------------------
# Asking

class Scene:
    """What can be said of one scene. A description is a frozenset of words; objects as texts.facts gives them."""

    def __init__(self, objects, rng):
        self.objects, self.rng = objects, rng
        self.words = [frozenset(o[name] for name in VALUES) for o in objects]
        subsets = [[frozenset(d) for n in range(5) for d in itertools.combinations(sorted(words), n)]
                   for words in self.words]
        self.names = [[d for d in each if self.count(d) == 1] for each in subsets]  # that fit one object alone

    def count(self, description):
        """How many objects fit."""
        return sum(description <= words for words in self.words)

    def name(self, k, hidden):
        """A description of object k alone that does not tell its attribute `hidden`, rather short; None if none is."""
        options = [d for d in self.names[k] if d.isdisjoint(VALUES[hidden])]
        return min(self.rng.choice(options), self.rng.choice(options), key=len) if options else None

    def group(self, least):
        """A description with `least` to 3 words, of an object or changed at random."""
        model = self.rng.choice(self.objects)
        names = self.rng.sample(list(VALUES), self.rng.randint(least, 3))
        return frozenset(model[q] if self.rng.random() < 0.6 else self.rng.choice(VALUES[q]) for q in names)

    def beyond(self, k, j, relation):
        """Whether object j is on that side of object k, e.g. left of it; None if that is not clear."""
        axis, sign = RELATIONS[relation]
        offset = sign * (self.objects[j][axis] - self.objects[k][axis])
        return offset > 0 if abs(offset) > MARGIN else None


def propose(template, q, scene):
    """Words to fill a template with, at random, and the answer: (dict of slots, answer), or None if none is clear.
    q: the attribute to ask about, where the template asks about one."""
    rng, objects = scene.rng, scene.objects

    def tell(n):
        if template.startswith("count"):
            return str(n)
        return "yes" if n else "no"

    if template in ("count", "exist"):
        a = scene.group(least=template == "exist")
        return {"a": a}, tell(scene.count(a))
    if template in ("more", "equal"):
        first, second = rng.sample((rng.choice(objects)[q], rng.choice(VALUES[q])), 2)
        common = rng.choice([(), (), (rng.choice(objects)[rng.choice([name for name in VALUES if name != q])],)])
        a, b = frozenset((first, *common)), frozenset((second, *common))
        m, n = scene.count(a), scene.count(b)
        return ({"a": a, "b": b}, tell(m > n if template == "more" else m == n)) if a != b else None
    q = "size" if template == "larger" else q
    k, *others = rng.sample(range(len(objects)), len(objects))
    a = scene.name(k, q)
    if a is None or not others and template != "attribute":
        return None
    if template == "attribute":
        return {"a": a, "q": q}, objects[k][q]
    if template in ("count like", "exist like"):
        return {"a": a, "q": q}, tell(sum(objects[j][q] == objects[k][q] for j in others))
    relation = rng.choice(list(RELATIONS))
    sides = [scene.beyond(k, j, relation) for j in others]  # is object j left of object k?
    if template in ("count beside", "exist beside"):
        return ({"a": a, "r": relation}, tell(sum(sides))) if None not in sides else None
    if template == "attribute beside":
        one = None not in sides and sum(sides) == 1
        return ({"a": a, "q": q, "r": relation}, objects[others[sides.index(True)]][q]) if one else None
    mine, theirs, b = objects[k], objects[others[0]], scene.name(others[0], q)
    if b is None or template == "beside" and sides[0] is None:
        return None
    return {"beside": ({"a": b, "b": a, "r": relation}, tell(sides[0])),
            "alike": ({"a": a, "b": b, "q": q}, tell(mine[q] == theirs[q])),
            "larger": ({"a": a, "b": b}, tell(mine["size"] == "large" and theirs["size"] == "small"))}[template]


def phrase(family, template, slots, rng):
    """The question as text."""
    thing = rng.choice(("object", "thing"))

    def say(words):
        spoken = sorted(words, key=list(KIND).index)
        return " ".join([*spoken, thing] if words.isdisjoint(SHAPES) else spoken)

    slots = {slot: value if slot in "qr" else say(value) for slot, value in slots.items()}
    if slots.get("r") in ("left of", "right of"):
        slots["r"] = rng.choice(("", "to the ")) + slots["r"]
    return rng.choice(PHRASES[family][template]).format(t=thing, **slots)


def choose(family, scene, said, asked):
    """A turn (family, question, answer), noted in `said` (descriptions) and `asked` (counts); None if none will do.
    Of some drawn at random, the one whose answer was the rarest so far; none whose answer was too frequent, and none
    with a description that is a part of one in `said`, or the other way round."""
    for template in scene.rng.sample(list(PHRASES[family]), len(PHRASES[family])):
        q, found = scene.rng.choice(list(VALUES)), []
        for slots, answer in filter(None, (propose(template, q, scene) for _ in range(TRIES))):
            kind = template, slots.get("q")
            form = template, *sorted(KIND[word] for word in slots["a"])
            spoken = [slots["a"], slots.get("b", set()), KIND.keys() & {answer}]
            repeats = any(x and y and (x <= y or y <= x) for x in spoken for y in said)
            if not repeats and asked[kind, answer] <= (asked[kind] + 4) / (3 if answer.isdigit() else 2):
                counted = family, kind, (kind, answer), (form, answer)
                found.append((asked[kind, answer] + asked[form, answer], slots, answer, spoken, counted))
        if found:
            _, slots, answer, spoken, counted = min(found, key=lambda choice: choice[0])
            said += spoken
            asked.update(counted)
            return FAMILIES.index(family) + 1, phrase(family, template, slots, scene.rng), answer


def ask(facts, rng, describe_first=DESCRIBE_FIRST):
    """Questions about scenes, each a list of objects: per scene a list of 3 to 5 turns (family, question, answer).

    describe_first: in one scene of so many describe is the first turn, 0: in none. Over all of them the families are
    even, and the answers of each template as even as the world lets them be. What a turn describes is no part of what
    another turn of the scene does, so that none simply gives away another's answer.
    """
    asked, dialogues = Counter(), []
    for objects in facts:
        scene, turns, said, wanted = Scene(objects, rng), [], [], rng.randint(FEWEST, MOST)
        for family in sorted(FAMILIES[:-1], key=lambda family: (asked[family], rng.random())):
            if len(turns) < wanted and (turn := choose(family, scene, said, asked)):
                turns.append(turn)
        rng.shuffle(turns)
        first = describe_first and rng.random() * describe_first < 1
        turns.insert(0 if first else len(turns), describe(objects, rng))
        dialogues.append(turns)
    return dialogues


def describe(objects, rng):
    """The turn that asks for every object; the answer tells them back to front, eight tokens each."""
    told = [f"{noun(o)} at x={o['x']} y={o['y']}" for o in reversed(objects)]
    return len(FAMILIES), rng.choice(PHRASES["describe"]["describe"]), ", ".join(told)


TOLD = re.compile(rf"a ({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({'|'.join(MATERIALS)}) ({'|'.join(SHAPES)}) at x=(\d+) y=(\d+)")


def parse_description(answer):
    """The objects of such an answer, those that are well formed: dicts x, y, size, color, material, shape."""
    return [{"x": int(x), "y": int(y), "size": size, "color": color, "material": material, "shape": shape}
            for size, color, material, shape, x, y in TOLD.findall(answer)]


# ------------------------------------------------------------------------------------------------------------
# Tokens, and what a blind guesser makes of them

def text(turns):
    """The turns as one text, in nanoVLM's form; every turn ends with a line end."""
    return "".join(f"Question: {question} Answer: {answer}\n" for _, question, answer in turns)


def encode(encoding, turns, length):
    """Two lists of `length`: tokens with the end token, padded; and at those of an answer and of the line end after it
    the turn's number (1 to 5), elsewhere 0. ValueError if they do not fit."""
    marks = []
    for number, (_, question, answer) in enumerate(turns, 1):
        marks += [0] * len(encoding.encode_ordinary(f"Question: {question} Answer:"))
        marks += [number] * len(encoding.encode_ordinary(f" {answer}\n"))
    return tokenizer.text_tokens(encoding, text(turns), length), marks + [0] * (length - len(marks))


def decode(rows, families):
    """All turns (family, question, answer) of token rows (N, L) with the families (N, 5) of their turns, one list."""
    turns, encoding = [], tokenizer.load_text(tokenizer.QA)
    for row, numbers in zip(rows, families):
        pairs = re.findall(r"Question: (.*) Answer: (.*)\n", tokenizer.decode_text(encoding, row))
        turns += [(int(family), *pair) for family, pair in zip(numbers, pairs)]
    return turns


def blind(known, turns):
    """Shares of answers guessed right without the picture: {family: (turns, in family, to template, to words)}.

    The guesses are the most frequent answers in `known`, also a list as decode gives it: in the family, to the same
    template, to the same words. Words that it does not have are guessed by template, and those by family.
    """
    template = functools.partial(re.compile(rf"\b({'|'.join(KIND)})(?=s?\b)").sub, lambda match: f"[{KIND[match[1]]}]")

    def keys(family, question):
        return family, (family, template(question)), (family, question)

    seen, right = defaultdict(Counter), defaultdict(list)
    for family, question, answer in known:
        for key in keys(family, question):
            seen[key][answer] += 1
    for family, question, answer in turns:
        guesses = [seen[key].most_common(1)[0][0] for key in keys(family, question) if key in seen] or [None]
        right[family].append([guess == answer for guess in guesses + guesses[-1:] * (3 - len(guesses))])
    return {family: (len(right[family]), *np.mean(right[family], 0)) for family in sorted(right)}


def table(known, turns):
    """The same as a Markdown table."""
    lines = ["| family | questions | most frequent answer | to the template | to the words |", "|---|---|---|---|---|"]
    for family, (n, *shares) in blind(known, turns).items():
        lines.append(f"| {FAMILIES[family - 1]} | {n:,} | " + " | ".join(f"{100 * s:.1f} %" for s in shares) + " |")
    return "\n".join(lines)


REPORT = """## Questions

How often an answer in `qa64.npz` can be guessed without its picture: always the family's most frequent answer, the most
frequent one to the question's template (every value replaced by its attribute's name), and to the very same words, as
{known:,} training questions have them. Written by `python data/questions.py`.

{table}
"""


def report():
    """Replace the questions' section of data/frozen/README.md."""
    try:
        known, _ = shards.read(shards.ROOT / "qa64" / "train", ["qa", "family"])
    except shards.Fault as fault:
        sys.exit(f"questions.py: {fault}")
    known = decode(known["qa"], known["family"])
    with np.load(shards.FROZEN / "qa64.npz") as arrays:
        turns = decode(arrays["qa"], arrays["family"])
    section = REPORT.format(known=len(known), table=table(known, turns))
    write_sections(section)
    print(section)


if __name__ == "__main__":
    report()
