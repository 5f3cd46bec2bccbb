"""Four AdapterHub adapters over the tiny BERT of golden/training, and what the library's equations make of them.

The equations are written down here over transformers' own BERT (transformers 5.23, torch 2.15); the folders have the
library's file names, keys and configuration tables (adapters 1.2).   usage: python make.py"""
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

HERE = Path(__file__).resolve().parent
BASE = HERE.parent / "training/bert/base"
ACT = {"relu": torch.relu, "swish": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}
COMMON = dict(residual_before_ln=True, adapter_residual_before_ln=False, original_ln_after=True, ln_before=False, ln_after=False,
              inv_adapter=None, cross_adapter=False, leave_out=[], phm_layer=False, use_gating=False, init_weights="bert", dropout=0.0)
CASES = {
    "seq_bn": dict(COMMON, mh_adapter=False, output_adapter=True, is_parallel=False, original_ln_before=True, non_linearity="relu", reduction_factor=16, scaling=1.0),
    "double_seq_bn": dict(COMMON, mh_adapter=True, output_adapter=True, is_parallel=False, original_ln_before=False, non_linearity="swish", reduction_factor=16, scaling=1.0),
    "par_bn": dict(COMMON, mh_adapter=False, output_adapter=True, is_parallel=True, original_ln_before=False, non_linearity="relu", reduction_factor=2, scaling=4.0),
    # Kronecker products instead of matrices, with small factors that all layers share.
    "compacter": dict(COMMON, mh_adapter=True, output_adapter=True, is_parallel=False, original_ln_before=False, non_linearity="gelu", reduction_factor=8, scaling=1.0,
                      phm_layer=True, phm_dim=4, factorized_phm_W=True, shared_W_phm=False, shared_phm_rule=True, factorized_phm_rule=False, phm_c_init="normal",
                      phm_init_range=0.0001, learn_phm=True, hypercomplex_nonlinearity="glorot-uniform", phm_rank=2, phm_bias=True),
}

def wrap(output, tensors, key, config):
    t = lambda part: tensors[f"{key}.adapters.task.{part}"]
    def linear(x, part):
        if not config["phm_layer"]:
            return x @ t(f"{part}.weight").T + t(f"{part}.bias")
        terms = zip(tensors["bert.shared_parameters.task.phm_rule"], t(f"{part}.W_left"), t(f"{part}.W_right"))
        return x @ sum(torch.kron(rule, left @ right) for rule, left, right in terms) + t(f"{part}.b")
    def adapter(x):
        return config["scaling"] * linear(ACT[config["non_linearity"]](linear(x, "adapter_down.0")), "adapter_up")
    def forward(hidden_states, input_tensor):
        h = output.dense(hidden_states)
        if config["is_parallel"]:
            h = h + adapter(input_tensor)
        elif config["original_ln_before"]:
            h = h + adapter(output.LayerNorm(h + input_tensor))
        else:
            h = h + adapter(h)
        return output.LayerNorm(h + input_tensor)
    output.forward = forward

ids = torch.randint(1, 128, (2, 7), generator=torch.Generator().manual_seed(7))
for number, (name, config) in enumerate(CASES.items()):
    model = AutoModelForSequenceClassification.from_pretrained(BASE, dtype=torch.float32).eval()
    g = torch.Generator().manual_seed(500 + number)
    tensors, width = {}, 64
    size = width // config["reduction_factor"]
    for layer, block in enumerate(model.bert.encoder.layer):
        places = [("output", block.output)] + [("attention.output", block.attention.output)] * config["mh_adapter"]
        for place, output in places:
            key = f"bert.encoder.layer.{layer}.{place}"
            n, rank = config.get("phm_dim", 1), config.get("phm_rank", 1)
            if config["phm_layer"]:
                parts = [(f"{part}.{end}", shape) for part, (i, o) in (("adapter_down.0", (width, size)), ("adapter_up", (size, width)))
                         for end, shape in (("W_left", (n, i // n, rank)), ("W_right", (n, rank, o // n)), ("b", (o,)))]
                if "bert.shared_parameters.task.phm_rule" not in tensors:
                    tensors["bert.shared_parameters.task.phm_rule"] = 0.5 * torch.randn((n, n, n), generator=g)
            else:
                parts = [("adapter_down.0.weight", (size, width)), ("adapter_down.0.bias", (size,)), ("adapter_up.weight", (width, size)), ("adapter_up.bias", (width,))]
            for part, shape in parts:
                tensors[f"{key}.adapters.task.{part}"] = 0.3 * torch.randn(shape, generator=g)
            wrap(output, tensors, key, config)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    whole = {"config": config, "hidden_size": width, "model_class": "BertForSequenceClassification", "model_name": None, "model_type": "bert", "name": "task", "version": "adapters.1.2.0"}
    (folder / "adapter_config.json").write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n")
    save_file(tensors, folder / "adapter.safetensors")
    save_file({"input_ids": ids, "logits": logits}, folder / "expected.safetensors")
    base = AutoModelForSequenceClassification.from_pretrained(BASE, dtype=torch.float32).eval()
    with torch.no_grad():
        print(name, (logits - base(input_ids=ids).logits).abs().max().item())
