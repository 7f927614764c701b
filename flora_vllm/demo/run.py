"""`flora-vllm demo`: a real server, several adapters, one mixed batch, and the proof that each request got its own.

What must hold, or the exit status is 1: every adapter is listed; each one finds text of its own kind likelier than
the base model and every other adapter do; each request's answer in the mixed batch is its answer alone.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flora_vllm.commands.server_process import ServerProcess
from flora_vllm.demo.model_assets import fetch_smollm2
from flora_vllm.environment import cache_root
from flora_vllm.errors import ConfigError

ADAPTERS = Path(__file__).with_name("adapters")
TOKENS = 32
COPIES = 2  # requests per adapter in the timed batches
# bfloat16 sums differ with the batch they run in; a token with a near tie may then fall either way.
LOGPROB_TOLERANCE = 0.15


@dataclass(frozen=True)
class Answer:
    """One completion: its text, its tokens and their log-probabilities."""

    model: str
    text: str
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]


BEGIN = """\
This serves one small model and {count} adapters ({names}) from one vLLM server, asks all of them at once, and checks
that every request got its own. It takes about two minutes; what vLLM says goes to a file."""
NEXT = {
    "flora-vllm demo --keep": "the same server, left running for your own requests",
    "flora-vllm inspect {adapters}/perl": "what an adapter is",
    "flora-vllm serve {model} --lora-modules perl={adapters}/perl": "your own server",
    "flora-vllm train {model} YOUR_TEXT.jsonl ./mine": "an adapter of your own, and the line that serves it",
    "flora-vllm --help": "everything else",
}
EXAMPLES = """\
examples:
  flora-vllm demo
  flora-vllm demo --prompt 'Once upon a time' --keep
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Serve a small model with several adapters, send a mixed batch and check each answer."
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", help="serve this model directory instead of fetching SmolLM2-135M-Instruct")
    parser.add_argument("--prompt", default="for", help="prompt every model continues")
    parser.add_argument("--keep", action="store_true", help="leave the server running and print how to use it")


def run(args: argparse.Namespace) -> int:
    import openai

    samples = _samples()
    print(BEGIN.format(count=len(samples), names=", ".join(samples)), flush=True)
    model = Path(args.model) if args.model else fetch_smollm2(cache_root() / "smollm2")
    with ServerProcess(model, {name: ADAPTERS / name for name in samples}, served_name="base") as server:
        client = openai.OpenAI(base_url=server.url, api_key="none", timeout=600)
        failures = _show(client, ["base", *samples], args.prompt, samples)
        print()
        print("Every check held." if not failures else "FAILED:\n" + "\n".join(f"  - {f}" for f in failures))
        if args.keep and not failures:
            print(f"the server runs at {server.url} until Ctrl-C; model names: base, {', '.join(samples)}")
            server.wait()
    if not failures and not args.keep:
        print(_next_steps(_shown(model.resolve()), _shown(ADAPTERS)))
    return 1 if failures else 0


def _next_steps(model: str, adapters: str) -> str:
    commands = {command.format(model=model, adapters=adapters): comment for command, comment in NEXT.items()}
    width = max(map(len, commands))
    lines = [f"  {command:{width}}  # {comment}" for command, comment in commands.items()]
    # In a clone the commands are not on the path: they lie in .venv/bin.
    return "\n".join(["", "What to try next (in a clone with `. .venv/bin/activate` first):", *lines, ""])


