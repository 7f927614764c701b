"""`flora-vllm cluster ACTION`: arguments and text; the work is in operate.py and manifest.py."""

import argparse
import json
import sys

from flora_vllm.errors import check_installed

EXAMPLES = """\
examples:
  flora-vllm cluster up cluster.yaml                      # a Ray of its own on this machine, until Ctrl-C
  flora-vllm cluster up cluster.yaml --address auto       # on the Ray cluster this machine belongs to
  flora-vllm cluster status
  flora-vllm cluster explain poems
  flora-vllm cluster down
  flora-vllm cluster manifest cluster.yaml --serve > serve.yaml && serve deploy serve.yaml
  flora-vllm cluster manifest cluster.yaml --image registry.example/flora-vllm:1 | kubectl apply -f -

All of it needs pip install "flora-vllm[cluster]".

a small cluster.yaml:
  models:
    - name: smol
      source: HuggingFaceTB/SmolLM2-135M-Instruct
      adapters: [/shared/adapters]          # directories, s3://, gs://; scanned again and again
      replicas: 2
      slots: 8                              # adapters in memory per replica
      device: cpu                           # or gpu
      adapter_options: {poems: {min_copies: 2}}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Serve base models and their adapters from many engines on Ray, behind one OpenAI endpoint."
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    command = commands.add_parser("up", help="bring it up and wait until it serves")
    command.add_argument("config", metavar="CONFIG.yaml")
    command.add_argument("--address", help="a running Ray (auto, host:port, ray://...); without it one is started here")

    for name, text in (
        ("status", "who holds what, and what cannot be served"),
        ("explain", "why an adapter is where it is"),
        ("down", "stop serving"),
    ):
        command = commands.add_parser(name, help=text)
        if name == "explain":
            command.add_argument("adapter", metavar="ADAPTER", help="a name, or base:name")
        if name != "down":
            command.add_argument("--json", action="store_true", help="one JSON object instead of text")
        command.add_argument("--name", default="flora", help="the application's name in the configuration")
        command.add_argument("--address", default="auto", help="the Ray cluster (default: the one on this machine)")

    command = commands.add_parser("manifest", help="print a KubeRay RayService, or a file for `serve deploy`")
    command.add_argument("config", metavar="CONFIG.yaml")
    kind = command.add_mutually_exclusive_group(required=True)
    kind.add_argument("--image", help="container image with flora-vllm: prints a RayService")
    kind.add_argument("--serve", action="store_true", help="print the configuration for `serve deploy`")
    command.add_argument("--memory", default="32Gi", help="memory per replica's pod (default: 32Gi)")
    command.add_argument("--claim", help="volume claim with models and adapters, mounted at /shared")


def run(args: argparse.Namespace) -> int:
    """0 if it was done; errors of ours are raised with their reason."""
    check_installed("flora-vllm cluster", "cluster", "ray", "fsspec", "yaml")
    return {"up": _up, "status": _status, "explain": _explain, "down": _down, "manifest": _manifest}[args.action](args)


def _up(args: argparse.Namespace) -> int:
    from flora_vllm.cluster import operate
    from flora_vllm.cluster.config import read_config

    config = read_config(args.config)
    is_ours = operate.connect(args.address, config)
    try:
        logs = operate.log_to_file() or "session_latest/logs in Ray's directory on each node"
        print(f"starting {', '.join(m.name for m in config.models)}; logs: {logs}", flush=True)
        operate.up(config, lambda warning: print(f"warning: {warning}", file=sys.stderr, flush=True))
        endpoint = f"http://{config.ingress.host}:{config.ingress.port}/v1"
        print(f"serving {', '.join(m.name for m in config.models)} at {endpoint}", flush=True)
        if is_ours:
            print("Ctrl-C or `flora-vllm cluster down` ends it", flush=True)
            operate.wait_until_gone(config.name)
    finally:
        if is_ours:
            operate.stop_all(config.name)
    return 0


def _status(args: argparse.Namespace) -> int:
    from flora_vllm.cluster import operate

    operate.connect(args.address)
    report = operate.status(args.name)
    if args.json:
        print(json.dumps(report))
    else:
        print(f"{report['application']}: {report['status']} {report['message']}".rstrip())
        for deployment, state in report["deployments"].items():
            print(f"  {deployment}: {state}")
        for model in report["models"].values():
            print("\n".join(operate.tell_model(model)))
    return 0 if report["status"] == "RUNNING" else 1


def _explain(args: argparse.Namespace) -> int:
    from flora_vllm.cluster import operate

    operate.connect(args.address)
    found = operate.explain(args.name, args.adapter)
    if args.json:
        print(json.dumps(found))
        return 0
    for one in found:
        print(f"{one['adapter']} on {one['deployment']}")
        for reason in one["reasons"]:
            print(f"  {reason}")
        print(f"  in memory on: {', '.join(one['resident']) or 'no replica'}")
        for replica, fault in one["refused"].items():
            print(f"  refused by {replica}: {fault}")
    return 0


def _down(args: argparse.Namespace) -> int:
    from flora_vllm.cluster import operate

    operate.connect(args.address)
    operate.down(args.name)
    print(f"{args.name} is down")
    return 0


def _manifest(args: argparse.Namespace) -> int:
    import yaml

    from flora_vllm.cluster.config import read_config
    from flora_vllm.cluster.manifest import ray_service, serve_config

    config = read_config(args.config)
    data = serve_config(config) if args.serve else ray_service(config, args.image, args.memory, args.claim)
    print(yaml.safe_dump(data, sort_keys=False), end="")
    return 0
