"""Makes golden numbers for `retune combine` with the real PEFT.

    python peft_combine.py FOLDER

Needs torch and peft (made with peft 0.21.2). Writes two tiny LoRA adapters of rank 2 and one of rank
3 on a model of two linear layers and an embedding, and for every combination of
`add_weighted_adapter` the changes of the weights it gives. DARE is made with density 1, where it
draws nothing. FOLDER is `crates/merge/tests/golden/combine` in the repository.
"""
import json, sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(7, 6)
        self.up = torch.nn.Linear(6, 9, bias=False)
        self.down = torch.nn.Linear(9, 5, bias=False)

    def forward(self, ids):
        return self.down(self.up(self.table(ids)))


torch.manual_seed(0)
everything = ["table", "up", "down"]
# c lacks one module and has another rank; b has another scale.
configs = {
    "a": LoraConfig(r=2, lora_alpha=4, target_modules=everything),
    "b": LoraConfig(r=2, lora_alpha=3, target_modules=everything, use_rslora=True),
    "c": LoraConfig(r=3, lora_alpha=3, target_modules=["up", "down"]),
}
model = get_peft_model(Model(), configs["a"], adapter_name="a")
for name in ["b", "c"]:
    model.add_adapter(name, configs[name])
for name, parameter in model.named_parameters():
    if "lora_" in name:
        torch.nn.init.normal_(parameter, std=0.5)
for name in configs:
    model.save_pretrained(folder, selected_adapters=[name])

cases = []
for kind in ["linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd"]:
    density = None if kind in ("linear", "cat", "svd") else 1.0 if "dare" in kind else 0.5
    cases.append(dict(kind=kind, adapters=["a", "b"], weights=[0.7, -0.4], density=density, rank=None, majority_sign="total"))
cases += [
    dict(kind="cat", adapters=["a", "b", "c"], weights=[1.0, 0.5, -2.0], density=None, rank=None, majority_sign="total"),
    dict(kind="svd", adapters=["a", "c"], weights=[1.0, 0.5], density=None, rank=1, majority_sign="total"),
    dict(kind="ties", adapters=["a", "b"], weights=[0.6, 0.9], density=0.7, rank=None, majority_sign="frequency"),
    dict(kind="ties_svd", adapters=["a", "b", "c"], weights=[0.6, 0.9, 0.3], density=0.4, rank=4, majority_sign="frequency"),
]
tensors = {}
for number, case in enumerate(cases):
    model.base_model.add_weighted_adapter(
        case["adapters"], case["weights"], f"case{number}", combination_type=case["kind"],
        svd_rank=case["rank"], density=case["density"], majority_sign_method=case["majority_sign"],
    )
    # With rsLoRA in the first adapter's configuration PEFT would scale the result once more.
    for module, layer in model.base_model.model.named_modules():
        if hasattr(layer, "get_delta_weight") and f"case{number}" in layer.scaling:
            delta = layer.get_delta_weight(f"case{number}")
            # [outputs, inputs], as the factors multiply; PEFT turns an embedding's.
            tensors[f"{number}.{module}"] = (delta.T if module == "table" else delta).detach().contiguous()
save_file(tensors, folder / "expected.safetensors")
(folder / "cases.json").write_text(json.dumps(cases, indent=1) + "\n")
