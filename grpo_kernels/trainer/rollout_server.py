"""Rollouts from a server that speaks the OpenAI completions protocol with token ids and log-probs: vLLM's, SGLang's.

Each completion is a request of its own, with its own seed: servers make the seeds of one request's n completions in different
ways (vLLM counts them up, SGLang takes one for all). Seeds are drawn from the rollout's random numbers, so a request that is
repeated asks for the same completion.

What may go wrong, and what is done:

* The server is busy (408, 429, 500): this request is sent again after a pause.
* It is away (refused, reset, cut off, timed out, 502 to 504, an aborted completion). It may have been started anew since, with the
  weights it was started with. What it has answered is thrown away on all processes; it is waited for, given the weights, and asked
  for the whole rollout again.
* It answers what cannot be trained on: an error says what was wanted and what came.

Weights go through a folder that both sides can read: process 0 saves what `from_pretrained` loads, the server's own endpoint
reads it, and it is deleted. That is done before the first rollout, after each change of the weights and after each absence.
"""

import concurrent.futures
import contextlib
import http.client
import json
import logging
import math
import os
import random
import re
import shutil
import socket
import threading
import time
from dataclasses import dataclass, field, fields
from urllib.parse import urlsplit

import torch
import transformers
from accelerate.utils import gather_object

from . import microbatch
from .rollout import Completions

_log = logging.getLogger(__name__)

KEY = "ROLLOUT_SERVER_API_KEY"  # not OPENAI_API_KEY, which is no business of a server that is none of theirs
_BUSY, _AWAY = (408, 429, 500), (502, 503, 504)
_PAUSES = 0.1, 5.0  # seconds before a request is repeated: the first, doubled up to the last
_CERTAIN = 1e-3  # a log-prob above is no rounding of 0
_ADAPTER = re.compile(r"\.lora_\w+\.")
_FAR = 0.5  # nats: no two kernels differ by as much in the mean
_OURS = {
    "model", "prompt", "n", "best_of", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed", "stop",
    "stop_token_ids", "ignore_eos", "logprobs", "echo", "stream", "return_token_ids",
}  # fmt: skip


class RolloutServerError(RuntimeError):
    """The server answered what cannot be trained on, or did not answer in time."""


class _Away(Exception):
    """No answer, or one that says that there is no server behind it."""


class _Stopped(_Away):
    """Another request found the server away, or was refused."""


class _Busy(Exception):
    """The server is there, and could not do it now."""


@dataclass
class ServerOptions:
    """The options of a rollout server; validated by `check_server_options`."""

    rollout_server: str | None = field(
        default=None, metadata={"help": "URL of a server that samples (vLLM, SGLang); None: the training processes do."}
    )
    rollout_server_reload: str = field(
        default="auto",
        metadata={"help": "How it takes new weights: vllm, sglang, the path of an endpoint, none; auto reads its openapi.json."},
    )
    rollout_server_folder: str | None = field(
        default=None, metadata={"help": "Folder that the server can read too, for the weights; None: in output_dir."}
    )
    rollout_server_requests: int = field(default=64, metadata={"help": "Requests of each process in flight at once."})
    rollout_server_timeout: float = field(default=600.0, metadata={"help": "Seconds that one answer may take."})
    rollout_server_patience: float = field(default=600.0, metadata={"help": "Seconds that a server may be away."})
    rollout_server_retries: int = field(
        default=4,
        metadata={"help": "Times that a request is sent again to a busy server, and a rollout asked again of one that was away."},
    )
    rollout_server_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Further fields of each request (JSON), such as min_tokens."}
    )
    rollout_server_clip_max: float | None = field(
        default=2.0,
        metadata={"help": "Highest weight of a token, the trainer's probability by the sampler's; None: no such weights."},
    )

    @property
    def corrects_sampler(self) -> bool:
        """Whether the loss is weighted by the ratio of trainer to sampler."""
        return self.rollout_server is not None and self.rollout_server_clip_max is not None


