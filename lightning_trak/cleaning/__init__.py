"""Cleaning and selecting training data: wrong labels, harmful and useful examples, duplicates."""

from lightning_trak.cleaning.duplicates import duplicates
from lightning_trak.cleaning.ranking import Ranking
from lightning_trak.cleaning.selection import harmful, useful, wrong_labels

__all__ = ["Ranking", "duplicates", "harmful", "useful", "wrong_labels"]
