"""A cache of the least recently used values, bounded in bytes and in entries."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LruCache(Generic[K, V]):
    """Values by key. `size` returns the bytes of a value; `bytes` is the sum over all cached values."""

    def __init__(self, size: Callable[[V], int], max_bytes: int, max_entries: int | None = None):
        self._size, self._max_bytes, self._max_entries = size, max_bytes, max_entries
        self.bytes = 0
        self._values: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: K) -> V | None:
        """Returns the value, which becomes the most recently used one; None without it."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key]

    def put(self, key: K, value: V) -> None:
        """Stores a value and drops the least recently used ones above the bounds."""
        self._drop(key)
        self._values[key] = value
        self.bytes += self._size(value)
        while self.bytes > self._max_bytes or len(self) > (self._max_entries or len(self)):
            self._drop(next(iter(self._values)))

    def _drop(self, key: K) -> None:
        if key in self._values:
            self.bytes -= self._size(self._values.pop(key))
