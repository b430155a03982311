"""A worker before LitServe's real server, which speaks OpenAI's chats and lists no models."""

from pathlib import Path

from tasks.settings import Settings
from tests.builders import add_engine_models
from tests.queues import engine_class, queues_of
from tests.real_engines import litserve
from tests.routing import eventually
from tests.stored import all_facts
from tests.working import CLASS, Tower, worker_process, worker_settings

CHAT = {"messages": [{"role": "user", "content": "Hello dear world"}]}


def test_a_chat_of_a_server_that_lists_no_models_is_answered_and_streamed(settings: Settings, tmp_path: Path) -> None:
    with litserve(tmp_path) as url:
        engine = engine_class(f"{url}/v1", slots=2, models={"talk": "any"}, health={"path": "/health"})
        configured = worker_settings(settings, tmp_path, queues_of({CLASS: engine}))
        add_engine_models(configured.models, "talk")
        with worker_process(configured, "--device", "endpoint:0"), Tower(configured) as tower:
            eventually(lambda: [one for one in all_facts(tower.state) if one.classes and not one.fault])
            jobs = [tower.order("talk", CHAT, variant="engine", stream=streams) for streams in (False, True)]
            outputs = [tower.result(job).outputs for job in jobs]
    assert [one["text"].split() for one in outputs] == [["Hello", "dear", "world"]] * 2
    assert outputs[0]["finish-reason"] == "stop"
