"""Loading ahead: worker processes parse, tokenise and decode what comes next while the model computes."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence

from torch.utils.data import DataLoader, Dataset

from minialign.errors import UserError


class Loads(Dataset):
    """`load(item)` by the item's number; an error in the input is handed over, to be raised where it can be read."""

    def __init__(self, items: Sequence, load: Callable):
        self.items, self.load = items, load

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int):
        try:
            return self.load(self.items[number])
        except UserError as error:
            return error


def load_ahead(items: Sequence, load: Callable, workers: int) -> Iterator:
    """`load(item)` of every item, in order, by `workers` processes (0: by this one), up to two items ahead each.

    There is at most one process per core. They are forked, so that they share what `load` holds. A `UserError` is
    raised at its item's turn.
    """
    workers = min(workers, os.cpu_count() or 1, len(items))
    context = "fork" if workers else None
    loader = DataLoader(
        Loads(items, load), batch_size=None, collate_fn=same, num_workers=workers, multiprocessing_context=context,
        worker_init_fn=stand_apart,
    )  # fmt: skip
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # none while forking, where it would be lost
    try:
        ahead = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    try:
        for loaded in ahead:
            if isinstance(loaded, UserError):
                raise loaded
            yield loaded
    finally:
        del ahead  # ends the processes; an error keeps this frame, and the garbage collector would wait for each


def stand_apart(_) -> None:
    """A signal to a run's process group is for the main process alone, which ends the others in its own time."""
    os.setpgrp()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the main process's own way of ending
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})


def same(value):
    """What was loaded, as it is: `load` has collated it."""
    return value
