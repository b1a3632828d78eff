"""How the models of a fleet are trained: alone by a Trainer, or many small ones together, also through a recording."""
