"""Calls a server with the unmodified LiteLLM; test_openai_clients.py runs it in its own virtualenv.

argv: base URL, image file. Prints its results as JSON.
"""

import json
import sys
from importlib.metadata import version

import litellm
import openai

URL, IMAGE = sys.argv[1:]
LOOK = {"model": "openai/sana-sprint", "prompt": "a blue square", "size": "64x96", "api_base": URL, "api_key": "right"}


def main() -> None:
    generated = litellm.image_generation(**LOOK, n=2, extra_body={"seed": 5})
    with open(IMAGE, "rb") as file:
        edited = litellm.image_edit(**LOOK, image=file, n=1, extra_body={"seed": 5, "strength": 0.25})
    try:
        litellm.image_generation(**{**LOOK, "size": "100x100"})
        refused = ""
    except openai.APIError as error:
        refused = str(error)
    print(
        json.dumps(
            {
                "version": version("litellm"),
                "generated": [item["b64_json"] for item in generated.data],
                "edited": [item["b64_json"] for item in edited.data],
                "refused": refused,
            }
        )
    )


main()
