"""Everything worth knowing on a GPU in one command: `python -m tests.gpu --out DIR --minutes 8`."""
