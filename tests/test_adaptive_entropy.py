"""The coefficient of the entropy bonus that follows the entropy: TRL's rule, by TRL's own statements, and a resumed run."""

import ast
import inspect
import math
import textwrap
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_trainer import trainer, weights

from grpo_kernels.trainer.entropy import AdaptiveEntropy

pytestmark = pytest.mark.usefixtures("one_thread")


def adaptive(folder, **options):
    return trainer(folder, use_adaptive_entropy=True, **options)


def their_statement():
    """The statement of TRL's `_compute_loss`, as installed, that moves the coefficient."""
    source = inspect.getsource(pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer._compute_loss)
    found = [node for node in ast.walk(ast.parse(textwrap.dedent(source))) if isinstance(node, ast.If)]
    (branch,) = [node for node in found if ast.unparse(node.test) == "self.use_adaptive_entropy and mode == 'train'"]
    return compile(ast.Module([branch], []), "trl", "exec")


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), parts=st.integers(1, 3), target=st.sampled_from([0.3, 0.5, 5.0]),
       delta=st.sampled_from([0.0, 0.1, 0.4]))  # fmt: skip
def test_the_rule_is_trls(seed, parts, target, delta):
    g = torch.Generator().manual_seed(seed)
    limits = dict(entropy_coef_min=-0.05, entropy_coef_max=0.5, entropy_coef_delta=delta, entropy_target=target)
    accelerator = SimpleNamespace(sync_gradients=False, reduce=lambda x, reduction: x)
    recorded = []
    ours = SimpleNamespace(
        args=SimpleNamespace(**limits), accelerator=accelerator, _coefficient=0.1, _last_entropy=math.inf, _window=None,
        loss_config=SimpleNamespace(top_entropy_quantile=1.0),
        _metrics={"train": SimpleNamespace(record=lambda metrics, weight: recorded.append(metrics["entropy_coef"].item()))},
    )  # fmt: skip
    theirs = SimpleNamespace(args=ours.args, accelerator=accelerator, entropy_coef=0.1, _last_world_entropy=math.inf,
                             _entropy_window_stats=None, use_adaptive_entropy=True)  # fmt: skip
    statement = their_statement()
    for i in range(4 * parts):
        accelerator.sync_gradients = i % parts == parts - 1
        entropy, mask = torch.rand(3, 4, generator=g, dtype=torch.float64), torch.rand(3, 4, generator=g) < 0.6
        sums = AdaptiveEntropy._entropy_and_tokens(ours, entropy, mask)
        ours._window = sums if ours._window is None else ours._window + sums
        if accelerator.sync_gradients:
            AdaptiveEntropy._move(ours)
        exec(statement, dict(self=theirs, mode="train", torch=torch, entropies=entropy, effective_mask=mask.double()))
        assert ours._coefficient == theirs.entropy_coef and math.isclose(ours._last_entropy, theirs._last_world_entropy, rel_tol=1e-12)
    assert len(recorded) == 4


def test_the_bonus_is_applied_after_a_step_below_the_target(tmp_path):
    """A run whose entropy is below the target moves up, and its weights are those of a run without bonus but for the steps after."""
    runs = {}
    for target in (0.0, 100.0):
        t = adaptive(tmp_path / str(target), entropy_target=target, entropy_coef=0.5, entropy_coef_delta=0.25, max_steps=1)
        t.train()
        runs[target] = weights(t.model)
    assert torch.equal(runs[0.0], runs[100.0]), "no bonus before an entropy was measured"
    t = adaptive(tmp_path / "more", entropy_target=100.0, entropy_coef=0.5, entropy_coef_delta=0.25, max_steps=3, gradient_accumulation_steps=2,
                 per_device_train_batch_size=4)  # fmt: skip
    t.train()
    assert [log["entropy_coef"] for log in t.state.log_history if "entropy_coef" in log] == [0.75, 1.0, 1.0]
    assert t.loss_config.entropy_coef == 1.0 and t._last_entropy < 100
    low = adaptive(tmp_path / "low", entropy_target=0.0, entropy_coef=0.5, entropy_coef_delta=0.25, max_steps=3)
    low.train()
    assert [log["entropy_coef"] for log in low.state.log_history if "entropy_coef" in log] == [0.25, 0.0, 0.0]
    assert low.loss_config.entropy_coef == 0.0


@pytest.mark.parametrize("quantile", [1.0, 0.5])
def test_a_resumed_run_ends_in_the_same_weights(tmp_path, quantile):
    options = dict(entropy_target=100.0, entropy_coef=0.1, max_steps=4, save_strategy="steps", save_steps=2, top_entropy_quantile=quantile)
    whole = adaptive(tmp_path, **options)
    whole.train()
    again = adaptive(tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again._coefficient == whole._coefficient == pytest.approx(0.12)
    assert torch.equal(weights(again.model), weights(whole.model))


@pytest.mark.parametrize("options, named", [(dict(entropy_coef_min=2.0), "entropy_coef_min must be at most entropy_coef_max, 1.0, got 2.0"),
                                            (dict(entropy_coef_delta=-0.1), "entropy_coef_delta must be >= 0, got -0.1"),
                                            (dict(entropy_target=math.nan), "entropy_target must be a finite number, got nan")])  # fmt: skip
def test_wrong_options_are_named(tmp_path, options, named):
    with pytest.raises(ValueError, match=named):
        adaptive(tmp_path, **options)


def test_it_is_off_by_default(tmp_path):
    t = trainer(tmp_path, max_steps=2, logging_steps=1, entropy_coef=0.25)
    t.train()
    assert t.loss_config.entropy_coef == 0.25 and not any("entropy_coef" in log for log in t.state.log_history)
