"""English as a speaker knows it: word forms, opposites, grammar, short reading, a little general knowledge.

Answers of one word are looked for in the reply; questions of taste are left out. Sentences are compared by likelihood.
"""

from __future__ import annotations

from tunegate.evaluation.builtin.draw import Draw, Made, contains, likeliest, mention

OPPOSITES = (
    ("hot", "cold"),
    ("big", "small", "little"),
    ("early", "late"),
    ("full", "empty"),
    ("strong", "weak"),
    ("rich", "poor"),
    ("always", "never"),
    ("increase", "decrease", "reduce"),
)
PLURALS = (
    ("cat", "cats"),
    ("box", "boxes"),
    ("city", "cities"),
    ("child", "children"),
    ("leaf", "leaves"),
    ("mouse", "mice"),
    ("tooth", "teeth"),
)
PASTS = (
    ("walk", "walked"),
    ("go", "went"),
    ("eat", "ate"),
    ("write", "wrote"),
    ("see", "saw"),
    ("buy", "bought"),
    ("bring", "brought"),
    ("swim", "swam"),
)
SUPERLATIVES = (("small", "smallest"), ("happy", "happiest"), ("good", "best"), ("bad", "worst"))
SPELLINGS = (
    ("becuase", "because"),
    ("freind", "friend"),
    ("recieve", "receive"),
    ("tommorow", "tomorrow"),
    ("seperate", "separate"),
)
CAPITALS = (
    ("France", "Paris"),
    ("Italy", "Rome"),
    ("Germany", "Berlin"),
    ("Spain", "Madrid"),
    ("Japan", "Tokyo"),
    ("Kenya", "Nairobi"),
)
FACTS = (
    ("Which planet do we live on?", "Earth"),
    ("How many legs does a spider have?", "8", "eight"),
    ("What do bees make?", "honey"),
    ("What colour do you get when you mix blue and yellow?", "green"),
    ("What is frozen water called?", "ice"),
    ("Which gas do people need to breathe?", "oxygen"),
)
KINDS = (
    ("A rose is a kind of", "flower", ("metal", "sport", "tool")),
    ("A trout is a kind of", "fish", ("bird", "tree", "coat")),
    ("A violin is a musical", "instrument", ("kitchen", "animal", "weather")),
)
GRAMMAR = (
    (
        "She goes to school every day.",
        "She go to school every day.",
        "She going to school every day.",
        "She gone to school every day.",
    ),
    (
        "They have eaten all the cake.",
        "They has eaten all the cake.",
        "They have ate all the cake.",
        "They having eaten all the cake.",
    ),
    (
        "There are three dogs in the garden.",
        "There is three dogs in the garden.",
        "There are three dog in the garden.",
        "There be three dogs in the garden.",
    ),
    (
        "I saw an elephant at the zoo.",
        "I saw a elephant at the zoo.",
        "I seen an elephant at the zoo.",
        "I saw an elephants at the zoo.",
    ),
    ("He does not like coffee.", "He do not like coffee.", "He does not likes coffee.", "He not like coffee."),
)
TRANSLATIONS = (
    ("French", "water", "eau"),
    ("French", "thank you", "merci"),
    ("Spanish", "cat", "gato"),
    ("German", "dog", "hund"),
    ("Spanish", "house", "casa"),
)
CLOZE = (
    ("The sun rises in the", "east.", ("spoon.", "running.", "quickly.")),
    ("He has lived in this town for twenty", "years.", ("spoons.", "slowly.", "rain.")),
    ("She speaks so quietly that I can hardly", "hear her.", ("eat wood.", "hears she.", "blue it.")),
)
PEOPLE = ("Mara", "Tom", "Lena", "Omar", "Ruth", "Paul", "Nina", "Sven", "Iris", "Max")
CITIES = ("Lyon", "Boston", "Oslo", "Porto", "Dublin", "Vienna", "Turin", "Leeds")
JOBS = ("nurse", "baker", "teacher", "pilot", "gardener", "plumber", "singer", "painter")
PETS = ("dog", "cat", "parrot", "rabbit", "turtle", "hamster")
PLAIN_WORDS = ("apple", "banana", "cherry", "garden", "island", "jungle", "mirror", "orange", "pencil", "window")


