"""Makes this pack: prompts and prefixes of PEFT on a tiny T5, and what PEFT computes with them.

Made with peft 0.21.2, torch 2.15, transformers 5.23, float32, CPU.   usage: python make.py
"""
import json
import shutil
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import save_file
from transformers import T5Config, T5ForConditionalGeneration

HERE = Path(__file__).resolve().parent
TASK = {"task_type": "SEQ_2_SEQ_LM"}
CASES = {
    # PEFT's default for this task saves as many rows again as it reads.
    "prompt_tuning": PromptTuningConfig(**TASK, num_virtual_tokens=3),
    "prompt_tuning_one": PromptTuningConfig(
        **TASK, num_virtual_tokens=3, num_transformer_submodules=1
    ),
    "p_tuning": PromptEncoderConfig(**TASK, num_virtual_tokens=3, encoder_hidden_size=8),
    "mpt_one": MultitaskPromptTuningConfig(
        **TASK, num_virtual_tokens=3, num_tasks=2, num_transformer_submodules=1
    ),
    "prefix_tuning": PrefixTuningConfig(**TASK, num_virtual_tokens=3),
    "lora": LoraConfig(**TASK, r=2, lora_alpha=4, target_modules=["q", "v"]),
}


def base():
    return T5ForConditionalGeneration.from_pretrained(HERE / "base", dtype=torch.float32).eval()


def stir(tensor):
    return tensor + 0.2 * torch.randn(tensor.shape)


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=24, d_model=16, d_kv=8, d_ff=20, num_heads=2, num_layers=4,
        relative_attention_num_buckets=8, relative_attention_max_distance=12,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )
    model = T5ForConditionalGeneration(config)
    for name, tensor in model.named_parameters():
        # Scores are not divided by the root of the width, so the weights of a real T5 are small.
        tensor.data = 0.3 * torch.randn(tensor.shape) + (1.0 if "layer_norm" in name else 0.0)
    model.save_pretrained(HERE / "base")
    (HERE / "base" / "generation_config.json").unlink(missing_ok=True)

    sources = torch.randint(2, 24, (2, 6))
    targets = torch.randint(2, 24, (2, 5))
    inputs = {"input_ids": sources, "labels": targets}
    start = torch.zeros((2, 1), dtype=torch.long)
    written = torch.cat([start, targets[:, :-1]], dim=1)
    out = {"input_ids": sources, "decoder_input_ids": written}
    with torch.no_grad():
        before = base()(**inputs).logits
    out["base"] = before
    for case, config in CASES.items():
        torch.manual_seed(1)
        model = get_peft_model(base(), config).eval()
        for tensor in model.parameters():
            if tensor.requires_grad:
                tensor.data = stir(tensor.data)
        tasks = {"task_ids": torch.tensor([0, 1])} if case == "mpt_one" else {}
        shutil.rmtree(HERE / case, ignore_errors=True)
        model.save_pretrained(HERE / case)
        (HERE / case / "README.md").unlink()
        path = HERE / case / "adapter_config.json"
        saved = json.loads(path.read_text())
        saved["base_model_name_or_path"] = None
        saved["target_modules"] = sorted(saved["target_modules"]) if "r" in saved else None
        if saved["target_modules"] is None:
            del saved["target_modules"]
        path.write_text(json.dumps(saved, indent=2, sort_keys=True))
        model = PeftModel.from_pretrained(base(), HERE / case).eval()
        with torch.no_grad():
            logits = model(**inputs, **tasks).logits
        out[case] = logits.contiguous()
        moved = float((logits - before).abs().max())
        print(case, "moves the logits by", moved)
        assert moved > 1e-2, case
    save_file(out, HERE / "expected.safetensors")


if __name__ == "__main__":
    main()
