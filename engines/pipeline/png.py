"""PNG files made where the pixels lie, by tensor operations alone: no kernel of our own, no wait, no interpreter lock.

Each row is filtered by the average of left and above (PNG specification, 9.2), and its bytes are coded with Huffman
codes (RFC 1951, 3.2.7) of one of TABLES, whichever gives the smallest file. Repetitions are not looked for: pictures
of photographs have few, and a plain one has an eighth of its size at least.
"""

import heapq
import struct
import zlib
from collections.abc import Mapping
from itertools import accumulate, count

import torch
import torch.nn.functional as F
from torch import Tensor

# Mean absolute values that differences are coded for, in levels of 255; the last table is of evenly spread bytes.
SPREADS = (0.05, 0.3, 0.8, 1.6, 3.0, 5.0, 8.0, 12.0, 18.0, 30.0)
END, PADDING = 256, 257  # of a block; of a pair, which takes no bits
AVERAGE = 3  # the filter's number
_LEAST = 2.0**-13  # of a byte's probability, which bounds a code to 15 bits


class PngEncoder:
    """Makes the parts of a PNG of pixels on `device`, from which `png_file` makes the file on the host."""

    def __init__(self, device: torch.device):
        lengths = [_lengths(_laplacian(spread)) for spread in SPREADS] + [_lengths([1 / 256] * 256)]
        headers = [_header(one) for one in lengths]
        size = -(-max(bits for _, bits in headers) // 32)
        padded = [(*one, 0) for one in lengths]
        self._lengths = torch.tensor(padded, dtype=torch.uint8, device=device)
        self._codes = torch.tensor([(*_codes(one), 0) for one in lengths], device=device)
        self._headers = torch.tensor([_words(value, size) for value, _ in headers], dtype=torch.int32, device=device)
        self._header_bits = torch.tensor([bits for _, bits in headers], device=device)

    def __call__(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Of pixels [1, H, W, 3], uint8 RGB: words [1, n], the deflate block, 32 bits each, lowest first; facts [1, 3],
        its bits and the two sums of Adler-32. Takes some 70 bytes of memory a number while it runs."""
        filtered = average_filtered(inputs["pixels"][0]).flatten()
        count, device = filtered.numel(), filtered.device
        values = filtered.long()
        falling = torch.arange(count, 0, -1, device=device)
        sums = 1 + values.sum(), count + (values * falling).sum()
        # Two symbols at a time: [n, 2], with the block's end behind the last byte.
        tail = torch.full((2 - count % 2,), PADDING, device=device)
        tail[0] = END
        symbols = torch.cat((values, tail))
        best = self._lengths[:, symbols].sum(1, dtype=torch.int64).argmin().view(1)
        lengths = self._lengths.index_select(0, best)[0][symbols].view(-1, 2).long()
        codes = self._codes.index_select(0, best)[0][symbols].view(-1, 2)
        taken = lengths.sum(1)
        end = taken.cumsum(0) + self._header_bits.index_select(0, best)
        start = end - taken
        pair = codes[:, 0] | (codes[:, 1] << lengths[:, 0])
        pair <<= start & 31  # 30 bits and 31 at most
        header = self._headers.index_select(0, best)[0]
        # No table is worse than that of evenly spread bytes: 9 bits each at most.
        words = torch.zeros(header.numel() + count * 9 // 32 + 3, dtype=torch.int32, device=device)
        words[: header.numel()] = header
        # Each bit is set once, so that sums are unions, in whatever order they are made.
        words.index_add_(0, start >> 5, pair.to(torch.int32))
        words.index_add_(0, (start >> 5) + 1, (pair >> 32).to(torch.int32))
        return words[None], torch.stack((end[-1], *sums))[None]


def average_filtered(pixels: Tensor) -> Tensor:
    """[H, W, 3] uint8 to rows [H, 1 + 3 W] of filter number and differences."""
    height, width, _ = pixels.shape
    left = F.pad(pixels, (0, 0, 1, 0))[:, :width]
    above = F.pad(pixels, (0, 0, 0, 0, 1, 0))[:height]
    # The mean without a ninth bit: what both have, and half of what one has.
    differences = pixels - ((left & above) + ((left ^ above) >> 1))
    return F.pad(differences.view(height, -1), (1, 0), value=AVERAGE)


def is_black(facts: tuple[int, int, int], height: int) -> bool:
    """Whether every pixel is black: then filter numbers are all that is not zero."""
    return facts[1] == 1 + AVERAGE * height


def png_file(words: memoryview, facts: tuple[int, int, int], height: int, width: int) -> bytes:
    """The PNG file of what an encoder made, on the host."""
    bits, low, high = facts
    stream = b"\x78\x01", words[: -(-bits // 8)], struct.pack(">HH", high % 65521, low % 65521)
    data = b"IDAT" + b"".join(stream)
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(chunk) for chunk in (head, data, b"IEND"))


def _chunk(content: bytes) -> bytes:
    return b"".join((struct.pack(">I", len(content) - 4), content, struct.pack(">I", zlib.crc32(content))))


def _laplacian(spread: float) -> list[float]:
    """Probabilities of differences 0, 1, ... 127, -128, ... -1, whose absolute values are `spread` on average."""
    fall = spread / (1 + spread)
    weights = [fall ** min(value, 256 - value) for value in range(256)]
    return [max(_LEAST, weight / sum(weights)) for weight in weights]


def _lengths(probabilities: list[float]) -> list[int]:
    """Huffman's, for the bytes and the block's end."""
    order = count()
    heap = [(p, next(order), [symbol]) for symbol, p in enumerate([*probabilities, min(probabilities)])]
    lengths = [0] * len(heap)
    heapq.heapify(heap)
    while len(heap) > 1:
        (p, _, some), (q, _, others) = heapq.heappop(heap), heapq.heappop(heap)
        for symbol in (*some, *others):
            lengths[symbol] += 1
        heapq.heappush(heap, (p + q, next(order), some + others))
    assert max(lengths) <= 15
    return lengths


def _codes(lengths: list[int]) -> list[int]:
    """Canonical codes (RFC 1951, 3.2.2), first bit lowest, as they stand in the stream."""
    per_length = [sum(length == one for length in lengths) for one in range(16)]
    following = list(accumulate(per_length[:-1], lambda code, have: (code + have) << 1, initial=0))
    codes = []
    for length in lengths:
        codes.append(int(f"{following[length]:0{length}b}"[::-1], 2))
        following[length] += 1
    return codes


def _header(lengths: list[int]) -> tuple[int, int]:
    """The head of the last block with these codes, as a number and its bits: lengths are written in four bits each,
    and there is one code for distances, which is never used."""
    fields = [(1, 1), (2, 2), (0, 5), (0, 5), (15, 4)]
    fields += [
        (0 if symbol > 15 else 4, 3) for symbol in (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15)
    ]
    fields += [(int(f"{length:04b}"[::-1], 2), 4) for length in (*lengths, 1)]
    value = bits = 0
    for field, width in fields:
        value |= field << bits
        bits += width
    return value, bits


def _words(value: int, size: int) -> tuple[int, ...]:
    """32 bits each, lowest first, as signed numbers."""
    return struct.unpack(f"<{size}i", value.to_bytes(4 * size, "little"))
