"""What Python's itertools lacks in 3.11."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")


def batched(items: Iterable[Item], count: int) -> Iterator[list[Item]]:
    """Lists of `count` items, the last one of what is left."""
    items = iter(items)
    while batch := list(islice(items, count)):
        yield batch
