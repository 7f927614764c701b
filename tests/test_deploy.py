"""Every file that `flora-vllm deploy` prints fits its schema, and the dashboard asks for metrics that there are.

The schemas hold the fields that we write, of the Compose specification, KServe's v1beta1 InferenceService, AIBrix's
v1alpha1 ModelAdapter, llm-d-modelservice's values, Kubernetes' Deployment and Grafana's dashboards, closed against
all others: a misspelt field fails here rather than being dropped there.
"""

import inspect
import json
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from flora_vllm import __version__
from flora_vllm.commands.cli import main
from flora_vllm.commands.deploy import FILES, text_of
from flora_vllm.options import fields_of
from flora_vllm.plugin import series
from flora_vllm.plugin.options import FloraOptions


def closed(required: str = "", **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def many(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


def named(values: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": values, "minProperties": 1}


def manifest(api_version: str, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    """A Kubernetes object."""
    return closed(
        "apiVersion kind metadata spec",
        apiVersion={"const": api_version},
        kind={"const": kind},
        metadata=METADATA,
        spec=spec,
    )


TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
YES_NO = {"type": "boolean"}
TEXTS = named(TEXT)
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"}

METADATA = closed("name", name=NAME, labels=TEXTS, annotations=TEXTS)
MOUNT = closed("name mountPath", name=NAME, mountPath=TEXT, readOnly=YES_NO)
CONTAINER_FIELDS = {
    "name": NAME,
    "image": TEXT,
    "command": many(TEXT),
    "args": many(TEXT),
    "env": many(closed("name value", name=TEXT, value=TEXT)),
    "ports": many(
        closed("containerPort", containerPort={**COUNT, "maximum": 65535}, name=NAME, protocol={"enum": ["TCP"]})
    ),
    "readinessProbe": closed(
        "httpGet",
        httpGet=closed("path port", path=TEXT, port=COUNT),
        periodSeconds=COUNT,
        failureThreshold=COUNT,
    ),
    "resources": closed(limits=named(QUANTITY), requests=named(QUANTITY)),
    "volumeMounts": many(MOUNT),
}
CONTAINER = closed("name image", **CONTAINER_FIELDS)
VOLUME = closed(
    "name",
    name=NAME,
    persistentVolumeClaim=closed("claimName", claimName=NAME, readOnly=YES_NO),
    emptyDir=closed(medium={"enum": ["Memory"]}, sizeLimit=QUANTITY),
)

KSERVE = manifest(
    "serving.kserve.io/v1beta1",
    "InferenceService",
    closed(
        "predictor",
        predictor=closed(
            "containers", minReplicas=COUNT, maxReplicas=COUNT, containers=many(CONTAINER), volumes=many(VOLUME)
        ),
    ),
)
DEPLOYMENT = manifest(
    "apps/v1",
    "Deployment",
    closed(
        "selector template",
        replicas=COUNT,
        selector=closed("matchLabels", matchLabels=TEXTS),
        template=closed(
            "metadata spec",
            metadata=closed("labels", labels=TEXTS),
            spec=closed("containers", containers=many(CONTAINER), volumes=many(VOLUME)),
        ),
    ),
)
MODEL_ADAPTER = manifest(
    "model.aibrix.ai/v1alpha1",
    "ModelAdapter",
    closed(
        "artifactURL podSelector",
        artifactURL=TEXT,
        baseModel=TEXT,
        podSelector=closed("matchLabels", matchLabels=TEXTS),
        replicas=COUNT,
        schedulerName=TEXT,
    ),
)
LLM_D = closed(
    "modelArtifacts routing decode",
    modelArtifacts=closed(
        "name uri", name=TEXT, uri={"type": "string", "pattern": "^(hf|pvc)://"}, size=QUANTITY, labels=TEXTS
    ),
    routing=closed("servicePort", servicePort=COUNT, proxy=closed("enabled", enabled=YES_NO)),
    prefill=closed("create", create=YES_NO),
    decode=closed(
        "containers",
        create=YES_NO,
        replicas=COUNT,
        parallelism=closed(tensor=COUNT, data=COUNT, dataLocal=COUNT, workers=COUNT),
        containers=many(
            closed(
                "name image modelCommand",
                **CONTAINER_FIELDS,
                modelCommand={"enum": ["vllmServe", "imageDefault", "custom"]},
                mountModelVolume=YES_NO,
            )
        ),
        volumes=many(VOLUME),
        monitoring=closed(
            "podmonitor", podmonitor=closed("enabled", enabled=YES_NO, portName=NAME, path=TEXT, interval=TEXT)
        ),
    ),
)
COMPOSE = closed(
    "services",
    name=NAME,
    services=named(
        closed(
            "image",
            build=TEXT,
            image=TEXT,
            command=many(TEXT),
            environment=TEXTS,
            ports=many({"type": "string", "pattern": r"^127\.0\.0\.1:\d+:\d+$"}),
            volumes=many({"type": "string", "pattern": "^[^:]+:/[^:]+(:ro)?$"}),
            ipc={"enum": ["host"]},
            restart={"enum": ["unless-stopped"]},
            depends_on=many(TEXT),
            configs=many(closed("source target", source=TEXT, target=TEXT)),
            deploy=closed(
                "resources",
                resources=closed(
                    "reservations",
                    reservations=closed(
                        "devices",
                        devices=many(closed("driver capabilities", driver=TEXT, count=COUNT, capabilities=many(TEXT))),
                    ),
                ),
            ),
        )
    ),
    configs=named(closed(content=TEXT, file=TEXT)),
    volumes=named({"type": "object", "maxProperties": 0}),
)
SOURCE = closed("type uid", type={"const": "prometheus"}, uid=TEXT)
GRAFANA = closed(
    "title uid schemaVersion panels templating time",
    **dict.fromkeys(("title", "uid", "refresh"), TEXT),
    **dict.fromkeys(("schemaVersion", "version"), COUNT),
    editable=YES_NO,
    tags=many(TEXT),
    time=closed("from to", **{"from": TEXT, "to": TEXT}),
    templating=closed("list", list=many({"type": "object", "required": ["name", "type", "query"]})),
    panels=many(
        closed(
            "id title type gridPos datasource targets",
            id=COUNT,
            title=TEXT,
            description=TEXT,
            type={"enum": ["timeseries", "table"]},
            gridPos=closed("h w x y", h=COUNT, w=COUNT, x=COUNT, y=COUNT),
            datasource=SOURCE,
            fieldConfig={"type": "object"},
            transformations=many(closed("id options", id=TEXT, options={"type": "object"})),
            targets=many(
                closed(
                    "refId expr", refId=TEXT, expr=TEXT, legendFormat={"type": "string"}, format=TEXT, instant=YES_NO
                )
            ),
        )
    ),
)
SCHEMAS = {
    "compose": [COMPOSE],
    "kserve": [KSERVE],
    "llm-d": [LLM_D],
    "aibrix": [DEPLOYMENT, MODEL_ADAPTER],
    "grafana": [GRAFANA],
}


def documents(kind: str) -> list[Any]:
    return list(yaml.safe_load_all(text_of(kind)))


@pytest.mark.parametrize("kind", SCHEMAS)
def test_fits_its_schema(kind: str) -> None:
    for document, schema in zip(documents(kind), SCHEMAS[kind], strict=True):
        jsonschema.Draft202012Validator(schema).validate(document)


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        ("compose", lambda d: d["services"]["server"].update(enviroment={})),
        ("kserve", lambda d: d["spec"]["predictor"]["containers"][0].update(argv=[])),
        ("kserve", lambda d: d["spec"]["predictor"]["containers"][0]["resources"]["limits"].update(cpu="four")),
        ("llm-d", lambda d: d["decode"]["containers"][0].update(modelCommand="serve")),
        ("grafana", lambda d: d["panels"][0].pop("targets")),
    ],
)
def test_the_schemas_catch_mistakes(kind: str, spoil: Callable[[Any], Any]) -> None:
    document = documents(kind)[0]
    spoil(document)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMAS[kind][0]).validate(document)


def test_the_containers_flags_are_ours_or_vllms() -> None:
    ours = {field.metadata["flag"] for field in fields_of(FloraOptions).values()}
    vllms = {"--max-loras", "--max-cpu-loras", "--served-model-name", "--port"}
    for kind in ("docker", "compose", "kserve", "llm-d", "aibrix"):
        used = set(re.findall(r"(?<=[ -] )(--[a-z-]+)(?==)", text_of(kind)))
        assert used <= ours | vllms, kind
        assert kind == "docker" or used & ours, kind


@pytest.mark.parametrize("kind", [kind for kind in FILES if "image: IMAGE" in text_of(kind)])
def test_a_file_that_leaves_the_image_open_says_how_to_fill_it_in(kind: str) -> None:
    head = text_of(kind).partition("\n\n")[0]
    assert re.search(rf"^#   flora-vllm deploy {kind} \| sed 's\|IMAGE\|\S+:{re.escape(__version__)}\|' ", head, re.M)


def test_compose_names_only_what_it_defines() -> None:
    (compose,) = documents("compose")
    for service in compose["services"].values():
        assert {config["source"] for config in service.get("configs", ())} <= set(compose["configs"])
        volumes = {volume.split(":")[0] for volume in service.get("volumes", ())}
        assert {volume for volume in volumes if not volume.startswith(".")} <= set(compose["volumes"])
    for config in compose["configs"].values():
        assert yaml.safe_load(config["content"]) if "content" in config else config["file"] == "./grafana.json"


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    package = find_spec("vllm")
    assert package is not None
    assert package.origin is not None
    sources = "\n".join(path.read_text() for path in (Path(package.origin).parent / "v1" / "metrics").rglob("*.py"))
    sources += inspect.getsource(series)
    there = set(re.findall(r'"((?:vllm:|flora_)\w+)"', sources))
    assert len(there) > 30
    dashboard = json.loads(text_of("grafana"))
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = set(re.findall(r"(?:vllm:|flora_)\w+", " ".join(queries)))
    assert len(asked) > 16
    # The exposition adds these to a counter's and a histogram's name.
    assert {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in asked} <= there
    labels = set(re.findall(r"by \((\w+)\)", json.dumps(dashboard))) - {"le"}
    assert all(f'"{label}"' in sources for label in labels | {"model_name"})


def test_the_image_installs_this_version_on_the_vllm_it_was_checked_with() -> None:
    text = text_of("docker")
    instructions = [line.split()[0] for line in re.sub(r"\\\n", " ", text).splitlines() if line and line[0] != "#"]
    assert instructions == ["FROM", "ARG", "RUN", "ENV", "VOLUME", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT"]
    assert f"flora-vllm=={__version__}" in text
    pinned = re.search(r'"vllm>=([\d.]+),', (Path(__file__).parent.parent / "pyproject.toml").read_text())
    assert pinned is not None
    assert f"FROM vllm/vllm-openai:v{pinned[1]}." in text


@pytest.mark.parametrize("kind", FILES)
def test_the_command_prints_it(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deploy", kind]) == 0
    printed = capsys.readouterr().out
    assert printed == text_of(kind)
    assert "@VERSION@" not in printed
