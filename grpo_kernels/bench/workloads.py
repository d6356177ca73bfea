"""What is asked for, and the distributions it is drawn from. Every number here is a choice; this is where they are written down.

Batch of `realistic`: groups of G = 8 completions of one prompt. The prompt's pass rate is drawn from Beta(1/2, 1/2), each
completion is right with that probability, and the rewards are 0 or 1: in expectation 39 % of the groups then have no variance,
so that their advantages are 0. Prompts take a log-normal share of the row (median 0.2, sigma 0.5, at most 0.5), completions a
log-normal one (median 0.3, sigma 0.7), cut at the end of the row. Prompt and padding are masked. Pass rates and lengths are
drawn from equal slices of their distribution, one draw each, so that a batch of eight groups already looks like it.

All others keep every token, with advantages that are not 0: the case least favourable to a library that skips work.

Logits: a fifth of the rows are forks, where four tokens share most of the probability; on three in ten one token has odds of
e^3 to e^7 against all others, on the remaining half odds of e^6 to e^12: most tokens of a trained model are nearly certain
(Wang et al. 2025, "Beyond the 80/20 rule": over half of the entropies below 0.01, a fifth above 0.67; ours: half below 0.05, a
fifth above 0.7, the noise of a random head having a heavier tail). Under that lies noise of standard deviation 1 to 2.

Ratios: old log-probs are the policy's own minus the logarithm of a ratio drawn from three bands, below, inside and above the
clip range and further from its bounds than bf16 logits can move them. Fresh random old log-probs would clip every token and
let a gradient of zeros pass.

Supports: every position of `support`, `support-frozen` and `support-logprobs` has the tokens that a sampler's top-p would have
left. 46 % have one token, the others a log-normal number (median 6.5, sigma 1.2, rounded up) of at least two: 8 in the mean, 2 in
the median, 99 % below 82, as samplers have published (45 to 48 % single). The fewest tokens go to rows with one candidate that was
sampled, the most to the forks. A support holds the sampled token, then the candidates of its row, then tokens drawn from the whole
vocabulary: hardly one is named twice, where a language has its frequent ones, so that dW has as many rows as it can have.

Teacher: `divergence` has a second head of the same depth. Its likely tokens are the student's, with odds drawn again; its noise is
its own. So the two agree as a student late in its training does with a larger model: its KL is a few tenths of a nat in the mean.
"""

import math
from dataclasses import dataclass, replace

import torch

from ..losses.advantages import group_advantages
from ..losses.config import GRPOLossConfig

GROUP = 8
PROMPT_SHARE, COMPLETION_SHARE = (0.2, 0.5), (0.3, 0.7)  # median and sigma of a log-normal
LONGEST_PROMPT = 0.5
SHORTEST = 32  # tokens of a row
BELOW, INSIDE, ABOVE = (0.35, 0.7), (0.92, 1.08), (1.4, 1.8)
FORKS, LIKELY = 0.2, 0.3  # shares of rows; the rest is nearly certain
FORK_TOKENS = 4
SINGLE, SUPPORT = 0.46, (6.5, 1.2)  # share of supports of one token; median and sigma of the log-normal sizes of the others
ODDS = {"fork": (2, 4), "likely": (3, 7), "certain": (6, 12)}  # logarithm of the candidates' odds against all other tokens


