"""Many adapters in one batch: the same losses and factors as each alone, and a jobs file's mistakes named."""

import json

import pytest
import torch
from safetensors.torch import load_file
from training_support import sentences, tiny_llama, tiny_tokenizer

from flora_vllm.commands.cli import main
from flora_vllm.errors import ConfigError
from flora_vllm.train_request import Request
from flora_vllm.training import jobs
from flora_vllm.training.run import read_blocks, train_one


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def file(base, tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        lines = [json.dumps({"text": text}) for text in sentences(150, seed)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines[: 150 if seed else 100]))
    path = tmp_path / "jobs.yaml"
    path.write_text(f"""
base: {base}
length: 16
targets: all-linear
jobs:
  - {{data: {tmp_path}/a.jsonl, out: {tmp_path}/a, steps: 6, batch: 2}}
  - {{data: {tmp_path}/b.jsonl, out: {tmp_path}/b, steps: 9, batch: 3, rank: 3, lr: 4e-3, seed: 7}}
""")
    return path


def losses(out) -> list[float]:
    lines = (out.parent / f"{out.name}.training" / "log.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def test_together_is_each_alone(file, tmp_path, capsys):
    requests = jobs.read_jobs(file)
    report = jobs.train_together(requests)
    assert report.seconds > 0
    assert report.alone_s > 0
    for request in requests:
        alone = Request(**{**vars(request), "out": tmp_path / "alone" / request.out.name})
        model, tokenizer = tiny_llama(), tiny_tokenizer()
        measured = train_one(alone, model, read_blocks(alone, tokenizer), alone.rate)
        # Rows of a GEMM are summed in another order in a larger batch: float32 ulps, grown by at most 9 Adam steps
        # (the first of which divides a gradient by its own size) of 8e-3.
        assert losses(request.out) == pytest.approx(losses(alone.out), rel=1e-4)
        assert report.measured[request.out].adapter == pytest.approx(measured.adapter, rel=1e-4)
        assert report.measured[request.out].base == pytest.approx(measured.base, rel=1e-6)
        assert len(losses(request.out)) == request.steps
    capsys.readouterr()


def test_command_trains_all_and_prints_one_serve_line(file, tmp_path, base, capsys):
    assert main(["train", "--jobs", str(file)]) == 0
    printed = capsys.readouterr().out
    serve = f"vllm serve {base} --enable-flora --max-loras 2 --lora-modules a={tmp_path}/a b={tmp_path}/b"
    assert serve in printed
    assert "together; one job after another" in printed
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert {t.shape[0] for name, t in a.items() if "flora_A" in name} == {1}
    assert {t.shape[0] for name, t in b.items() if "flora_A" in name} == {3}
    assert not torch.equal(
        *(t["base_model.model.model.layers.0.self_attn.q_proj.flora_B.weight"][:, :1] for t in (a, b))
    )
    old = [tmp_path / f"{name}.training" / "old" for name in "ab"]
    for path in old:
        path.touch()
    assert main(["train", "--jobs", str(file), "--restart"]) == 0
    assert not any(path.exists() for path in old)


def test_a_run_goes_on_from_a_file_in_another_order_or_with_other_jobs(file, tmp_path, monkeypatch):
    """Each job's state is its own: the factors are those of a run that nothing stopped."""
    requests = jobs.read_jobs(file)
    elsewhere = [Request(**{**vars(r), "out": tmp_path / "whole" / r.out.name}) for r in requests]
    jobs.train_together(elsewhere)
    steps = 0

    def interrupted(*_):
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(jobs.Bar, "seen", interrupted)
    with pytest.raises(KeyboardInterrupt):
        jobs.train_together(requests)
    assert [len(losses(r.out)) for r in requests] == [4, 4]
    monkeypatch.undo()
    jobs.train_together(requests[1:])
    jobs.train_together(requests[::-1])
    for request, whole in zip(requests, elsewhere, strict=True):
        # As above: in a batch with other jobs' rows the sums are of another order.
        assert losses(request.out) == pytest.approx(losses(whole.out), rel=1e-4)
        assert len(losses(request.out)) == request.steps


def test_a_state_of_another_model_is_refused_in_one_line(file, tmp_path, base):
    requests = jobs.read_jobs(file)
    jobs.train_together(requests)
    path = tmp_path / "b.training" / "state.pt"
    state = torch.load(path, weights_only=True)
    name, factor = next(iter(state["factors"].items()))
    assert "job" not in name
    state["factors"][name] = factor[:, :1]
    torch.save(state, path)
    with pytest.raises(ConfigError, match=r"/b holds a run of other factors \(1 differ; .*shape \[.*--restart") as said:
        jobs.train_together(requests)
    assert name in str(said.value)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("jobs: []", "needs base: MODEL and jobs"),
        ("base: m\njobs: [{data: d, out: o, speed: 3}]", "job 1: it has unknown keys speed; allowed are method, rank"),
        ("base: m\njobs: [{data: d}]", "job 1: out must be given"),
        ("base: m\njobs: [{data: d, out: o}, {data: e, out: o}]", r"jobs 1 and 2 write to .*/o$"),
        ("base: m\njobs: [{data: d, out: o}, {data: e, out: x/../o/}]", r"jobs 1 and 2 write to .*/o$"),
        (
            "base: m\njobs: [{data: d, out: o, rank: 1.5}]",
            r"rank \(--rank\) must be a whole number .* got 1.5",
        ),
        ("base: m\njobs: [{data: d, out: o, lr: fast}]", r"lr \(--lr\) must be a number above 0, got 'fast'"),
        ("base: m\njobs: [{data: d, out: o, length: 8}]", "length must be the same for all jobs"),
        ("base: m\nmethod: lora\njobs: [{data: d, out: o}]", "only method flora"),
        ("base: m\njobs: [3]", "job 1: is 3"),
        ("a: [", "can't be read"),
    ],
)
def test_mistakes_in_a_jobs_file_are_named(text, words, tmp_path):
    path = tmp_path / "jobs.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        jobs.read_jobs(path)


def test_jobs_and_single_run_options_do_not_mix(file, capsys):
    assert main(["train", "--jobs", str(file), "--rank", "2"]) == 1
    assert "leave out --rank" in capsys.readouterr().err
    assert main(["train"]) == 1
    assert "give BASE DATA OUT, or --jobs FILE" in capsys.readouterr().err
