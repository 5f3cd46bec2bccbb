"""Merges the same plans with mergekit and with retune, and compares values and seconds.

    python mergekit_side_by_side.py MERGEKIT_YAML RETUNE_PROGRAM FOLDER [METHOD ...]

MERGEKIT_YAML is mergekit's program, started anew for each plan, or `import`: then this Python has
mergekit, loads it once, and its seconds are without its start.
FOLDER holds four models of one architecture: `base`, `a`, `b`, `c` (such as
crates/merge/tests/golden/mergekit; without `base`, `a` is the base). Needs safetensors and torch;
made with mergekit 0.1.5 (`ram` and `ramplus_tl` are not in 0.1.4), torch 2.15.0, transformers
5.23.0. Not part of CI: the packages are large.
Exit code 1 if a value differs by more than 1e-6 in F32 (one step of the type else). Of
`arcee_fusion` one value in a thousand may: mergekit finds importances in F32, so that a few values
fall on the other side of the bar.
"""
import contextlib, os, subprocess, sys, tempfile, time
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


def loaded():
    """mergekit's command, in this process."""
    start = time.perf_counter()
    import mergekit.architecture as architecture
    import mergekit.architecture.base as base
    from mergekit.scripts.run_yaml import main

    # Its classes name torch before it is there for them; newer pydantic asks for that by hand.
    for module in (base, architecture):
        for found in vars(module).values():
            if isinstance(found, type) and hasattr(found, "model_rebuild") and found.__module__.startswith("mergekit"):
                found.model_rebuild(_types_namespace={**vars(sys.modules[found.__module__]), "torch": torch})
    print(f"mergekit starts in {time.perf_counter() - start:.1f} s")
    return main


def timed_inside(command, arguments):
    start = time.perf_counter()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            command.main(args=[str(part) for part in arguments], standalone_mode=False)
        except RuntimeError as error:
            return str(error)
    return time.perf_counter() - start


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
inside = loaded() if mergekit == "import" else None
print(f"{'plan':24} {'distance':>10} {'mergekit s':>11} {'retune s':>9}")
for name in sys.argv[4:] or PLANS:
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        work = Path(work)
        (work / "plan.yml").write_text(PLANS[name])
        theirs = [work / "plan.yml", work / "theirs", "--no-copy-tokenizer"]
        slow = timed_inside(inside, theirs) if inside else timed([mergekit, *theirs])
        if isinstance(slow, str):
            failed = True
            print(f"{name:24} mergekit: {slow}", flush=True)
            continue
        fast = timed([program, "merge", work / "plan.yml", work / "ours"])
        gap, far = distance(work / "theirs", work / "ours")
        bad = far > (1e-3 if name == "arcee_fusion" else 0)
        failed |= bad
        print(f"{name:24} {gap:10.1e} {slow:11.2f} {fast:9.2f}{'   TOO FAR' if bad else ''}", flush=True)
sys.exit(failed)
