"""Pairs of texts to classify: read from a table, or generated."""

import csv
import random
from pathlib import Path

from examples.texts import read_text

Pair = tuple[str, str, int]  # two texts and the label
LABELS = ("not_entailment", "entailment")

RELATIONS = [  # how questions ask for it, and how sentences say it
    (
        ["Where was {a} born?", "What is the birthplace of {a}?"],
        ["{a} came into the world in {b}.", "{b} is the native town of {a}.", "In {b} the parents of {a} had a child."],
    ),
    (
        ["Where did {a} die?", "What was the last place that {a} saw?"],
        ["{a} lies buried in {b}.", "{a} passed away near {b}.", "A fever killed {a} in {b}."],
    ),
    (
        ["Where did {a} study?", "Which university taught {a}?"],
        ["{a} holds a degree from {b}.", "Professors in {b} lectured to {a}.", "{a} was a student at {b}."],
    ),
    (
        ["Where does {a} work?", "Who employs {a}?"],
        ["{a} earns a salary in {b}.", "The mill at {b} pays {a}.", "{a} has an office in {b}."],
    ),
]
PEOPLE = ("Ada", "Bea", "Cleo", "Dora", "Edna", "Flora", "Greta", "Hilda", "Ines", "Judith", "Klara", "Lena")
PLACES = ("Aachen", "Bergen", "Cadiz", "Delft", "Exeter", "Faro", "Genoa", "Halle", "Izmir", "Jena", "Kiel", "Lyon")


def generate(count: int, seed: int) -> list[Pair]:
    """Questions with sentences about the same person. Half of the sentences answer their question."""
    draw, pairs = random.Random(seed), []
    for number in range(count):
        asked = draw.choice(RELATIONS)
        told = asked if number % 2 else draw.choice([other for other in RELATIONS if other is not asked])
        person, place = draw.choice(PEOPLE), draw.choice(PLACES)
        question, sentence = draw.choice(asked[0]).format(a=person), draw.choice(told[1]).format(a=person, b=place)
        pairs.append((question, sentence, number % 2))
    return pairs


def read(folder: Path, name: str, count: int) -> list[Pair]:
    """The first pairs of ``name.tsv`` or ``name.tsv.gz``. Its columns are an index, two texts and the label."""
    path = next((folder / file for file in (f"{name}.tsv", f"{name}.tsv.gz") if (folder / file).is_file()), None)
    if path is None:
        raise SystemExit(f"there is no {name}.tsv or {name}.tsv.gz in {folder}")
    _, *rows = csv.reader(read_text(path).splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    return [(first, second, LABELS.index(label)) for _, first, second, label in rows[:count]]
