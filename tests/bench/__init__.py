"""minialign beside transformers and TRL: the same weights, the same inputs, one run. `python -m
tests.bench`."""
