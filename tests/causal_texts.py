"""A small causal language model, and padded texts for it."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_trak import AttributionMixin
from lightning_trak.outputs import CausalLMMargin

VOCABULARY = 9
PAD = 0


class CausalNet(AttributionMixin, L.LightningModule):
    """Logits of the next token from all tokens up to this one that are attended to."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(VOCABULARY, 5)
            self.inner = nn.Linear(5, 6)
            self.head = nn.Linear(6, VOCABULARY)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embedding(input_ids)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        past = (hidden * weights).cumsum(1) / weights.cumsum(1).clamp(min=1)
        return self.head(torch.tanh(self.inner(past + hidden)))

    def configure_model_output(self):
        return CausalLMMargin()


def make_texts(count, seed=0):
    """Texts of two to seven tokens. Of every third, the first tokens are a prompt without labels."""
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for number in range(count):
        length = int(torch.randint(2, 8, (), generator=generator))
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator)
        labels = ids.clone()
        if number % 3 == 0:
            labels[: length // 2] = -100
        texts.append({"input_ids": ids, "labels": labels})
    return texts


def pad(texts, side="right"):
    """A batch with an attention mask."""
    longest = max(len(text["input_ids"]) for text in texts)
    batch = {
        "input_ids": torch.full((len(texts), longest), PAD),
        "attention_mask": torch.zeros(len(texts), longest, dtype=torch.int64),
        "labels": torch.full((len(texts), longest), -100),
    }
    for row, text in enumerate(texts):
        length = len(text["input_ids"])
        place = slice(0, length) if side == "right" else slice(longest - length, longest)
        batch["input_ids"][row, place] = text["input_ids"]
        batch["attention_mask"][row, place] = 1
        batch["labels"][row, place] = text["labels"]
    return batch


def pad_left(texts):
    """A batch that is padded on the left."""
    return pad(texts, "left")


def loader(texts, batch_size=4, collate=pad, **options):
    """A loader of texts."""
    return DataLoader(texts, batch_size=batch_size, collate_fn=collate, **options)


def margins(model, text):
    """By the definition: log p - log(1 - p) of each token that counts, with their graph."""
    logits = model(text["input_ids"].unsqueeze(0))[0]
    found = []
    for place in range(1, len(text["labels"])):
        label = int(text["labels"][place])
        if label != -100:
            p = logits[place - 1].softmax(-1)[label]
            found.append(p.log() - (1 - p).log())
    return torch.stack(found)


def gradients(model, values):
    """The gradient of each value by all parameters, in one row."""
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(value, parameters, retain_graph=True) for value in values]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
