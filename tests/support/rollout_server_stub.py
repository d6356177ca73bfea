"""A server that samples from a tiny transformers model and speaks what vLLM and SGLang do; it can be told to fail.

Its tokens are drawn one by one from the model's own logits, with random numbers of the request's seed alone. When it dies and
returns it has the weights that it was started with, as a real one has.
"""

import contextlib
import copy
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers import AutoModelForCausalLM
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

RELOADS = {"vllm": "/collective_rpc", "sglang": "/update_weights_from_disk", "own": "/load", None: None}


def processors(body):
    """Those of transformers' generate, in its order."""
    found = [RepetitionPenaltyLogitsProcessor(body["repetition_penalty"])] if body["repetition_penalty"] != 1 else []
    found += [TemperatureLogitsWarper(float(body["temperature"]))]
    found += [TopKLogitsWarper(body["top_k"])] if body["top_k"] > 0 else []
    found += [TopPLogitsWarper(body["top_p"])] if body["top_p"] < 1 else []
    found += [MinPLogitsWarper(body["min_p"])] if body["min_p"] else []
    return LogitsProcessorList(found)


@torch.no_grad()
def complete(model, body):
    """(ids, log-probs, finish_reason) of the one prompt of ``body``."""
    dice, change = torch.Generator().manual_seed(body["seed"]), processors(body)
    (prompt,), ids, logps = body["prompt"], [], []
    while len(ids) < body["max_tokens"]:
        whole = torch.tensor([prompt + ids])
        scores = change(whole, model(input_ids=whole, use_cache=False).logits[:, -1].float()).log_softmax(-1)[0]
        ids.append(torch.multinomial(scores.exp(), 1, generator=dice).item())
        logps.append(scores[ids[-1]].item())
        if ids[-1] in body["stop_token_ids"]:
            return ids, logps, "stop"
    return ids, logps, "length"


class Server:
    """Runs in threads until `close`.

    Args:
        model: what it is started with; copied.
        api: whose endpoints it offers for new weights: "vllm", "sglang", "own" (/load), or None for none.
    """

    def __init__(self, model, api="vllm", key=None):
        self.initial = copy.deepcopy(model).eval()
        self.api, self.key, self.lock = api, key, threading.Lock()
        self.log = []  # (path, body) of what was asked for, in its order
        self.answered = []  # (seed, prompt, ids) of completions that were sent to their end
        self.faults = []  # of the next completions: taken from the front
        self.reload_faults = []
        self.away = 0.3  # seconds between death and return
        self.change = lambda answer: answer
        self.lives, self._asked, self._http = 0, 0, None
        self._start(0)
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def _start(self, port):
        self.model = copy.deepcopy(self.initial)
        handler = type("Handler", (_Handler,), {"server_of": self, "timeout": 30})
        self._http = _Http(("127.0.0.1", port), handler)
        self.lives += 1
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self):
        """At once, with all that was under way."""
        http = self._http
        http.dead = True
        http.shutdown()
        http.server_close()
        for connection in list(http.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def die(self, and_return=True):
        port = self._http.server_port

        def life():
            self.stop()
            if and_return:
                time.sleep(self.away)
                self._start(port)

        threading.Thread(target=life, daemon=True).start()

    close = stop

    def asked(self, path):
        return [body for p, body in self.log if p == path]


class _Http(ThreadingHTTPServer):
    daemon_threads, allow_reuse_address, request_queue_size = True, True, 64
    dead = False

    def __init__(self, *args):
        self.connections = set()
        super().__init__(*args)

    def process_request(self, request, address):
        self.connections.add(request)
        super().process_request(request, address)

    def shutdown_request(self, request):
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address):
        pass  # a client that hung up, a server that died: both on purpose


class _Handler(BaseHTTPRequestHandler):
    server_of = None

    def log_message(self, *_):
        pass

    def _send(self, answer, status=200, cut=0, tells_length=True):
        text = b"" if answer is None else answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        if tells_length:
            self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text[: len(text) - cut])

    def do_GET(self):
        mine = self.server_of
        mine.log.append((self.path, None))
        if self.path == "/v1/models":
            self._send({"object": "list", "data": [{"id": "tiny", "object": "model"}]})
        elif self.path == "/openapi.json":
            self._send({"paths": {path: {} for path in ("/v1/completions", RELOADS[mine.api]) if path}})
        else:
            self._send({"detail": "Not Found"}, 404)

    def do_POST(self):
        mine, body = self.server_of, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if mine.key and self.headers.get("Authorization") != f"Bearer {mine.key}":
            return self._send({"error": "Unauthorized"}, 401)
        with mine.lock:
            mine.log.append((self.path, body))
        if self.path == "/v1/completions":
            self._completions(mine, body)
        elif self.path == RELOADS[mine.api]:
            self._reload(mine, body)
        elif self.path == "/reset_prefix_cache" and mine.api == "vllm":
            self._send(None)
        else:
            self._send({"detail": "Not Found"}, 404)

    def _reload(self, mine, body):
        fault = mine.reload_faults.pop(0) if mine.reload_faults else None
        if fault == "die":
            mine.die()
            return time.sleep(1)
        if isinstance(fault, int):
            return self._send({"error": "no such shard"}, fault)
        if fault == "fail":
            return self._send({"success": False, "message": "no such shard"})
        if mine.api == "vllm":
            assert body["method"] == "reload_weights" and body["kwargs"]["is_checkpoint_format"] is True
            folder = body["kwargs"]["weights_path"]
        else:
            folder = body["model_path"]
        with mine.lock:
            mine.model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
        self._send({"results": [None]} if mine.api == "vllm" else {"success": True, "message": "ok"})

    def _completions(self, mine, body):
        with mine.lock:
            fault = mine.faults.pop(0) if mine.faults else None
        if fault == "die":
            mine.die()
            return time.sleep(1)
        if fault == "die for good":
            mine.die(and_return=False)
            return time.sleep(1)
        if fault == "hang":
            return time.sleep(20)
        if isinstance(fault, int):
            return self._send({"error": "out of order"}, fault)
        if fault == "not JSON":
            return self._send(b"<html>")
        with mine.lock:
            ids, logps, reason = complete(mine.model, body)
        choice = {"index": 0, "text": "", "finish_reason": reason, "token_ids": ids, "prompt_token_ids": body["prompt"][0],
                  "logprobs": {"tokens": [f"token_id:{i}" for i in ids], "token_logprobs": logps}}  # fmt: skip
        answer = mine.change({"id": "cmpl", "object": "text_completion", "choices": [choice]})
        if self.server.dead:
            return
        cut = 10 if fault in ("truncate", "truncate without a length") else 0
        self._send(answer, cut=cut, tells_length=fault != "truncate without a length")
        if fault is None:
            with mine.lock:
                mine.answered.append((body["seed"], body["prompt"][0], ids))
