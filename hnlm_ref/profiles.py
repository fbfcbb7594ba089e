"""Questions to a language model, local or behind an OpenAI-compatible server, and the profiles made of the answers.

Answers are appended to one file as they come, so a killed job goes on where it was. Nothing heavy is imported before
a local model is asked.
"""

import contextlib
import http.client
import json
import math
import os
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hnlm_ref.artifacts import Prep, Run, digest, file_fingerprint, resolve_path, save_jsonl
from hnlm_ref.console import UserError, progress
from hnlm_ref.knobs import knob
from hnlm_ref.prompts import PROFILE_KEY, Reply, item_profile_prompt, parse_reply, user_profile_prompt

Answers = Iterator[tuple[int, str | Exception]]  # (number of the question, what was said or why not), in any order
BACK_OFF = 1.0  # seconds between the first try and the second


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST becomes a GET, and the key would go wherever it leads: an error like any other refusal."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(frozen=True)
class AskConfig:
    """Knobs of every stage that asks a language model for text."""

    endpoint: str | None = knob(None, "OpenAI-compatible server, e.g. http://127.0.0.1:8000/v1; none: the local model")
    endpoint_model: str = knob("default", "name of the model at the server")
    concurrency: int = knob(8, "questions sent to the server at the same time", low=1)
    timeout_s: float = knob(120.0, "seconds to wait for the server's next byte", low=0.1)
    n_retries: int = knob(4, "further tries if no answer comes, each after twice the wait", low=0)
    max_new_tokens: int = knob(160, "length of an answer in tokens", low=1)
    ask_batch_size: int = knob(16, "questions per batch of a local model; on a CPU each thread takes a batch", low=1)

    def __post_init__(self) -> None:
        if self.endpoint is not None and not self.endpoint.startswith(("http://", "https://")):
            raise UserError(f"endpoint {self.endpoint!r} is no address; write one like http://127.0.0.1:8000/v1")


def ask_local(llm: Any, tokenizer: Any, cfg: AskConfig, questions: list[str], done: Container[int] = ()) -> Answers:
    """Greedy answers in batches of prompts of like length; batches are those of all questions, whichever are `done`."""
    from hnlm_ref.llm import chat_ids, cut, generate_texts, in_parallel

    prompts = [(number, chat_ids(tokenizer, text)) for number, text in enumerate(questions)]
    prompts.sort(key=lambda prompt: (len(prompt[1]), prompt[0]))
    longest, room = len(prompts[-1][1]), getattr(llm.config.get_text_config(), "max_position_embeddings", math.inf)
    if longest + cfg.max_new_tokens > room:
        told = f"a question of {longest} tokens and max_new_tokens {cfg.max_new_tokens} are more than the {room} places"
        raise UserError(f"{told} of the model; lower profile_titles, text_chars or review_chars of prep")
    batches = [some for some in cut(prompts, cfg.ask_batch_size) if any(number not in done for number, _ in some)]

    def write(some: list[tuple[int, list[int]]]) -> list[str]:
        return generate_texts(llm, tokenizer, [ids for _, ids in some], cfg.max_new_tokens)

    for some, texts in zip(batches, in_parallel(write, batches, llm.device.type), strict=True):
        yield from ((number, text) for (number, _), text in zip(some, texts, strict=True) if number not in done)


