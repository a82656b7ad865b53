"""WS /v1/live: sessions that draw, and their messages."""
