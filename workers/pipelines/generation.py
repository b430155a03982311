"""Text generation by a small chat model with continuous batching.

Rows join and leave between steps, and each ends on its own: tokens are sampled, and a text's end is detected, for each
sequence independently of its batch.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from tasks.models.catalogue import Model, Variant
from taxiway.contract.deltas import Delta
from taxiway.errors import InvalidRequestError, RequestTooLargeError
from workers.pipelines.text import read_text
from workers.port import MAX_PREFILL, Item, ModelLoadError, Placed, Row, Runtime, SteppingRuntime

MAX_STOPS = 4


class ChatTemplate:
    """A chat as a model was trained to read it, by the template of its makers.

    What a message spells never becomes a control token.

    Args:
        chat: what the recipe `gguf-chat` writes.

    Raises:
        ModelLoadError: the template is wrong, or the tokenizer lacks a token that it names.
    """

    def __init__(self, tokenizer: Tokenizer, chat: Mapping[str, Any]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(chat["template"])
        except TemplateError as error:
            raise ModelLoadError(f"the chat template is wrong: {error}") from error
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True
        special = {one.content: number for number, one in tokenizer.get_added_tokens_decoder().items() if one.special}
        self._special = special
        self._controls = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
        self._around = {"bos_token": chat["begin"], "eos_token": chat["end"]}
        missing = [text for text in chat["ends"] if text not in special]
        if missing:
            raise ModelLoadError(f"the tokenizer has no token {missing[0]!r}: it is another model's")
        self.ends = frozenset(special[text] for text in chat["ends"])

    def tokens(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The whole chat up to where the answer begins.

        Raises:
            InvalidRequestError: the template does not take such a chat.
        """
        mark = f"\ue000{secrets.token_hex(8)}\ue001"  # stands in a message for what would be a control token
        spelt: list[str] = []

        def hide(found: re.Match[str]) -> str:
            spelt.append(found[0])
            return mark

        hidden = [{**m, "content": self._controls.sub(hide, m["content"])} for m in messages]
        try:
            text = self._template.render(messages=hidden, add_generation_prompt=True, **self._around)
        except TemplateError as error:
            raise InvalidRequestError(f"the model's chat template refuses the messages: {error}") from error
        return self._encoded(text, mark, iter(spelt))

    def text(self, tokens: Sequence[int]) -> str:
        """What the tokens say."""
        decoded: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return decoded

    def _encoded(self, text: str, mark: str, spelt: Iterator[str]) -> list[int]:
        """The tokens of a rendered chat: control tokens where the template has them, and text between these."""
        ids: list[int] = []
        at = 0
        for control in (*self._controls.finditer(text), None):
            first, *rest = text[at : control.start() if control is not None else len(text)].split(mark)
            part = first + "".join(next(spelt, "") + more for more in rest)
            if part:
                ids += self._tokenizer.encode(part, add_special_tokens=False).ids
            if control is not None:
                ids.append(self._special[control[0]])
                at = control.end()
        return ids


def _refuse(reason: str) -> str:
    """What templates call for a chat that they do not take."""
    raise TemplateError(reason)


def open_template(placed: Placed) -> ChatTemplate:
    """The template of a variant, from the files in the roles `tokenizer` and `chat`."""
    chat = json.loads(placed.files["chat"].read_text(encoding="utf-8"))
    return ChatTemplate(Tokenizer.from_file(str(placed.files["tokenizer"])), chat)


class SteppingPipeline:
    """Answers items with the `tokens` of a prompt, in a batch that rows join and leave.

    Args:
        ends: the tokens that end an answer.
        decode: tokens to text.
    """

    def __init__(self, ends: frozenset[int], decode: Callable[[Sequence[int]], str]) -> None:
        self._ends, self._decode = ends, decode

    def begin(self, runtime: Runtime) -> RunningBatch:
        """An empty batch, for items of this pipeline."""
        return RunningBatch(cast(SteppingRuntime, runtime), self._generated)

    def run(self, runtime: Runtime, items: Sequence[Item]) -> list[Row]:
        """The answer of each item, as a `RunningRow` has it. As many run together as memory allows."""
        batch, waiting = self.begin(runtime), deque(items)
        rows = []
        try:
            while waiting or batch.rows:
                while waiting and batch.room(waiting[0].size):
                    rows.append(batch.join(waiting.popleft()))
                for failed in [ended.error for ended in batch.step() if ended.error is not None]:
                    raise failed
        finally:
            batch.leave(batch.rows)
        return [row.answer for row in rows]

    def _generated(self, item: Item) -> GeneratedText:
        return GeneratedText(read_sampling(item.parameters), self._ends, self._decode)


