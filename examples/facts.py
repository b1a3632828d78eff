"""Facts, and sentences that state them: invented, or read from files.

Both are rows in the format of LAMA's T-REx. A fact has a "query" with a [MASK], its "object" (or "obj"), and "sents",
the ids of the sentences that state it. A sentence has an "id" and a "text".
"""

import random
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

Row = dict[str, Any]
PAD, MASK, ANSWER, IGNORED = 0, 1, 2, -100
MAX_WORDS = 40  # longer sentences are left out
CITIES = ("Aarhus", "Bergen", "Cadiz", "Dover", "Essen", "Faro", "Ghent", "Havre", "Izmir", "Kiel", "Lund", "Malmo")
FIRST_NAMES = ("anna", "bea", "cleo", "dora", "eva", "fay", "gia", "ida")
LAST_NAMES = ("berg", "lind", "holm", "dahl", "falk")
RELATIONS = {  # all forms are sentences; the first is also the query
    "born": ("{} was born in {} .", "{} is a native of {} .", "the birthplace of {} is {} .", "{} came from {} ."),
    "died": ("{} died in {} .", "the grave of {} is in {} .", "{} spent her last days in {} .", "{} fell ill in {} ."),
    "works": ("{} worked in {} .", "{} had a job in {} .", "the office of {} was in {} .", "{} was hired in {} ."),
    "novel": ("{} wrote about {} .", "a novel by {} is set in {} .", "{} praised {} in verse .", "{} painted {} ."),
}


def make_facts(num_people: int, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Facts about invented people, who share names and places, and sentences that state them."""
    rng = random.Random(seed)
    people = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]
    facts, sentences = [], []
    for person in rng.sample(people, num_people):
        born, died, works = rng.sample(CITIES, 3)
        for relation, city in (("born", born), ("died", died), ("works", works), ("novel", rng.choice([born, died]))):
            texts = [form.format(person, city) for form in rng.sample(RELATIONS[relation], rng.randint(2, 4))]
            ids = range(len(sentences), len(sentences) + len(texts))
            sentences += [{"id": number, "text": text} for number, text in zip(ids, texts, strict=True)]
            query = RELATIONS[relation][0].format(person, "[MASK]")
            facts.append({"query": query, "object": city, "sents": list(ids)})
    return facts, sentences


class Blanks(Dataset):
    """Texts with a blank, as `words of the text = words in the blank`. Only the words in the blank are predicted."""

    def __init__(self, texts: list[tuple[list[str], list[str]]], vocabulary: dict[str, int], length: int) -> None:
        self.texts, self.vocabulary, self.length = texts, vocabulary, length

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        text, blank = ([self.vocabulary[word] for word in words] for words in self.texts[index])
        ids = torch.tensor([*text, ANSWER, *blank])
        labels = torch.where(torch.arange(len(ids)) > len(text), ids, IGNORED)
        rest = (0, self.length - len(ids))  # on the right: a causal model does not look ahead
        return {"input_ids": F.pad(ids, rest, value=PAD), "labels": F.pad(labels, rest, value=IGNORED)}

    def show(self, index: int) -> str:
        text, blank = self.texts[index]
        return " ".join(text).replace("[MASK]", f"[{' '.join(blank)}]")


def make_data(facts: list[Row], sentences: list[Row], num_facts: int) -> tuple[Blanks, Blanks, Tensor]:
    """Sentences without the object of their fact, the queries of the facts, and which sentences state which fact."""
    texts = {row["id"]: split_words(row["text"]) for row in sentences}
    blanks: dict[int, tuple[list[str], list[str]]] = {}
    queries, stated = [], []
    for fact in random.Random(0).sample(facts, len(facts)):
        answer = split_words(fact["object"] if "object" in fact else fact["obj"])
        found = {number: leave_out(texts[number], answer) for number in fact["sents"]}
        if any(found.values()) and len(queries) < num_facts:
            for number, text in found.items():
                if text is not None:
                    blanks.setdefault(number, (text, answer))
            queries.append((split_words(fact["query"]), answer))
            stated.append(set(fact["sents"]))
    relevant = torch.tensor([[number in ids for number in blanks] for ids in stated])
    everything = [*blanks.values(), *queries]
    words = dict.fromkeys(word for pair in everything for part in pair for word in part if word != "[MASK]")
    vocabulary = {"[MASK]": MASK} | {word: number for number, word in enumerate(words, ANSWER + 1)}
    length = max(len(text) + len(blank) + 1 for text, blank in everything)
    return Blanks([*blanks.values()], vocabulary, length), Blanks(queries, vocabulary, length), relevant


def split_words(text: str) -> list[str]:
    return [word if word == "[MASK]" else word.lower() for word in re.findall(r"\[MASK\]|\w+|[^\w\s]", text)]


def leave_out(text: list[str], part: list[str]) -> list[str] | None:
    """The text with a blank in place of the part. None if the text does not hold the part, or is too long."""
    for start in range(len(text) - len(part) + 1 if len(text) <= MAX_WORDS else 0):
        if text[start : start + len(part)] == part:
            return [*text[:start], "[MASK]", *text[start + len(part) :]]
    return None
