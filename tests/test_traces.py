"""A request's span says which adapter it used, through vLLM's own tracing and OpenTelemetry's own span."""

from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from flora_vllm.plugin import traces
from flora_vllm.plugin.identity import identity

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("lora_name", "added"),
    [
        (identity("poems", "a" * 64), {traces.NAME: "poems", traces.DIGEST: "a" * 64}),
        ("plain", {traces.NAME: "plain"}),
        (None, {}),
    ],
)
def test_the_span_of_a_request(lora_name: str | None, added: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine import output_processor
    from vllm.v1.metrics.stats import IterationStats, RequestStateStats

    spans, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    for holder, name in ((output_processor, "instrument_manual"), (output_processor.OutputProcessor, "do_tracing")):
        function = getattr(holder, name)
        monkeypatch.setattr(holder, name, getattr(function, "__wrapped__", function))
    traces.install()
    state: Any = SimpleNamespace(
        stats=RequestStateStats(arrival_time=1.0),
        prompt_token_ids=[1, 2],
        prompt_embeds=None,
        external_req_id="r",
        top_p=None,
        max_tokens_param=None,
        temperature=None,
        n=None,
        lora_request=lora_name and LoRARequest(lora_name, 1, "/nowhere"),
        lora_name=lora_name,
    )
    processor: Any = SimpleNamespace()
    output: Any = SimpleNamespace(trace_headers=None)
    output_processor.OutputProcessor.do_tracing(processor, output, state, IterationStats())
    (span,) = spans.get_finished_spans()
    assert span.name == "llm_request"
    assert {name: value for name, value in (span.attributes or {}).items() if name.startswith("flora.")} == added
    assert (span.attributes or {})["gen_ai.usage.prompt_tokens"] == 2
