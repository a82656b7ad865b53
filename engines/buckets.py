"""Which padded batch size a batch runs at. Pure arithmetic: no tensors, no device."""

from bisect import bisect_left


def powers_of_two(largest: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to and including `largest` (which closes the list even where it is no power of two)."""
    if largest < 1:
        raise ValueError(f"largest bucket: got {largest}, must be at least 1")
    sizes = [1]
    while sizes[-1] * 2 <= largest:
        sizes.append(sizes[-1] * 2)
    return tuple(sizes) if sizes[-1] == largest else (*sizes, largest)


def smallest_fitting(count: int, buckets: tuple[int, ...]) -> int:
    """The smallest of the ascending `buckets` that holds `count` jobs.

    Raises ValueError where none does.
    """
    position = bisect_left(buckets, count)
    if count < 1 or position == len(buckets):
        raise ValueError(f"a batch of {count} fits none of the buckets {', '.join(map(str, buckets))}")
    return buckets[position]
