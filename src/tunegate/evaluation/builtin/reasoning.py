"""Short inferences: order, rules, places of things, causes, analogies.

Where the question names its candidates, the first one that the answer names decides; where it does not, four fixed
continuations are compared by likelihood (chance: 1 in 4; yes or no: 1 in 2).
"""

from __future__ import annotations

from tunegate.evaluation.builtin.draw import Draw, Made, contains, likeliest, mention

NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kira", "Leo")
NONSENSE = ("blick", "dax", "fep", "glorp", "jope", "mib", "norp", "pilk", "tove", "wug", "zarn", "quib")
COLOURS = ("red", "blue", "green", "yellow", "black", "white")
THINGS = ("ball", "key", "book", "coin", "ring", "cup", "pen", "phone")
PLACES = ("box", "drawer", "basket", "bag", "cupboard", "bucket")
ORDERS = (("taller", "tallest"), ("older", "oldest"), ("faster", "fastest"), ("heavier", "heaviest"))
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)

ANALOGIES = (
    ("hot", "cold", "up", "down", ("sky", "high", "left")),
    ("bird", "nest", "bee", "hive", ("honey", "flower", "wing")),
    ("puppy", "dog", "kitten", "cat", ("mouse", "milk", "bird")),
    ("eye", "see", "ear", "hear", ("head", "ring", "smell")),
    ("day", "night", "summer", "winter", ("warm", "month", "beach")),
    ("fish", "water", "bird", "air", ("feather", "worm", "tree")),
    ("king", "queen", "father", "mother", ("child", "house", "uncle")),
    ("knife", "cut", "pen", "write", ("paper", "ink", "read")),
    ("finger", "hand", "toe", "foot", ("shoe", "arm", "nail")),
    ("painter", "picture", "baker", "bread", ("oven", "shop", "flour")),
)
ODD = (
    (("apple", "pear", "plum"), "hammer"),
    (("dog", "cat", "horse"), "table"),
    (("red", "green", "blue"), "seven"),
    (("bus", "car", "train"), "carrot"),
    (("shirt", "coat", "sock"), "river"),
    (("piano", "violin", "drum"), "lemon"),
    (("oak", "pine", "birch"), "salmon"),
    (("spoon", "fork", "knife"), "cloud"),
)
CAUSES = (
    (
        "The floor is wet because",
        "somebody spilled water on it.",
        ("the window is made of glass.", "the lamp was turned on.", "it is Tuesday today."),
    ),
    (
        "The baby started to cry because",
        "it was hungry.",
        ("the carpet was brown.", "paper is made from wood.", "the door had a handle."),
    ),
    (
        "The plant died because",
        "nobody watered it for weeks.",
        ("it stood in a blue pot.", "the radio was playing.", "plants have green leaves."),
    ),
    (
        "She put on a coat because",
        "it was cold outside.",
        ("the soup was too salty.", "her phone was charged.", "the room had four walls."),
    ),
    (
        "The car stopped in the middle of the road because",
        "it ran out of fuel.",
        ("the driver had brown hair.", "roads are made of asphalt.", "the seats were soft."),
    ),
    (
        "He could not open the door because",
        "he had lost his key.",
        ("he liked coffee.", "the door was painted green.", "it was his birthday."),
    ),
    (
        "The ice melted because",
        "the sun was shining on it.",
        ("the glass was expensive.", "ice is cold.", "someone closed a book."),
    ),
    (
        "He was late for work because",
        "his train did not come.",
        ("his shirt was white.", "work starts with a w.", "the office has windows."),
    ),
)
NEXT = (
    ("She dropped the glass on the stone floor. The glass", "broke.", ("sang.", "grew.", "slept.")),
    (
        "He put the bread in the toaster. A few minutes later the bread was",
        "brown and warm.",
        ("a bicycle.", "under water.", "asleep."),
    ),
    ("The dog saw the cat, and the cat ran up a", "tree.", ("soup.", "song.", "Tuesday.")),
    ("She was very tired, so she went to", "bed.", ("spoon.", "seven.", "cheese.")),
    ("It got dark in the room, so he turned on the", "light.", ("shoe.", "bread.", "rain.")),
    ("He wanted to write a letter, so he took a", "pen.", ("pillow.", "fish.", "wheel.")),
    ("They were thirsty after the run, so they drank some", "water.", ("sand.", "paper.", "wool.")),
    ("She cut her finger, so she put on a", "bandage.", ("hat.", "lamp.", "carpet.")),
)


def comparison(draw: Draw, n: int) -> Made:
    more, most = draw.pick(ORDERS)
    names = draw.sample(NAMES, 3)
    facts = [f"{names[0]} is {more} than {names[1]}.", f"{names[1]} is {more} than {names[2]}."]
    given = " ".join(facts[:: 1 if n % 3 == 0 else -1])  # mostly, the first name of the question is not the answer
    a, b, c = draw.shuffled(names)
    return mention(f"{given} Who is the {most}: {a}, {b} or {c}? Answer with the name only.", names[0], names)


