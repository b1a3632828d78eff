"""Outputs of classifiers: one label for an example, several, or one for each pixel."""
