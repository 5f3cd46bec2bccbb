"""Trains adapters on a tiny T5 with retune and checks that the real PEFT computes the same with them.

    python peft_t5.py RETUNE_PROGRAM [--methods lora,ia3] [--form plain] [--keep FOLDER]

Needs torch, transformers, peft, tokenizers and safetensors (made with torch 2.15, transformers 5.23,
peft 0.21.2). Not part of CI: the packages are large. Makes both published forms of T5 (plain and tied;
gated with a head of its own) with random weights, has retune train every method that writes PEFT's
format, and compares, within 1e-5: the logits of the decoder's tokens, those of the merged model (or that
both refuse to merge), and the words either side generates. Prints a line for each, and ends with exit
code 1 if one differs, or if an adapter moves no logit by more than 1e-3, as then nothing was tested.
"""
import argparse, json, subprocess, sys, tempfile, warnings
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration
from transformers.utils import logging

TOLERANCE, RATE, NEW_TOKENS = 1e-5, 3e-3, 8
FORMS = {
    "plain": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
    "gated": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
# Methods in PEFT's format that T5 takes, with what the tiny model needs beside their defaults.
METHODS = {
    "lora": "", "adalora": "", "beft": "", "boft": "", "c3a": "block_size = 16", "deft": "", "delora": "",
    # Their defaults multiply what is trained by 150, 20 and 25, and rounding with it.
    "fourierft": "n_frequency = 200\nscaling = 5.0", "randlora": "alpha = 32.0", "waveft": "n_frequency = 200\nscaling = 5.0",
    "glora": "", "gralora": "", "hira": "", "hra": "", "ia3": "", "ln_tuning": "", "loha": "", "lokr": "",
    "miss": "rank = 8", "oft": "block_size = 16", "peanut": "", "pvera": "", "road": "group_size = 16",
    "prompt-tuning": "", "p-tuning": "", "prefix-tuning": "", "multitask-prompt-tuning": "tasks = 2",
    "shira": "rank = 4", "supertuning": "", "trainable_tokens": "token_indices = [5, 6, 7]",
    "vblora": "vector_length = 16", "vera": "", "osf": "", "tinylora": "", "unilora": "",
}
# PEFT decomposes the base again where it reads these files, and keeps the signs or clusters it finds.
NOT_PORTABLE = ["frod", "psoft", "adamss"]
# transformers says of every T5 that its head is tied, and PEFT then writes an embedding's rows into a head
# that is not.
WRONG_HEAD = ("gated", "trainable_tokens")


def make_base(folder, form):
    words = [f"w{i}" for i in range(30)]
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(vocabulary), d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=2,
        relative_attention_num_buckets=8, relative_attention_max_distance=12, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, **FORMS[form],
    )
    # This version of transformers sets it whatever it is given.
    config.tie_word_embeddings = FORMS[form]["tie_word_embeddings"]
    model = T5ForConditionalGeneration(config)
    for name, tensor in model.named_parameters():
        if "layer_norm" in name:
            tensor.data += 0.2 * torch.randn(tensor.shape)
        if name == "lm_head.weight":
            tensor.data *= 0.1
    for side in (model.encoder, model.decoder):
        side.set_input_embeddings(model.shared)
    model.save_pretrained(folder)
    rows = []
    for row in range(64):
        ids = torch.randint(30, (6,)).tolist()
        prompt = " ".join(f"w{i}" for i in ids)
        rows.append({"prompt": prompt, "completion": " ".join(f"w{i}" for i in sorted(ids))})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return done.stdout


def train(program, base, method, work):
    recipe = work / "recipe.toml"
    recipe.write_text(
        f'model = "{base}"\nname = "t5"\nruns = "{work}/runs"\n'
        f'[data]\ntrain = "{base}/rows.jsonl"\nvalidation_fraction = 0.1\n'
        f"[method.{method}]\n{METHODS[method]}\n"
        f"[train]\nsteps = 40\nbatch_size = 8\nlearning_rate = {RATE}\nsave_every = 0\n"
        '[evaluate]\nkind = "loss"\nrows = 2\nbefore = false\n'
    )
    run(program, "run", recipe)
    return next((work / "runs").glob("t5-*")) / "adapter"


def load(base):
    return T5ForConditionalGeneration.from_pretrained(base, dtype=torch.float32).eval()


