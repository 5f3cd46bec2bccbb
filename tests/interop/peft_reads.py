"""Checks that the real PEFT reads an adapter retune wrote, and computes the same logits.

    python peft_reads.py RETUNE_PROGRAM BASE_FOLDER ADAPTER_FOLDER

Needs torch, transformers, peft and safetensors (made with 2.15, 5.23, 0.21.2). Not part of CI: the
packages are large. Exit code 1 and the largest difference if the two disagree by more than 1e-4.
"""
import subprocess, sys, tempfile
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

program, base, adapter = sys.argv[1:4]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
generator = torch.Generator().manual_seed(0)
ids = torch.randint(model.config.vocab_size, (2, 24), generator=generator)
with torch.no_grad():
    plain = model(ids).logits
    tuned = PeftModel.from_pretrained(model, adapter).eval()
    expected = tuned(ids).logits
    merged = tuned.merge_and_unload()(ids).logits
with tempfile.TemporaryDirectory() as folder:
    inputs, outputs = Path(folder) / "ids.safetensors", Path(folder) / "logits.safetensors"
    save_file({"input_ids": ids}, inputs)
    subprocess.run([program, "logits", "--model", base, "--adapter", adapter, "--input-ids", inputs, "--output", outputs], check=True)
    found = load_file(outputs)["logits"]
moved = float((expected - plain).abs().max())
gap = float((expected - found).abs().max())
print(f"the adapter moves logits by up to {moved:.3g}; PEFT and retune differ by up to {gap:.3g}; PEFT merged by up to {float((expected - merged).abs().max()):.3g}")
sys.exit(not (moved > 1e-3 and gap < 1e-4))
