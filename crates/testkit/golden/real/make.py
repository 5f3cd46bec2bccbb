"""Makes `<name>.safetensors`: what transformers computes with a real model.

    python make.py NAME FILE.gguf|FOLDER        needs torch 2.15, transformers 5.23, gguf 0.19, accelerate; CPU, float32

A GGUF file is dequantised by transformers itself. The text is our own. Every file holds `input_ids` I64 [1, T], as the model's own
tokenizer gives them. A GGUF file's has `losses` F32 [T - 1], the cross-entropy of each token after the first; a folder's (an
encoder) `embeddings` F32 [1, width], the mean over its tokens scaled to length 1.
"""
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

TEXT = ("The river rises in the hills behind the town, runs past the old mill and the school, "
        "and reaches the sea after nearly forty miles of quiet farmland.")

name, path = sys.argv[1], Path(sys.argv[2])
transformers.utils.logging.disable_progress_bar()
settings = dict(dtype=torch.float32, attn_implementation="eager")
if path.suffix == ".gguf":
    ids = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)(TEXT, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **settings).eval()
    with torch.no_grad():
        logits = model(ids).logits[0, :-1]
    out = {"losses": torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")}
    print(name, ids.shape[1], "tokens, mean loss", float(out["losses"].mean()))
else:
    ids = AutoTokenizer.from_pretrained(path)(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        states = AutoModel.from_pretrained(path, **settings).eval()(ids).last_hidden_state
    out = {"embeddings": torch.nn.functional.normalize(states.mean(1), dim=1)}
    print(name, ids.shape[1], "tokens")
save_file({"input_ids": ids, **out}, Path(__file__).parent / f"{name}.safetensors")