def gap(a, b):
    return float((a - b).abs().max())


def compare(program, base, adapter, rows, work):
    """Returns the line to print, and whether all agrees."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    encode = lambda key: tokenizer([row[key] for row in rows], return_tensors="pt")["input_ids"]
    sources, targets = encode("prompt"), encode("completion")
    start = torch.zeros((len(rows), 1), dtype=torch.long)
    inputs = {"input_ids": sources, "decoder_input_ids": torch.cat([start, targets[:, :-1]], 1)}
    save_file(inputs, work / "ids.safetensors")

    def ours(model, *more):
        out = work / "logits.safetensors"
        run(program, "logits", "--model", model, *more, "--input-ids", work / "ids.safetensors", "--output", out)
        return load_file(out)["logits"]

    with torch.no_grad():
        plain = load(base)(**inputs).logits
        tuned = PeftModel.from_pretrained(load(base), adapter).eval()
        kind = tuned.active_peft_config.peft_type.value
        tasks = {}
        here = inputs
        if kind == "MULTITASK_PROMPT_TUNING":
            tasks = {"task_ids": torch.zeros(len(rows), dtype=torch.long)}
            # With tokens of the decoder in place of labels PEFT gives the decoder both them and their vectors.
            here = {"input_ids": sources, "labels": targets, **tasks}
        expected = tuned(**here).logits
        words = tuned.generate(input_ids=sources[:4], max_new_tokens=NEW_TOKENS, do_sample=False,
                               **{name: ids[:4] for name, ids in tasks.items()})
    gaps = [gap(expected, ours(base, "--adapter", adapter))]
    moved = gap(expected, plain)
    text = f"moves {moved:.1e}, logits differ by {gaps[0]:.1e}"
    try:
        with torch.no_grad():
            merged = tuned.merge_and_unload()
            merged_logits = merged(**inputs).logits
    except Exception as error:
        merged, text = None, f"{text}, PEFT does not merge ({type(error).__name__})"
    if merged is not None:
        run(program, "merge-adapter", "--model", base, "--adapter", adapter, "--output", work / "merged")
        gaps.append(gap(merged_logits, ours(work / "merged")))
        theirs, mine = merged.state_dict(), load(work / "merged").state_dict()
        gaps.append(max(gap(theirs[name], mine[name]) for name in mine))
        text = f"{text}, merged logits by {gaps[1]:.1e}, merged weights by {gaps[2]:.1e}"
    same = 0
    for row, ids in zip(rows, words):
        found = run(program, "generate", "--model", base, "--adapter", adapter, "--raw", "--json",
                    "--max-new-tokens", NEW_TOKENS, "--exact", "--prompt", row["prompt"])
        same += json.loads(found)["text"].split() == tokenizer.decode(ids, skip_special_tokens=True).split()
    text = f"{text}, {same} of {len(words)} texts the same"
    return text, max(gaps) <= TOLERANCE and moved > 1e-3 and same == len(words)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program", type=Path)
    parser.add_argument("--methods")
    parser.add_argument("--form", choices=FORMS)
    parser.add_argument("--keep", type=Path)
    arguments = parser.parse_args()
    program = arguments.program.resolve()
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    names = arguments.methods.split(",") if arguments.methods else list(METHODS)
    bad = 0
    with tempfile.TemporaryDirectory() as temporary:
        root = (arguments.keep or Path(temporary)).resolve()
        for form in [arguments.form] if arguments.form else FORMS:
            base = root / form / "base"
            base.mkdir(parents=True, exist_ok=True)
            rows = make_base(base, form)
            for name in names:
                if (form, name) == WRONG_HEAD and not arguments.methods:
                    continue
                work = root / form / name
                work.mkdir(parents=True, exist_ok=True)
                try:
                    adapter = train(program, base, name, work)
                    text, good = compare(program, base, adapter, rows[:8], work)
                except Exception as error:
                    text, good = f"{type(error).__name__}: {error}", False
                bad += not good
                print(f"{'ok' if good else 'BAD':4} {form} {name}: {text}", flush=True)
    print(f"not compared: {', '.join(NOT_PORTABLE)}, and {' '.join(WRONG_HEAD)}; see the comments here")
    sys.exit(bad > 0)


main()
