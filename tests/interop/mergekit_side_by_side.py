"""Merges the same plans with mergekit and with retune, and compares values and seconds.

    python mergekit_side_by_side.py MERGEKIT_YAML RETUNE_PROGRAM FOLDER [METHOD ...]

FOLDER holds four models of one architecture: `base`, `a`, `b`, `c` (such as
crates/merge/tests/golden/mergekit; without `base`, `a` is the base). Needs safetensors and torch;
made with mergekit 0.1.5, torch 2.15.0, transformers 5.23.0. Not part of CI: the packages are large.
Exit code 1 if a value differs by more than 1e-6 in F32 (one step of the type else). Of
`arcee_fusion` one value in a thousand may: mergekit finds importances in F32, so that a few values
fall on the other side of the bar.
"""
import subprocess, sys, tempfile, time
from pathlib import Path

import torch
from safetensors import safe_open

mergekit, program, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3]).resolve()
base = folder / "base" if (folder / "base").is_dir() else folder / "a"
a, b, c = (folder / name for name in "abc")


def plan(method, models, own="", shared="", base=base):
    lines = [f"merge_method: {method}"] + ([f"base_model: {base}"] if base else []) + ["models:"]
    for model in models:
        lines += [f"- model: {model}"] + ([f"  parameters: {{{own}}}"] if own and model != base else [])
    return "\n".join(lines + ([f"parameters: {{{shared}}}"] if shared else [])) + "\n"


def band(density):
    return f"weight: 0.5, density: {density}, gamma: 0.05"


PLANS = {
    "linear": plan("linear", [a, b, c], "weight: 0.4", base=None),
    "slerp": plan("slerp", [b, c], shared="t: [0.2, 0.7]", base=b),
    "nuslerp": plan("nuslerp", [b, c], "weight: 0.3", base=None),
    "nuslerp of changes": plan("nuslerp", [b, c], "weight: 0.3"),
    "nuslerp by row": plan("nuslerp", [b, c], "weight: 0.3", "nuslerp_flatten: false", base=None),
    "nuslerp by column": plan("nuslerp", [b, c], "weight: 0.3", "nuslerp_flatten: false, nuslerp_row_wise: true", base=None),
    "multislerp": plan("multislerp", [a, b, c], "weight: 0.7", base=None),
    "karcher": plan("karcher", [a, b, c], base=None),
    "task_arithmetic": plan("task_arithmetic", [b, c], "weight: 0.6", "lambda: 1.2"),
    "ties": plan("ties", [b, c], "weight: 0.5, density: 0.4"),
    "dare_ties at density 1": plan("dare_ties", [b, c], "weight: 0.5, density: 1.0"),
    "della at density 1": plan("della", [b, c], "weight: 0.5, density: 1.0"),
    "breadcrumbs": plan("breadcrumbs", [b, c], band(0.6)),
    "breadcrumbs_ties": plan("breadcrumbs_ties", [b, c], band(0.6)),
    "sce": plan("sce", [b, c], shared="select_topk: 0.5"),
    "ram": plan("ram", [b, c]),
    "ramplus_tl": plan("ramplus_tl", [b, c], shared="r: 0.1, alpha: 0.2"),
    "model_stock": plan("model_stock", [base, b, c]),
    "model_stock by row": plan("model_stock", [base, b, c], shared="filter_wise: true"),
    "nearswap": plan("nearswap", [b], shared="t: 0.005"),
    "arcee_fusion": plan("arcee_fusion", [b]),
    "passthrough": plan("passthrough", [b], "scale: 0.5", base=None),
}


def timed(command):
    start = time.perf_counter()
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command}:\n{done.stdout}{done.stderr}")
    return time.perf_counter() - start


def distance(expected, found):
    with safe_open(expected / "model.safetensors", "pt") as x, safe_open(found / "model.safetensors", "pt") as y:
        if sorted(x.keys()) != sorted(y.keys()):
            sys.exit(f"different tensors: {set(x.keys()) ^ set(y.keys())}")
        worst, kind, far, count = 0.0, None, 0, 0
        for name in x.keys():
            one, other = x.get_tensor(name), y.get_tensor(name)
            kind = one.dtype
            gaps = (one.float() - other.float()).abs()
            limit = 1e-6 if kind == torch.float32 else float(torch.finfo(kind).eps)
            worst, far, count = max(worst, float(gaps.max())), far + int((gaps > limit).sum()), count + gaps.numel()
    return worst, far / count


failed = False
print(f"{'plan':24} {'distance':>10} {'mergekit s':>11} {'retune s':>9}")
for name in sys.argv[4:] or PLANS:
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        work = Path(work)
        (work / "plan.yml").write_text(PLANS[name])
        slow = timed([mergekit, work / "plan.yml", work / "theirs", "--no-copy-tokenizer"])
        fast = timed([program, "merge", work / "plan.yml", work / "ours"])
        gap, far = distance(work / "theirs", work / "ours")
        bad = far > (1e-3 if name == "arcee_fusion" else 0)
        failed |= bad
        print(f"{name:24} {gap:10.1e} {slow:11.2f} {fast:9.2f}{'   TOO FAR' if bad else ''}", flush=True)
sys.exit(failed)