@dataclass(frozen=True)
class Workload:
    name: str
    about: str = ""
    realistic: bool = False  # lengths, prompts and advantages as above
    trains_head: bool = True
    gradients: bool = True  # False: log-probs only, under no_grad
    level: str = "token"
    quantile: float = 1.0  # of the entropy: tokens below it are not trained
    off_policy: bool = True
    beta: float = 0.0
    supports: bool = False  # every position has one
    teacher: bool = False  # a second head; the loss is the mean reverse KL to it

    def config(self):
        options = {"importance_sampling_level": self.level, "top_entropy_quantile": self.quantile, "beta": self.beta}
        return GRPOLossConfig(loss_type="dapo", **options)

    def laid_out(self, shape):
        """The shape with as many sequences as this workload has; the tokens stay."""
        if not self.realistic:
            return shape
        # short rows have no lengths to speak of
        able = [n for n in (8, 4, 2) if shape.tokens % (GROUP * n) == 0 and shape.tokens // (GROUP * n) >= SHORTEST]
        groups = able[0] if able else 1
        return replace(shape, sequences=GROUP * groups, length=max(1, shape.tokens // (GROUP * groups)))


WORKLOADS = {
    w.name: w
    for w in (
        # those on the same data one after the other: they share their float64 truth
        Workload("dense", "all tokens kept, all advantages nonzero"),
        Workload("frozen", "dense, the head is frozen", trains_head=False),
        Workload("logprobs", "log-probs only, no gradient", gradients=False),
        Workload("support", "dense over supports: the tokens that sampling left", supports=True),
        Workload("support-frozen", "support, the head is frozen", supports=True, trains_head=False),
        Workload("support-logprobs", "log-probs only over supports, no gradient", supports=True, gradients=False),
        Workload("realistic", "prompts, lengths and groups without variance as drawn", realistic=True),
        Workload("kl", "dense, a KL to a reference that the check would miss", beta=0.5),
        Workload("sequence", "dense, ratio per sequence", level="sequence"),
        Workload("entropy", "dense, the fifth of highest entropy is trained", quantile=0.2),
        Workload("onpolicy", "dense, one step per rollout: no old log-probs", off_policy=False),
        Workload("divergence", "the reverse KL to a teacher of the same depth, all tokens kept", teacher=True, off_policy=False),
    )
}


def over_the_vocabulary(name):
    """The workload that is the same but for the supports of ``name``; None if that has none."""
    asked = WORKLOADS.get(name)  # an older record has others
    if asked is None or not asked.supports:
        return None
    options = lambda w: replace(w, name="", about="", supports=False)  # noqa: E731
    return next(w.name for w in WORKLOADS.values() if not w.supports and options(w) == options(asked))


def draw_batch(workload, B, T, g):
    """(mask [B, T] bool, advantages [B])."""
    if not workload.realistic:
        positive = torch.arange(B) % 4 < 2
        return torch.ones(B, T, dtype=torch.bool), (0.5 + torch.rand(B, generator=g)) * torch.where(positive, 1.0, -1.0)
    groups = B // GROUP
    prompt = (log_normal(groups, *PROMPT_SHARE, g).clamp(max=LONGEST_PROMPT) * T).long().repeat_interleave(GROUP)
    completion = (log_normal(B, *COMPLETION_SHARE, g) * T).ceil().long()
    position = torch.arange(T)
    mask = (position >= prompt.unsqueeze(1)) & (position < (prompt + completion).unsqueeze(1))
    advantages = torch.zeros(B)
    while not advantages.any():  # few groups can all be without variance: a batch that trains nothing is drawn again
        rewards = (torch.rand(B, generator=g) < pass_rates(groups, g).repeat_interleave(GROUP)).float()
        advantages = group_advantages(rewards, torch.arange(B) // GROUP)
    return mask, advantages


def support_sizes(count, vocab, g):
    """[count] int64, ascending."""
    single = round(SINGLE * count)
    sizes = log_normal(count - single, *SUPPORT, g).ceil().long().clamp(min(2, vocab), vocab)
    return torch.cat([torch.ones(single, dtype=torch.int64), sizes.sort().values])


def pass_rates(count, g):
    """Beta(1/2, 1/2): the arcsine distribution, whose quantile function is sin^2(pi u / 2)."""
    return (sliced(count, g) * math.pi / 2).sin().square()


def log_normal(count, median, sigma, g):
    return median * (sigma * torch.special.ndtri(sliced(count, g).double())).exp().float()


def sliced(count, g):
    """One uniform number from each of ``count`` equal slices of (0, 1), in random order."""
    u = (torch.randperm(count, generator=g) + torch.rand(count, generator=g)) / count
    return u.clamp(1e-6, 1 - 1e-6)


def draw_log_ratios(level, advantages, T, g):
    """[B, T] logarithms of new over old probability.

    Token level: eight tokens in ten inside the clip range, one below, one above, whatever the advantage. Sequence level: off
    policy on the side where clipping keeps the gradient, since a clipped sequence is work that may be skipped.
    """
    B = advantages.shape[0]

    def drawn(bands):
        low, high = torch.tensor(bands).log().unbind(-1)
        return low + (high - low) * torch.rand(low.shape, generator=g)

    if level == "token":
        choice = torch.randint(0, 10, (B, T), generator=g)
        return drawn([[BELOW if c == 0 else ABOVE if c == 1 else INSIDE for c in row] for row in choice.tolist()])
    outer = [[(BELOW if a > 0 else ABOVE) if b % 2 else INSIDE] for b, a in enumerate(advantages.tolist())]
    noise = 0.1 * torch.randn(B, T, generator=g)
    return drawn(outer) + noise - noise.mean(1, keepdim=True)
