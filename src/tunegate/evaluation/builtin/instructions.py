"""Instructions whose following can be seen: length, first and last words, case, words to use or to leave out.

Each item carries one answer that follows it, which is also what likelihood is measured on. What the answer says
beyond the stated properties is not judged.
"""

from __future__ import annotations

from tunegate.evaluation.builtin.draw import Draw, Made, escaped, ruled

TOPICS = (
    ("the sea", "The sea is wide and blue."),
    ("autumn", "Autumn brings cool days and golden leaves."),
    ("a train ride", "The train rolled slowly through the hills."),
    ("bread", "Fresh bread smells wonderful in the morning."),
    ("a garden", "The garden is full of flowers and bees."),
    ("the moon", "The moon shone brightly over the lake."),
    ("friendship", "A good friend listens and helps."),
    ("a library", "The library is quiet and full of books."),
    ("rain", "Rain fell softly on the roof all night."),
    ("a market", "The market was full of fruit and noise."),
)
LEFT_OUT = ("water", "tree", "station", "flour", "green")  # a likely word for each of the first topics
WORDS = ("river", "lamp", "window", "orange", "teacher", "winter", "bottle", "music", "forest", "pencil", "bridge")
QUESTIONS = (
    ("Is the sky blue on a clear day?", "Yes"),
    ("Do fish live in water?", "Yes"),
    ("Is ice hot?", "No"),
    ("Can a stone fly by itself?", "No"),
    ("Is Paris a city?", "Yes"),
    ("Do cows lay eggs?", "No"),
)
ONE_WORD = (
    ("Name a fruit.", "Apple"),
    ("Name a colour.", "Blue"),
    ("Name an animal that can fly.", "Eagle"),
    ("Name a country in Europe.", "France"),
    ("Name a musical instrument.", "Piano"),
    ("Name a month.", "June"),
)
LISTS = (
    ("fruits", ("Apple", "Pear", "Plum", "Cherry", "Grape")),
    ("animals", ("Dog", "Cat", "Horse", "Cow", "Sheep")),
    ("colours", ("Red", "Blue", "Green", "Yellow", "Black")),
    ("sports", ("Tennis", "Football", "Golf", "Judo", "Rugby")),
    ("vegetables", ("Carrot", "Leek", "Bean", "Pea", "Onion")),
    ("things in a kitchen", ("Pan", "Pot", "Fork", "Cup", "Oven")),
)
OPENINGS = ("Once upon a time", "Dear friend", "Well", "In my opinion", "Honestly", "Today")
CLOSINGS = ("The end.", "Thank you.", "Goodbye!", "Is that clear?", "That is all.")
NUMBERS = ("zero", "one", "two", "three", "four", "five")


def yes_or_no(draw: Draw, n: int) -> Made:
    question, answer = QUESTIONS[n]
    asked = f"{question} Answer with yes or no and nothing else."
    rule = {"rule": "matches", "pattern": rf"(?i)\A{answer}\b"}
    return ruled(asked, f"{answer}.", {"rule": "words", "max": 1}, rule, max_new_tokens=24)


def one_word(draw: Draw, n: int) -> Made:
    question, answer = ONE_WORD[n]
    return ruled(f"{question} Answer with one word only.", answer, {"rule": "words", "max": 1}, max_new_tokens=24)


def use_words(draw: Draw, n: int) -> Made:
    words = draw.sample(WORDS, 1 if n < 3 else 2)
    listed = " and ".join(f"'{word}'" for word in words)
    asked = f"Write one sentence that contains the word{'s' if len(words) > 1 else ''} {listed}."
    answer = f"I thought about the {' and the '.join(words)} all day."
    return ruled(asked, answer, {"rule": "contains", "items": words}, {"rule": "sentences", "min": 1, "max": 1})


def start_with(draw: Draw, n: int) -> Made:
    opening, (topic, text) = OPENINGS[n], draw.pick(TOPICS)
    asked = f'Write one or two sentences about {topic}. Begin your answer with the words "{opening}".'
    return ruled(asked, f"{opening}, I thought of this. {text}", {"rule": "starts_with", "text": opening})


