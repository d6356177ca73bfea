"""Completions from a server by the OpenAI protocol: many requests at once, repeated where that helps. Knows nothing of training.

* The server is busy (408, 429, 500): this request is sent again after a pause.
* It is away (refused, reset, cut off, timed out, 502 to 504, an aborted completion): none of its answers is handed out, and whoever
  asked is told. It may be started anew meanwhile, with the weights it was started with.
* It answers what is not exactly what was asked for: an error says what was wanted and what came.
"""

import concurrent.futures
import contextlib
import http.client
import json
import logging
import os
import random
import re
import socket
import threading
import time
from urllib.parse import urlsplit

_log = logging.getLogger(__name__)

KEY = "ROLLOUT_SERVER_API_KEY"  # not OPENAI_API_KEY, which is no business of a server that is none of theirs
_BUSY, _AWAY = (408, 429, 500), (502, 503, 504)
_PAUSES = 0.1, 5.0  # seconds before a request is repeated: the first, doubled up to the last
_CERTAIN = 1e-3  # a log-prob above is no rounding of 0
_LEAST = -3.4e38  # of float32, in which they are kept


class RolloutServerError(RuntimeError):
    """The server answered what cannot be trained on, or did not answer in time."""


class _Away(Exception):
    """No answer, or one that says that there is no server behind it."""


class _Stopped(_Away):
    """Another request found the server away, or was refused."""


class _Busy(Exception):
    """The server is there, and could not do it now."""


