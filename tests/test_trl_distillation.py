"""TRL's chunked divergence, stock and ours, and `trl.DistillationTrainer` stock and patched."""

import contextlib
import random
import sys

import pytest
import torch

trl = pytest.importorskip("trl")
divergence_module = pytest.importorskip("trl.kernels.chunked_divergence")

from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from support.cases import usually  # noqa: E402
from support.seeds import each_seed  # noqa: E402
from support.tiny_trainer import DATA, tiny_model, weights  # noqa: E402
from support.tolerance import assert_close, assert_no_worse_than_torch  # noqa: E402
from support.trl_runs import MODELS, assert_same, finish, saved  # noqa: E402
from trl.trainer import distillation_trainer  # noqa: E402

from grpo_kernels import reference  # noqa: E402
from grpo_kernels.integrations import trl as ours  # noqa: E402
from grpo_kernels.integrations.trl import FusedDivergenceFunction, is_patched, patch_trl, unpatch_trl  # noqa: E402
from grpo_kernels.trainer.demo import make_tokenizer  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

STOCK = divergence_module.ChunkedDivergenceFunction
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
LEAVES = ("hidden", "weight", "bias")


@pytest.fixture(autouse=True)
def unpatched():
    yield
    unpatch_trl()


@pytest.fixture
def stock_raises(monkeypatch):
    """From here on TRL's own chunked function must not run."""

    def refuse(*args):
        raise AssertionError("TRL's own chunked function was called")

    monkeypatch.setattr(STOCK, "forward", staticmethod(refuse))


# ---- the function


class Draw:
    """Random arguments of one call, by position as TRL passes them."""

    def __init__(self, seed, beta, dtype=torch.float32):
        rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
        N, D, E, V = rng.choice([1, 7, 33]), rng.choice([4, 16]), rng.choice([3, 24]), rng.choice([2, 37, 307])

        def normal(*shape, std=1.0):
            return (torch.randn(*shape, generator=g) * std).to(dtype)

        def bias():
            return normal(V) if rng.random() < 0.5 else None

        self.student = [normal(N, D), normal(V, D, std=2 * D**-0.5), bias()]
        self.teacher = [normal(N, E), normal(V, E, std=2 * E**-0.5), bias()]
        if seed % 7 == 0:
            self.teacher = [x if x is None else x + normal(*x.shape, std=1e-2) for x in self.student]
        options = [rng.choice(values) for values in ([1.0, 0.6, 2.0], [1.0, 1.0, 0.3, -1.2], [None, None, 4.0], [1.0, 1.7], [None, 9.0])]
        self.options = [beta, *options]
        self.needs = rng.choice([(True,) * 3, (True,) * 3, (True, False, False), (False, True, True)])
        self.g = torch.randn(N, generator=g) * (torch.rand(N, generator=g) < 0.8)

    def run(self, function, dtype=None, autocast=False):
        """[divergence, entropy, gradients of hidden, weight and bias]."""
        student = [x if x is None else x.to(dtype or x.dtype, copy=True).requires_grad_(n)
                   for x, n in zip(self.student, self.needs, strict=True)]  # fmt: skip
        teacher = [x if x is None else x.to(dtype or x.dtype) for x in self.teacher]
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            divergence, entropy = function(*student, *teacher, *self.options)
        assert not entropy.requires_grad and divergence.requires_grad
        (divergence * self.g.to(divergence.dtype)).sum().backward()
        return [divergence.detach(), entropy, *(x.grad for x in student if x is not None and x.requires_grad)]


def by_definition(h, w, b, th, tw, tb, beta, temperature, scale, softcap, teacher_scale, teacher_softcap):
    """Full logits of both."""

    def transformed(h, w, b, scale, softcap):
        z = (h @ w.T if b is None else h @ w.T + b) * scale
        return (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature

    z, y = transformed(h, w, b, scale, softcap), transformed(th, tw, tb, teacher_scale, teacher_softcap)
    z, y = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (z, y))
    kind = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd")
    lp = z.log_softmax(-1)
    return reference.divergence_from_logits(z, y, kind, beta), -(lp.exp() * lp).sum(-1).detach()


