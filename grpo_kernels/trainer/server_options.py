"""The options of a rollout server, which `GRPOConfig` has among its own."""

import math
from dataclasses import dataclass, field, fields

from .rollout_client import split_url

_OURS = {
    "model", "prompt", "n", "best_of", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed", "stop",
    "stop_token_ids", "ignore_eos", "logprobs", "echo", "stream", "return_token_ids",
}  # fmt: skip


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
        metadata={"help": "Highest weight of a token, trainer's probability by sampler's; None: none. A mode replaces it."},
    )

    @property
    def corrects_sampler(self) -> bool:
        """Whether a rollout brings the ratio of trainer to sampler; with ``importance_sampling_mode`` the loss makes it."""
        asked = self.rollout_server is not None and self.rollout_server_clip_max is not None
        return asked and self.importance_sampling_mode is None


def check_server_options(args):
    """Raises ValueError naming the option, what was wanted and what came."""
    if args.rollout_server is None:
        for f in fields(ServerOptions):
            if getattr(args, f.name) != f.default:
                raise ValueError(f"{f.name} needs rollout_server, got {getattr(args, f.name)!r}")
        if args.importance_sampling_mode is not None:
            raise ValueError("importance_sampling_mode must be None without rollout_server, whose log-probs it corrects, got "
                             f"{args.importance_sampling_mode!r}")  # fmt: skip
        return
    split_url(args.rollout_server)
    how = args.rollout_server_reload
    if how not in ("auto", "vllm", "sglang", "none") and not str(how).startswith("/"):
        raise ValueError(f"rollout_server_reload must be auto, vllm, sglang, none or a path that begins with /, got {how!r}")
    for name, least in (("rollout_server_requests", 1), ("rollout_server_retries", 0)):
        value = getattr(args, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    for name in ("rollout_server_timeout", "rollout_server_patience"):
        value = getattr(args, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{name} must be a number of seconds > 0, got {value!r}")
    clip = args.rollout_server_clip_max
    real = isinstance(clip, (int, float)) and not isinstance(clip, bool)
    if clip is not None and not (real and 0 < clip < math.inf):
        raise ValueError(f"rollout_server_clip_max must be None or a number > 0, got {clip!r}")
    if refused := sorted(set(args.rollout_server_kwargs or ()) & _OURS):
        given = {name: args.rollout_server_kwargs[name] for name in refused}
        raise ValueError(f"rollout_server_kwargs must leave out {', '.join(refused)}, which the trainer sets, got {given!r}")
    if args.generation_kwargs:
        raise ValueError("generation_kwargs must be None with rollout_server, whose options are rollout_server_kwargs, got "
                         f"{args.generation_kwargs!r}")  # fmt: skip
    if args.use_transformers_continuous_batching:
        raise ValueError("use_transformers_continuous_batching must be False with rollout_server, got True")
    if args.keep_sampling_mask:
        raise ValueError("keep_sampling_mask must be False or None with rollout_server, which does not tell what it left, got True")
