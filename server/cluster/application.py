"""The Ray Serve application: replicas, their resources and their autoscaling.

`serve run server.cluster.application:application model=tiny` and KubeRay's RayService import `application`;
`python -m server.cluster` calls `build`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from server.cluster.replica import Replica
from server.cluster.scaling import ByWaitingJobs
from server.errors import SettingsError
from server.settings import Settings, flag_of, load_settings

NAME = "sana-sprint"


@dataclass(frozen=True, slots=True)
class ScalingConfig:
    """Number and resources of replicas. More than `target_waiting_jobs` waiting jobs per replica start another one."""

    min_replicas: int = 1
    max_replicas: int = 1
    target_waiting_jobs: int = 8
    gpus: float = 0.0
    cpus: float = 1.0
    upscale_delay_s: float = 10.0  # time above target_waiting_jobs before another replica starts
    downscale_delay_s: float = 300.0  # time that a replica must be superfluous before it ends


def build(settings: Settings, scale: ScalingConfig) -> Any:
    """Returns a ray.serve.Application. Raises SettingsError."""
    if not 1 <= scale.min_replicas <= scale.max_replicas:
        raise SettingsError(
            f"--min-replicas, --max-replicas: got {scale.min_replicas}, {scale.max_replicas}, allowed: 1 <= min <= max"
        )
    from ray import serve
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

    policy = AutoscalingPolicy(
        policy_function=ByWaitingJobs,
        policy_kwargs={"target_waiting_jobs": scale.target_waiting_jobs, "max_batch": settings.max_batch},
    )
    deployment = serve.deployment(serve.ingress()(Replica)).options(
        name=NAME,
        ray_actor_options={"num_gpus": scale.gpus, "num_cpus": scale.cpus},
        autoscaling_config=AutoscalingConfig(
            min_replicas=scale.min_replicas,
            max_replicas=scale.max_replicas,
            upscale_delay_s=scale.upscale_delay_s,
            downscale_delay_s=scale.downscale_delay_s,
            look_back_period_s=max(scale.upscale_delay_s, 1.0),
            policy=policy,
        ),
        # Serve must pass more requests than the server accepts: the server itself refuses with 429 at once.
        max_ongoing_requests=2 * settings.max_queue + settings.live_sessions,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=settings.shutdown_timeout_s + 5,
        health_check_period_s=5,
        health_check_timeout_s=10,
    )
    return deployment.bind(settings)


def application(arguments: Mapping[str, object]) -> Any:
    """Returns the application for the arguments in Serve's YAML: fields of ScalingConfig and of Settings.

    Raises SettingsError for a bad or unknown argument.
    """
    scaling_names = {field.name for field in fields(ScalingConfig)}
    allowed = scaling_names | {field.name for field in fields(Settings)}
    if unknown := sorted(set(arguments) - allowed):
        raise SettingsError(f"arguments: got {', '.join(unknown)}, allowed: {', '.join(sorted(allowed))}")
    scale = ScalingConfig(
        **{name: parse_scaling_value(name, value) for name, value in arguments.items() if name in scaling_names}
    )
    flags = [
        word
        for name, value in arguments.items()
        if name not in scaling_names
        for one in (value if isinstance(value, list) else [value])  # of a setting that repeats, such as model
        for word in (flag_of(name), str(one))
    ]
    return build(load_settings(flags, {}), scale)


def parse_scaling_value(name: str, value: object) -> Any:
    """Parses the value of a field of ScalingConfig. Raises SettingsError."""
    whole = isinstance(getattr(ScalingConfig(), name), int)
    try:
        return int(str(value)) if whole else float(str(value))
    except ValueError as error:
        allowed = "a whole number" if whole else "a number"
        raise SettingsError(f"{flag_of(name)}: got {value!r}, allowed: {allowed}") from error
