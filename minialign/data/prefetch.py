"""Loading ahead: threads parse, tokenise and decode what comes next while the model computes.

Threads and not processes: what takes long, decoding and scaling pictures and the tokenizer, lets go
of Python's lock. And a process that is forked beside the threads of torch.distributed may inherit a
lock that nobody will ever open: one start in some hundred hung for good.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor


def load_ahead(items: Sequence, load: Callable, workers: int) -> Iterator:
    """`load(item)` of every item, in order, by `workers` threads, up to two items ahead each.

    There is at most one thread per core; with 0 this one loads. What an item's load raises is
    raised at its turn.
    """
    workers = min(workers, os.cpu_count() or 1, len(items))
    if not workers:
        yield from map(load, items)
        return
    pool = ThreadPoolExecutor(workers, "load")
    ahead = deque()
    try:
        for item in items:
            ahead.append(pool.submit(load, item))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
