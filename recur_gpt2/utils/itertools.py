"""What Python's itertools lacks in 3.11."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")


def batched(items: Iterable[Item], count: int) -> Iterator[list[Item]]:
    """Lists of `count` items, the last one of what is left."""
    items = iter(items)
    while batch := list(islice(items, count)):
        yield batch


def batched_by_size(
    items: Iterable[Item], size: Callable[[Item], int], enough: int, most: int | None = None
) -> Iterator[list[Item]]:
    """Lists of items whose sizes add up to `enough` or a little more, or of `most` items; the last of what is left."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total >= enough or len(batch) == most:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch
