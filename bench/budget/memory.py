"""Counts the peak bytes that tensors hold on a card, outside of graphs and in the pool that graphs share."""

from dataclasses import dataclass

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass
class _Part:
    """live: bytes held now; most: bytes held at once since the last `settle`."""

    live: int = 0
    most: int = 0


class Memory:
    """Counts storages as they come and go; the pool never shrinks."""

    def __init__(self) -> None:
        self.outside, self.pool = _Part(), _Part()
        self._old: dict[int, tuple[StorageWeakRef, int, _Part]] = {}
        self._young: dict[int, tuple[StorageWeakRef, int, _Part]] = {}

    @property
    def peak(self) -> int:
        return self.outside.most + self.pool.most

    def holds(self, tensor: Tensor, *, pooled: bool) -> None:
        """Counts the memory of `tensor`, once."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._young or storage._cdata in self._old:
            return
        part = self.pool if pooled else self.outside
        if part.live + storage.nbytes() > part.most:  # without a new peak no sweep is due
            self._sweep(self._young)
        # A weak reference keeps the allocator from reusing the address.
        weak = StorageWeakRef(storage)  # type: ignore[no-untyped-call]  # torch's own
        self._young[storage._cdata] = (weak, storage.nbytes(), part)
        part.live += storage.nbytes()
        part.most = max(part.most, part.live)

    def settle(self) -> None:
        """Resets the peak outside of graphs to the bytes held now; the pool's peak stays."""
        self._old |= self._young
        self._young = {}
        self._sweep(self._old)
        self.outside.most = self.outside.live

    def _sweep(self, kept: dict[int, tuple[StorageWeakRef, int, _Part]]) -> None:
        for key in [key for key, (storage, _, _) in kept.items() if storage.expired()]:  # type: ignore[no-untyped-call]  # torch's own
            _, size, part = kept.pop(key)
            part.live -= size
