"""`flora-vllm deploy KIND`: prints a file that others deploy; the files lie in flora_vllm/deploy/."""

import argparse
from pathlib import Path

from flora_vllm import __version__

FILES = {
    "docker": ("Dockerfile", "an image on vLLM's own"),
    "compose": ("compose.yaml", "the image with Prometheus and Grafana on one machine"),
    "kserve": ("kserve.yaml", "an InferenceService"),
    "llm-d": ("llm-d.yaml", "values for the chart llm-d-modelservice"),
    "aibrix": ("aibrix.yaml", "a deployment and a ModelAdapter"),
    "grafana": ("grafana.json", "a dashboard of the server's metrics"),
}
EXAMPLES = """\
examples:
  flora-vllm deploy docker > Dockerfile && docker build -t flora-vllm .
  flora-vllm deploy grafana > grafana.json && flora-vllm deploy compose > compose.yaml && docker compose up
  flora-vllm deploy kserve | sed 's|IMAGE|registry.example/flora-vllm:1|' | kubectl apply -f -

Each file begins with how to use it. For Ray and KubeRay see `flora-vllm cluster manifest --help`.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Print a file to deploy the server with."
    parser.epilog = "\n".join([*(f"  {kind:8} {text}" for kind, (_, text) in FILES.items()), "", EXAMPLES])
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("kind", metavar="KIND", choices=FILES, help=f"one of {', '.join(FILES)}")


def text_of(kind: str) -> str:
    """The file, for this version."""
    path = Path(__file__).resolve().parent.parent / "deploy" / FILES[kind][0]
    return path.read_text(encoding="utf-8").replace("@VERSION@", __version__)


def run(args: argparse.Namespace) -> int:
    """0, always."""
    print(text_of(args.kind), end="")
    return 0
