"""python -m server.cluster: serves replicas behind one address, on this machine or on a Ray cluster.

    python -m server.cluster --max-replicas 4 --gpus 1 --model sprint-0.6b
    RAY_ADDRESS=auto python -m server.cluster ...        on a cluster that `ray start` started

Accepts its own flags and those of `python -m server`. SIGTERM drains every replica.
"""

import argparse
import os
import signal
import sys
import threading
from dataclasses import fields
from pathlib import Path

from server.cluster.application import NAME, ScalingConfig, build, parse_scaling_value
from server.cluster.retry import CALLBACK
from server.errors import EXIT_SETTINGS, EXIT_START, SettingsError
from server.processes.announce import print_listening, print_ready, server_url
from server.settings import Settings, flag_of, load_settings

HELP = {
    "min_replicas": "minimum number of replicas",
    "max_replicas": "maximum number of replicas",
    "target_waiting_jobs": "jobs that may wait at each replica before another one starts",
    "gpus": "GPUs of each replica",
    "cpus": "cores of each replica",
    "upscale_delay_s": "seconds that jobs must wait before another replica starts",
    "downscale_delay_s": "seconds that a replica must be one too many before it ends",
}


def parser() -> argparse.ArgumentParser:
    """Returns the flags of the cluster alone."""
    command = argparse.ArgumentParser(
        prog="python -m server.cluster", allow_abbrev=False, epilog="Further flags: python -m server --help"
    )
    for field in fields(ScalingConfig):
        default = getattr(ScalingConfig(), field.name)
        command.add_argument(flag_of(field.name), metavar="N", default=default, help=f"{HELP[field.name]} ({default})")
    return command


def parse(arguments: list[str]) -> tuple[ScalingConfig, Settings]:
    """Returns the two parts of a command line. Raises SettingsError; argparse exits with code 2 for an unknown flag."""
    cluster_flags, server_flags = parser().parse_known_args(arguments)
    scale = ScalingConfig(**{name: parse_scaling_value(name, value) for name, value in vars(cluster_flags).items()})
    return scale, load_settings(server_flags, os.environ)


def run(scale: ScalingConfig, settings: Settings) -> None:
    """Serves until a signal, then drains. Blocks."""
    variable, callback = CALLBACK
    os.environ.setdefault(variable, callback)  # the proxies of a cluster that starts here inherit it
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")]))
    import ray
    from ray import serve

    ray.init(namespace=NAME, include_dashboard=False)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # after ray.init, which installs its own handlers
        signal.signal(number, lambda *_: stop.set())
    server_address = server_url(settings.host, settings.port)
    print_listening(server_address, f"{settings.model} in {scale.min_replicas} to {scale.max_replicas} replicas")
    serve.start(http_options={"host": settings.host, "port": settings.port})
    serve.run(build(settings, scale), name=NAME)
    print_ready(server_address)
    stop.wait()
    serve.shutdown()
    ray.shutdown()


def main() -> int:
    try:
        scale, settings = parse(sys.argv[1:])
        run(scale, settings)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_SETTINGS
    except ImportError as error:
        print(f"error: {error}; Ray is an extra: pip install 'sana-sprint-server[ray]'", file=sys.stderr)
        return EXIT_START
    return 0


if __name__ == "__main__":
    sys.exit(main())