def position(draw: Draw, n: int) -> Made:
    names = draw.sample(NAMES, 3 + n % 2)
    place = draw.pick(("first", "last"))
    given = f"In a race, {', '.join(names[:-1])} and {names[-1]} came in, in this order."
    answer = names[0] if place == "first" else names[-1]
    return mention(f"{given} Who came in {place}? Answer with the name only.", answer, names)


def category_rule(draw: Draw, n: int) -> Made:
    kind, other, one = draw.sample(NONSENSE, 3)
    (colour, wrong), one = draw.sample(COLOURS, 2), one.capitalize()
    rules = [f"Every {kind} is {colour}.", f"Every {other} is {wrong}."]
    given = " ".join(rules[:: 1 if n % 3 == 0 else -1])
    asked = f"{given} {one} is a {kind}. What colour is {one}? Answer with one word."
    return mention(asked, colour, COLOURS)


def syllogism(draw: Draw, n: int) -> Made:
    a, b, c = draw.sample(NONSENSE, 3)
    follows = f"all {a}s are {c}s" if n % 2 == 0 else f"all {c}s are {a}s"
    asked = f"All {a}s are {b}s. All {b}s are {c}s. Does it follow that {follows}? Answer yes or no."
    answer, other = ("Yes", "No") if n % 2 == 0 else ("No", "Yes")
    return likeliest(asked, answer, (other,), draw)


def where_is_it(draw: Draw, n: int) -> Made:
    who, other = draw.sample(NAMES, 2)
    thing = draw.pick(THINGS)
    first, second = draw.sample(PLACES, 2)
    later = f"{other} goes home." if n < 3 else f"Later {other} moves the {thing} to the {second}."
    asked = f"{who} puts the {thing} in the {first}. {later} Where is the {thing} now? Answer with one word."
    return mention(asked, first if n < 3 else second, PLACES)


def owner(draw: Draw, n: int) -> Made:
    names, things = draw.sample(NAMES, 3), draw.sample(THINGS, 3)
    facts = " ".join(f"{who} has the {what}." for who, what in zip(names, things, strict=True))
    at = draw.below(3)
    if n % 2:
        return mention(f"{facts} Who has the {things[at]}? Answer with the name only.", names[at], names)
    return mention(f"{facts} What does {names[at]} have? Answer with one word.", things[at], things)


def calendar(draw: Draw, n: int) -> Made:
    words, kind = (DAYS, "day") if n % 2 == 0 else (MONTHS, "month")
    at, step = draw.below(len(words)), (1, 1, -1, -1, 2, 2)[n % 6]
    phrase = {1: "comes right after", -1: "comes right before", 2: f"comes two {kind}s after"}[step]
    among = [word for word in words if word != words[at]]
    asked = f"Which {kind} {phrase} {words[at]}? Answer with one word."
    return mention(asked, words[(at + step) % len(words)], among)


def analogy(draw: Draw, n: int) -> Made:
    a, b, c, d, others = ANALOGIES[n]
    return likeliest(f"Complete the comparison with one word: {a} is to {b} as {c} is to", d, others, draw)


def odd_one_out(draw: Draw, n: int) -> Made:
    alike, odd = ODD[n]
    words = draw.shuffled([*alike, odd])
    asked = f"Which of these words does not belong with the others: {', '.join(words)}? Answer with one word."
    return mention(asked, odd, words)


def cause(draw: Draw, n: int) -> Made:
    start, right, wrong = CAUSES[n]
    return likeliest(f"Complete the sentence in a sensible way: {start}", right, wrong, draw)


def what_next(draw: Draw, n: int) -> Made:
    start, right, wrong = NEXT[n]
    return likeliest(f"Complete the sentence: {start}", right, wrong, draw)


def direction(draw: Draw, n: int) -> Made:
    turns = ("north", "east", "south", "west")
    at, side, who = draw.below(4), draw.pick(("right", "left")), draw.pick(NAMES)
    answer = turns[(at + (1 if side == "right" else -1)) % 4]
    given = f"{who} faces {turns[at]} and turns {side} by 90 degrees."
    return contains(f"{given} Which way does {who} face now? Answer with one word.", answer)


TEMPLATES = (
    (comparison, 7),
    (position, 6),
    (category_rule, 6),
    (syllogism, 6),
    (where_is_it, 6),
    (owner, 7),
    (calendar, 6),
    (analogy, 6),
    (odd_one_out, 6),
    (cause, 6),
    (what_next, 6),
    (direction, 4),
)