class GenerationPipeline(SteppingPipeline):
    """Tokenises prompts and generates answers in a running batch.

    Args:
        model: its first input is the prompt; its last bucket is the most tokens of prompt and answer in total.
        template: makes a chat of a prompt.
    """

    def __init__(self, model: Model, template: ChatTemplate) -> None:
        super().__init__(template.ends, template.text)
        self._input = model.inputs[0].name
        self._limit = model.buckets[-1]
        self._defaults = {name: parameter.default for name, parameter in model.parameters.items()}
        self._template = template

    def prepare(self, row: Row, parameters: Mapping[str, Any]) -> Item:
        """The chat's tokens; the size is their number plus the answer's limit.

        Raises:
            InvalidRequestError: the prompt is missing, empty or not UTF-8, or there are too many or empty stops.
            RequestTooLargeError: prompt and answer exceed the context, or the prompt exceeds `text.MAX_BYTES`.
        """
        wanted = {**self._defaults, **parameters}
        _check_stops(wanted.get("stop"))
        ids = self._template.tokens([{"role": "user", "content": read_text(self._input, row)}])
        size = len(ids) + int(wanted["max_tokens"])
        if size > self._limit:
            expected = f"at most {self._limit} tokens of chat and max_tokens together"
            message = f"input {self._input!r}: expected {expected}, got {size}"
            raise RequestTooLargeError(message, field=f"inputs.{self._input}", limit=self._limit)
        return Item({"tokens": np.array(ids, np.int64)}, size, wanted)


def _check_stops(stops: Any) -> None:
    if stops and (len(stops) > MAX_STOPS or not all(stops)):
        message = f"parameter 'stop': expected at most {MAX_STOPS} texts, none of them empty, got {stops!r}"
        raise InvalidRequestError(message, field="parameters.stop")


def open_pipeline(model: Model, variant: Variant, placed: Placed) -> GenerationPipeline:
    """The pipeline for one variant, from the files in the roles `tokenizer` and `chat`."""
    return GenerationPipeline(model, open_template(placed))


MAX_HELD = 12_288
"""Most tokens of prompts and answers in the key-value cache: 46 kB each in float32, 570 MB in all."""

PREFILL_TIME = 0.1
"""Approximate seconds of prefill per step, which delay the rows that decode: the time of two steps on a CPU."""

MIN_PREFILL = 64
"""Least prompt tokens per step: in pieces of 64 a token costs 6 % more than in large ones, in pieces of 16 56 %."""

_SMOOTHING = 0.3  # weight of the newest measurement in the mean speed


@dataclass(slots=True, eq=False)
class RunningRow:
    """A row in a running batch.

    `prefilled` counts the prompt's tokens in the cache, `steps` the steps that the row was in the batch, and `batched`
    the rows of those steps, itself included. `run_time` is those steps' seconds, and `device_time` its share of them.
    `error` is the failure that ended it.
    """

    item: Item
    generated: GeneratedText
    slot: int
    prefilled: int = 0
    steps: int = 0
    batched: int = 0
    run_time: float = 0.0
    device_time: float = 0.0
    error: BaseException | None = None

    @property
    def prompt(self) -> np.ndarray:
        """The prompt's tokens, int64."""
        return self.item.arrays["tokens"]

    @property
    def batch(self) -> int:
        """The mean batch size over its steps."""
        return max(1, round(self.batched / max(self.steps, 1)))

    @property
    def left(self) -> float:
        """Seconds until it reaches its token limit, at the pace of its steps so far."""
        tokens = self.item.size - len(self.prompt) - len(self.generated.tokens)
        return tokens * self.run_time / max(self.steps, 1)

    @property
    def answer(self) -> Row:
        """`text`, `tokens`, `finish-reason`, `usage` and `logprobs`; and, for a chat, the assistant's `message`."""
        text, asked, tokens = self.generated.text, len(self.prompt), len(self.generated.tokens)
        told = {"logprobs": {"content": self.generated.logprobs}} if self.generated.logprobs else {}
        return {
            "logprobs": None,
            **told,
            "text": text,
            "tokens": tokens,
            "finish-reason": self.generated.finish,
            "message": {"role": "assistant", "content": text, **told},
            "usage": {"prompt_tokens": asked, "completion_tokens": tokens, "total_tokens": asked + tokens},
        }