@pytest.mark.cover("beta")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta", BETAS)
def test_values_and_gradients(beta, dtype):
    """Rule 10, against full logits in the same dtype, of all draws together: TRL's products are float32 on a CPU always."""
    found = {}
    for seed in range(24):
        draw = Draw(seed, beta, dtype)
        results = [draw.run(f) for f in (STOCK.apply, FusedDivergenceFunction.apply, by_definition)]
        names = ["divergence", "entropy", *(n for n, x, need in zip(LEAVES, draw.student, draw.needs, strict=True) if need and x is not None)]
        for name, stock, mine, plain, truth in zip(names, *results, draw.run(by_definition, torch.float64), strict=True):
            assert stock.dtype == mine.dtype and stock.shape == mine.shape
            if dtype == torch.float32:
                assert_close(f"seed {seed} {name}", mine, stock, 1e-4, floor=1e-5)
            found.setdefault(name, []).append([x.double().flatten() for x in (mine, plain, truth)])
    floor = 5e-6 if dtype == torch.float32 else 4e-3  # p is exp(z - lse): it is off by eps lse, torch's by eps (z - max z)
    for name, parts in found.items():
        assert_no_worse_than_torch(name, *map(torch.cat, zip(*parts, strict=True)), floor=floor)
    assert found.keys() == {"divergence", "entropy", *LEAVES}


@pytest.mark.cover("beta")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@each_seed(0, 8, usual=2)
def test_autocast(seed, beta, dtype):
    draw = Draw(seed, beta, dtype)
    stock, mine = (draw.run(f.apply, autocast=True) for f in (STOCK, FusedDivergenceFunction))
    for i, (a, b) in enumerate(zip(stock, mine, strict=True)):
        assert a.dtype == b.dtype
        assert_close(f"result {i}", b, a, 2e-2, floor=1e-4)


@pytest.mark.cover("dtypes")
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtypes", ["student", "teacher", "heads", "biases"])
def test_dtypes_that_differ(dtypes, beta):
    """Master weights in float32 under hidden states in bfloat16, or a teacher in another dtype: products are in that of hidden."""
    which = dict(student=(0, 1, 2), teacher=(3, 4, 5), heads=(0, 3), biases=(0, 1, 3, 4))[dtypes]
    draw = Draw(1, beta)
    draw.needs = (True,) * 3
    tensors = [x if x is None or i not in which else x.bfloat16() for i, x in enumerate([*draw.student, *draw.teacher])]
    tensors[2] = torch.linspace(-1, 1, len(tensors[1])).to(torch.float32 if dtypes != "student" else torch.bfloat16)
    draw.student, draw.teacher = tensors[:3], tensors[3:]
    stock, mine = (draw.run(f.apply) for f in (STOCK, FusedDivergenceFunction))
    for i, (a, b) in enumerate(zip(stock, mine, strict=True)):
        assert a.dtype == b.dtype
        assert_close(f"result {i}", b, a, 1e-2, floor=1e-5)


def test_defaults_no_gradient_and_no_rows():
    draw = Draw(3, 0.5)
    for function in (STOCK.apply, FusedDivergenceFunction.apply):
        with torch.no_grad():
            plain = function(*draw.student, *draw.teacher, 0.5)
        assert not plain[0].requires_grad
        assert_close("defaults", plain[0], by_definition(*draw.student, *draw.teacher, 0.5, 1.0, 1.0, None, 1.0, None)[0], 1e-4)
        weight = draw.student[1].clone().requires_grad_()
        nothing = function(draw.student[0][:0], weight, None, draw.teacher[0][:0], *draw.teacher[1:], 0.5)
        nothing[0].sum().backward()
        assert nothing[0].shape == nothing[1].shape == (0,) and not weight.grad.any()


