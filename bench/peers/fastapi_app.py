"""A peer: FastAPI as in its tutorial, a plain function on Starlette's thread pool, one image per call."""

import sys

import uvicorn
from fastapi import FastAPI, Response

from bench.peers.shared_engine import PATH, GenerateBody, SharedEngine


def main() -> None:
    app, engine = FastAPI(), SharedEngine()

    @app.post(PATH)
    def generate(body: GenerateBody) -> Response:
        [file] = engine.png_files([engine.job(body)])
        return Response(file, media_type="image/png")

    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]))


if __name__ == "__main__":
    main()
