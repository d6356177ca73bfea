"""Rollouts from a server that speaks the OpenAI completions protocol with token ids and log-probs: vLLM's, SGLang's.

Each completion is a request of its own, with its own seed: servers make the seeds of one request's n completions in different
ways (vLLM counts them up, SGLang takes one for all). Seeds are drawn from the rollout's random numbers, so a request that is
repeated asks for the same completion.

Where the server was away for one of the requests, it is given the weights and asked for the whole rollout again, on all processes.

Weights go through a folder that both sides can read: process 0 saves what `from_pretrained` loads, the server's own endpoint
reads it, and it is deleted. That is done before the first rollout, after each change of the weights and after each absence.
"""

import contextlib
import os
import re
import shutil

import torch
import transformers
from accelerate.utils import gather_object

from .rollout import Completions
from .rollout_client import Client, RolloutServerError, read_choice
from .run_checks import raising_together

_ADAPTER = re.compile(r"\.lora_\w+\.")
_SAVED = re.compile(r"\.(?:original_module|modules_to_save\.([^.]+))\.")


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
            with raising_together(trainer.args):
                answers = self._client.ask(requests, lambda body, answer: read_choice(answer, body, vocabulary))
            if not any(_of_all(trainer, answers is None)):
                return _padded(prompt_ids, answers, config, self._args.device)
            self._given = None
        raise RolloutServerError(
            f"{self._client.name}: went away in each of {self._args.rollout_server_retries + 1} attempts at one rollout "
            f"(rollout_server_retries {self._args.rollout_server_retries}), the last time: {self._client.last}"
        )

    def forget(self):
        """The next rollout gives it the weights, though they may be the same: it may have been started anew since the last one."""
        self._given = None

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
        with raising_together(trainer.args):
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
    found, adapters, active = {}, [], model.active_adapters
    for config in (model.peft_config[name] for name in active):
        beyond = next((x for x in ("use_dora", "lora_bias", "trainable_token_indices") if getattr(config, x, None)), None)
        if config.peft_type != "LORA" or beyond:
            came = f"{config.peft_type.value}{' with ' + beyond if beyond else ''}"
            raise ValueError(f"rollout_server needs plain LoRA adapters, whose weights can be added to the model's, got {came}")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("rollout_server_reload must be 'none' for quantised weights, to which no adapter can be added")
    for name, x in state.items():
        name = name.removeprefix("base_model.model.")
        saved = _SAVED.search(name)
        if _ADAPTER.search(name):
            adapters.append(name)
        elif saved is None or saved[1] is None or saved[1] in active:  # the original comes before what replaces it
            found[_SAVED.sub(".", name.replace(".base_layer.", "."))] = x
    for name in adapters:
        layer, kind, adapter = re.fullmatch(r"(.*)\.lora_(\w+)\.([^.]+)(?:\.weight)?", name).groups()
        if not kind.endswith("B") or adapter not in active:
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
