"""The Serve application of a ClusterConfig, from Python or from a `serve deploy` file."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from flora_vllm.cluster.config import ClusterConfig, ModelConfig, parse, to_data
from flora_vllm.errors import ClusterError, ConfigError
from flora_vllm.plugin.options import KEY

ROUTER = "flora_vllm.cluster.router.AdapterAffinityRouter"
IMPORT_PATH = "flora_vllm.cluster.app:build_from_data"


def settings_for(config: ClusterConfig, model: ModelConfig) -> dict[str, Any]:
    """What replicas and controller of one model get, as plain data."""
    return {"model": to_data(model), "store": to_data(config.store), "timing": to_data(config.timing)}


def deployment_options(config: ClusterConfig, model: ModelConfig) -> dict[str, Any]:
    """Serve's options for the replicas of one model: scale, router, controller, health."""
    import ray

    from flora_vllm.cluster.controller import PlacementController
    from flora_vllm.cluster.ray_hooks import CONTROLLER, DeploymentActorConfig, RequestRouterConfig

    # Serve creates the controller from an actor class, by value: replicas on other nodes import it from the package.
    actor = ray.remote(num_cpus=0)(PlacementController)
    options: dict[str, Any] = {
        "max_ongoing_requests": model.max_requests,
        "health_check_period_s": 5,
        "health_check_timeout_s": 20,
        "graceful_shutdown_timeout_s": 30,
        "ray_actor_options": {"num_cpus": model.cpus},
        "request_router_config": RequestRouterConfig.model_validate(
            {"request_router_class": ROUTER, "request_router_kwargs": to_data(model.routing)}
        ),
        "deployment_actors": [
            DeploymentActorConfig(
                name=CONTROLLER,
                actor_class=actor,
                init_kwargs=settings_for(config, model),
                actor_options={"num_cpus": 0},
            )
        ],
    }
    scale = model.autoscale
    if scale is None:
        options["num_replicas"] = model.replicas
    else:
        options["autoscaling_config"] = {
            "min_replicas": scale.min_replicas,
            "max_replicas": scale.max_replicas,
            "target_ongoing_requests": scale.target_requests,
            "upscale_delay_s": scale.upscale_delay_s,
            "downscale_delay_s": scale.downscale_delay_s,
            "policy": {"policy_function": "flora_vllm.cluster.rules.scaling:autoscaling_policy"},
        }
    if model.replicas_per_node is not None:
        options["max_replicas_per_node"] = model.replicas_per_node
    return options


def _environment(model: ModelConfig) -> dict[str, str]:
    # Several CPU engines on one node would otherwise bind to the same cores.
    defaults = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"} if model.device == "cpu" else {}
    return {**defaults, **model.environment}


def _llm_config(config: ClusterConfig, model: ModelConfig) -> Any:
    from flora_vllm.cluster.ray_hooks import LLMConfig
    from flora_vllm.cluster.serve_llm import SETTINGS, FloraLLMServer, LocalModel
    from flora_vllm.cluster.vllm_engine import lora_limit

    options: dict[str, Any] = {}
    if model.device == "cpu":
        options["accelerator_config"] = {"kind": "cpu"}
        # Serve adds the replica's own CPUs to the first bundle; the workers run in processes of the replica.
        options["placement_group_config"] = {"bundles": [{"CPU": 0.0}], "strategy": "STRICT_PACK"}
    if model.accelerator_type is not None:
        options["accelerator_type"] = model.accelerator_type
    if Path(model.source).is_absolute():
        options["callback_config"] = {"callback_class": LocalModel}
    return LLMConfig(
        model_loading_config={"model_id": model.name, "model_source": model.source},
        server_cls=FloraLLMServer,
        engine_kwargs={
            "enable_lora": True,
            "max_loras": model.slots,
            "max_cpu_loras": model.slots,
            "max_lora_rank": lora_limit(model.max_rank),
            "tensor_parallel_size": model.tensor_parallel,
            "pipeline_parallel_size": model.pipeline_parallel,
            "additional_config": {KEY: asdict(model.flora_options)},
            **model.engine,
        },
        deployment_config=deployment_options(config, model),
        experimental_configs={SETTINGS: settings_for(config, model)},
        runtime_env={"env_vars": _environment(model)},
        log_engine_metrics=False,
        **options,
    )


def build_app(config: ClusterConfig) -> Any:
    """A Serve application: run it with `serve.run(build_app(config), name=config.name)`, connected to Ray.

    Raises HookError if this Ray is not one we can use, ClusterError without a connection, ConfigError for a setting
    that ray.serve.llm refuses.
    """
    import ray

    from flora_vllm.cluster.ray_hooks import build_openai_app, check_hooks, more_endpoints
    from flora_vllm.cluster.serve_llm import ANSWERS, ROUTES, FloraIngress

    check_hooks()
    if not ray.is_initialized():
        # ray.serve.llm would start or join whatever Ray it finds, with options that nobody chose.
        raise ClusterError(
            "not connected to Ray: call ray.init(...) or flora_vllm.cluster.operate.connect(address, config) first"
        )
    try:
        llm_configs = [_llm_config(config, model) for model in config.models]
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"ray.serve.llm refuses the configuration: {error}") from error
    with more_endpoints(ROUTES, ANSWERS):
        return build_openai_app(
            {
                "llm_configs": llm_configs,
                "ingress_cls_config": {
                    "ingress_cls": FloraIngress,
                    "ingress_extra_kwargs": {"retry_s": config.ingress.retry_s, "refresh_s": config.timing.plan_s},
                },
                "ingress_deployment_config": {
                    "num_replicas": config.ingress.replicas,
                    "ray_actor_options": {"num_cpus": config.ingress.cpus},
                    "max_ongoing_requests": 10_000,
                },
            }
        )


def build_from_data(args: dict[str, Any]) -> Any:
    """Application builder for `serve deploy`: its args are the configuration file's content."""
    return build_app(parse(ClusterConfig, args))
