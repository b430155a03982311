"""Programs that were written for OpenAI, unmodified: LangChain's ChatOpenAI, LiteLLM and the `llm` command.

They are installed into a virtual environment in the user's cache: only if TAXIWAY_TEST_CLIENTS is set.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from benchmarks.suite.installing import AbsentError, environment
from tasks.settings import cache_directory
from tests.openai_fleet import OpenAIFleet

PACKAGES = ["langchain-openai==1.7.4", "litellm==1.110.2", "llm==0.36"]

LANGCHAIN = """
import sys
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
chat = ChatOpenAI(model="talk", base_url=sys.argv[1], api_key="none", max_retries=0)
print(chat.invoke("Hello dear world").content)
print("".join(chunk.content for chunk in chat.stream("Hello dear world")))
vectors = OpenAIEmbeddings(model="vector", base_url=sys.argv[1], api_key="none", check_embedding_ctx_length=False)
print(vectors.embed_documents(["a", "bb"]))
"""

LITELLM = """
import asyncio, sys
import litellm
asked = dict(model="openai/talk", api_base=sys.argv[1], api_key="none")
asked |= {"messages": [{"role": "user", "content": "Hello dear world"}]}
print(litellm.completion(**asked).choices[0].message.content)
print("".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(**asked, stream=True)))
print(asyncio.run(litellm.acompletion(**asked)).usage.total_tokens)
try:
    litellm.completion(**{**asked, "model": "openai/tlak"})
except litellm.NotFoundError:
    print("no such model")
"""

LLM = """
- model_id: tower
  model_name: talk
  api_base: {url}
"""


@pytest.fixture(scope="module")
def python() -> str:
    if not os.environ.get("TAXIWAY_TEST_CLIENTS"):
        pytest.skip("TAXIWAY_TEST_CLIENTS is not set: LangChain, LiteLLM and llm are not installed")
    try:
        return environment(cache_directory(os.environ) / "openai-clients", PACKAGES)
    except AbsentError as error:
        pytest.skip(f"LangChain, LiteLLM and llm cannot be installed: {str(error)[-200:]}")


def said(command: list[str], **variables: str) -> list[str]:
    """The lines that a program prints."""
    environment = {name: value for name, value in os.environ.items() if "OPENAI" not in name} | variables
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_langchain_chats_streams_and_embeds(python: str, fleet: OpenAIFleet) -> None:
    *texts, vectors = said([python, "-c", LANGCHAIN, fleet.url])

    assert texts == ["Hello dear world "] * 2
    assert json.loads(vectors) == [[1, 1], [2, 1]]


def test_litellm_chats_streams_and_knows_our_errors(python: str, fleet: OpenAIFleet) -> None:
    stated = said([python, "-c", LITELLM, fleet.url], LITELLM_LOCAL_MODEL_COST_MAP="True")

    assert stated[:3] == ["Hello dear world ", "Hello dear world ", "6"]
    assert stated[-1] == "no such model"


@pytest.mark.parametrize("options", [[], ["--no-stream"]])
def test_the_llm_command_prompts_a_model(python: str, fleet: OpenAIFleet, tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(LLM.format(url=fleet.url))
    command = [str(Path(python).parent / "llm"), "prompt", "-m", "tower", "--key", "none", *options, "Hello dear world"]

    assert said(command, LLM_USER_PATH=str(tmp_path)) == ["Hello dear world "]
