"""TRL's GRPO trainer with the fused loss: the import is all that changes.

    python examples/trl_grpo.py                          a tiny random model and tokenizer, some seconds on a laptop
    python examples/trl_grpo.py --model PATH             a causal LM with its tokenizer
    python examples/trl_grpo.py --trainer stock          TRL's own, for comparison: the same figures

Needs TRL 1.15 or newer.
"""

import argparse
import tempfile

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import GRPOConfig, GRPOTrainer

from grpo_kernels.integrations.trl import FusedGRPOTrainer, patch_trl


def tiny_model(folder):
    """A random Llama over single characters, saved with its tokenizer."""
    characters = ["<pad>", "</s>", *"0123456789+= "]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    config = LlamaConfig(vocab_size=len(characters), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, pad_token_id=0, bos_token_id=None, eos_token_id=1)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def evens(completions, **_):
    return [sum(c in "02468" for c in text) / max(len(text), 1) for text in completions]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--trainer", choices=["fused", "patched", "stock"], default="fused")
    parser.add_argument("--max_steps", type=int, default=20)
    args = parser.parse_args()
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, max_steps=args.max_steps, per_device_train_batch_size=32, num_generations=8, num_iterations=2,
            max_completion_length=12, beta=0.01, learning_rate=3e-3, logging_steps=2, save_strategy="no", report_to="none",
            bf16=False, disable_tqdm=True,
        )  # fmt: skip
        if args.trainer == "patched":
            patch_trl()  # every TRL trainer from here on
        trainer = (FusedGRPOTrainer if args.trainer == "fused" else GRPOTrainer)(
            model=args.model or tiny_model(folder),
            reward_funcs=evens,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(8) for b in range(8)]),
        )
        trainer.train()
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    print(f"{args.trainer}: reward {rewards[0]:.3f} -> {rewards[-1]:.3f}")
    return rewards


if __name__ == "__main__":
    main()
