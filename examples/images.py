"""Images in one folder per class: your own, or crops of two photographs."""

import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """Images in one folder per class. Each item is the middle square of an image, resized to ``size``."""

    def __init__(self, directory: Path, size: int) -> None:
        self.classes = sorted(path.name for path in directory.iterdir() if path.is_dir())
        files = [(p, label) for label, name in enumerate(self.classes) for p in (directory / name).rglob("*")]
        kinds = Image.registered_extensions()
        self.files = sorted((path, label) for path, label in files if path.suffix.lower() in kinds)
        if not self.files:
            raise FileNotFoundError(f'"{directory}" has no images; expected them in a folder for each class')
        self.labels = torch.tensor([label for _, label in self.files])
        self.size = size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return (self.image(index) - MEAN[:, None, None]) / STD[:, None, None], self.files[index][1]

    def image(self, index: int) -> Tensor:
        """Colours in [0, 1], shape ``(3, size, size)``."""
        with Image.open(self.files[index][0]) as image:
            side = min(image.size)
            left, top = ((length - side) // 2 for length in image.size)
            box = (left, top, left + side, top + side)
            pixels = np.array(image.convert("RGB").resize((self.size, self.size), Image.Resampling.BILINEAR, box))
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255

    def name(self, index: int) -> str:
        path, label = self.files[index]
        return f"{self.classes[label]}\n{path.stem}"


def write_crops(directory: Path, number: int, size: int = 224) -> None:
    """Write crops of scikit-learn's two photographs as a folder of images, named after their positions."""
    from sklearn.datasets import load_sample_image

    rng = random.Random(0)
    for part, count in (("train", number), ("val", max(2, number // 8))):
        for name in ("china", "flower"):
            photograph = Image.fromarray(load_sample_image(f"{name}.jpg"))
            (directory / part / name).mkdir(parents=True, exist_ok=True)
            for _ in range(count // 2):
                x, y = (rng.randrange(length - size) for length in photograph.size)
                photograph.crop((x, y, x + size, y + size)).save(directory / part / name / f"{x:03d}-{y:03d}.png")