def read_choice(answer, body, vocabulary) -> tuple[list[int], list[float]]:
    """(token ids, log-probs) of the one completion of an answer to ``body``; raises where it is not exactly what was asked for."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    one = isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], dict)
    _want(one, "choices", "a list of one completion", choices)
    choice, prompt, most, ends = choices[0], body["prompt"][0], body["max_tokens"], body["stop_token_ids"]
    reason, echoed = choice.get("finish_reason"), choice.get("prompt_token_ids")
    ids = choice.get("token_ids", choice.get("response_token_ids"))  # as SGLang may rename them (pull request 38459)
    if reason == "abort":
        raise _Away("the server aborted a completion")
    _want(reason in ("stop", "length"), "finish_reason", "stop or length", reason)
    known = "the ids of the completion, from a server that knows return_token_ids (text is not tokenised again)"
    _want(isinstance(ids, list), "token_ids", known, ids)
    _want(1 <= len(ids) <= most, "token_ids", f"1 to {most} ids (max_tokens)", f"{len(ids)} of them")
    wrong = [i for i in ids if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocabulary]
    _want(not wrong, "token_ids", f"integers in [0, {vocabulary}), the trainer's vocabulary", wrong[:1])
    _want(echoed in (None, prompt), "prompt_token_ids", f"the {len(prompt)} ids that were sent", echoed)
    logps = choice["logprobs"].get("token_logprobs") if isinstance(choice.get("logprobs"), dict) else None
    came = f"{len(logps)} of them" if isinstance(logps, list) else logps
    _want(isinstance(logps, list) and len(logps) == len(ids), "logprobs.token_logprobs", f"{len(ids)} numbers, one a token", came)
    wrong = [p for p in logps if isinstance(p, bool) or not isinstance(p, (int, float)) or not _LEAST < p <= _CERTAIN]
    _want(not wrong, "logprobs.token_logprobs", "finite numbers <= 0", wrong[:1])
    _want(not set(ids[:-1]) & set(ends), "token_ids", f"none behind the first of stop_token_ids {ends}", ids)
    if reason == "stop":
        _want(ids[-1] in ends, "token_ids", f"one of stop_token_ids {ends} at the end of a completion that stopped", ids[-1])
    elif ids[-1] not in ends:
        full = f"{most} ids (max_tokens) where the length ended it; is the server's context long enough?"
        _want(len(ids) == most, "token_ids", full, f"{len(ids)} of them")
    return ids, logps


def _want(holds, name, wanted, came):
    if not holds:
        raise RolloutServerError(f"{name} must be {wanted}, got {str(came)[:200]}")


class Client:
    """The requests, concurrent and repeated; knows nothing of training.

    Args:
        args: with the fields of `ServerOptions`.
    """

    def __init__(self, args):
        self._args = args
        self._secure, self._host, self._port, self._prefix = split_url(args.rollout_server)
        self.name, self.place = f"rollout_server {args.rollout_server}", f"{self._host}-{self._port}"
        self.last = None  # why it was away
        self._model, self._how = None, None
        self._open, self._lock = set(), threading.Lock()

    def ask(self, requests, read):
        """What ``read(request, answer)`` makes of each, in their order; None where the server was away for one of them."""
        stop = threading.Event()
        pool = concurrent.futures.ThreadPoolExecutor(min(self._args.rollout_server_requests, len(requests)), "rollout")
        try:
            model = {"model": self.wait()}
            pending = [pool.submit(self._ask, {**model, **request}, read, stop) for request in requests]
            concurrent.futures.wait(pending, return_when=concurrent.futures.FIRST_EXCEPTION)
            errors = [future.exception() for future in pending if future.done() and future.exception() is not None]
            if errors:  # what is wrong before what is away
                raise min(errors, key=lambda error: isinstance(error, _Away) + isinstance(error, _Stopped))
            return [future.result() for future in pending]
        except _Away as error:
            self.last, self._model, self._how = str(error), None, None
            _log.warning("%s: away (%s); the rollout is asked again as a whole", self.name, error)
            return None
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            self._hang_up()  # or its threads would wait for answers that nobody wants, and the server would make them
            pool.shutdown()

    def _ask(self, request, read, stop):
        try:
            return self._repeated(request, read, stop)
        except BaseException:
            stop.set()
            raise

    def _repeated(self, request, read, stop):
        for pause in _pauses(self._args.rollout_server_retries):
            try:
                answer = self.call("POST", "/v1/completions", request, stop)
                break
            except _Busy as error:
                if pause is None:
                    raise RolloutServerError(f"{self.name}: {error}, {self._args.rollout_server_retries + 1} times") from None
                if stop.wait(pause):
                    raise _Stopped from None
        try:
            return read(request, answer)
        except RolloutServerError as error:
            raise RolloutServerError(f"{self.name}: {error}") from None

    def wait(self) -> str:
        """Until the server is there: the name of its model, the first of those that it serves."""
        if self._model is None:
            found = self._patiently(lambda: self.call("GET", "/v1/models"))
            try:
                self._model = found["data"][0]["id"]
            except (TypeError, KeyError, IndexError):
                raise RolloutServerError(f"{self.name}: /v1/models must name a model, got {str(found)[:200]}") from None
        return self._model

    def reload(self, folder):
        """Makes the server read the weights of ``folder``. Repeated until it has, since twice does no harm."""
        self._patiently(lambda: self._reload(folder))

    def _reload(self, folder):
        how = self._reloads_by()
        if how == "vllm":
            arguments = {"weights_path": folder, "is_checkpoint_format": True}
            self._succeed("/collective_rpc", {"method": "reload_weights", "kwargs": arguments})
            self._succeed("/reset_prefix_cache", {})  # keys and values of the old weights
        elif how == "sglang":
            self._succeed("/update_weights_from_disk", {"model_path": folder})  # which empties its cache by itself
        else:
            self._succeed(how, {"model_path": folder})

    def _succeed(self, path, body):
        try:
            answer = self.call("POST", path, body)
        except RolloutServerError as error:
            raise RolloutServerError(f"{error} (rollout_server_reload is {self._args.rollout_server_reload!r})") from None
        if isinstance(answer, dict) and answer.get("success") is False:
            raise RolloutServerError(f"{self.name}: {path} must succeed, got {str(answer)[:300]}")

    def _reloads_by(self):
        if self._args.rollout_server_reload != "auto":
            return self._args.rollout_server_reload
        if self._how is None:
            paths = {}
            with contextlib.suppress(RolloutServerError):  # 404 of a server that hides it
                paths = (self.call("GET", "/openapi.json") or {}).get("paths", {})
            endpoints = {"/update_weights_from_disk": "sglang", "/collective_rpc": "vllm"}
            self._how = next((how for path, how in endpoints.items() if path in paths), None)
        if self._how is None:
            raise RolloutServerError(
                f"{self.name}: rollout_server_reload 'auto' needs {' or '.join(endpoints)} in its openapi.json, got neither: start "
                "vLLM with VLLM_SERVER_DEV_MODE=1, or name the endpoint that reloads"
            )
        return self._how

    def _patiently(self, function):
        deadline, busy = time.monotonic() + self._args.rollout_server_patience, 0
        for pause in _pauses():
            try:
                return function()
            except (_Away, _Busy) as error:
                self._how, busy = None, busy + isinstance(error, _Busy)
                if busy > self._args.rollout_server_retries:
                    raise RolloutServerError(f"{self.name}: {error}, {busy} times") from None
                if time.monotonic() + pause > deadline:
                    raise RolloutServerError(
                        f"{self.name}: not there for {self._args.rollout_server_patience:g} s (rollout_server_patience): {error}"
                    ) from None
                if self.last != str(error):
                    _log.warning("%s: away (%s); waits for it", self.name, error)
                self.last = str(error)
                time.sleep(pause)

    def call(self, method, path, body=None, stop=None):
        """The answer's JSON, None where it is empty. Raises _Away, _Busy, or RolloutServerError with the server's own words."""
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if key := os.environ.get(KEY, "").strip():  # http.client's error of a line break has the key in it
            headers["Authorization"] = f"Bearer {key}"
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        timeout, began, sock = self._args.rollout_server_timeout, time.monotonic(), None
        connection = kind(self._host, self._port, timeout=timeout)
        try:
            connection.connect()
            sock = connection.sock  # which http.client lets go before it has read the last answer
            with self._lock:
                if stop is not None and stop.is_set():
                    raise _Stopped
                self._open.add(sock)
            with _hung_up_after(timeout, sock):  # the socket's own is for each part of an answer
                connection.request(method, self._prefix + path, None if body is None else json.dumps(body), headers)
                answer = connection.getresponse()
                text = answer.read()
            if time.monotonic() - began >= timeout:
                raise TimeoutError
        except (OSError, http.client.HTTPException) as error:
            if time.monotonic() - began >= timeout:
                raise _Away(f"{path}: no answer in {timeout:g} s (rollout_server_timeout)") from None
            raise _Away(f"{path}: {type(error).__name__}: {error}") from None
        finally:
            with self._lock:
                self._open.discard(sock)
            connection.close()
        if answer.status in _AWAY:
            raise _Away(f"{path}: status {answer.status}")
        said = f"{path}: status {answer.status}: {text[:300].decode(errors='replace')}"
        if answer.status in _BUSY:
            raise _Busy(said)
        if not 200 <= answer.status < 300:
            raise RolloutServerError(f"{self.name}: {said}")
        try:
            return json.loads(text) if text else None
        except (ValueError, RecursionError) as error:
            if answer.getheader("Content-Length") is None and getattr(error, "pos", 0) >= len(text.rstrip()):
                raise _Away(f"{path}: the answer was cut off") from None  # whose end only the server's hanging up tells
            raise RolloutServerError(f"{self.name}: {path} must answer with JSON, got {text[:200]!r}") from None

    def _hang_up(self):
        with self._lock:
            for sock in self._open:
                _shut(sock)


@contextlib.contextmanager
def _hung_up_after(seconds, sock):
    timer = threading.Timer(seconds, _shut, [sock])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _shut(sock):
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _pauses(retries=None):
    """Seconds between attempts: doubled, and apart from those of other threads and processes; None after the last."""
    first, longest = _PAUSES
    dice, n = random.Random(), 0  # not the run's random numbers
    while retries is None or n < retries:
        yield min(first * 2 ** min(n, 32), longest) * dice.uniform(0.5, 1.0)
        n += 1
    yield None


def split_url(url):
    """(whether by https, host, port, path in front of /v1)."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except (ValueError, AttributeError, TypeError):
        host = None
    if host and "@" in parts.netloc:  # not quoted: it would stand in logs
        raise ValueError(f"rollout_server must be a URL without user and password, whose key is in {KEY}")
    if not host or parts.scheme not in ("http", "https") or parts.query or parts.fragment or re.search(r"\s", url):
        raise ValueError(f"rollout_server must be a URL such as http://localhost:8000, got {url!r}")
    secure = parts.scheme == "https"
    return secure, host, port or (443 if secure else 80), parts.path.rstrip("/").removesuffix("/v1")
