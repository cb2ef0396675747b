"""Random contents of each kind, and the split of all contents into training, shots and test.

The split is a function of the content string alone, so no example of one split can appear in another whatever the
task or its wording.
"""

import random
import zlib
from collections.abc import Callable
from typing import Literal

from compose.demo.operations import MONTH_LENGTHS, MONTHS, PAIRS, STEPS, WEEKDAYS

Split = Literal["train", "shots", "test"]

_WORD_TEXT = """
acorn actor agent album amber angle ankle apple apron arch arena armor arrow ash atlas aunt bacon badge bake band
bank bark barn basin bath beach bead beam bean bear beard beef bell belt bench berry bike bird blade blaze bloom
board boat body bolt bone book boot bowl box brain brake brass bread brick bride brook broom brush bull bush cabin
cable cake calf camel camp canal candy cane card cargo cart case cave cedar chain chair chalk cheek chess chest
chief child cider city clay cliff clock cloth cloud clown coach coal coast coat cobra coin comet coral cord cork
corn couch court cove crab craft crane crate cream crew crib crop crow crown cube cup curve dairy daisy dance dawn
deck deer delta desk dice diner dish dock doll dove draft drain dream dress drum duck dune dusk dust eagle earth
easel echo eel elbow elk elm ember fable face fairy fan farm fawn fence fern ferry field film finch fish flag flame
flask fleet flint flock flour flute foam fog folk fork fort fox frame frog frost fruit gale game gate gem ghost
giant gift glass globe glove glue goat gold golf goose gown grain grape grass grove guest guide gulf hail hall ham
harp hat hawk hazel heart hedge helm herb heron hill hinge hive honey hood hook horn horse hotel house hut ice inlet
iron isle ivory ivy jade jar jazz jewel jug judge juice jury kayak kelp key king kite knee knife knot lace lake lamb
lamp lance lane lark lawn leaf lemon lens lily lime linen lion llama lock loft log lunch lung lute lynx magic maple
march mask mast meal medal melon metal mill mint mist moat mole money month moon moose moss motel moth motor mouse
mud mule music nail neck nest night north nose novel nurse oak oar oasis oat ocean olive onion opal opera orbit
organ otter owl oxen pail paint palm panda panel paper park patch path peach pear pearl pedal pen perch piano pig
pilot pine pipe pizza plain plane plant plate plaza plum poem poet pond pony porch port prism prize pulp pump quail
queen quilt radio raft rail rain ranch raven reed reef ridge ring river road robe robin robot rock roof room root
rope rose ruby rug sage sail salad salt sand sauce scarf seal seed shade shark sheep shelf shell ship shirt shoe
shore silk siren skate sky sled slope snail snow soap sofa soil song soup spark spear spice spoon squid stage star
steam stone stool storm stove straw sugar suit swan sword table tail taxi tea tent tiger tile toad torch tower town
toy track train tray tree truck tulip tuna tunic urn valve van vase vault veil vest vine viola wagon wall water wave
whale wharf wheat wheel wind wing wolf wood wool yacht yard yarn zebra zinc
"""
WORDS: tuple[str, ...] = tuple(_WORD_TEXT.split())
_VOWELS, _CONSONANTS = "aeiou", "bcdfghjklmnpqrstvwxyz"


def split_of(content: str) -> Split:
    """The split that a content string belongs to: about half training, a tenth shots, the rest test."""
    bucket = zlib.crc32(content.encode()) % 10
    return "train" if bucket < 5 else "shots" if bucket == 5 else "test"


def draw_content(kind: str, rng: random.Random, split: Split) -> str:
    """One random content of this kind and split."""
    while True:
        content = CONTENTS[kind](rng)
        if split_of(content) == split:
            return content


def invented_words(rng: random.Random) -> str:
    """Two to four made-up words of three to five letters, so that spelling skills do not rest on a word list."""
    return " ".join(_invent(rng) for _ in range(rng.randint(2, 4)))


def _invent(rng: random.Random) -> str:
    start = rng.random() < 0.25
    letters = (
        _VOWELS if (i % 2 == 0) == start or rng.random() < 0.1 else _CONSONANTS for i in range(rng.randint(3, 5))
    )
    return "".join(rng.choice(group) for group in letters)


def _words(rng: random.Random) -> str:
    return " ".join(rng.sample(WORDS, rng.randint(2, 4)))


def _numbers(rng: random.Random) -> str:
    return " ".join(str(n) for n in rng.sample(range(1, 99), rng.randint(2, 4)))


def _sum(rng: random.Random) -> str:
    return " + ".join(str(rng.randint(1, 49)) for _ in range(rng.randint(2, 3)))


def _sequence(rng: random.Random) -> str:
    step = rng.choice([-7, -6, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    start = rng.randint(1, 50) + max(0, -4 * step)
    return " ".join(str(start + i * step) for i in range(rng.randint(3, 4)))


def _date(rng: random.Random) -> str:
    month = rng.randrange(12)
    return f"{rng.randint(1, MONTH_LENGTHS[month])} {MONTHS[month]} + {rng.randint(1, 20)}"


def _weekday(rng: random.Random) -> str:
    moves = (f"{rng.choice('+-')} {rng.randint(1, 9)}" for _ in range(2))
    return " ".join((rng.choice(WEEKDAYS), *moves))


def _logic(rng: random.Random) -> str:
    terms = [rng.choice(("", "", "not ")) + rng.choice(("true", "false")) for _ in range(rng.randint(2, 4))]
    return terms[0] + "".join(f" {rng.choice(('and', 'or'))} {term}" for term in terms[1:])


def _walk(rng: random.Random) -> str:
    moves = [rng.choice("NSEW") for _ in range(rng.randint(2, 3))]
    back = [{"N": "S", "S": "N", "E": "W", "W": "E"}[move] for move in moves]
    if rng.random() < 0.5:
        back = [rng.choice(tuple(STEPS)) for _ in back]
    rng.shuffle(back)
    return " ".join(moves + back)


def _brackets(rng: random.Random) -> str:
    marks: list[str] = []
    open_marks: list[str] = []
    for _ in range(rng.randint(3, 9)):
        if open_marks and rng.random() < 0.4:
            marks.append(PAIRS[open_marks.pop()])
        else:
            open_marks.append(rng.choice(tuple(PAIRS)))
            marks.append(open_marks[-1])
    return " ".join(marks) if open_marks else _brackets(rng)


def _clock(rng: random.Random) -> str:
    return f"{rng.randrange(24):02d}:{rng.randrange(60):02d} + {rng.randint(1, 59)}"


CONTENTS: dict[str, Callable[[random.Random], str]] = {
    "words": _words,
    "numbers": _numbers,
    "sum": _sum,
    "sequence": _sequence,
    "date": _date,
    "weekday": _weekday,
    "logic": _logic,
    "walk": _walk,
    "brackets": _brackets,
    "clock": _clock,
}
