"""Calls a server with the unmodified webuiapi, a client of AUTOMATIC1111's API; test_sdapi.py runs it in a virtualenv.

argv: host, port, image file. Prints its results as JSON.
"""

import base64
import io
import json
import sys
from importlib.metadata import version

import webuiapi
from PIL import Image

HOST, PORT, IMAGE = sys.argv[1:]
LOOK = {"prompt": "a blue square", "negative_prompt": "ugly", "width": 64, "height": 96, "cfg_scale": 4.5, "seed": 5}


def files(result: webuiapi.WebUIApiResult) -> list[str]:
    found = []
    for image in result.images:
        file = io.BytesIO()
        image.save(file, "PNG")
        found.append(base64.b64encode(file.getvalue()).decode())
    return found


def main() -> None:
    client = webuiapi.WebUIApi(host=HOST, port=int(PORT), username="any", password="right")
    client.util_wait_for_ready()
    client.util_set_model(client.util_get_model_names()[0])
    generated = client.txt2img(**LOOK, batch_size=2)
    edited = client.img2img(images=[Image.open(IMAGE)], **LOOK, denoising_strength=0.25)
    drawn = client.txt2img(**LOOK, controlnet_units=[webuiapi.ControlNetUnit(image=Image.open(IMAGE), weight=0.5)])
    try:
        client.txt2img(**{**LOOK, "width": 100})
        refused = ""
    except RuntimeError as error:
        refused = str(error)
    client.session.auth = ("any", "wrong")
    print(
        json.dumps(
            {
                "version": version("webuiapi"),
                "generated": files(generated),
                "seeds": generated.info["all_seeds"],
                "ignored": generated.info["ignored"],
                "edited": files(edited),
                "drawn": files(drawn),
                "model": generated.info["sd_model_name"],
                "samplers": client.session.get(f"{client.baseurl}/samplers").status_code,
                "refused": refused,
            }
        )
    )


main()