def test_a_divergence_that_is_not_used_trains_nothing():
    draw = Draw(3, 1.0)
    for function in (STOCK.apply, FusedDivergenceFunction.apply):
        hidden = draw.student[0].clone().requires_grad_()
        divergence, entropy = function(hidden, *draw.student[1:], *draw.teacher, 1.0)
        (entropy.sum() + 0 * hidden.sum()).backward()
        assert not hidden.grad.any() and divergence.requires_grad


def test_heads_of_zero3_are_gathered_and_live_until_the_backward(monkeypatch):
    """DeepSpeed's protocol: parameters are empty but inside of the context, and have a ds_id."""
    draw = Draw(1, 0.5)
    draw.student[2], draw.teacher[2] = torch.linspace(-1, 1, len(draw.student[1])), None
    plain = draw.run(FusedDivergenceFunction.apply)
    whole, seen = {}, []

    @contextlib.contextmanager
    def gathered(*parameters):
        parameters = [p for p in parameters if p is not None]
        for p in parameters:
            p.data = whole[id(p)]
        seen.append(len(parameters))
        yield
        for p in parameters:
            p.data = torch.empty(0)

    monkeypatch.setattr(ours.utils_module, "maybe_gather_lm_head_ctx", gathered)
    hidden, *head = (torch.nn.Parameter(x.clone()) for x in draw.student)
    teacher = torch.nn.Parameter(draw.teacher[1].clone())
    for i, p in enumerate((*head, teacher)):
        p.ds_id, whole[id(p)] = i, p.data
        p.accumulator = p.expand_as(p).grad_fn.next_functions[0][0]  # DeepSpeed makes it of the whole parameter, for its hooks
        p.found = []
        p.accumulator.register_prehook(lambda grads, p=p: p.found.append(grads[0]) or (None,))
        p.data = torch.empty(0)
    divergence, entropy = FusedDivergenceFunction.apply(hidden, *head, draw.teacher[0], teacher, None, *draw.options)
    assert seen == [2, 1] and not head[0].numel() and not teacher.numel()
    (divergence * draw.g).sum().backward()
    results = [divergence, entropy, hidden.grad, *(p.found[0] for p in head)]
    for ours_, expected in zip(results, plain, strict=True):
        assert torch.equal(ours_, expected)
    assert not teacher.found


# ---- the trainer


