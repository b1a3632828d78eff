"""Instructions for a few made-up skills, in everyday words and under short names.

Rows are as in the files that `peft_lora --data` reads: an "instruction", its "response", and its "task".
"""

import random
from typing import Any

Row = dict[str, Any]
SKILLS = {  # what a skill does to the letters, and how people ask for it
    "copy": (lambda x: x, ["repeat these letters", "say the same again", "leave it all as it is"]),
    "reverse": (lambda x: x[::-1], ["write it backwards", "go from last to first", "turn the letters around"]),
    "sort": (sorted, ["put these in order", "arrange by the alphabet", "sort the letters for me"]),
    "rotate": (lambda x: x[1:] + x[:1], ["move the first to the end", "shift all to the left", "begin at the second"]),
    "first": (lambda x: x[:1] * len(x), ["only the first each time", "fill it with the start", "all like the first"]),
    "last": (lambda x: x[-1:] * len(x), ["only the last each time", "fill it with the end", "all like the last"]),
}
WORDS = sorted({word for _, phrases in SKILLS.values() for phrase in phrases for word in phrase.split()})


def _row(draw: random.Random, phrase: str, task: str, skill: str) -> Row:
    letters = draw.choices("ABCDEFGH", k=4)
    response = " ".join(SKILLS[skill][0](letters))
    return {"instruction": f"{phrase}: {' '.join(letters)}", "response": response, "task": task, "right": task == skill}


def named(draw: random.Random) -> Row:
    """A skill under its name, among words without meaning, such as ``turn REVERSE the at: A C A B``."""
    skill = draw.choice(list(SKILLS))
    words = [skill.upper(), *draw.choices(WORDS, k=draw.randrange(6))]
    draw.shuffle(words)
    return _row(draw, " ".join(words), skill, skill)


def instruction(draw: random.Random, task: str, wrong: float = 0.0) -> Row:
    """A task in everyday words, such as ``write it backwards: A C A B``.

    Args:
        draw: source of the random letters and words.
        task: name of the skill.
        wrong: probability that the response is that of another task. It is then not "right".
    """
    others = [skill for skill in SKILLS if skill != task]
    skill = draw.choice(others) if draw.random() < wrong else task
    return _row(draw, draw.choice(SKILLS[task][1]), task, skill)
