"""Serves the fake engine on a fake GPU: python gpu_server.py PORT, with helpers and fakes on the path."""

import sys
from collections.abc import Mapping

import fake_nvml

from engines.device.memory import open_card
from engines.fake import FakeEngine
from server.app import create_app
from server.processes.uvicorn_server import serve
from server.settings import load_settings

sys.modules["pynvml"] = fake_nvml.FakeNvml()


class EngineOnACard(FakeEngine):
    def memory_bytes(self) -> Mapping[str, int]:
        card = open_card(fake_nvml.UUID)
        return {} if card is None else {"reserved": 2**30, **card.memory_bytes()}


if __name__ == "__main__":
    settings = load_settings(["--backend", "fake", "--log-level", "error", "--port", sys.argv[1]], {})
    serve(create_app(EngineOnACard(), settings), settings)
