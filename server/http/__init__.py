"""From the socket to a checked request: request ids, API keys, body limits, RFC 9457 errors."""
