from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.heartbeat import EngineLoad
from workers.endpoints.health import is_full, read_metrics, read_slots

VLLM = """
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="meta-llama/Llama-3.1-8B-Instruct"} 3.0
vllm:num_requests_running{engine="1",model_name="meta-llama/Llama-3.1-8B-Instruct"} 2.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="meta-llama/Llama-3.1-8B-Instruct"} 4.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="meta-llama/Llama-3.1-8B-Instruct"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="meta-llama/Llama-3.1-8B-Instruct"} 0.5
# TYPE vllm:request_success_total counter
vllm:request_success_total{finished_reason="stop"} 17.0
"""
LLAMA = """
# HELP llamacpp:requests_processing Number of requests processing.
# TYPE llamacpp:requests_processing gauge
llamacpp:requests_processing 1
llamacpp:requests_deferred 2
"""
SLOTS = b'[{"id":0,"is_processing":true,"params":{}},{"id":1,"is_processing":false}]'


@pytest.mark.parametrize(
    ("body", "engine"),
    [
        (VLLM, EngineLoad(running=5, waiting=4, cache=0.5)),
        (LLAMA, EngineLoad(running=1, waiting=2)),
        ('nv_inference_pending_request_count{model="a"} 7\n', EngineLoad(waiting=7)),
        ("process_cpu_seconds_total 1\n", None),
        ("vllm:num_requests_running{broken 1", None),
        ("vllm:num_requests_running 1e300\nvllm:num_requests_waiting NaN\n", EngineLoad(running=10**6)),
        ("vllm:kv_cache_usage_perc -3\nvllm:num_requests_running -1\n", EngineLoad()),
        ("", None),
    ],
)
def test_an_engines_metrics_show_what_runs_and_waits_there(body: str, engine: EngineLoad | None) -> None:
    assert read_metrics(body.encode()) == engine


@pytest.mark.parametrize(("body", "engine"), [(SLOTS, EngineLoad(running=1)), (b"{}", None), (b"\xff", None)])
def test_slots_show_what_runs(body: bytes, engine: EngineLoad | None) -> None:
    assert read_slots(body) == engine


@given(text=st.text(st.sampled_from('vllm:num_requests_running{}"=,\n 0123456789.eE+-#\\\xff')))
def test_whatever_an_endpoint_says_is_facts_or_nothing(text: str) -> None:
    for body in (text, f"vllm:num_requests_running{text}"):
        facts = read_metrics(body.encode())
        assert facts is None or 0 <= facts.running <= 10**6
    assert read_slots(text.encode()) is None or text.strip() == "[]"


def test_an_engine_whose_requests_wait_or_whose_cache_is_used_is_full() -> None:
    engines = (None, EngineLoad(running=9), EngineLoad(waiting=1), EngineLoad(cache=0.99))
    assert [is_full(one) for one in engines] == [False, False, True, True]
