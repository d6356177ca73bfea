"""Rollouts from a server: what it sampled is what the model would, nothing is lost or trained twice when it fails, and what cannot be
trained on is refused.

The server is `rollout_server_stub`. vLLM and SGLang themselves are not run.
"""

import contextlib
import copy
import functools
import itertools
import json
import logging
import math
import re
import socket
import tempfile
import threading
import time
from dataclasses import fields
from pathlib import Path

import peft
import pytest
import torch
from support.cases import usually
from support.documents import section, table
from support.ranks import join, launch, leave
from support.rehearsed_trainer import use_fsdp
from support.rollout_server_stub import Server
from support.tiny_trainer import DATA, config, tiny_model, trainer, weights
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from grpo_kernels import GRPOLossConfig, objective
from grpo_kernels.trainer import dry_run
from grpo_kernels.trainer.rollout import Completions, sample, sampling_config
from grpo_kernels.trainer.rollout_client import KEY, Client, RolloutServerError, split_url
from grpo_kernels.trainer.rollout_server import merged
from grpo_kernels.trainer.server_options import ServerOptions

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [[2, 3, 4], [5, 6], [5, 6], [7, 8, 9, 10]]
COMPLETIONS, RELOAD = "/v1/completions", "/collective_rpc"
QUICK = dict(rollout_server_timeout=30.0, rollout_server_patience=60.0)
OTHER = 7  # seed of the weights that a server is started with, which are not the trainer's


@pytest.fixture
def server():
    servers = []

    def start(model=None, **options):
        servers.append(Server(tiny_model(OTHER) if model is None else model, **options))
        return servers[-1]

    yield start
    for started in servers:
        started.close()


def served(folder, server, **options):
    """A trainer of the tiny model, and what it trains on: the rows of each micro-batch."""
    t = trainer(folder, rollout_server=server.url, **{**QUICK, **options})
    t.trained, loss = [], t.compute_loss

    def noted(model, inputs, *args, **keywords):
        if model.training:
            t.trained += [(t.state.global_step, tuple(row)) for row in inputs["input_ids"].tolist()]
        return loss(model, inputs, *args, **keywords)

    t.compute_loss = noted
    return t


def drawn_by(t, prompts=PROMPTS):
    torch.manual_seed(5)
    config = sampling_config(t.args, t.model, t.processing_class)
    return t._server.sample(t, prompts, config), config


@torch.no_grad()
def scores_of(model, drawn, temperature=1.0):
    """[B, T, V] log-probs that the model gives in the places of the completions, from full logits."""
    T = drawn.mask.shape[1]
    positions = (drawn.attention_mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=drawn.input_ids, attention_mask=drawn.attention_mask, position_ids=positions).logits
    return (logits[:, -T - 1 : -1] / temperature).log_softmax(-1)


def chosen(scores, drawn):
    return scores.gather(-1, drawn.input_ids[:, -drawn.mask.shape[1] :].unsqueeze(-1)).squeeze(-1)


# ---- what is sampled ----


@pytest.mark.parametrize("api", ["vllm", "sglang", "own"])
def test_tokens_and_log_probs_are_those_of_the_trainers_model(tmp_path, server, api):
    s = server(api=api)
    options = {"rollout_server_reload": "/load"} if api == "own" else {}
    t = served(tmp_path, s, temperature=0.7, top_k=3, **options)
    drawn, _ = drawn_by(t)
    assert drawn.mask.any(1).all() and drawn.mask.shape[1] <= 5
    for row, prompt in zip(drawn.input_ids, PROMPTS, strict=True):
        before = row[: -drawn.mask.shape[1]].tolist()
        assert before[-len(prompt) :] == prompt and not any(before[: -len(prompt)])
    scores = scores_of(t.model, drawn, 0.7)
    cut = scores.where(scores >= scores.topk(3).values[..., -1:], -math.inf).log_softmax(-1)
    torch.testing.assert_close(drawn.logps[drawn.mask], chosen(cut, drawn)[drawn.mask], atol=2e-6, rtol=1e-5)
    assert not drawn.logps[~drawn.mask].any()
    assert (chosen(scores_of(s.initial, drawn, 0.7), drawn) - chosen(scores, drawn))[drawn.mask].abs().max() > 0.01, "too alike to tell"
    greedy = served(tmp_path, s, top_k=1, **options)
    (ours, config), again = drawn_by(greedy), greedy._server.sample(greedy, PROMPTS, drawn_by(greedy)[1])
    ids = [row[kept].tolist() for row, kept in zip(ours.input_ids, ours.attention_mask.bool(), strict=True)]
    plain = sample(greedy.model, PROMPTS, config)
    assert ids == [row[kept].tolist() for row, kept in zip(plain.input_ids, plain.attention_mask.bool(), strict=True)]
    assert torch.equal(ours.terminated, plain.terminated) and torch.equal(again.input_ids, ours.input_ids)


