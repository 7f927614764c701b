"""Files that `flora-vllm cluster` writes, what it says of bad input, Ray's names, and a Ray that it starts itself."""

import copy
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from flora_vllm.cluster.config import ClusterConfig, parse, to_data
from flora_vllm.commands.cli import main
from flora_vllm.errors import ClusterError, ConfigError, HookError
from flora_vllm.plugin.options import FloraOptions

with warnings.catch_warnings():
    # Ray uses what pydantic deprecated.
    warnings.simplefilter("ignore")
    import ray
    from vllm.config.lora import LoRAConfig

    from flora_vllm.cluster import manifest, operate, ray_hooks
    from flora_vllm.cluster.app import _llm_config, build_app, build_from_data, deployment_options

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray and vLLM warn when imported

CONFIG = {
    "name": "my_app",
    "models": [
        {
            "name": "Smol.1",
            "source": "hub/smol",
            "adapters": ["s3://bucket/adapters"],
            "replicas": 2,
            "tensor_parallel": 4,
            "pipeline_parallel": 2,
            "environment": {"HF_HUB_OFFLINE": "1"},
        },
        {
            "name": "tiny",
            "source": "/shared/tiny",
            "device": "cpu",
            "autoscale": {"min_replicas": 1, "max_replicas": 5},
        },
    ],
}


@pytest.fixture
def config():
    return parse(ClusterConfig, CONFIG)


def test_ray_service_is_valid_and_says_what_the_config_says(config):
    service = manifest.ray_service(config, "image:1", claim="models")
    groups = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert [g["groupName"] for g in groups] == ["smol-1", "tiny"]
    assert (groups[0]["minReplicas"], groups[0]["maxReplicas"], groups[0]["numOfHosts"]) == (2, 2, 2)
    limits = [g["template"]["spec"]["containers"][0]["resources"]["limits"] for g in groups]
    assert limits[0]["nvidia.com/gpu"] == "4"
    assert "nvidia.com/gpu" not in limits[1]
    assert (groups[1]["minReplicas"], groups[1]["maxReplicas"]) == (1, 5)
    assert service["spec"]["rayClusterConfig"]["enableInTreeAutoscaling"] is True
    applications = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    assert parse(ClusterConfig, applications[0]["args"]) == config


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: m["spec"].update(rayclusterConfig={}),
        lambda m: m["spec"]["rayClusterConfig"]["workerGroupSpecs"][0].update(groupName="Has_Capitals"),
        lambda m: m["spec"]["rayClusterConfig"]["workerGroupSpecs"][0].pop("maxReplicas"),
        lambda m: m["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda m: m.update(apiVersion="ray.io/v1alpha1"),
        lambda m: m["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0][
            "resources"
        ]["limits"].update(memory="32 GB"),
    ],
)
def test_the_schema_catches_mistakes(config, spoil):
    service = copy.deepcopy(manifest.ray_service(config, "image:1"))
    manifest.check_manifest(service)
    spoil(service)
    with pytest.raises(ConfigError, match="not valid"):
        manifest.check_manifest(service)


