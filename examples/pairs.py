"""Images with captions: generated scenes, or your own."""

import io
import random
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

from examples.common import read_rows
from lightning_trak.reporting.plots import Picture

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 220),
    "yellow": (235, 205, 50),
    "pink": (240, 130, 190),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross", "bar", "ring")
Pair = tuple[Image.Image, str]


def make_scenes(number: int, wrong: float = 0.0, seed: int = 0, size: int = 64) -> list[Pair]:
    """Images of two shapes side by side, with captions that name them. Some kinds of shape are much rarer than others.

    Args:
        number: number of pairs.
        wrong: fraction of the captions that name a wrong colour.
        seed: of the scenes. The rare kinds are the same for every seed.
        size: width and height of the images, in pixels.
    """
    rng = random.Random(seed)
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    random.Random(0).shuffle(kinds)
    weights = [1 / rank for rank in range(1, len(kinds) + 1)]
    return [_scene(rng, rng.choices(kinds, weights, k=2), rng.random() < wrong, size) for _ in range(number)]


def _scene(rng: random.Random, kinds: list[tuple[str, str]], wrong: bool, size: int) -> Pair:
    image = Image.new("RGB", (size, size), tuple(rng.randint(60, 120) for _ in range(3)))
    for side, (colour, shape) in enumerate(kinds):
        radius = size * rng.uniform(0.12, 0.2)
        x, y = size * (0.26 + 0.48 * side + rng.uniform(-0.04, 0.04)), size * rng.uniform(0.25, 0.75)
        _shape(ImageDraw.Draw(image), shape, x, y, radius, COLOURS[colour])
    if wrong:
        kinds = [(rng.choice([name for name in COLOURS if name != kinds[0][0]]), kinds[0][1]), kinds[1]]
    left, right = (" ".join(("a", *kind)) for kind in kinds)
    return image, rng.choice([f"{left} left of {right}", f"{right} right of {left}"])


def _shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, colour: tuple[int, int, int]) -> None:
    if shape in ("circle", "ring"):
        draw.ellipse((x - r, y - r, x + r, y + r), outline=colour, fill=colour if shape == "circle" else None, width=5)
    elif shape == "square":
        draw.rectangle((x - r, y - r, x + r, y + r), fill=colour)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=colour)
    if shape in ("bar", "cross"):
        draw.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=colour)
    if shape == "cross":
        draw.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=colour)


def read_pairs(directory: Path) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on, and held-out pairs: the last caption of each image with several captions.

    The directory holds captions.jsonl (or .jsonl.gz). Its rows have "image", the name of a file in the directory, and
    "captions", a list. Instead of the image files there may be images.npz. There, "jpeg" holds the bytes of all files
    one after the other, in the order of the rows. "off" holds the start of each file, and the end of the last one.
    """
    packed = np.load(directory / "images.npz") if (directory / "images.npz").exists() else None
    train, targets = [], []
    for number, row in enumerate(read_rows(directory, "captions")):
        if packed is None:
            image = Image.open(directory / row["image"]).convert("RGB")
        else:
            start, end = packed["off"][number : number + 2]
            image = Image.open(io.BytesIO(packed["jpeg"][start:end].tobytes())).convert("RGB")
        captions = [caption.strip() for caption in row["captions"]]
        targets += [(image, caption) for caption in captions[1:][-1:]]
        train += [(image, caption) for caption in (captions[:-1] or captions)]
    return train, targets


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Images as tensors, captions as word numbers: items ``(3, size, size)`` in [0, 1] and ``(MAX_WORDS,)``.

    Args:
        pairs: images and captions.
        size: width and height of the images, in pixels.
        vocabulary: the number of each word, from 1. Other words are left out. Default: all words of these captions.
    """

    MAX_WORDS = 16

    def __init__(self, pairs: list[Pair], size: int, vocabulary: dict[str, int] | None = None) -> None:
        self.captions = [caption for _, caption in pairs]
        pixels = np.stack([np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)) for image, _ in pairs])
        self.images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        words = [re.findall(r"\w+", caption.lower()) for caption in self.captions]
        everything = dict.fromkeys(word for caption in words for word in caption)
        self.vocabulary = vocabulary or {word: number for number, word in enumerate(everything, 1)}
        self.words = torch.zeros(len(pairs), self.MAX_WORDS, dtype=torch.int64)
        for row, caption in zip(self.words, words, strict=True):
            known = [self.vocabulary[word] for word in caption if word in self.vocabulary][: self.MAX_WORDS]
            row[: len(known)] = torch.tensor(known, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.captions)

    def picture(self, index: int) -> Picture:
        return Picture(self.images[index], self.captions[index])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.words[index]