def test_the_options_of_the_sampling_reach_the_server(tmp_path, server):
    s = server()
    t = served(tmp_path, s, temperature=0.7, top_p=0.9, top_k=7, min_p=0.1, repetition_penalty=1.5, rollout_server_requests=1,
               rollout_server_kwargs='{"min_tokens": 1}')  # fmt: skip
    drawn_by(t)
    body = s.asked(COMPLETIONS)[0]
    assert body.pop("seed") >= 0
    assert body == {
        "model": "tiny", "prompt": [[2, 3, 4]], "n": 1, "temperature": 0.7, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "min_tokens": 1,
        "repetition_penalty": 1.5, "max_tokens": 5, "stop_token_ids": [1, 3, 4, 5, 6], "logprobs": 0, "return_token_ids": True,
    }  # fmt: skip
    plain = served(tmp_path, s)
    drawn_by(plain)
    body = s.asked(COMPLETIONS)[-1]  # -1: SGLang refuses 0
    assert (body["top_k"], body["min_p"], body["top_p"], body["repetition_penalty"], body["temperature"]) == (-1, 0.0, 1.0, 1.0, 1.0)


def test_each_completion_has_its_own_dice_and_a_rollout_always_the_same(tmp_path, server):
    s = server()
    for _ in range(2):
        t = served(tmp_path, s)
        t._new_rollout(0), t._new_rollout(1)
    seeds = [body["seed"] for body in s.asked(COMPLETIONS)]
    assert len(set(seeds[:16])) == 16 and sorted(seeds[:8]) == sorted(seeds[16:24]) and sorted(seeds[8:16]) == sorted(seeds[24:])


def test_requests_are_in_flight_together_and_not_more_than_asked_for(tmp_path, server):
    s, now, most = server(), [0], [0]
    meet, lock = threading.Barrier(4), threading.Lock()

    def change(answer):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        meet.wait(10)
        with lock:
            now[0] -= 1
        return answer

    s.change, s.lock = change, _NoLock()
    served(tmp_path, s, rollout_server_requests=4)._new_rollout(0)
    assert most[0] == 4


class _NoLock:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


# ---- weights ----


@pytest.mark.parametrize("api", ["vllm", "sglang"])
def test_the_server_has_the_weights_of_each_rollout_and_gets_them_once(tmp_path, server, api):
    s, path = server(api=api), {"vllm": RELOAD, "sglang": "/update_weights_from_disk"}[api]
    t = served(tmp_path / "out", s, max_steps=4, num_iterations=2, eval_dataset=DATA[:4], eval_strategy="steps", eval_steps=4)
    t.train()
    given = [(p, b) for p, b in s.log if p in (path, "/reset_prefix_cache")]
    # two rollouts of two steps each, and the evaluation after the last step
    assert [p for p, _ in given] == [path, "/reset_prefix_cache"] * 3 if api == "vllm" else [path] * 3
    assert torch.equal(weights(s.model), weights(t.model))
    t.evaluate()
    assert len(s.asked(path)) == 4, "once for both rounds: it may have been started anew since the last evaluation"
    with torch.no_grad():
        t.model.model.norm.weight.mul_(1.5)
    t.evaluate()
    assert len(s.asked(path)) == 5 and torch.equal(weights(s.model), weights(t.model))
    body = s.asked(path)[-1]
    folder = Path(body["kwargs"]["weights_path"] if api == "vllm" else body["model_path"])
    assert folder.is_absolute() and folder.is_relative_to(tmp_path / "out") and not folder.exists() and not folder.parent.exists()


def test_the_weights_go_through_the_folder_that_is_named(tmp_path, server):
    s = server(api="own")
    weights = tmp_path / "shared" / f"weights-127.0.0.1-{s._http.server_port}"
    weights.mkdir(parents=True)
    (weights / "model-00001-of-00002.safetensors").write_text("of a run that was killed")
    t = served(tmp_path / "out", s, rollout_server_folder=str(tmp_path / "shared"), rollout_server_reload="/load")
    t._new_rollout(0)
    assert s.asked("/load") == [{"model_path": str(weights)}]
    assert (tmp_path / "shared").exists() and not any((tmp_path / "shared").iterdir())