def test_manifest_command_refuses_bad_values(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    assert main(["cluster", "manifest", str(path), "--image", "image:1", "--memory", "32 GB"]) == 1
    assert "32 GB" in capsys.readouterr().err
    assert main(["cluster", "manifest", str(path), "--serve"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["applications"][0]["import_path"] == "flora_vllm.cluster.app:build_from_data"


def test_serve_takes_the_deploy_file(config):
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(manifest.serve_config(config))
    assert schema.applications[0].args == to_data(config)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models: [{name: base, source: x, wheels: 4}]", ["unknown key 'wheels'"]),
        ("models: [{name: 'a:b', source: x}]", ["a:b", "not allowed"]),
        ("[]", ["must be a mapping"]),
    ],
)
def test_up_refuses_a_bad_config_before_it_starts_anything(tmp_path, capsys, text, words):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert main(["cluster", "up", str(path)]) == 1
    error = capsys.readouterr().err
    assert str(path) in error
    assert all(word in error for word in words)


def test_no_cluster_there(capsys):
    assert main(["cluster", "status", "--address", "127.0.0.1:1"]) == 1
    assert "no Ray cluster at 127.0.0.1:1" in capsys.readouterr().err


def test_deployment_options_reach_serve(config):
    first, second = (deployment_options(config, model) for model in config.models)
    assert first["num_replicas"] == 2
    assert second["autoscaling_config"]["max_replicas"] == 5
    assert first["deployment_actors"][0].init_kwargs["model"]["name"] == "Smol.1"


def test_the_plugins_options_reach_every_engine():
    data = {"name": "smol", "source": "hub/smol", "max_rank": 32, "flora": {"path": "stacked"}}
    config = parse(ClusterConfig, {"models": [data]})
    made = _llm_config(config, config.models[0])
    assert made.engine_kwargs["additional_config"] == {"flora": asdict(FloraOptions(max_rank=32, path="stacked"))}
    for bad, words in (
        ({"max_rank": 3}, "unknown keys max_rank"),
        ({"path": "fast"}, "--flora-path"),
        ({"adapter_shares": "key"}, "use prefix"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse(ClusterConfig, {"models": [{**data, "flora": bad}]})


@pytest.mark.parametrize(("asked", "passed"), [(4, 8), (16, 16), (24, 32), (300, 320), (512, 512)])
def test_any_max_rank_makes_an_engine(asked, passed):
    """vLLM knows a few limits of a LoRA's rank; FLoRA's, and what the fleet places, keep the one that was asked for."""
    config = parse(ClusterConfig, {"models": [{"name": "smol", "source": "hub/smol", "max_rank": asked}]})
    made = _llm_config(config, config.models[0]).engine_kwargs
    assert LoRAConfig(max_lora_rank=made["max_lora_rank"]).max_lora_rank == passed
    assert made["additional_config"]["flora"]["max_rank"] == asked


def test_a_max_rank_that_no_engine_takes_is_refused():
    config = parse(ClusterConfig, {"models": [{"name": "smol", "source": "hub/smol", "max_rank": 513}]})
    with pytest.raises(ConfigError, match="max_rank is 513, vLLM allows at most 512"):
        _llm_config(config, config.models[0])


def test_every_name_of_ray_that_we_use_is_there():
    ray_hooks.check_hooks()


def test_a_missing_name_is_told(monkeypatch):
    wrong = (("ray.serve", "no_such_thing", (), "a test"), ("ray.serve", "get_deployment_actor", ("colour",), "a test"))
    monkeypatch.setattr(ray_hooks, "HOOKS", wrong)
    with pytest.raises(HookError) as caught:
        ray_hooks.check_hooks(with_llm=False)
    assert "no_such_thing" in str(caught.value)
    assert "colour" in str(caught.value)


@pytest.fixture
def dead_cluster(monkeypatch):
    """This machine as a cluster left it that was killed: Ray's directory names an address where nobody is."""
    # Not tmp_path: Ray puts sockets there, whose paths are short.
    root = Path(tempfile.mkdtemp(prefix="ray"))
    (root / "ray").mkdir()
    (root / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    monkeypatch.setenv("RAY_TMPDIR", str(root))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield "127.0.0.1:1"
    shutil.rmtree(root, ignore_errors=True)


@pytest.mark.usefixtures("dead_cluster")
def test_a_dead_clusters_address_is_told_at_once(monkeypatch, capsys):
    # Ray takes any Ray that runs on the machine, also one of somebody else, before the address left behind.
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)
    for action in (["status"], ["explain", "poems"], ["down"]):
        assert main(["cluster", *action]) == 1
        error = capsys.readouterr().err
        assert "no Ray cluster at auto" in error
        assert "nobody listens at" in error


def test_the_application_needs_a_connection(config):
    with pytest.raises(ClusterError, match="not connected to Ray"):
        build_app(config)
    assert not ray.is_initialized()


def test_up_waits_for_what_is_under_way_and_then_tells_the_faults(config, monkeypatch):
    model = {"model": "tiny", "pending": ["r0 loads its adapters"], "faults": {}, "store_faults": {}}
    ready = {**model, "pending": [], "faults": {"wide": "no replica can hold it"}}
    states = iter([ClusterError("no controller"), {"models": {"a": model}}, {"models": {"a": model, "b": ready}}])

    def status(_name):
        state = next(states, {"models": {"a": {**ready, "model": "Smol.1"}, "b": ready}})
        if isinstance(state, Exception):
            raise state
        return state

    monkeypatch.setattr(operate, "status", status)
    monkeypatch.setattr(operate.time, "sleep", lambda _: None)
    found = operate.first_faults(config)
    assert found == ["Smol.1: wide: no replica can hold it", "tiny: wide: no replica can hold it"]
    monkeypatch.setattr(operate, "status", lambda _: {"models": {"b": ready}})
    assert operate.first_faults(config, patience_s=0)[-1] == "Smol.1: no placement controller"


def test_a_ray_of_our_own_beside_a_dead_clusters_address(dead_cluster, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", dead_cluster)
    data = {"models": [{"name": "tiny", "source": str(tmp_path), "device": "cpu", "cpus": 0.5}]}
    try:
        assert operate.connect(None, parse(ClusterConfig, data))
        assert ray.cluster_resources()["CPU"] >= 1
        # Messages of Ray's LLM stack and of vLLM inside it, which take the root logger when imported, are not shown.
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
        logs = operate.log_to_file()
        assert logs is not None
        app = build_from_data(data)
        # Another process of this user finds it and may talk to it.
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        command = [sys.executable, "-m", "flora_vllm.commands.cli", "cluster", "status", "--name", "nobody"]
        seen = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        logging.getLogger("somebody").warning("for the file")
        written = (logs / f"flora-up-{os.getpid()}.log").read_text()
        short = operate.lacks(parse(ClusterConfig, {"models": [{"name": "big", "source": "x", "tensor_parallel": 99}]}))
    finally:
        operate.stop_all("flora")
    assert app._bound_deployment.name == "FloraIngress"
    assert "no application 'nobody' runs on this Ray" in seen.stderr
    assert "for the file" in written
    assert short is not None
    assert "99 GPUs are needed" in short
