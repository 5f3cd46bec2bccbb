"""Greedy decoding of one GGUF file in retune and in llama.cpp, one stream, taking turns.

    python tests/interop/decode_side_by_side.py --retune target/release/retune --model FILE.gguf

Prints tokens/s of each turn and the median of the ratios pair by pair. Both are given the same
prompt tokens and the same number of threads; retune runs as a person runs it (`generate --json`),
once with inputs rounded to 8 bits, as llama.cpp always does, and once with `--exact`. How far the
two programs' answers agree is printed too: greedy decoding parts for good at the first close
choice that falls the other way. Needs llama-cpp-python.
"""

import argparse
import json
import os
import statistics
import subprocess
import time

parser = argparse.ArgumentParser()
parser.add_argument("--retune", required=True)
parser.add_argument("--model", required=True, help="a GGUF file")
parser.add_argument("--prompt", default="The history of the steam engine begins in")
parser.add_argument("--tokens", type=int, default=128)
parser.add_argument("--threads", type=int, default=os.cpu_count())
parser.add_argument("--rounds", type=int, default=5)
arguments = parser.parse_args()

import llama_cpp

model = llama_cpp.Llama(
    arguments.model,
    n_ctx=1024,
    n_threads=arguments.threads,
    n_threads_batch=arguments.threads,
    verbose=False,
)


def peer():
    """Decodes with llama.cpp; the clock starts behind the first new token, as retune's does."""
    prompt = model.tokenize(arguments.prompt.encode(), add_bos=False, special=True)
    found, first = [], None
    model.reset()
    for token in model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0):
        if first is None:
            first = time.perf_counter()
        found.append(token)
        if len(found) == arguments.tokens or token == model.token_eos():
            break
    return found, (len(found) - 1) / (time.perf_counter() - first)


def own(*options):
    command = [arguments.retune, "--json", "generate", "--model", arguments.model]
    command += ["--prompt", arguments.prompt, "--raw", *options]
    command += ["--max-new-tokens", str(arguments.tokens)]
    environment = os.environ | {"RAYON_NUM_THREADS": str(arguments.threads)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    answer = json.loads(done.stdout)
    return answer["tokens"], answer["decode_tokens_per_s"]


def agreement(left, right):
    pairs = zip(left, right)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


peer()
ratios, exact_ratios = [], []
for number in range(1, arguments.rounds + 1):
    theirs, their_speed = peer()
    ours, our_speed = own()
    exact, exact_speed = own("--exact")
    ratios.append(our_speed / their_speed)
    exact_ratios.append(exact_speed / their_speed)
    print(
        f"round {number}: llama.cpp {their_speed:.1f} tokens/s, retune {our_speed:.1f} "
        f"({ratios[-1]:.2f}), --exact {exact_speed:.1f} ({exact_ratios[-1]:.2f}); equal tokens: "
        f"{agreement(ours, theirs)} of {len(theirs)}, exact {agreement(exact, theirs)}",
        flush=True,
    )
print(
    f"median ratio {statistics.median(ratios):.2f}, --exact {statistics.median(exact_ratios):.2f}, "
    f"{arguments.threads} threads, {arguments.tokens} tokens"
)
