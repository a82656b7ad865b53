"""A PNG encoder of tensor operations for the device of the pixels: it needs no kernel of our own and never waits.

It filters each row by the average of left and above (PNG specification, 9.2). It codes the bytes with the Huffman codes
(RFC 1951, 3.2.7) of one of several tables, that of the smallest file. It finds no repetitions, as photographs have few;
a plain image still takes an eighth of its size.
"""

import heapq
import struct
import zlib
from collections.abc import Mapping
from itertools import accumulate, count

import torch
import torch.nn.functional as F
from torch import Tensor

# Mean absolute differences of the tables, in levels of 255; one more table is for uniform bytes.
SPREADS = (0.05, 0.3, 0.8, 1.6, 3.0, 5.0, 8.0, 12.0, 18.0, 30.0)
END, PADDING = 256, 257  # end of a block; filler of a pair, of zero bits
AVERAGE = 3  # number of the filter
_MIN_PROBABILITY = 2.0**-13  # of a byte, which bounds a code to 15 bits


class PngEncoder:
    """Encodes pixels on `device` to the parts from which `png_file` assembles the file on the host."""

    def __init__(self, device: torch.device):
        lengths = [_lengths(_laplacian(spread)) for spread in SPREADS] + [_lengths([1 / 256] * 256)]
        headers = [_header(table) for table in lengths]
        size = -(-max(bits for _, bits in headers) // 32)
        padded = [(*table, 0) for table in lengths]
        self._lengths = torch.tensor(padded, dtype=torch.uint8, device=device)
        self._codes = torch.tensor([(*_codes(table), 0) for table in lengths], device=device)
        self._headers = torch.tensor([_words(value, size) for value, _ in headers], dtype=torch.int32, device=device)
        self._header_bits = torch.tensor([bits for _, bits in headers], device=device)
        self._tail = torch.tensor([END, PADDING], device=device)

    def __call__(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns words [1, n] and facts [1, 3] of pixels [1, H, W, 3], uint8 RGB.

        words: the deflate block, 32 bits each, lowest bit first. facts: its number of bits and the sums of Adler-32.
        Takes some 70 bytes of memory per number.
        """
        filtered = average_filtered(inputs["pixels"][0]).flatten()
        count, device = filtered.numel(), filtered.device
        values = filtered.long()
        falling = torch.arange(count, 0, -1, device=device)
        sums = 1 + values.sum(), count + (values * falling).sum()
        # Pairs of symbols [n, 2], with the end of the block after the last byte.
        symbols = torch.cat((values, self._tail[: 2 - count % 2]))
        best = self._lengths[:, symbols].sum(1, dtype=torch.int64).argmin().view(1)
        lengths = self._lengths.index_select(0, best)[0][symbols].view(-1, 2).long()
        codes = self._codes.index_select(0, best)[0][symbols].view(-1, 2)
        bits = lengths.sum(1)
        end = bits.cumsum(0) + self._header_bits.index_select(0, best)
        start = end - bits
        pair = codes[:, 0] | (codes[:, 1] << lengths[:, 0])
        pair <<= start & 31  # at most 30 + 31 bits
        header = self._headers.index_select(0, best)[0]
        # The table of uniform bytes bounds all others: 9 bits for a byte at most.
        words = torch.zeros(header.numel() + count * 9 // 32 + 3, dtype=torch.int32, device=device)
        words[: header.numel()] = header
        # Each bit is set once, so a sum equals a bitwise or, in any order.
        words.index_add_(0, start >> 5, pair.to(torch.int32))
        words.index_add_(0, (start >> 5) + 1, (pair >> 32).to(torch.int32))
        return words[None], torch.stack((end[-1], *sums))[None]


def average_filtered(pixels: Tensor) -> Tensor:
    """Returns rows [H, 1 + 3 W] of filter number and differences of pixels [H, W, 3] uint8."""
    height, width, _ = pixels.shape
    left = F.pad(pixels, (0, 0, 1, 0))[:, :width]
    above = F.pad(pixels, (0, 0, 0, 0, 1, 0))[:height]
    # The mean without a ninth bit: common bits, plus half of the differing ones.
    differences = pixels - ((left & above) + ((left ^ above) >> 1))
    return F.pad(differences.view(height, -1), (1, 0), value=AVERAGE)


def is_black(facts: tuple[int, int, int], height: int) -> bool:
    """Returns whether every pixel is black: then only the filter numbers are not zero."""
    return facts[1] == 1 + AVERAGE * height


def png_file(words: memoryview, facts: tuple[int, int, int], height: int, width: int) -> bytes:
    """Returns the PNG file from the parts of PngEncoder, on the host."""
    bits, low, high = facts
    stream = b"\x78\x01", words[: -(-bits // 8)], struct.pack(">HH", high % 65521, low % 65521)
    data = b"IDAT" + b"".join(stream)
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(chunk) for chunk in (head, data, b"IEND"))


def _chunk(content: bytes) -> bytes:
    return b"".join((struct.pack(">I", len(content) - 4), content, struct.pack(">I", zlib.crc32(content))))


def _laplacian(spread: float) -> list[float]:
    """Returns probabilities of differences 0, 1, ... 127, -128, ... -1 with mean absolute value `spread`."""
    decay = spread / (1 + spread)
    weights = [decay ** min(value, 256 - value) for value in range(256)]
    return [max(_MIN_PROBABILITY, weight / sum(weights)) for weight in weights]


def _lengths(probabilities: list[float]) -> list[int]:
    """Returns the lengths of Huffman codes for the bytes and the end of the block."""
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
    """Returns canonical codes (RFC 1951, 3.2.2), first bit lowest, as in the stream."""
    counts = [sum(length == bits for length in lengths) for bits in range(16)]
    next_code = list(accumulate(counts[:-1], lambda code, number: (code + number) << 1, initial=0))
    codes = []
    for length in lengths:
        codes.append(int(f"{next_code[length]:0{length}b}"[::-1], 2))
        next_code[length] += 1
    return codes


def _header(lengths: list[int]) -> tuple[int, int]:
    """Returns the header of a final block with these codes: a number, and its number of bits.

    Each length takes four bits. The one code for distances is never used.
    """
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
    """Returns signed numbers of 32 bits each, lowest first."""
    return struct.unpack(f"<{size}i", value.to_bytes(4 * size, "little"))