class RunningBatch:
    """Rows that a runtime generates together. For one thread.

    If the runtime fails on several rows, each restarts alone, so only the faulty rows fail.

    Args:
        begin: makes an empty text for a row.
        prefill_time: approximate seconds of prefill per step.
    """

    def __init__(
        self, runtime: SteppingRuntime, begin: Callable[[Item], GeneratedText], *, prefill_time: float = PREFILL_TIME
    ) -> None:
        self._runtime = runtime
        self._begin = begin
        self._prefill_time = prefill_time
        self._rows: list[RunningRow] = []
        self._suspects: list[RunningRow] = []
        self._speed = 0.0  # prompt tokens per second

    @property
    def rows(self) -> list[RunningRow]:
        """All rows that have not ended."""
        return [*self._rows, *self._suspects]

    def room(self, size: int) -> int:
        """How many more rows of up to `size` tokens may join; at least one if the batch is empty."""
        if self._suspects:
            return 0
        largest = max([size, *(row.item.size for row in self._rows)])
        return max(MAX_HELD // largest - len(self._rows), 0 if self._rows else 1)

    def join(self, item: Item) -> RunningRow:
        """Add a row. Prompts are prefilled in the order in which rows joined."""
        taken = {row.slot for row in self._rows}
        row = RunningRow(item, self._begin(item), next(slot for slot in range(len(taken) + 1) if slot not in taken))
        self._rows.append(row)
        return row

    def leave(self, rows: Sequence[RunningRow]) -> None:
        """Remove rows and free their cache."""
        self._runtime.evict([row.slot for row in rows if row in self._rows])
        self._rows = [row for row in self._rows if row not in rows]
        self._suspects = [row for row in self._suspects if row not in rows]

    def step(self) -> list[RunningRow]:
        """Decode one token for each row whose prompt is prefilled, then prefill some of the other prompts.

        Returns:
            The rows that ended in this step; they have left the batch.
        """
        if not self._rows and self._suspects:
            self._rows = [self._suspects.pop(0)]
        began, present = time.perf_counter(), list(self._rows)
        ended = self._step()
        for row in present:
            row.steps += 1
            row.batched += len(present)
            row.run_time += time.perf_counter() - began
        return ended

    def _step(self) -> list[RunningRow]:
        decoding = [row for row in self._rows if row.prefilled == len(row.prompt)]
        ended = self._guarded(decoding, self._decode) if decoding else []
        waiting = [row for row in self._rows if row.prefilled < len(row.prompt)]
        return ended + self._guarded(self._next_to_prefill(waiting), self._prefill) if waiting else ended

    def _guarded(self, rows: list[RunningRow], run: Callable[[list[RunningRow]], list[RunningRow]]) -> list[RunningRow]:
        """The rows that ended while `run` ran over `rows`, which share its device time."""
        began = time.perf_counter()
        try:
            ended = run(rows)
        except BaseException as error:  # a runtime may raise anything
            ended = self._suspect(rows, error)
        seconds = time.perf_counter() - began
        for row in rows:
            row.device_time += seconds / len(rows)
        if ended:
            self.leave(ended)
        return ended

    def _suspect(self, rows: list[RunningRow], error: BaseException) -> list[RunningRow]:
        """Restart each row alone; a row that already ran alone fails."""
        if len(rows) == 1 and len(self._rows) == 1:
            rows[0].error = error
            return rows
        self.leave(rows)
        for row in rows:
            row.generated, row.slot, row.prefilled = self._begin(row.item), 0, 0
        self._suspects += rows
        return []

    def _decode(self, decoding: list[RunningRow]) -> list[RunningRow]:
        logits = self._runtime.step([row.slot for row in decoding], [row.generated.tokens[-1] for row in decoding])
        return _take(decoding, logits)

    def _next_to_prefill(self, waiting: list[RunningRow]) -> list[RunningRow]:
        """The rows to prefill next: several with whole prompts, or one with a piece of its prompt."""
        group, most = waiting[:1], self._prefill_size()
        for row in waiting[1:]:
            if group[0].prefilled or max(len(r.prompt) for r in (*group, row)) * (len(group) + 1) > most:
                break
            group.append(row)
        return group

    def _prefill(self, rows: list[RunningRow]) -> list[RunningRow]:
        pieces = [row.prompt[row.prefilled : row.prefilled + self._prefill_size()] for row in rows]
        began = time.perf_counter()
        if rows[0].prefilled:
            logits = self._runtime.extend(rows[0].slot, pieces[0])
        else:
            logits = self._runtime.admit([row.slot for row in rows], pieces)
        speed = sum(map(len, pieces)) / max(time.perf_counter() - began, 1e-9)
        for row, piece in zip(rows, pieces, strict=True):
            row.prefilled += len(piece)
        self._speed += (_SMOOTHING if self._speed else 1.0) * (speed - self._speed)
        return _take(rows, logits) if rows[0].prefilled == len(rows[0].prompt) else []

    def _prefill_size(self) -> int:
        """Prompt tokens per step."""
        return min(max(MIN_PREFILL, int(self._speed * self._prefill_time)), MAX_PREFILL)


def _take(rows: Sequence[RunningRow], logits: np.ndarray) -> list[RunningRow]:
    """Append each row's next token; returns the rows that ended with it."""
    texts = [row.generated for row in rows]
    draws = [generated.draw() if generated.temperature else 0.0 for generated in texts]
    chosen = choose(logits, [s.temperature for s in texts], draws)
    for generated, token, row in zip(texts, chosen, logits, strict=True):
        generated.take(token, row)
    return [row for row in rows if row.generated.finish]


FinishReason = Literal["stop", "length"]

_UNFINISHED = "\ufffd"  # the replacement character, to which an incomplete UTF-8 sequence decodes
_BLOCK = 256  # probabilities that are summed at a time


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """Parameters of a generation; temperature 0 is greedy.

    With `logprobs`, each token's logarithmic probability is told, and those of so many likely ones.
    """

    max_tokens: int
    temperature: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


def read_sampling(parameters: Mapping[str, Any]) -> SamplingParameters:
    """The sampling parameters in validated request parameters that include defaults."""
    return SamplingParameters(
        max_tokens=int(parameters["max_tokens"]),
        temperature=float(parameters["temperature"] or 0),
        seed=parameters.get("seed"),
        stop=tuple(parameters.get("stop") or ()),
        logprobs=parameters.get("logprobs"),
    )


class Detokenizer:
    """Incremental decoding of tokens to text. A character of several tokens appears with the last of them.

    Args:
        decode: tokens to text, with U+FFFD for an incomplete character. More tokens may only append text, and replace a
            U+FFFD at the end.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self.text = ""
        self._decode = decode
        self._open: list[int] = []  # tokens since the last complete character
        self._taken = 0  # their characters that are in `text`

    def add(self, token: int) -> None:
        """Append a token."""
        self._open.append(token)
        decoded = self._decode(self._open)
        whole = decoded.removesuffix(_UNFINISHED)
        self.text += whole[self._taken :]
        self._taken = len(whole)
        if whole == decoded:
            self._open, self._taken = [], 0

    def end(self) -> None:
        """Flush what is incomplete: no more tokens follow."""
        self.text += self._decode(self._open)[self._taken :]
        self._open, self._taken = [], 0


class GeneratedText:
    """A growing text that detects its end.

    Args:
        sampling: the caller's parameters.
        ends: the end-of-text tokens; they are not part of the answer.
        decode: tokens to text, as for `Detokenizer`.

    `emitted` counts the characters that `new_text` returned. `logprobs` has each token's in OpenAI's form, if asked,
    and `told` counts how often `new_logprobs` returned some.
    """

    def __init__(
        self, sampling: SamplingParameters, ends: frozenset[int], decode: Callable[[Sequence[int]], str]
    ) -> None:
        self.tokens: list[int] = []
        self.finish: FinishReason | None = None
        self.emitted = 0
        self.told = 0
        self.logprobs: list[dict[str, Any]] = []
        self._passed = 0
        self._sampling = sampling
        self._ends = ends
        self._decode = decode
        self._detokenizer = Detokenizer(decode)
        self._random = np.random.default_rng(sampling.seed)
        self._searched = 0

    @property
    def text(self) -> str:
        """The text so far; the whole answer once `finish` is set."""
        return self._detokenizer.text

    @property
    def temperature(self) -> float:
        """The caller's temperature."""
        return self._sampling.temperature

    def draw(self) -> float:
        """The next random number in [0, 1), one per token."""
        return self._random.random()

    def take(self, token: int, logits: np.ndarray | None = None) -> None:
        """Append the next token, which was chosen by these logits."""
        if token in self._ends:
            self._end("stop")
            return
        self.tokens.append(token)
        if self._sampling.logprobs is not None and logits is not None:
            self.logprobs.append(self._told(token, logits, self._sampling.logprobs))
        self._detokenizer.add(token)
        if not self._stopped() and len(self.tokens) >= self._sampling.max_tokens:
            self._end("length")

    def new_text(self) -> str:
        """The text since the last call that no further token can change."""
        stable = len(self.text) if self.finish else len(self.text) - open_end(self.text, self._sampling.stop)
        given = self.text[self.emitted : stable]
        self.emitted += len(given)
        return given

    def new_logprobs(self) -> tuple[Delta, ...]:
        """The logarithmic probabilities of the tokens since the last call, as a delta; nothing if there are none."""
        new, self._passed = self.logprobs[self._passed :], len(self.logprobs)
        self.told += bool(new)
        return ({"logprobs": new},) if new else ()

    def _told(self, token: int, logits: np.ndarray, most: int) -> dict[str, Any]:
        probabilities = log_probabilities(logits)
        likely = np.argsort(-probabilities, kind="stable")[:most].tolist()
        return {**self._one(token, probabilities), "top_logprobs": [self._one(one, probabilities) for one in likely]}

    def _one(self, token: int, probabilities: np.ndarray) -> dict[str, Any]:
        text = self._decode([token])
        spelt = None if _UNFINISHED in text else list(text.encode())
        return {"token": text, "logprob": float(probabilities[token]), "bytes": spelt}

    def _end(self, reason: FinishReason) -> None:
        self._detokenizer.end()
        if not self._stopped():
            self.finish = reason

    def _stopped(self) -> bool:
        """Cut the text at the first stop; returns whether there was one."""
        stops = self._sampling.stop
        if not stops:
            return False
        cut = cut_at(self.text, stops, self._searched)
        if cut is None:
            self._searched = max(0, len(self.text) - max(map(len, stops)) + 1)
            return False
        self._detokenizer.text = self.text[:cut]
        self.finish = "stop"
        return True


def choose(logits: np.ndarray, temperatures: Sequence[float], draws: Sequence[float]) -> list[int]:
    """Sample a token for each row of `logits` (rows, vocabulary), independently of the other rows.

    Greedy at temperature 0; otherwise the token at which the cumulative probability passes the row's draw in [0, 1).
    """
    tokens: list[int] = logits.argmax(axis=1).tolist()
    warm = [row for row, temperature in enumerate(temperatures) if temperature > 0]
    if warm:
        best = logits[warm, [tokens[row] for row in warm]]
        scaled = (logits[warm] - best[:, None]) / np.array([temperatures[row] for row in warm], np.float32)[:, None]
        for row, weights in zip(warm, np.exp(scaled, out=scaled), strict=True):
            tokens[row] = passed(weights, draws[row])
    return tokens


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """The logarithm of each token's probability, float64."""
    shifted = logits.astype(np.float64) - logits.max()
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum())
    return result