def check_server_options(args):
    """Raises ValueError naming the option, what was wanted and what came."""
    if args.rollout_server is None:
        for f in fields(ServerOptions):
            if getattr(args, f.name) != f.default:
                raise ValueError(f"{f.name} needs rollout_server, got {getattr(args, f.name)!r}")
        return
    _split(args.rollout_server)
    how = args.rollout_server_reload
    if how not in ("auto", "vllm", "sglang", "none") and not str(how).startswith("/"):
        raise ValueError(f"rollout_server_reload must be auto, vllm, sglang, none or a path that begins with /, got {how!r}")
    for name, least in (("rollout_server_requests", 1), ("rollout_server_retries", 0)):
        value = getattr(args, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    for name in ("rollout_server_timeout", "rollout_server_patience"):
        if not 0 < getattr(args, name) < math.inf:
            raise ValueError(f"{name} must be seconds > 0, got {getattr(args, name)!r}")
    clip = args.rollout_server_clip_max
    if clip is not None and not 0 < clip < math.inf:
        raise ValueError(f"rollout_server_clip_max must be None or a number > 0, got {clip!r}")
    if refused := sorted(set(args.rollout_server_kwargs or ()) & _OURS):
        raise ValueError(f"rollout_server_kwargs must leave {', '.join(refused)} alone: the trainer sets them")
    if args.generation_kwargs:
        raise ValueError("generation_kwargs must be None with rollout_server, whose options are rollout_server_kwargs, got "
                         f"{args.generation_kwargs!r}")  # fmt: skip
    if args.use_transformers_continuous_batching:
        raise ValueError("use_transformers_continuous_batching must be False with rollout_server, got True")
    if args.keep_sampling_mask:
        raise ValueError("keep_sampling_mask must be False or None with rollout_server, which does not tell what it left, got True")


class RolloutServer:
    """The sampler in the place of the policy's own: `sample` of the trainer's rollouts and evaluations.

    Args:
        args: `GRPOConfig`, whose ``rollout_server`` is a URL.
    """

    def __init__(self, args):
        self._args, self._client = args, Client(args)
        self._given = None  # what identifies the weights that the server has; None: not known

    def sample(self, trainer, prompt_ids: list[list[int]], config) -> Completions:
        """One completion per row of ``prompt_ids``, with the server's log-probs of its tokens. All processes come through here.

        Raises:
            RolloutServerError: naming the server, what was wanted and what came.
        """
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=True)
        vocabulary = model.config.get_text_config().vocab_size
        requests = self._requests(prompt_ids, config)
        for _ in range(self._args.rollout_server_retries + 1):
            self._renew(trainer)
            with trainer._raising_together():
                answers = self._client.ask(requests, lambda body, answer: read_choice(answer, body, vocabulary))
            if not any(_of_all(trainer, answers is None)):
                return _padded(prompt_ids, answers, config, self._args.device)
            self._given = None
        raise RolloutServerError(
            f"{self._client.name}: went away in each of {self._args.rollout_server_retries + 1} attempts at one rollout "
            f"(rollout_server_retries {self._args.rollout_server_retries}), the last time: {self._client.last}"
        )

    def corrected(self, batch, metrics, skips) -> dict:
        """The batch with ``importance_sampling_ratio`` [B, T], of its ``old_logps`` to its ``sampling_logps``, at most
        ``rollout_server_clip_max``.

        Args:
            batch: of a rollout, with advantages.
            metrics: `Recorded`, which gets how far both are apart.
            skips: completions without a gradient have no old log-probs.

        Source: truncated importance sampling of Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
        training".
        """
        mask = batch["mask"]
        if skips:
            mask = mask & microbatch.trained(mask, batch["advantages"]).unsqueeze(1)
        difference = (batch["old_logps"].float() - batch["sampling_logps"]).where(mask, 0.0)
        ratio = difference.exp().clamp(max=self._args.rollout_server_clip_max)
        kept = mask.sum()
        mean = lambda x: x.where(mask, 0.0).sum() / kept  # noqa: E731 - nan of no tokens, which is not recorded
        found = {"sampler/logp_difference_mean": mean(difference.abs()), "sampler/ratio_mean": mean(ratio)}
        found |= {"sampler/logp_difference_max": difference.abs().amax(), "sampler/ratio_max": ratio.where(mask, 0.0).amax()}
        metrics.record(found | {"sampler/ratio_min": ratio.where(mask, math.inf).amin()}, kept)
        if found["sampler/logp_difference_mean"] > _FAR:
            _log.warning(
                "%s: its log-probs are %.2f from the trainer's in the mean: are they after temperature and truncation (vLLM: "
                "--logprobs-mode processed_logprobs), and are its weights the trainer's?",
                self._client.name, found["sampler/logp_difference_mean"].item(),
            )  # fmt: skip
        batch = batch | {"importance_sampling_ratio": ratio}
        if self._args.steps_per_rollout == 1:
            del batch["old_logps"]  # the one step's own, which the loss makes
        return batch

    def _requests(self, prompt_ids, config):
        seeds = torch.randint(2**31 - 1, (len(prompt_ids),)).tolist()
        eos = config.eos_token_id
        common = {
            # all of them: vLLM takes what is missing from the model's generation_config.json
            "n": 1, "temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k or -1,
            "min_p": config.min_p or 0.0, "repetition_penalty": config.repetition_penalty, "max_tokens": config.max_new_tokens,
            "stop_token_ids": eos if isinstance(eos, list) else [] if eos is None else [eos],
            "logprobs": 0, "return_token_ids": True,
        }  # fmt: skip
        common |= self._args.rollout_server_kwargs or {}
        return [{"prompt": [ids], "seed": seed, **common} for ids, seed in zip(prompt_ids, seeds, strict=True)]

    def _renew(self, trainer):
        """Gives the server the weights, unless it has them."""
        # not the step alone: a checkpoint may have been loaded since, at the same step
        now = (trainer.state.global_step, sum(p._version for p in trainer.model.parameters()))
        if not any(_of_all(trainer, now != self._given)):
            return
        state = trainer.accelerator.get_state_dict(trainer.model) if self._args.rollout_server_reload != "none" else None
        with trainer._raising_together():
            if trainer.is_world_process_zero():
                self._client.wait()
                if state is not None:
                    self._hand_over(trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=True), state)
        self._given = now

    def _hand_over(self, model, state):
        folder = self._args.rollout_server_folder or os.path.join(self._args.output_dir, "rollout_server")
        folder = os.path.abspath(folder)
        new = [path for path in (folder, os.path.dirname(folder)) if not os.path.exists(path)]
        weights = os.path.join(folder, f"weights-{self._client.place}")  # one server's alone, where several runs have one folder
        if hasattr(model, "get_base_model"):
            model, state = model.get_base_model(), merged(model, state)
        shutil.rmtree(weights, ignore_errors=True)  # of a run that was killed
        try:
            with _without_bars():
                model.save_pretrained(weights, state_dict=state)
            self._client.reload(weights)
        finally:
            shutil.rmtree(weights, ignore_errors=True)
            for path in new:
                with contextlib.suppress(OSError):
                    os.rmdir(path)