def ask_server(cfg: AskConfig, questions: list[str], done: Container[int] = ()) -> Answers:
    """Several requests at once, each retried with back-off; the last error when the server had no answer in the end.

    A server that is busy may say how long to wait (Retry-After). A refused request (4xx) is a UserError and not tried
    again: raised, as the next one would be refused too (a key that is missing or used up), or given where the question
    itself may be at fault (too long).
    Ends early when 2 * concurrency questions one after the other were not answered: the server is down. Refusals count
    only until it has answered another.
    A key is read from the environment variable OPENAI_API_KEY.
    """
    url = f"{(cfg.endpoint or '').rstrip('/')}/chat/completions"
    headers, stop = {"Content-Type": "application/json"}, threading.Event()
    server = urllib.request.build_opener(_NoRedirect)
    if key := os.environ.get("OPENAI_API_KEY", "").strip():
        headers["Authorization"] = f"Bearer {key}"

    def ask_one(text: str) -> str | Exception:
        failure: Exception
        body: dict[str, Any] = {"model": cfg.endpoint_model, "messages": [{"role": "user", "content": text}]}
        body |= {"max_tokens": cfg.max_new_tokens, "temperature": 0.0, "seed": 0}
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        for attempt in range(cfg.n_retries + 1):
            wait = BACK_OFF * 2**attempt
            try:
                with server.open(request, timeout=cfg.timeout_s) as reply:
                    return str(json.load(reply)["choices"][0]["message"]["content"] or "")
            except urllib.error.HTTPError as error:
                failure = error
                if error.code < 500 and error.code not in (408, 429):
                    detail = error.read(200).decode(errors="replace").strip()
                    refusal = UserError(f"{url} refused the request: {error.code} {error.reason} {detail}")
                    if error.code in (400, 413, 422):
                        return refusal
                    raise refusal from error
                with contextlib.suppress(TypeError, ValueError):  # none given, or a date
                    wait = max(wait, min(float(error.headers["Retry-After"]), 3600))  # Choice: no longer than an hour
            except (OSError, ValueError, TypeError, LookupError, http.client.HTTPException) as error:
                failure = error  # no connection, time-out, broken answer: worth another try
            if attempt == cfg.n_retries or stop.wait(wait):
                break
        return failure

    with ThreadPoolExecutor(cfg.concurrency) as pool:
        running = {pool.submit(ask_one, text): number for number, text in enumerate(questions) if number not in done}
        n_failed, answered = 0, bool(done)
        try:
            for future in as_completed(running):
                said = future.result()
                yield running[future], said
                if not isinstance(said, Exception):
                    n_failed, answered = 0, True
                elif not (answered and isinstance(said, UserError)):
                    n_failed += 1
                if n_failed >= 2 * cfg.concurrency:
                    return
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def ask(
    cfg: AskConfig,
    model: str,
    load: Callable[[], tuple[Any, Any]],
    questions: list[str],
    about: list[dict],
    path: Path,
    key: str,
    titles: list[str] | None = None,
) -> list[Reply]:
    """Ask every question once and write JSONL to `path`: `about`, status, text, raw, in their order.

    Answers are kept in a file *.part named by what they depend on, which outlives a change of other knobs until the
    stage is whole: those that are there are not asked for again, a half-written last line is dropped (case D17), failed
    questions are asked again. A failed answer is empty, never another's text (case D20).
    model, load  name of the local model, and what loads it and its tokenizer, where no server is asked
    titles       of the positive of each question, which an answer must not repeat
    """
    who = cfg.endpoint_model if cfg.endpoint else [model, file_fingerprint(resolve_path(model)), cfg.ask_batch_size]
    part = path.with_name(f"{path.name}.{digest([cfg.endpoint, who, cfg.max_new_tokens, questions])}.part")
    with part.open("a+", encoding="ascii", newline="\n") as file:
        file.seek(0)
        lines, newline, _ = file.read().rpartition("\n")
        file.truncate(len(lines + newline))
        said, failed = dict(map(json.loads, lines.splitlines())), dict[int, Reply]()
        done, missing = set(said), len(questions) - len(said)
        answers: Answers = iter(())
        if missing:
            answers = ask_server(cfg, questions, done) if cfg.endpoint else ask_local(*load(), cfg, questions, done)
        for number, raw in progress(answers, total=missing, desc=path.stem):
            if isinstance(raw, Exception):
                failed[number] = reply = Reply("failed", None, f"{type(raw).__name__}: {raw}")
                continue
            said[number] = raw
            file.write(json.dumps([number, raw]) + "\n")
            file.flush()
    if len(said) + len(failed) < len(questions) or (failed and not said):
        told = f"{len(said) - len(done)} of {missing} questions were answered ({reply.raw})"
        raise UserError(f"{told}; is the server up? Nothing is lost: start again")
    replies = [failed.get(n) or parse_reply(said[n], key, titles[n] if titles else None) for n in range(len(questions))]
    save_jsonl(path, (who | vars(reply) for who, reply in zip(about, replies, strict=True)))
    return replies


def write_profiles(cfg: Any, prep: Prep, reviews: list[dict], model: str, run: Run) -> dict[str, int]:
    """Put LLM profiles P_v and P_u into the records of `prep`; answers are kept in profiles.jsonl. Counts by status.

    cfg      AskConfig with profile_titles, the number of newest training items told of a user
    reviews  {"user", "item", "text"} of training rows
    A profile without an answer is "" and counted: no other text stands in for it (case D20). All of them: UserError.
    """
    own = {(review["user"], review["item"]): review["text"] for review in reviews}
    questions, about = [item_profile_prompt(item) for item in prep.items], [{"item": n} for n in range(prep.n_items)]
    for u in range(prep.n_users):
        newest = prep.history(u)[::-1][: cfg.profile_titles].tolist()
        questions.append(user_profile_prompt([(prep.items[i], own.get((u, i))) for i in newest]))
        about.append({"user": u})

    def load() -> tuple[Any, Any]:
        import torch

        from hnlm_ref.llm import load_llm

        torch.set_num_threads(run.n_threads or torch.get_num_threads())
        return load_llm(model, run.device)

    path = run.out / "profiles.jsonl"
    replies = ask(cfg, model, load, questions, about, path, PROFILE_KEY)
    counts = Counter(reply.status for reply in replies)
    if not counts["ok"]:
        told = f"none of {len(replies)} answers is a profile ({dict(counts)}); see {path}"
        raise UserError(f"{told}, or name another profile_model or endpoint_model")
    for record, reply in zip([*prep.items, *prep.users], replies, strict=True):
        record["profile"] = reply.text or ""
    return {f"profiles {status}": n for status, n in counts.items()}
