"""Makes golden numbers for `retune combine` with the real PEFT.

    python peft_combine.py FOLDER

Needs torch and peft (made with peft 0.21.2). Writes two tiny LoRA adapters of rank 2 and one of rank
3 on a model of two linear layers and an embedding, and for every combination of
`add_weighted_adapter` the changes of the weights it gives. DARE draws at random, and PEFT from
torch's stream: here `torch.bernoulli` is replaced by retune's own draws, so that both drop the same
entries and everything PEFT does with them is compared. FOLDER is
`crates/merge/tests/golden/combine` in the repository.
"""
import json, sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraModel
from safetensors.torch import save_file

SEED = 7

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

WORD = (1 << 64) - 1
GOLDEN_RATIO = 0x9E3779B97F4A7C15


def mix(x):
    """The finalizer of SplitMix64."""
    x = (x + GOLDEN_RATIO) & WORD
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & WORD
    return x ^ x >> 31


def uniform(seed, place, task, count):
    """The numbers `crates/merge/src/combine/rules.rs` draws for a tensor of a task."""
    state = mix(seed ^ GOLDEN_RATIO)
    for byte in place.encode():
        state = mix(state ^ byte)
    state = mix((state + task + 1) & WORD)
    return [(mix(state ^ (i * GOLDEN_RATIO & WORD)) >> 11) / 2.0**53 for i in range(count)]


class Draws:
    """Stands in for `torch.bernoulli` while one module's adapters are combined."""

    def __init__(self, seed):
        self.seed, self.module, self.num_tasks, self.num_drawn = seed, None, 1, 0

    def begin(self, module, num_tasks, factors):
        self.module, self.num_tasks, self.factors, self.num_drawn = module, num_tasks, factors, 0

    def __call__(self, chances):
        # Factor by factor and, of each, task by task.
        factor, task = divmod(self.num_drawn, self.num_tasks)
        self.num_drawn += 1
        place = f"base_model.model.{self.module}" + ("." + "ab"[factor] if self.factors else "")
        numbers = torch.tensor(uniform(self.seed, place, task, chances.numel()), dtype=torch.float64)
        # PEFT turns an embedding's change; retune draws for it as the factors multiply.
        turned = self.module == "table" and not self.factors
        numbers = numbers.reshape(chances.T.shape).T if turned else numbers.reshape(chances.shape)
        return (numbers < chances.double()).to(chances.dtype)


draws = Draws(SEED)
torch.bernoulli = draws
paths = {layer: path for path, layer in model.base_model.model.named_modules()}
for method, factors in [("_generalized_task_arithmetic_weighted_adapter", True), ("_svd_generalized_task_arithmetic_weighted_adapter", False)]:
    def told(self, *arguments, original=getattr(LoraModel, method), factors=factors, **named):
        adapters = arguments[1]
        target = next(argument for argument in [*arguments, *named.values()] if isinstance(argument, torch.nn.Module))
        known = [name for name in adapters if name in target.lora_A or name in target.lora_embedding_A]
        draws.begin(paths[target], len(known), factors)
        return original(self, *arguments, **named)

    setattr(LoraModel, method, told)

cases = []
for kind in ["linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd"]:
    density = None if kind in ("linear", "cat", "svd") else 1.0 if "dare" in kind else 0.5
    cases.append(dict(kind=kind, adapters=["a", "b"], weights=[0.7, -0.4], density=density, rank=None, majority_sign="total"))
cases += [
    dict(kind="cat", adapters=["a", "b", "c"], weights=[1.0, 0.5, -2.0], density=None, rank=None, majority_sign="total"),
    dict(kind="svd", adapters=["a", "c"], weights=[1.0, 0.5], density=None, rank=1, majority_sign="total"),
    dict(kind="ties", adapters=["a", "b"], weights=[0.6, 0.9], density=0.7, rank=None, majority_sign="frequency"),
    dict(kind="ties_svd", adapters=["a", "b", "c"], weights=[0.6, 0.9, 0.3], density=0.4, rank=4, majority_sign="frequency"),
    dict(kind="dare_linear", adapters=["a", "b"], weights=[0.7, -0.4], density=0.6, rank=None, majority_sign="total"),
    dict(kind="dare_ties", adapters=["a", "b"], weights=[0.7, 0.4], density=0.6, rank=None, majority_sign="frequency"),
    dict(kind="dare_linear_svd", adapters=["a", "b", "c"], weights=[0.7, -0.4, 1.2], density=0.3, rank=4, majority_sign="total"),
    dict(kind="dare_ties_svd", adapters=["a", "b", "c"], weights=[0.6, 0.9, 0.3], density=0.7, rank=4, majority_sign="total"),
]
for case in cases:
    case["seed"] = SEED
tensors = {}
for number, case in enumerate(cases):
    draws.num_drawn = 0
    model.base_model.add_weighted_adapter(
        case["adapters"], case["weights"], f"case{number}", combination_type=case["kind"],
        svd_rank=case["rank"], density=case["density"], majority_sign_method=case["majority_sign"],
    )
    drawn = draws.num_drawn
    assert (drawn > 0) == (case["density"] not in (None, 1.0) and "dare" in case["kind"]), (case, drawn)
    # With rsLoRA in the first adapter's configuration PEFT would scale the result once more.
    for module, layer in model.base_model.model.named_modules():
        if hasattr(layer, "get_delta_weight") and f"case{number}" in layer.scaling:
            delta = layer.get_delta_weight(f"case{number}")
            # [outputs, inputs], as the factors multiply; PEFT turns an embedding's.
            tensors[f"{number}.{module}"] = (delta.T if module == "table" else delta).detach().contiguous()
save_file(tensors, folder / "expected.safetensors")
(folder / "cases.json").write_text(json.dumps(cases, indent=1) + "\n")
