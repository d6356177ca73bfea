from ..config import GRPOLossConfig
from ..outputs import LogProbs
from ..reference import grpo_loss as fused_linear_grpo_loss, hidden_to_logits, logps_from_logits
def linear_logprobs(hidden, weight, ids, *, mask=None, bias=None, lora=None, temperature=1.0, logit_scale=1.0, softcap=None):
    c = GRPOLossConfig(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    return LogProbs(*logps_from_logits(hidden_to_logits(hidden, weight, bias, lora), ids, mask, c))
