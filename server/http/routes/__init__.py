"""One file per API: /generate, OpenAI, AUTOMATIC1111, status and metrics, page; their schemas and OpenAPI text."""
