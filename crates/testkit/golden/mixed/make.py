"""Makes this pack: what PEFT's PeftMixedModel computes with several adapters of `../peft` at once.

Made with peft 0.21.2, torch 2.15, transformers 5.23, float32, CPU.   usage: python make.py
"""
from pathlib import Path

import torch
from peft import PeftMixedModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

HERE = Path(__file__).resolve().parent
PEFT = HERE.parent / "peft"

# The first acts on the base, each next one on what those before it left.
STACKS = [
    ["lora", "loha"],
    ["shira", "lora"],
    ["shira", "lokr"],
    ["lora", "oft"],
    ["lora", "oft", "loha"],
    ["adalora", "lokr"],
]


def base():
    return AutoModelForCausalLM.from_pretrained(PEFT / "base", dtype=torch.float32).eval()


def main():
    torch.set_num_threads(1)
    ids = load_file(PEFT / "base" / "expected.safetensors")["input_ids"]
    out = {"input_ids": ids}
    before = base().state_dict()
    for stack in STACKS:
        key = "+".join(stack)
        model = PeftMixedModel.from_pretrained(base(), PEFT / stack[0], adapter_name=stack[0])
        for name in stack[1:]:
            model.load_adapter(PEFT / name, adapter_name=name)
        model.set_adapter(stack)
        model.eval()
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        out[f"{key}.logits"] = logits.contiguous()
        merged = model.merge_and_unload().eval()
        with torch.no_grad():
            again = merged(input_ids=ids).logits
        state = merged.state_dict()
        moved = float((again - logits).abs().max())
        print(key, "merging moves the logits by", moved)
        # PEFT merges three nested layers in another order than it runs them.
        if moved < 1e-5:
            weight = "model.layers.1.self_attn.v_proj.weight"
            assert not torch.equal(state[weight], before[weight]), key
            out[f"{key}.merged.{weight}"] = state[weight].contiguous()
    save_file(out, HERE / "expected.safetensors")


if __name__ == "__main__":
    main()
