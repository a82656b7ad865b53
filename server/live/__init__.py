"""WS /v1/live: drawing sessions and their messages."""
