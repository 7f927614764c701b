"""Files for others to deploy: the `serve deploy` configuration and a KubeRay RayService, checked before they are shown.

The schema holds the fields of KubeRay's ray.io/v1 RayService and of pod templates that we write, closed against all
others, so that a misspelt field cannot pass as one that KubeRay would silently prune.
"""

import math
from typing import Any

from flora_vllm.cluster.app import IMPORT_PATH
from flora_vllm.cluster.config import ClusterConfig, ModelConfig, to_data
from flora_vllm.errors import ConfigError

RAY_VERSION = "2.60.0"


def serve_config(config: ClusterConfig, host: str | None = None) -> dict[str, Any]:
    """What `serve deploy FILE` takes."""
    return {
        "http_options": {"host": host or config.ingress.host, "port": config.ingress.port},
        "applications": [
            {
                "name": config.name,
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "args": to_data(config),
            }
        ],
    }


def _object(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


_TEXT = {"type": "string", "minLength": 1}
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_COUNT = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_QUANTITIES = {
    "type": "object",
    "additionalProperties": {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"},
}
_NAME = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
_CONTAINER = _object(
    ("name", "image", "resources"),
    name=_NAME,
    image=_TEXT,
    env={"type": "array", "items": _object(("name",), name=_TEXT, value={"type": "string"})},
    ports={
        "type": "array",
        "items": _object(("containerPort",), containerPort={**_COUNT, "minimum": 1, "maximum": 65535}, name=_NAME),
    },
    resources=_object((), limits=_QUANTITIES, requests=_QUANTITIES),
    volumeMounts={"type": "array", "items": _object(("name", "mountPath"), name=_NAME, mountPath=_TEXT)},
)
_VOLUME = _object(
    ("name",),
    name=_NAME,
    emptyDir=_object((), medium={"type": "string"}),
    persistentVolumeClaim=_object(("claimName",), claimName=_TEXT),
)
_TEMPLATE = _object(
    ("spec",),
    metadata=_object((), labels=_TEXTS),
    spec=_object(
        ("containers",),
        containers={"type": "array", "minItems": 1, "items": _CONTAINER},
        volumes={"type": "array", "items": _VOLUME},
    ),
)
_CLUSTER = _object(
    ("headGroupSpec",),
    rayVersion=_TEXT,
    enableInTreeAutoscaling={"type": "boolean"},
    headGroupSpec=_object(("rayStartParams", "template"), rayStartParams=_TEXTS, template=_TEMPLATE),
    workerGroupSpecs={
        "type": "array",
        "items": _object(
            ("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
            groupName=_NAME,
            replicas=_COUNT,
            minReplicas=_COUNT,
            maxReplicas=_COUNT,
            numOfHosts={**_COUNT, "minimum": 1},
            rayStartParams=_TEXTS,
            template=_TEMPLATE,
        ),
    },
)
RAY_SERVICE_SCHEMA = _object(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayService"},
    metadata=_object(("name",), name=_NAME, labels=_TEXTS),
    spec=_object(("serveConfigV2", "rayClusterConfig"), serveConfigV2=_TEXT, rayClusterConfig=_CLUSTER),
)


def check_manifest(manifest: dict[str, Any]) -> None:
    """Raises ConfigError naming every place that KubeRay would not take."""
    import jsonschema

    faults = [
        f"{'.'.join(map(str, e.absolute_path)) or 'manifest'}: {e.message}"
        for e in jsonschema.Draft202012Validator(RAY_SERVICE_SCHEMA).iter_errors(manifest)
    ]
    if faults:
        raise ConfigError("the KubeRay manifest is not valid:\n" + "\n".join(f"  - {f}" for f in faults))


def _kubernetes_name(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-").strip("-")


def _pod(
    name: str,
    image: str,
    resources: dict[str, str],
    ports: dict[str, int],
    environment: dict[str, str],
    claim: str | None,
) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": name,
        "image": image,
        "resources": {"limits": dict(resources), "requests": dict(resources)},
    }
    if environment:
        container["env"] = [{"name": k, "value": v} for k, v in sorted(environment.items())]
    if ports:
        container["ports"] = [{"containerPort": port, "name": n} for n, port in ports.items()]
    spec: dict[str, Any] = {"containers": [container]}
    if claim is not None:
        container["volumeMounts"] = [{"name": "shared", "mountPath": "/shared"}]
        spec["volumes"] = [{"name": "shared", "persistentVolumeClaim": {"claimName": claim}}]
    return {"spec": spec}


def _worker_group(model: ModelConfig, image: str, memory: str, claim: str | None) -> dict[str, Any]:
    """One pod per replica; a pipeline stage per host."""
    scale = model.autoscale
    low, high = (scale.min_replicas, scale.max_replicas) if scale else (model.replicas, model.replicas)
    resources = {"cpu": str(math.ceil(model.cpus * (1 + model.tensor_parallel))), "memory": memory}
    if model.device == "gpu":
        resources["nvidia.com/gpu"] = str(model.tensor_parallel)
    return {
        "groupName": _kubernetes_name(model.name),
        "replicas": max(low, 1) if high else 0,
        "minReplicas": low,
        "maxReplicas": high,
        "numOfHosts": model.pipeline_parallel,
        "rayStartParams": {},
        "template": _pod("ray-worker", image, resources, {}, dict(model.environment), claim),
    }


def ray_service(config: ClusterConfig, image: str, memory: str = "32Gi", claim: str | None = None) -> dict[str, Any]:
    """A RayService that serves `config` from `image`; `claim` is a volume claim mounted at /shared. Checked.

    Raises ConfigError if the result is not a valid manifest.
    """
    import yaml

    groups = [_worker_group(model, image, memory, claim) for model in config.models]
    ports = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "serve": config.ingress.port}
    manifest = {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": _kubernetes_name(config.name)},
        "spec": {
            # Pods reach the proxies by address, so they listen on all interfaces.
            "serveConfigV2": yaml.safe_dump(serve_config(config, host="0.0.0.0"), sort_keys=False),
            "rayClusterConfig": {
                "rayVersion": RAY_VERSION,
                "enableInTreeAutoscaling": any(model.autoscale for model in config.models),
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
                    "template": _pod("ray-head", image, {"cpu": "2", "memory": "8Gi"}, ports, {}, claim),
                },
                "workerGroupSpecs": groups,
            },
        },
    }
    check_manifest(manifest)
    return manifest