def test_adapters_are_added_to_the_weights_that_are_given(tmp_path, server):
    s = server()
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, init_lora_weights=False,
                           target_modules=["embed_tokens", "q_proj", "down_proj", "lm_head"])  # fmt: skip
    t = served(tmp_path, s, peft_config=lora)
    before = {name: x.clone() for name, x in t.model.state_dict().items()}
    drawn, _ = drawn_by(t)
    scores = scores_of(t.model, drawn)
    torch.testing.assert_close(drawn.logps[drawn.mask], chosen(scores, drawn)[drawn.mask], atol=2e-6, rtol=1e-5)
    with t.model.disable_adapter():
        assert (chosen(scores_of(t.model, drawn), drawn) - drawn.logps)[drawn.mask].abs().max() > 0.01, "adapters too small to tell"
    assert all(torch.equal(x, before[name]) for name, x in t.model.state_dict().items())
    t.train()


def test_only_the_active_adapter_is_added(tmp_path):
    lora = functools.partial(peft.LoraConfig, task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj"])
    model = peft.get_peft_model(tiny_model(), lora(modules_to_save=["norm"]))
    model.add_adapter("other", lora(modules_to_save=["norm"]))
    model.get_base_model().model.norm.modules_to_save["other"].weight.data *= 2
    plain, ids = tiny_model(), torch.arange(2, 9).unsqueeze(0)
    logits = []
    for name in ("default", "other"):
        model.set_adapter(name)
        plain.load_state_dict(merged(model, model.state_dict()))
        logits.append(plain.eval()(ids).logits)
        torch.testing.assert_close(logits[-1], model.eval()(ids).logits, atol=1e-6, rtol=1e-5)
    assert (logits[0] - logits[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "adapter, named",
    [
        (peft.LoraConfig(target_modules=["q_proj"], use_dora=True), "LORA with use_dora"),
        (peft.LoraConfig(target_modules=["q_proj"], lora_bias=True), "LORA with lora_bias"),
        (peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1]), "LORA with trainable_token_indices"),
        (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "IA3"),
        (peft.VeraConfig(target_modules=["q_proj"]), "VERA"),
    ],
)
def test_adapters_that_cannot_be_added_are_refused(adapter, named):
    """Or the server would go on with the weights without them."""
    model = peft.get_peft_model(tiny_model(), adapter)
    with pytest.raises(ValueError, match=f"plain LoRA adapters.*got {named}$"):
        merged(model, model.state_dict())


def test_a_server_without_an_endpoint_for_weights_is_told_from_one_with(tmp_path, server):
    with pytest.raises(RolloutServerError, match="rollout_server_reload 'auto' needs .*collective_rpc.*VLLM_SERVER_DEV_MODE=1"):
        drawn_by(served(tmp_path, server(api=None)))
    s = server()
    s.reload_faults = [None, "fail"]
    t = served(tmp_path, s)
    t._new_rollout(0)
    t.state.global_step = 1
    with pytest.raises(RolloutServerError, match="/collective_rpc must succeed, got .*no such shard"):
        t._new_rollout(1)
    s.reload_faults = ["die"]
    drawn, _ = drawn_by(t)
    torch.testing.assert_close(drawn.logps[drawn.mask], chosen(scores_of(t.model, drawn), drawn)[drawn.mask], atol=2e-6, rtol=1e-5)
    with pytest.raises(RolloutServerError, match="/not/there: status 404"):
        drawn_by(served(tmp_path, s, rollout_server_reload="/not/there"))


# ---- a server that fails ----


@functools.cache
def undisturbed():
    """Weights and trained rows of a run of four steps, two on each rollout, without a fault."""
    s = Server(tiny_model(OTHER))
    try:
        with tempfile.TemporaryDirectory() as folder:
            t = served(folder, s, max_steps=4, num_iterations=2)
            t.train()
            return weights(t.model), t.trained, len(s.asked(COMPLETIONS)), len(s.asked(RELOAD))
    finally:
        s.close()


@pytest.mark.parametrize("fault", usually(["die", "hang", "truncate", "truncate without a length", 503, 500, 429], "die", "truncate", 503))
def test_a_run_goes_on_through_faults_as_if_there_were_none(tmp_path, server, fault, caplog):
    plain, trained, asked, given = undisturbed()
    s = server()
    s.faults = [None] * 10 + [fault]  # amid the second rollout, with the weights of two steps
    t = served(tmp_path, s, max_steps=4, num_iterations=2, rollout_server_timeout=4.0 if fault == "hang" else 30.0)
    with caplog.at_level(logging.WARNING):
        t.train()
    assert torch.equal(weights(t.model), plain)
    assert t.trained == trained and len(set(trained)) == len(trained), "a rollout was lost, or trained on twice"
    if fault in (500, 429):  # still there: one request again
        assert (len(s.asked(COMPLETIONS)), len(s.asked(RELOAD)), s.lives) == (asked + 1, given, 1)
        assert "asked again as a whole" not in caplog.text
    else:  # it may have been started anew: the weights and the whole rollout again
        assert len(s.asked(RELOAD)) == given + 1 and asked < len(s.asked(COMPLETIONS)) <= asked + 8
        assert s.lives == 1 + (fault == "die") and caplog.text.count("asked again as a whole") == 1
        seeds = [seed for seed, _, _ in s.answered]
        assert {seeds.count(seed) for seed in set(seeds[-8:])} <= {1, 2} and len(set(seeds)) == asked


