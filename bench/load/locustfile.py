"""Load by Locust, for those who have it: POST /generate as people do, a seed of its own for each picture.

    locust --locustfile bench/load/locustfile.py --host http://127.0.0.1:8000            # then its page, port 8089
    locust --locustfile bench/load/locustfile.py --host http://127.0.0.1:8000 --headless --users 8 --run-time 30s

Failures are counted by status: 429 and 504 are what a loaded server answers. `python -m bench.load` looks at the
pictures as well, and needs nothing installed.
"""

import random

from locust import HttpUser, constant, task  # type: ignore[import-not-found]  # in an environment of its own

PROMPTS = ("a red circle", "a blue square on a white background", "a green triangle above a yellow circle")


class Person(HttpUser):  # type: ignore[misc]  # Any, where Locust is not installed
    """Asks again as soon as the picture is there."""

    wait_time = constant(0)

    @task  # type: ignore[untyped-decorator]  # likewise
    def picture(self) -> None:
        order = {"prompt": random.choice(PROMPTS), "seed": random.randrange(2**32)}
        with self.client.post("/generate", json=order, catch_response=True) as answer:
            if answer.status_code != 200:
                answer.failure(str(answer.status_code))
            elif answer.headers.get("x-seed") != str(order["seed"]):
                answer.failure("a picture of another seed")