def end_with(draw: Draw, n: int) -> Made:
    closing, (topic, text) = CLOSINGS[n], draw.pick(TOPICS)
    asked = f'Write a short sentence about {topic}, and end your answer with the words "{closing}"'
    return ruled(asked, f"{text} {closing}", {"rule": "ends_with", "text": closing})


def letter_case(draw: Draw, n: int) -> Made:
    topic, text = draw.pick(TOPICS)
    case, name = ("upper", "CAPITAL LETTERS") if n % 2 == 0 else ("lower", "lower case letters")
    answer = text.upper() if case == "upper" else text.lower()
    asked = f"Write one short sentence about {topic} in {name} only."
    return ruled(asked, answer, {"rule": "case", "is": case}, {"rule": "words", "min": 3})


def short_answer(draw: Draw, n: int) -> Made:
    topic, text = draw.pick(TOPICS)
    most = (30, 25, 20, 15, 12, 10)[n]
    asked = f"Say something about {topic} in at most {most} words."
    return ruled(asked, text, {"rule": "words", "min": 3, "max": most})


def sentences(draw: Draw, n: int) -> Made:
    topic, text = draw.pick(TOPICS)
    count = (1, 2, 3, 1, 2)[n]
    answer = " ".join((text, "I like to think about it.", "It makes me happy.")[:count])
    asked = f"Write exactly {NUMBERS[count]} sentence{'s' if count > 1 else ''} about {topic}."
    return ruled(asked, answer, {"rule": "sentences", "min": count, "max": count}, max_new_tokens=64)


def list_lines(draw: Draw, n: int) -> Made:
    what, values = LISTS[n]
    count = 3 + n % 3
    asked = f"List {NUMBERS[count]} {what}, one on each line, and write nothing else."
    lines = {"rule": "lines", "min": count, "max": count}
    return ruled(asked, "\n".join(values[:count]), lines, {"rule": "words", "max": 4 * count})


def leave_out(draw: Draw, n: int) -> Made:
    (topic, text), word = TOPICS[n], LEFT_OUT[n]
    asked = f"Write one sentence about {topic} without using the word '{word}'."
    return ruled(asked, text, {"rule": "excludes", "items": [word]}, {"rule": "words", "min": 3})


def repeat(draw: Draw, n: int) -> Made:
    _, text = draw.pick(TOPICS)
    rule = {"rule": "matches", "pattern": f"\\A[\"']?{escaped(text)}[\"']?\\Z"}
    return ruled(f"Repeat this sentence exactly, and write nothing else: {text}", text, rule)


def repeat_word(draw: Draw, n: int) -> Made:
    word, count = draw.pick(WORDS), (2, 3, 3, 4, 5)[n]
    asked = f"Write the word '{word}' {NUMBERS[count]} times and nothing else."
    answer = " ".join([word] * count)
    return ruled(asked, answer, {"rule": "times", "text": word, "times": count}, {"rule": "words", "max": count})


def wrapped(draw: Draw, n: int) -> Made:
    word = draw.pick(WORDS)
    name, left, right = (("square brackets", "[", "]"), ("double quotes", '"', '"'), ("round brackets", "(", ")"))[
        n % 3
    ]
    rule = {"rule": "matches", "pattern": rf"\A{escaped(left)}\s*{word}\s*{escaped(right)}\.?\Z"}
    asked = f"Write the word {word} in {name}, like this: {left}word{right}. Write nothing else."
    return ruled(asked, f"{left}{word}{right}", rule, max_new_tokens=16)


TEMPLATES = (
    (yes_or_no, 6),
    (one_word, 6),
    (use_words, 6),
    (start_with, 6),
    (end_with, 5),
    (letter_case, 6),
    (short_answer, 6),
    (sentences, 5),
    (list_lines, 6),
    (leave_out, 5),
    (repeat, 6),
    (repeat_word, 5),
    (wrapped, 4),
)