def merged(model, state) -> dict:
    """The state of a PEFT model's base with its LoRA adapters added, in copies: what is added in place and subtracted again leaves
    rounding errors.

    Raises:
        ValueError: naming an adapter that is not LoRA, or weights that cannot be added to.
    """
    found, adapters = {}, []
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("rollout_server_reload must be 'none' for quantised weights, to which no adapter can be added")
    for name, x in state.items():
        name = name.removeprefix("base_model.model.")
        if _ADAPTER.search(name):
            adapters.append(name)
        elif ".original_module." not in name:
            found[name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")] = x
    for name in adapters:
        layer, kind, adapter = re.fullmatch(r"(.*)\.lora_(\w+)\.([^.]+)(?:\.weight)?", name).groups()
        if kind not in ("A", "B", "embedding_A", "embedding_B"):
            raise ValueError(f"rollout_server needs plain LoRA adapters, whose weights can be added to the model's, got {name}")
        if not kind.endswith("B"):
            continue
        module = model.get_base_model().get_submodule(layer)
        a = state[f"base_model.model.{name}".replace("lora_B", "lora_A").replace("lora_embedding_B", "lora_embedding_A")]
        delta = module.scaling[adapter] * (state[f"base_model.model.{name}"].float() @ a.float())
        whole = found[f"{layer}.weight"]
        turned = getattr(module, "fan_in_fan_out", False) or kind.startswith("embedding")
        found[f"{layer}.weight"] = (whole.float() + (delta.T if turned else delta)).to(whole.dtype)
    return found


@contextlib.contextmanager
def _without_bars():
    """transformers' progress bars are for what is saved once in a while."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def _of_all(trainer, flag):
    """[processes] bool."""
    return gather_object([flag]) if trainer.args.world_size > 1 else [flag]


def _padded(prompt_ids, answers, config, device):
    P, T = max(map(len, prompt_ids)), max(len(ids) for ids, _ in answers)
    ids = torch.full((len(answers), P + T), config.pad_token_id)
    attention, logps = torch.zeros_like(ids), torch.zeros(len(answers), T)
    ended = torch.zeros(len(answers), dtype=torch.bool)
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    for i, (prompt, (completion, sampled)) in enumerate(zip(prompt_ids, answers, strict=True)):
        whole = slice(P - len(prompt), P + len(completion))
        ids[i, whole] = torch.tensor(prompt + completion)
        attention[i, whole] = 1
        logps[i, : len(sampled)] = torch.tensor(sampled)
        ended[i] = completion[-1] in eos
    mask = attention[:, P:].bool()
    return Completions(*(x.to(device) for x in (ids, attention, mask, ended, logps)))


def read_choice(answer, body, vocabulary) -> tuple[list[int], list[float]]:
    """(token ids, log-probs) of the one completion of an answer to ``body``; raises where it is not exactly what was asked for."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    one = isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], dict)
    _want(one, "choices", "a list of one completion", choices)
    choice, prompt, most, ends = choices[0], body["prompt"][0], body["max_tokens"], body["stop_token_ids"]
    reason, echoed = choice.get("finish_reason"), choice.get("prompt_token_ids")
    ids = choice.get("token_ids", choice.get("response_token_ids"))  # SGLang is about to rename them (its pull request 38459)
    if reason == "abort":
        raise _Away("the server aborted a completion")
    _want(reason in ("stop", "length"), "finish_reason", "stop or length", reason)
    known = "the ids of the completion, from a server that knows return_token_ids (text is not tokenised again)"
    _want(isinstance(ids, list), "token_ids", known, ids)
    _want(1 <= len(ids) <= most, "token_ids", f"1 to {most} ids (max_tokens)", f"{len(ids)} of them")
    wrong = [i for i in ids if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocabulary]
    _want(not wrong, "token_ids", f"integers in [0, {vocabulary}), the trainer's vocabulary", wrong[:1])
    _want(echoed in (None, prompt), "prompt_token_ids", f"the {len(prompt)} ids that were sent", echoed)
    logps = (choice.get("logprobs") or {}).get("token_logprobs")
    came = f"{len(logps)} of them" if isinstance(logps, list) else logps
    _want(isinstance(logps, list) and len(logps) == len(ids), "logprobs.token_logprobs", f"{len(ids)} numbers, one a token", came)
    wrong = [p for p in logps if isinstance(p, bool) or not isinstance(p, (int, float)) or not -math.inf < p <= _CERTAIN]
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
        self._secure, self._host, self._port, self._prefix = _split(args.rollout_server)
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
                stop.wait(pause)
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
        answer = self.call("POST", path, body)
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
        deadline = time.monotonic() + self._args.rollout_server_patience
        for pause in _pauses():
            try:
                return function()
            except (_Away, _Busy) as error:
                self._how = None
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
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self._args.rollout_server_timeout)
        try:
            with self._lock:
                if stop is not None and stop.is_set():
                    raise _Stopped
                self._open.add(connection)
            connection.request(method, self._prefix + path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            text = answer.read()
        except TimeoutError:
            raise _Away(f"{path}: no answer in {self._args.rollout_server_timeout:g} s (rollout_server_timeout)") from None
        except (OSError, http.client.HTTPException) as error:
            raise _Away(f"{path}: {type(error).__name__}: {error}") from None
        finally:
            with self._lock:
                self._open.discard(connection)
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
        except ValueError:
            raise RolloutServerError(f"{self.name}: {path} must answer with JSON, got {text[:200]!r}") from None

    def _hang_up(self):
        with self._lock:
            for connection in self._open:
                if connection.sock is not None:
                    with contextlib.suppress(OSError):
                        connection.sock.shutdown(socket.SHUT_RDWR)


def _pauses(retries=None):
    """Seconds between attempts: doubled, and apart from those of other threads and processes; None after the last."""
    first, longest = _PAUSES
    dice, n = random.Random(), 0  # not the run's random numbers
    while retries is None or n < retries:
        yield min(first * 2 ** min(n, 32), longest) * dice.uniform(0.5, 1.0)
        n += 1
    yield None


def _split(url):
    """(whether by https, host, port, path in front of /v1)."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except (ValueError, AttributeError, TypeError):
        host = None
    if not host or parts.scheme not in ("http", "https") or parts.query or parts.fragment or parts.username:
        raise ValueError(f"rollout_server must be a URL such as http://localhost:8000, got {url!r}")
    secure = parts.scheme == "https"
    return secure, host, port or (443 if secure else 80), parts.path.rstrip("/").removesuffix("/v1")
