"""A peer: LitServe with dynamic batching, as documented."""

import sys
from collections.abc import Sequence
from typing import Any

import litserve  # type: ignore[import-not-found]  # in the peer's own environment only
from fastapi import Response

from bench.peers.shared_engine import MAX_BATCH, PATH, WAIT_S, GenerateBody, SharedEngine
from engines.types import Job


class Api(litserve.LitAPI):  # type: ignore[misc]  # as above
    def setup(self, device: str) -> None:
        del device
        self.engine = SharedEngine()

    def decode_request(self, request: GenerateBody, **_: Any) -> Job:
        return self.engine.job(request)

    def batch(self, inputs: Sequence[Job]) -> list[Job]:
        return list(inputs)

    def predict(self, x: list[Job], **_: Any) -> list[bytes]:
        return self.engine.png_files(x)

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        return output

    def encode_response(self, output: bytes, **_: Any) -> Response:
        return Response(output, media_type="image/png")


def main() -> None:
    api = Api(max_batch_size=MAX_BATCH, batch_timeout=WAIT_S, api_path=PATH)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=120)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), num_api_servers=1, generate_client_file=False)


if __name__ == "__main__":
    main()
