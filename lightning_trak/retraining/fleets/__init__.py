"""Fleets: models trained on parts of the data, their files and results, and fleets as ensembles."""
