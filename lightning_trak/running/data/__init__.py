"""The user's data: which loaders are accepted, and how their examples are loaded, in which order."""
