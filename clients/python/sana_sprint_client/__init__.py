"""Images from a sana-sprint-server: `Client`, and `AsyncClient` for asyncio. See README.md."""

from sana_sprint_client.asynchronous import AsyncClient
from sana_sprint_client.client import Client
from sana_sprint_client.errors import ConnectionFailedError, FieldError, GenerationError, SanaSprintError
from sana_sprint_client.generation import Image, ImageFormat
from sana_sprint_client.retries import Retries

__all__ = [
    "AsyncClient",
    "Client",
    "ConnectionFailedError",
    "FieldError",
    "GenerationError",
    "Image",
    "ImageFormat",
    "Retries",
    "SanaSprintError",
]
