"""Names of file formats by their first bytes, for error messages about files that the server cannot read."""

HEADS = (
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"\0\0\1\0", "ICO"),
    (b"8BPS", "Photoshop"),
    (b"%PDF", "PDF"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"qoif", "QOI"),
    (b"DDS ", "DDS"),
    (b"v/1\x01", "OpenEXR"),
    (b"\x1aE\xdf\xa3", "WebM"),
    (b"PK\x03\x04", "zip"),
    (b"\x1f\x8b", "gzip"),
    (b"\x89PNG", "damaged PNG"),
    (b"\xff\xd8\xff", "damaged JPEG"),
)
BRANDS = {  # ISO base media files: their brand, at byte 8
    b"heic": "HEIC",
    b"heix": "HEIC",
    b"heim": "HEIC",
    b"heis": "HEIC",
    b"hevc": "HEIC",
    b"hevx": "HEIC",
    b"mif1": "HEIF",
    b"msf1": "HEIF",
    b"avif": "AVIF",
    b"avis": "AVIF",
    b"crx ": "Canon raw",
    b"qt  ": "QuickTime",
}
TEXTS = ((b"<svg", "SVG"), (b"<!doctype html", "HTML"), (b"<html", "HTML"), (b"{", "JSON"))


def detect_format(content: bytes) -> str | None:
    """Returns the usual name of the format, or None if it is unknown."""
    for head, name in HEADS:
        if content.startswith(head):
            return name
    if content[4:8] == b"ftyp":
        return BRANDS.get(content[8:12], "MP4")
    if content[:4] == b"RIFF":
        return "damaged WebP" if content[8:12] == b"WEBP" else "RIFF"
    start = content[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"<?xml"):
        return "SVG" if b"<svg" in start else "XML"
    return next((name for head, name in TEXTS if start.startswith(head)), None)
