"""A peer: FastAPI as its tutorial has it, a plain function on Starlette's thread pool, one picture per call."""

import sys

import uvicorn
from fastapi import FastAPI, Response

from bench.peers.shared_engine import PATH, Asked, Work


def main() -> None:
    app, work = FastAPI(), Work()

    @app.post(PATH)
    def generate(asked: Asked) -> Response:
        [picture] = work.pictures([work.job(asked)])
        return Response(picture, media_type="image/png")

    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]))


if __name__ == "__main__":
    main()