def opposite(draw: Draw, n: int) -> Made:
    word, *answers = OPPOSITES[n]
    return contains(f"What is the opposite of the word '{word}'? Answer with one word.", *answers)


def plural(draw: Draw, n: int) -> Made:
    word, answer = PLURALS[n]
    return contains(f"What is the plural of the word '{word}'? Answer with one word.", answer)


def past(draw: Draw, n: int) -> Made:
    word, answer = PASTS[n]
    return contains(f"What is the past tense of the verb '{word}'? Answer with one word.", answer)


def superlative(draw: Draw, n: int) -> Made:
    word, answer = SUPERLATIVES[n]
    return contains(f"The superlative of 'tall' is 'tallest'. What is it of '{word}'? Answer with one word.", answer)


def spelling(draw: Draw, n: int) -> Made:
    wrong, right = SPELLINGS[n]
    return contains(f"The word '{wrong}' is misspelled. Write it correctly. Answer with one word.", right)


def capital(draw: Draw, n: int) -> Made:
    country, answer = CAPITALS[n]
    return contains(f"What is the capital of {country}? Answer with the name only.", answer)


def fact(draw: Draw, n: int) -> Made:
    question, *answers = FACTS[n]
    return contains(f"{question} Answer with one word.", *answers)


def kind_of(draw: Draw, n: int) -> Made:
    start, right, wrong = KINDS[n]
    return likeliest(f"Complete the sentence with one word: {start}", right, wrong, draw)


def grammar(draw: Draw, n: int) -> Made:
    right, asked, *wrong = GRAMMAR[n]
    return likeliest(f"Correct the grammar of this sentence: {asked}", right, (asked, *wrong), draw)


def translation(draw: Draw, n: int) -> Made:
    to, word, answer = TRANSLATIONS[n]
    return contains(f"How do you say '{word}' in {to}? Answer with the translation only.", answer)


def cloze(draw: Draw, n: int) -> Made:
    start, right, wrong = CLOZE[n]
    return likeliest(f"Finish this sentence: {start}", right, wrong, draw)


def reading(draw: Draw, n: int) -> Made:
    who, city, job, pet = draw.pick(PEOPLE), draw.pick(CITIES), draw.pick(JOBS), draw.pick(PETS)
    year = draw.between(1985, 2019)
    text = draw.pick(
        (
            f"{who} lives in {city} and works as a {job}. In {year}, {who} moved into a small flat with a {pet}.",
            f"In {year} {who}, a {job} from {city}, brought home a {pet} that nobody else wanted.",
            f"The {job} {who} lives in {city} with a {pet}. They have been there since {year}.",
        )
    )
    asked, answer, among = (
        ("Which city does the text name?", city, CITIES),
        (f"What is {who}'s job?", job, JOBS),
        (f"Which animal does {who} have?", pet, PETS),
        ("Which year does the text name?", str(year), [str(y) for y in range(1985, 2020)]),
    )[n % 4]
    return mention(f"{text}\n{asked} Answer with one word.", answer, among)


def first_letter(draw: Draw, n: int) -> Made:
    words = draw.sample(PLAIN_WORDS, 3)
    answer = draw.pick(words)
    asked = f"Which of these words begins with the letter {answer[0].upper()}: {', '.join(words)}?"
    return mention(f"{asked} Answer with one word.", answer, words)


TEMPLATES = (
    (opposite, 8),
    (plural, 7),
    (past, 8),
    (superlative, 4),
    (spelling, 5),
    (capital, 6),
    (fact, 6),
    (kind_of, 3),
    (grammar, 5),
    (translation, 5),
    (cloze, 3),
    (reading, 8),
    (first_letter, 4),
)