def test_a_server_that_is_not_there_yet_is_waited_for(tmp_path, server):
    s = server()
    port = s._http.server_port
    s.stop()
    threading.Timer(0.5, lambda: s._start(port)).start()
    t = served(tmp_path, s)
    t.train()
    assert t.state.global_step == 2


@pytest.mark.parametrize(
    "faults, options, said",
    [
        (["die for good"], dict(rollout_server_patience=0.5), "not there for 0.5 s \\(rollout_server_patience\\).*ConnectionRefused"),
        (["die", "die"], dict(rollout_server_retries=1), "went away in each of 2 attempts at one rollout \\(rollout_server_retries 1\\)"),
        (["hang"] * 2, dict(rollout_server_retries=1, rollout_server_timeout=1.5, rollout_server_reload="none"),
         "attempts.*no answer in 1.5 s \\(rollout_server_timeout\\)"),
        ([500] * 30, dict(rollout_server_retries=1), "status 500: .*out of order.*, 2 times"),
        ([400], {}, "/v1/completions: status 400: .*out of order"),
        (["not JSON"], {}, "/v1/completions must answer with JSON, got b'<html>'"),
    ],
)  # fmt: skip
def test_what_does_not_pass_is_an_error_that_says_how_long_it_was_waited_for(tmp_path, server, faults, options, said):
    s = server()
    s.away, s.faults = 0.1, list(faults)
    t = served(tmp_path, s, rollout_server_requests=1, **options)
    with pytest.raises(RolloutServerError, match=f"rollout_server {s.url}: .*{said}"):
        t.train()
    assert t.trained == []


@pytest.mark.parametrize(
    "faults, options, said",
    [
        ([500] * 30, dict(rollout_server_retries=1), "/collective_rpc: status 500: .*no such shard.*, 2 times"),
        ([], dict(rollout_server_reload="/nowhere"), "/nowhere: status 404: .*\\(rollout_server_reload is '/nowhere'\\)"),
    ],
)
def test_weights_that_are_refused_are_told_soon(tmp_path, server, faults, options, said):
    s, began = server(), time.monotonic()
    s.reload_faults = list(faults)
    t = served(tmp_path, s, **options)
    with pytest.raises(RolloutServerError, match=f"rollout_server {s.url}: {said}"):
        t.train()
    assert time.monotonic() - began < 30 and t.trained == []


def test_a_server_that_is_started_anew_behind_an_evaluation_gets_the_weights(tmp_path, server):
    s = server(tiny_model(OTHER, initializer_range=0.3))
    t = served(tmp_path, s, max_steps=2, logging_steps=1, eval_dataset=DATA[:2], eval_strategy="steps", eval_steps=1)

    class Anew(TrainerCallback):
        def on_evaluate(self, *_, **__):
            s.model = copy.deepcopy(s.initial)

    t.add_callback(Anew())
    t.train()
    apart = [log["sampler/logp_difference_max"] for log in t.state.log_history if "loss" in log]
    assert len(apart) == 2 and max(apart) < 1e-5


def test_a_key_is_sent_and_its_absence_told(tmp_path, server, monkeypatch):
    s = server(key="secret")
    with pytest.raises(RolloutServerError, match="status 401: .*Unauthorized"):
        drawn_by(served(tmp_path, s))
    monkeypatch.setenv(KEY, "secret\n")  # as from a file
    drawn_by(served(tmp_path, s))


