"""Draws a line that grows, and saves each picture: python docs/use/live_client.py ws://127.0.0.1:8000/v1/live"""

import io
import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw
from websockets.sync.client import connect


def drawing(length: int) -> bytes:
    """White strokes on black, as a PNG."""
    canvas = Image.new("RGB", (256, 256))
    ImageDraw.Draw(canvas).line((20, 128, 20 + length, 128), fill="white", width=8)
    file = io.BytesIO()
    canvas.save(file, "PNG")
    return file.getvalue()


with connect(sys.argv[1], proxy=None) as socket:
    print(socket.recv())  # what this server can do
    socket.send(json.dumps({"prompt": "a red circle", "seed": 7}))  # message 1
    for number, length in enumerate(range(20, 220, 20), start=2):
        socket.send(drawing(length))
        header = {"sequence": 0}
        while header["sequence"] < number:  # a picture of an older message may still come first
            header = json.loads(socket.recv())
            if header["type"] != "picture":
                sys.exit(header["detail"])
            Path("live.jpg").write_bytes(socket.recv())
        print(f"message {number} drawn in {header['timings_ms']['total']} ms")
