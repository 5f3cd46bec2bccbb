"""Makes expected.safetensors: loss and gradient of PEFT's context-aware prompt tuning on the base of ../peft, with
and without decay of the context's answers (peft 0.21.2, torch 2.15, transformers 5.23).   usage: python make.py"""
from pathlib import Path

import torch
from peft import CPTConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

HERE = Path(__file__).resolve().parent
BASE = HERE.parent / "peft" / "base"
CONTEXT = [5, 17, 9, 33, 60, 8, 21, 90, 14, 77]
# Two examples: template, input, template of the output, output of two tokens each time.
KINDS = [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]


def main():
    torch.set_num_threads(1)
    ids = load_file(BASE / "expected.safetensors")["input_ids"]
    labels = ids.clone()
    labels[:, 0] = -100
    delta = 0.002 * torch.randn((len(CONTEXT), 64), generator=torch.Generator().manual_seed(1))
    delta[[3, 4, 8, 9]] = 0.0
    out = {"input_ids": ids, "delta": delta}
    for kind, factor in [("none", 1.0), ("decay", 0.7)]:
        config = CPTConfig(
            task_type="CAUSAL_LM", cpt_token_ids=CONTEXT, cpt_mask=[1] * len(CONTEXT), cpt_tokens_type_mask=KINDS,
            opt_weighted_loss_type=kind, opt_loss_decay_factor=factor, opt_projection_epsilon=0.2, opt_projection_format_epsilon=0.2,
        )
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval(), config).eval()
        weight = model.prompt_encoder["default"].delta_embedding.weight
        weight.data = delta.clone()
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        assert torch.equal(weight.data, delta), "the bounds must not matter here"
        out[f"{kind}.loss"] = loss.detach().reshape(1)
        out[f"{kind}.gradient"] = weight.grad.clone()
        print(kind, loss.item(), weight.grad.abs().max().item())
    save_file(out, HERE / "expected.safetensors")


if __name__ == "__main__":
    main()
