"""One training run in PyTorch + PEFT, a line per step: the peer of `cargo xtask bench --peer`.

    python tests/interop/bench_step.py --model FOLDER --method lora --dtype f32 --steps 6

Prints `step N tokens M` after each step, M being the tokens that are not padding. Ids are random:
speed does not depend on them. Needs torch, transformers and peft.
"""

import argparse
import json
import random

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--method", choices=["lora", "full"], default="lora")
parser.add_argument("--task", choices=["language", "classes"], default="language")
parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
parser.add_argument("--rows", type=int, default=4)
parser.add_argument("--tokens", type=int, default=256)
parser.add_argument("--steps", type=int, default=6)
parser.add_argument(
    "--chats", help="JSONL of `messages`: rows of mixed length, padded to the longest of a batch"
)
arguments = parser.parse_args()

import torch
import transformers

transformers.logging.set_verbosity_error()
dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
torch.manual_seed(0)

if arguments.task == "classes":
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        arguments.model, dtype=dtype, num_labels=2
    )
else:
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
if arguments.method == "lora":
    import peft

    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config)
model.train()
optimizer = torch.optim.AdamW(
    [p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.01
)


def random_batch():
    shape = (arguments.rows, arguments.tokens)
    ids = torch.randint(5, model.config.vocab_size, shape)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if arguments.task == "classes":
        batch["labels"] = torch.randint(0, 2, (arguments.rows,))
    else:
        batch["labels"] = ids.clone()
    return batch, ids.numel()


def chat_batches():
    """What the trainer of transformers does by default: shuffle, pad to the batch's longest."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    chats = []
    for line in open(arguments.chats, encoding="utf-8"):
        messages = json.loads(line)["messages"]
        whole = tokenizer.apply_chat_template(messages, return_dict=False)
        prompt = tokenizer.apply_chat_template(
            messages[:-1], add_generation_prompt=True, return_dict=False
        )
        labels = [-100] * len(prompt) + whole[len(prompt):]
        chats.append((whole[: arguments.tokens], labels[: arguments.tokens]))
    random.Random(0).shuffle(chats)
    for start in range(0, len(chats), arguments.rows):
        rows = chats[start : start + arguments.rows]
        longest = max(len(ids) for ids, _ in rows)
        pad = lambda row, value: row + [value] * (longest - len(row))
        yield {
            "input_ids": torch.tensor([pad(ids, 0) for ids, _ in rows]),
            "attention_mask": torch.tensor([pad([1] * len(ids), 0) for ids, _ in rows]),
            "labels": torch.tensor([pad(labels, -100) for _, labels in rows]),
        }, sum(len(ids) for ids, _ in rows)


def batches():
    if arguments.chats:
        yield from chat_batches()
    while True:
        yield random_batch()


for step, (batch, tokens) in zip(range(1, arguments.steps + 1), batches()):
    loss = model(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    assert torch.isfinite(loss)
    print(f"step {step} tokens {tokens}", flush=True)