def _shown(path: Path) -> str:
    """Short where it can be."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _samples() -> dict[str, str]:
    """Adapter name -> a text of its kind that it was not trained on."""
    path = ADAPTERS / "samples.json"
    samples = json.loads(path.read_text(encoding="utf-8"))
    missing = [name for name in samples if not (ADAPTERS / name / "adapter_config.json").is_file()]
    if missing:
        raise ConfigError(f"{path} names adapters that are not there: {missing}; reinstall flora-vllm")
    return samples


def _show(client: Any, models: Sequence[str], prompt: str, samples: dict[str, str]) -> list[str]:
    failures = []
    listed = {card.id for card in client.models.list()}
    failures += [f"{model} is not in /v1/models" for model in models if model not in listed]
    print(f"\n/v1/models lists {', '.join(m for m in models if m in listed)}")

    alone = {model: _complete(client, model, prompt) for model in models}
    together = _batch(client, models, prompt)
    print(f"\nOne batch, one prompt, {len(models)} models. {prompt.strip()!r} goes on as:")
    for answer in together:
        print(f"\n[{answer.model}]\n{answer.text.strip()}")
        failures += _differences(alone[answer.model], answer)
    texts = [answer.text for answer in together]
    failures += [f"{m} answers as another model does" for m, t in zip(models, texts, strict=True) if texts.count(t) > 1]

    failures += _own_kind(client, models, samples)
    _speed(client, models, prompt)
    return failures


def _complete(client: Any, model: str, prompt: str, tokens: int = TOKENS) -> Answer:
    response = client.completions.create(
        model=model, prompt=prompt, max_tokens=tokens, temperature=0, logprobs=1, extra_body={"ignore_eos": True}
    )
    choice = response.choices[0]
    return Answer(response.model, choice.text, tuple(choice.logprobs.tokens), tuple(choice.logprobs.token_logprobs))


def _batch(client: Any, models: Sequence[str], prompt: str) -> list[Answer]:
    with ThreadPoolExecutor(len(models)) as pool:
        return list(pool.map(lambda model: _complete(client, model, prompt), models))


def _differences(alone: Answer, together: Answer) -> list[str]:
    """Up to the first differing token the log-probabilities agree, and there the two tokens were a near tie."""
    for i, (a, b) in enumerate(zip(alone.tokens, together.tokens, strict=True)):
        if abs(alone.logprobs[i] - together.logprobs[i]) > LOGPROB_TOLERANCE:
            gap = abs(alone.logprobs[i] - together.logprobs[i])
            return [f"{together.model}: token {i} has another log-probability in the batch than alone (by {gap:.3f})"]
        if a != b:
            break
    return []


def _own_kind(client: Any, models: Sequence[str], samples: dict[str, str]) -> list[str]:
    """Score each adapter's sample under every model, all at once, and print bits per token."""
    pairs = [(model, name) for name in samples for model in models]
    with ThreadPoolExecutor(16) as pool:
        scores = dict(zip(pairs, pool.map(lambda pair: _bits(client, pair[0], samples[pair[1]]), pairs), strict=True))
    print("\nBits per token of unseen text (row) under each model (column); lower is better:")
    print(f"{'':>12}" + "".join(f"{model:>12}" for model in models))
    failures = []
    for name in samples:
        row = {model: scores[model, name] for model in models}
        best = min(row, key=lambda model: row[model])
        cells = [f"{value:.2f}{'*' if model == best else ' '}" for model, value in row.items()]
        print(f"{name:>12}" + "".join(f"{cell:>12}" for cell in cells))
        if best != name:
            failures.append(f"text of {name!r} is likelier under {best!r}")
    return failures


def _bits(client: Any, model: str, text: str) -> float:
    response = client.completions.create(model=model, prompt=text, max_tokens=1, echo=True, logprobs=1, temperature=0)
    # The first prompt token has no log-probability; the last token is the generated one.
    logprobs = response.choices[0].logprobs.token_logprobs[1:-1]
    return -sum(logprobs) / len(logprobs) / math.log(2)


def _speed(client: Any, models: Sequence[str], prompt: str) -> None:
    def timed(batch: Sequence[str]) -> float:
        start = time.perf_counter()
        _batch(client, batch, prompt)
        return time.perf_counter() - start

    mixed = list(models) * COPIES
    plain = ["base"] * len(mixed)
    rounds = [(timed(plain), timed(mixed)) for _ in range(3)]
    base_s, mixed_s = (sorted(times)[1] for times in zip(*rounds, strict=True))
    tokens = len(mixed) * TOKENS
    print(
        f"\n{len(mixed)} requests at once, {tokens} tokens: base only {tokens / base_s:.0f} tokens/s, "
        f"mixed {tokens / mixed_s:.0f} tokens/s; a mixed step costs {mixed_s / base_s:.2f} of a base step "
        "(medians of 3, interleaved)"
    )