@contextlib.contextmanager
def raw_server(*answers):
    """Its URL. It names a model, and to the n-th completion it sends the bytes of ``answers[n]``, a pause after each part."""
    left, listening = list(answers), socket.create_server(("127.0.0.1", 0))

    def answer(connection):
        with connection, contextlib.suppress(OSError):
            if b"/v1/models" in connection.recv(65536):
                connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 24\r\n\r\n{"data":[{"id":"tiny"}]}')
                return
            for part in left.pop(0):
                connection.sendall(part)
                time.sleep(0.2)

    def listen():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=answer, args=listening.accept()[:1], daemon=True).start()

    threading.Thread(target=listen, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        listening.close()


BEGUN = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 1000\r\n\r\n"


def test_an_answer_in_drips_is_late_too(tmp_path):
    """Each of its parts comes in time, but not the whole."""
    with raw_server([BEGUN, *[b" "] * 50]) as url:
        client = Client(config(tmp_path, rollout_server=url, rollout_server_timeout=0.6))
        assert client.ask([{}], lambda request, answer: answer) is None
    assert client.last == "/v1/completions: no answer in 0.6 s (rollout_server_timeout)"


def test_what_is_refused_does_not_wait_for_an_answer_that_stands_still(tmp_path):
    refused = b"HTTP/1.1 400 Bad\r\nContent-Length: 0\r\n\r\n"
    with raw_server([BEGUN, *[b""] * 100], [b"", refused]) as url:
        client, began = Client(config(tmp_path, rollout_server=url, rollout_server_timeout=15.0)), time.monotonic()
        with pytest.raises(RolloutServerError, match="/v1/completions: status 400"):
            client.ask([{}, {}], lambda request, answer: answer)
    assert time.monotonic() - began < 10


# ---- answers that cannot be trained on ----


def of_choice(**changes):
    def change(answer):
        answer["choices"][0] |= {name: new(answer["choices"][0]) for name, new in changes.items()}
        return answer

    return change


def test_either_name_of_the_ids_will_do(tmp_path, server):
    plain, trained, *_ = undisturbed()
    s = server(api="sglang")

    def change(answer):
        answer["choices"][0]["response_token_ids"] = answer["choices"][0].pop("token_ids")
        return answer

    s.change = change
    t = served(tmp_path, s, max_steps=4, num_iterations=2)
    t.train()
    assert torch.equal(weights(t.model), plain) and t.trained == trained


def logps(change):
    return of_choice(logprobs=lambda c: {"token_logprobs": change(c["logprobs"]["token_logprobs"])})


@pytest.mark.parametrize(
    "change, said",
    [
        (of_choice(token_ids=lambda c: None), "token_ids must be the ids of the completion, .*return_token_ids.*, got None"),
        (of_choice(token_ids=lambda c: []), "token_ids must be 1 to 5 ids \\(max_tokens\\), got 0 of them"),
        (of_choice(token_ids=lambda c: [2] * 6), "token_ids must be 1 to 5 ids \\(max_tokens\\), got 6 of them"),
        (of_choice(token_ids=lambda c: [32, *c["token_ids"][1:]]), "integers in \\[0, 32\\), the trainer's vocabulary, got \\[32\\]"),
        (of_choice(token_ids=lambda c: ["2", *c["token_ids"][1:]]), "integers in \\[0, 32\\), the trainer's vocabulary, got \\['2'\\]"),
        (of_choice(prompt_token_ids=lambda c: [9]), "prompt_token_ids must be the \\d ids that were sent, got \\[9\\]"),
        (of_choice(logprobs=lambda c: None), "logprobs.token_logprobs must be \\d numbers, one a token, got None"),
        (of_choice(logprobs=lambda c: [-1.0]), "logprobs.token_logprobs must be \\d numbers, one a token, got None"),
        (logps(lambda x: [*x[:-1], -1e300]), "logprobs.token_logprobs must be finite numbers <= 0, got \\[-1e\\+300\\]"),
        (logps(lambda x: [*x, -1.0]), "logprobs.token_logprobs must be (\\d) numbers, one a token, got (?!\\1)\\d of them"),
        (logps(lambda x: [*x[:-1], 0.5]), "logprobs.token_logprobs must be finite numbers <= 0, got \\[0.5\\]"),
        (logps(lambda x: [*x[:-1], None]), "logprobs.token_logprobs must be finite numbers <= 0, got \\[None\\]"),
        (logps(lambda x: [*x[:-1], math.nan]), "logprobs.token_logprobs must be finite numbers <= 0, got \\[nan\\]"),
        (logps(lambda x: [*x[:-1], -math.inf]), "logprobs.token_logprobs must be finite numbers <= 0, got \\[-inf\\]"),
        (of_choice(finish_reason=lambda c: None), "finish_reason must be stop or length, got None"),
        (of_choice(finish_reason=lambda c: "content_filter"), "finish_reason must be stop or length, got content_filter"),
        (of_choice(token_ids=lambda c: [2], logprobs=lambda c: {"token_logprobs": [-1.0]}, finish_reason=lambda c: "stop"),
         "one of stop_token_ids \\[1, 3, 4, 5, 6\\] at the end of a completion that stopped, got 2"),
        (of_choice(token_ids=lambda c: [2, 2], logprobs=lambda c: {"token_logprobs": [-1.0, -1.0]}, finish_reason=lambda c: "length"),
         "5 ids \\(max_tokens\\) where the length ended it; is the server's context long enough\\?, got 2 of them"),
        (of_choice(token_ids=lambda c: [1, 2], logprobs=lambda c: {"token_logprobs": [-1.0, -1.0]}, finish_reason=lambda c: "length"),
         "none behind the first of stop_token_ids .*, got \\[1, 2\\]"),
        (lambda answer: {"choices": answer["choices"] * 2}, "choices must be a list of one completion, got "),
        (lambda answer: {"choices": []}, "choices must be a list of one completion, got \\[\\]"),
        (lambda answer: [], "choices must be a list of one completion, got None"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_on_is_refused(tmp_path, server, change, said):
    s = server()
    s.change = change
    t = served(tmp_path, s)
    with pytest.raises(RolloutServerError, match=f"rollout_server {s.url}: .*{said}"):
        t.train()
    assert t.trained == []


def test_an_aborted_completion_is_asked_for_again(tmp_path, server):
    plain, trained, *_ = undisturbed()
    s, calls = server(), itertools.count(1)
    s.change = lambda answer: of_choice(finish_reason=lambda c: "abort")(answer) if next(calls) == 11 else answer
    t = served(tmp_path, s, max_steps=4, num_iterations=2)
    t.train()
    assert next(calls) > 17 and t.trained == trained and torch.equal(weights(t.model), plain)


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(rollout_server="localhost:8000"), "rollout_server must be a URL such as http://localhost:8000, got 'localhost:8000'"),
        (dict(rollout_server="http://"), "rollout_server must be a URL"),
        (dict(rollout_server="http://me:pass@host"), "^rollout_server must be a URL without user and password, whose key is in \\w+$"),
        (dict(rollout_server="http://:pass@host"), "^rollout_server must be a URL without user and password, whose key is in \\w+$"),
        (dict(rollout_server=None, rollout_server_timeout=3.0), "rollout_server_timeout needs rollout_server, got 3.0"),
        (dict(rollout_server=None, importance_sampling_mode="icepop"), "importance_sampling_mode must be None without rollout_server"),
        (dict(rollout_server_reload="restart"), "rollout_server_reload must be auto, vllm, sglang, none or a path .*, got 'restart'"),
        (dict(rollout_server_requests=0), "rollout_server_requests must be an integer >= 1, got 0"),
        (dict(rollout_server_retries=-1), "rollout_server_retries must be an integer >= 0, got -1"),
        (dict(rollout_server_patience=0.0), "rollout_server_patience must be a number of seconds > 0, got 0.0"),
        (dict(rollout_server_timeout="60"), "rollout_server_timeout must be a number of seconds > 0, got '60'"),
        (dict(rollout_server="http://a b:8000"), "rollout_server must be a URL"),
        (dict(rollout_server_clip_max=0.0), "rollout_server_clip_max must be None or a number > 0, got 0.0"),
        (dict(rollout_server_kwargs={"seed": 1, "n": 2}), "rollout_server_kwargs must leave out n, seed, .*, got {'n': 2, 'seed': 1}"),
        (dict(rollout_server_kwargs="[1]"), "rollout_server_kwargs must be a JSON object"),
        (dict(generation_kwargs={"min_new_tokens": 2}), "generation_kwargs must be None with rollout_server"),
        (dict(use_transformers_continuous_batching=True), "use_transformers_continuous_batching must be False with rollout_server"),
        (dict(keep_sampling_mask=True), "keep_sampling_mask must be False or None with rollout_server"),
    ],
)
def test_bad_options_are_named(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        config(tmp_path, **{"rollout_server": "http://127.0.0.1:1", **options})


@pytest.mark.parametrize("url", ["http://host:8000", "http://host:8000/", "http://host:8000/v1", "https://host/proxy/v1/"])
def test_a_url_may_end_in_v1(tmp_path, url):
    assert split_url(url) == (url.startswith("https"), "host", 8000 if "8000" in url else 443, "/proxy" if "proxy" in url else "")
    assert config(tmp_path, rollout_server=url, top_p=0.5).keeps_sampling_mask is False


# ---- the loss ----


@pytest.mark.cover
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("padding_free", [False, True])
def test_the_loss_is_weighted_by_the_capped_ratio_of_trainer_to_sampler(tmp_path, server, caplog, steps, padding_free):
    s = server(tiny_model(OTHER, initializer_range=0.3))  # which keeps its own weights: far from the trainer's
    options = dict(off_policy_mask_threshold=0.3, num_iterations=steps, padding_free=padding_free, rollout_server_clip_max=1.3, loss_type="grpo")
    t = served(tmp_path, s, rollout_server_reload="none", **options)
    (batch,) = t.get_batch_samples(iter(range(1)), 1, t.args.device)[0]
    assert s.asked(RELOAD) == [] and ("old_logps" in batch) == (steps > 1)
    mask = batch["mask"]
    drawn = Completions(batch["input_ids"], batch["attention_mask"], mask, None)
    ours, theirs = chosen(scores_of(t.model, drawn), drawn), chosen(scores_of(s.initial, drawn), drawn)
    torch.testing.assert_close(batch["sampling_logps"][mask], theirs[mask], atol=2e-6, rtol=1e-5)
    live = mask & (batch["advantages"] != 0).unsqueeze(1)
    ratio = (ours - theirs).exp()
    assert (ratio[live] > 1.3).any() and (ratio[live] < 1).any(), "the cap is not reached"
    torch.testing.assert_close(batch["importance_sampling_ratio"][live], ratio[live].clamp(max=1.3), atol=1e-5, rtol=1e-5)
    logging.Logger.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        t.log({"loss": 0.0})
    found = t.state.log_history[-1]
    assert found["sampler/ratio_max"] == pytest.approx(1.3) and found["sampler/ratio_min"] == pytest.approx(ratio[live].min().item(), rel=1e-4)
    assert found["sampler/ratio_mean"] == pytest.approx(ratio[live].clamp(max=1.3).mean().item(), rel=1e-4)
    assert {row[0] for row in table("metrics.md", "Metrics of the rollout server")[1:]} == {name for name in found if name.startswith("sampler/")}
    apart = (ours - theirs)[live].abs()
    assert found["sampler/logp_difference_mean"] == pytest.approx(apart.mean().item(), rel=1e-4)
    assert found["sampler/logp_difference_max"] == pytest.approx(apart.max().item(), rel=1e-4)
    assert ("processed_logprobs" in caplog.text) == bool(apart.mean() > 0.5)
    loss = t.compute_loss(t.model, batch).item()
    given = dict(old_logps=batch.get("old_logps"), importance_sampling_ratio=ratio.clamp(max=1.3), sampling_logps=theirs)
    reference = functools.partial(objective, ours, torch.zeros_like(ours), batch["advantages"], mask)
    plain = GRPOLossConfig(loss_type="grpo")
    masked = GRPOLossConfig(loss_type="grpo", off_policy_mask_threshold=0.3)
    assert loss == pytest.approx(reference(**given, config=masked)[0].item(), rel=1e-4)
    others = [reference(**given, config=plain), reference(**given | {"importance_sampling_ratio": None}, config=masked)]
    assert all(abs(loss - other[0].item()) > 1e-3 * abs(loss) for other in others), "an input that changes nothing"


@pytest.mark.cover
@pytest.mark.parametrize("options", [dict(rollout_server_clip_max=None), dict(importance_sampling_mode="icepop"), {}])
@pytest.mark.parametrize("steps, truncated", [(1, {}), (2, {}), (1, {"top_k": 9})])
def test_how_far_the_server_is_is_logged_whatever_corrects_it(tmp_path, server, caplog, options, steps, truncated):
    """By the loss's own log-probs where a rollout has no old ones; with truncated sampling both differ by right."""
    s = server(tiny_model(OTHER, initializer_range=0.3))
    t = served(tmp_path, s, rollout_server_reload="none", num_iterations=steps, max_steps=steps, logging_steps=1, **options, **truncated)
    logging.Logger.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        t.train()
    first, *others = t.state.log_history
    assert first["sampler/logp_difference_max"] > first["sampler/logp_difference_mean"] > 0.5
    assert caplog.text.count("processed_logprobs") == (not truncated)
    assert not [log for log in others if "sampler/logp_difference_mean" in log], "the weights have moved since"
    reference = served(tmp_path / "cap", s, rollout_server_reload="none", max_steps=1, logging_steps=1, **truncated)
    reference.train()
    for name in ("sampler/logp_difference_mean", "sampler/logp_difference_max"):
        assert first[name] == pytest.approx(reference.state.log_history[0][name], rel=1e-4)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_mode_of_the_loss_replaces_the_cap(tmp_path, server, steps):
    """With its bound the same run, but for rounding; with another mode another one."""
    found = {}
    for name, options in {
        "cap": dict(rollout_server_clip_max=1.1), "mode": dict(importance_sampling_mode="token_truncate", importance_sampling_clip_max=1.1),
        "other": dict(importance_sampling_mode="sequence_mask", importance_sampling_clip_max=1.1),
    }.items():  # fmt: skip
        t = served(tmp_path / name, server(api="own"), rollout_server_reload="none", num_iterations=steps, max_steps=steps, **options)
        assert t.args.corrects_sampler == (name == "cap")
        t.train()
        found[name] = weights(t.model)
    rounding, moved = (found["mode"] - found["cap"]).norm(), (found["other"] - found["cap"]).norm()
    assert rounding < 1e-3 * moved and moved > 1e-3 * found["cap"].norm()


def test_without_a_cap_the_log_probs_alone_are_passed_on(tmp_path, server):
    t = served(tmp_path, server(), rollout_server_clip_max=None)
    batch = t._new_rollout(0)
    assert "sampling_logps" in batch and not {"importance_sampling_ratio", "old_logps"} & set(batch)
    assert "sampling_logps" not in trainer(tmp_path)._new_rollout(0)
    t.train()


def test_a_completion_that_is_skipped_is_not_in_the_metrics_of_the_ratio(tmp_path, server):
    """It has no log-probs of the trainer: its group's rewards are equal."""
    rewards = lambda completions, **_: [0.0] * 4 + [0.0, 1.0, 0.0, 1.0]  # noqa: E731
    t = served(tmp_path, server(), rewards=rewards, max_steps=1, logging_steps=1)
    t.train()
    assert t.state.log_history[0]["frac_reward_zero_std"] == 0.5
    assert t.state.log_history[0]["sampler/logp_difference_max"] < 1e-5


def test_a_ratio_over_no_tokens_is_not_recorded(tmp_path, server):
    t = served(tmp_path, server())
    none = {"mask": torch.zeros(2, 3, dtype=torch.bool), "advantages": torch.ones(2), "old_logps": torch.zeros(2, 3), "sampling_logps": torch.zeros(2, 3)}
    assert torch.equal(t._beside_sampler(none)["importance_sampling_ratio"], torch.ones(2, 3))
    assert t._metrics["train"].take(lambda x: x) == {}


# ---- resumed, rehearsed, on two processes ----


def test_a_run_that_is_resumed_amid_a_rollout_goes_on_with_its_log_probs(tmp_path, server):
    s = server()
    options = dict(num_iterations=2, max_steps=4, save_strategy="steps", save_steps=1, off_policy_mask_threshold=0.5)
    whole = served(tmp_path, s, **options)
    whole.train()
    seeds = [body["seed"] for body in s.asked(COMPLETIONS)]
    s.log.clear()
    again = served(tmp_path, s, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert torch.equal(weights(again.model), weights(whole.model)) and again.trained == whole.trained[8:]
    assert sorted(body["seed"] for body in s.asked(COMPLETIONS)) == sorted(seeds[8:]), "the first rollout was in the checkpoint"


def test_a_dry_run_tries_the_server_and_leaves_nothing(tmp_path, server):
    s = server()
    t = served(tmp_path / "out", s, eval_dataset=DATA[:2])
    lines = list(dry_run.describe(t))
    assert any(s.url in line for line in lines) and s.asked(RELOAD) and s.asked(COMPLETIONS)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def _two_ranks(rank, folder, port):
    join(rank, port, 2, 100)
    settings = json.loads((Path(folder) / "settings.json").read_text())
    if settings["sharded"]:
        use_fsdp()
    options = dict(per_device_train_batch_size=4, num_generations=8, max_steps=4, num_iterations=2, rollout_server=settings["url"])
    t = trainer(f"{folder}/out", **QUICK, **options)
    trained = []
    split = t.get_batch_samples

    def noted(*args):
        found = split(*args)
        trained.extend((t.state.global_step, tuple(row)) for batch in found[0] for row in batch["input_ids"].tolist())
        return found

    t.get_batch_samples = noted
    t.train()
    sharded = any(isinstance(p, DTensor) for p in t.model.parameters())
    torch.save({"weights": weights(t.model), "trained": trained, "sharded": sharded}, f"{folder}/rank{rank}.pt")
    leave()


# 503 is for one process alone, and the other must ask again with it
@pytest.mark.exhaustive(reason="ten seconds: two processes that train, twice")
@pytest.mark.parametrize("sharded, failure", [(False, 503), (True, "die")])
def test_two_processes_share_a_server_that_fails(tmp_path, server, sharded, failure):
    found = []
    for fault in (None, failure):
        s, folder = server(), tmp_path / str(fault)
        folder.mkdir()
        s.faults = [None] * 10 + [fault]
        (folder / "settings.json").write_text(json.dumps({"url": s.url, "sharded": sharded}))
        launch(_two_ranks, folder, 2, 200)
        ranks = [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]
        assert torch.equal(ranks[0]["weights"], ranks[1]["weights"]) and ranks[0]["sharded"] == sharded
        assert not set(ranks[0]["trained"]) & set(ranks[1]["trained"])
        seeds = [body["seed"] for body in s.asked(COMPLETIONS)]
        assert len(set(seeds)) == 16 and (len(seeds) == 16) == (fault is None)
        assert len(s.asked(RELOAD)) == 2 + (fault is not None), "given by one process, and again after its absence"
        assert s.lives == 1 + (fault == "die")
        found.append(ranks)
    for plain, disturbed in zip(*found, strict=True):
        assert torch.equal(plain["weights"], disturbed["weights"]) and plain["trained"] == disturbed["trained"]


def test_the_documentation_names_every_option():
    named = re.findall(r"rollout_server\w*", section("training.md", "Use a rollout server"))
    assert {f.name for f in fields(ServerOptions)} <= set(named)
