"""One file per API: /generate, OpenAI, status and metrics, page; their schemas and OpenAPI text."""
