"""Methods without gradients: by representations, by words, by retrained models, or by chance."""