def distilled(folder, student, teacher, peft=None, evaluate=False, mixin=None, **options):
    """({name: [value of each log]}, weights after training) of a run."""
    defaults = dict(
        output_dir=str(folder / "out"), use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, max_steps=3,
        logging_steps=1, per_device_train_batch_size=4, max_completion_length=6, learning_rate=0.3, optim="sgd", max_grad_norm=0.0,
        gradient_checkpointing=False, seed=7, lr_scheduler_type="constant", generation_kwargs={"eos_token_id": [1, 3, 4, 5, 6]},
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": d["prompt"]} for d in DATA])
    kind = trl.DistillationTrainer if mixin is None else type("Mixed", (mixin, trl.DistillationTrainer), {})
    t = kind(model=student, teacher_model=teacher, args=trl.DistillationConfig(**{**defaults, **options}), train_dataset=data,
             eval_dataset=data.select(range(4)) if evaluate else None, processing_class=make_tokenizer(), peft_config=peft)  # fmt: skip
    return finish(t, evaluate)


class NothingOnce:
    """The second micro-batch has no token that counts."""

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        self.batches = getattr(self, "batches", 0) + 1
        return {**inputs, "completion_mask": inputs["completion_mask"] * (self.batches != 2)}


OPTIONS = {
    "forward": dict(beta=0.0),
    "reverse": dict(beta=1.0, temperature=0.7),
    "jsd": dict(beta=0.5, temperature=1.5),
    "accumulation": dict(beta=0.1, gradient_accumulation_steps=2, per_device_train_batch_size=2),
    "evaluation": dict(beta=0.9, evaluate=True, per_device_eval_batch_size=2, max_steps=2),
    "checkpointing": dict(beta=1.0, gradient_checkpointing=True),
    "lora": dict(beta=1.0, peft=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")),
    "autocast": dict(beta=0.5, bf16=True, tolerance=4e-3),
    "bfloat16 teacher": dict(beta=0.5, teacher_model_init_kwargs={"dtype": "bfloat16"}),
    "a batch without a token": dict(beta=1.0, mixin=NothingOnce),
}


@pytest.mark.parametrize("name", usually(OPTIONS, *list(OPTIONS)[::3]))
def test_stock_and_patched_runs_are_the_same(name, folder, request):
    options = dict(OPTIONS[name])
    tolerance = options.pop("tolerance", 2e-4)
    student, teacher = saved(folder), saved(folder, "teacher", seed=3, hidden_size=24, intermediate_size=48, num_hidden_layers=2, initializer_range=0.4)
    stock = distilled(folder, student, teacher, **options)
    request.getfixturevalue("stock_raises")
    patch_trl()
    assert_same(stock, distilled(folder, student, teacher, **options), tolerance)
    assert "peft" in options or (stock[1] - weights(tiny_model())).abs().max() > 1e-3
    assert stock[0]["loss"][0] > 0 and any("entropy" in key for key in stock[0])


@pytest.mark.parametrize("name", usually(["gemma", "granite", "cohere", "phi"], "gemma"))
def test_architectures(name, folder, request):
    """Softcap, logit scale, bias and tied heads, of the student and of the teacher."""
    model, llama = saved(folder, name, **MODELS[name]), saved(folder)
    for student, teacher, beta in ((model, llama, 0.5), (llama, model, 1.0)):
        with pytest.MonkeyPatch.context() as patch:
            stock = distilled(folder, student, teacher, beta=beta, max_steps=2)
            patch.setattr(STOCK, "forward", None)  # must not run
            patch_trl()
            assert_same(stock, distilled(folder, student, teacher, beta=beta, max_steps=2))
            unpatch_trl()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


# ---- patching


def holders():
    """(module, name) of every place in TRL that holds its function or ours."""
    held = (STOCK, FusedDivergenceFunction)
    modules = [(key, m) for key, m in sys.modules.items() if m is not None and (key == "trl" or key.startswith("trl."))]
    return {(key, name): value for key, m in modules for name, value in vars(m).items() if any(value is x for x in held)}


def test_every_place_is_patched_and_put_back():
    before = holders()
    compacts = getattr(distillation_trainer, "_use_triton", None)
    assert ("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction") in before and set(before.values()) == {STOCK}
    patch_trl()
    patch_trl()
    during = holders()
    assert is_patched() and during.keys() == before.keys() and set(during.values()) == {FusedDivergenceFunction}
    assert compacts is None or distillation_trainer._use_triton("any device")
    unpatch_trl()
    assert not is_patched() and holders() == before and getattr(distillation_trainer, "_use_triton", None) is compacts


def test_another_function_is_refused(monkeypatch):
    class Other(STOCK):
        @staticmethod
        def forward(ctx, student_hidden, teacher_hidden, alpha):
            pass

    monkeypatch.setattr(divergence_module, "ChunkedDivergenceFunction", Other)
    monkeypatch.setattr(ours, "_found_divergence", ours._arguments(divergence_module, "ChunkedDivergenceFunction"))
    with pytest.raises(RuntimeError, match=f"{trl.__version__}.*not one that grpo_kernels knows: ChunkedDivergenceFunction takes .*alpha"):
        patch_trl()
    assert not is_patched() and FusedDivergenceFunction not in holders().values()
    monkeypatch.delattr(divergence_module, "ChunkedDivergenceFunction")
    monkeypatch.setattr(ours, "_found_divergence", ours._arguments(divergence_module, "ChunkedDivergenceFunction"))
    with pytest.raises(RuntimeError, match="ChunkedDivergenceFunction is missing"):
        patch_trl()
    assert not is_patched()


def test_a_trl_without_the_function_is_patched_all_the_same(monkeypatch):
    monkeypatch.setattr(ours, "divergence_module", None)
    monkeypatch.setattr(ours, "distillation_module", None)
    patch_trl()
    assert is_patched() and set(holders().values()) == {STOCK}