def passed(weights: np.ndarray, draw: float) -> int:
    """The index at which the cumulative weights pass `draw` of their sum.

    Blocks are summed first and only one is accumulated, which takes a fifth of the time for 49,152 weights.
    """
    sums = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64).cumsum()
    wanted = draw * sums[-1]
    block = int(np.searchsorted(sums, wanted, side="right"))
    within = weights[block * _BLOCK : (block + 1) * _BLOCK].cumsum(dtype=np.float64)
    place = np.searchsorted(within, wanted - (sums[block - 1] if block else 0.0), side="right")
    return block * _BLOCK + min(int(place), len(within) - 1)


def cut_at(text: str, stops: Sequence[str], start: int = 0) -> int | None:
    """The index of the first of `stops` in `text` from `start` on; None if there is none."""
    found = [place for stop in stops if (place := text.find(stop, start)) >= 0]
    return min(found, default=None)


def open_end(text: str, stops: Sequence[str]) -> int:
    """The number of characters at the end of `text` that may begin one of `stops`."""
    longest = max(map(len, stops), default=0)
    return next((n for n in range(min(longest - 1, len(text)), 0, -1) if _begins(text[-n:], stops)), 0)


def _begins(end: str, stops: Sequence[str]) -> bool:
    return any(stop.startswith(end) for stop in stops)
