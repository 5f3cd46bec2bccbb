"""Makes this pack: one tiny random model per family or feature, with what transformers computes.

    python make.py [folder [case ...]]        needs torch 2.15, transformers 5.23, safetensors; CPU, one thread, float32

Everything random comes from the seed of a case, so a rerun with the same versions writes the same bytes.
"""
import shutil
import sys
import warnings
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import (BertConfig, BertModel, Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2ForSequenceClassification,
                          GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, MistralConfig,
                          MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM, RobertaConfig,
                          RobertaForSequenceClassification, T5Config, T5ForConditionalGeneration)

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SMALL = dict(vocab_size=40, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.02,
             bos_token_id=1, eos_token_id=2, pad_token_id=0)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
T5 = dict(vocab_size=40, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, relative_attention_num_buckets=8,
          relative_attention_max_distance=12, dropout_rate=0.1, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
GPT2 = dict(vocab_size=40, n_embd=24, n_layer=2, n_head=4, n_positions=32, n_inner=40, bos_token_id=1, eos_token_id=2, pad_token_id=0)

T5_GATED = T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
T5_GATED.tie_word_embeddings = False                                         # transformers 5 ties the head again by itself

# name: class, configuration, whether norm weights lie around 0
CASES = {
    "gpt2": (GPT2LMHeadModel, GPT2Config(**GPT2), False),
    "gpt2_classes": (GPT2ForSequenceClassification, GPT2Config(**GPT2, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}), False),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**SMALL, head_dim=8, query_pre_attn_scalar=12, sliding_window=4,
                                               attn_logit_softcapping=2.0, final_logit_softcapping=3.0), True),
    "qwen2_window": (Qwen2ForCausalLM, Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=5, max_window_layers=1), False),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SMALL, head_dim=8, tie_word_embeddings=True), False),
    "mistral": (MistralForCausalLM, MistralConfig(**SMALL, sliding_window=5), False),
    "llama3_rope": (LlamaForCausalLM, LlamaConfig(**SMALL, rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True), False),
    "llama_yarn": (LlamaForCausalLM, LlamaConfig(**SMALL, rope_parameters=YARN), False),
    "llama_classes": (LlamaForSequenceClassification, LlamaConfig(**SMALL, id2label={0: "a", 1: "b", 2: "c"},
                                                                  label2id={"a": 0, "b": 1, "c": 2}), False),
    "bert_embedding": (BertModel, BertConfig(vocab_size=40, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                                             num_attention_heads=4, max_position_embeddings=32), False),
    "roberta_classes": (RobertaForSequenceClassification, RobertaConfig(vocab_size=40, hidden_size=24, intermediate_size=40,
                                                                        num_hidden_layers=2, num_attention_heads=4,
                                                                        max_position_embeddings=32, type_vocab_size=1,
                                                                        pad_token_id=1, id2label={0: "a", 1: "b", 2: "c"},
                                                                        label2id={"a": 0, "b": 1, "c": 2}), False),
    "t5": (T5ForConditionalGeneration, T5Config(**T5, num_decoder_layers=3), False),
    "t5_gated": (T5ForConditionalGeneration, T5_GATED, False),
}


def randomise(model, gen, zero_centred_norms):
    """Weights of a size that makes every part matter: no norm is exactly 1, no bias exactly 0."""
    for name, p in model.named_parameters():
        n = torch.randn(p.shape, generator=gen)
        if p.dim() == 1 and name.endswith("weight"):                         # norms
            p.data = 0.1 * n if zero_centred_norms else 1 + 0.1 * n
        elif p.dim() == 1:                                                   # biases
            p.data = 0.1 * n
        elif "embed" in name or "shared" in name or "relative" in name or "wte" in name or "wpe" in name:
            p.data = 0.3 * n
        else:                                                                # linear maps; a Conv1D weight is [in, out]
            p.data = n * (p.shape[0] if "transformer.h" in name else p.shape[1]) ** -0.5
    return model


def batch(gen, vocabulary, padding):
    """Three rows of 24 tokens, the second and third padded on the right."""
    ids = torch.randint(4, vocabulary, (3, 24), generator=gen)
    mask = torch.ones_like(ids)
    for row, length in ((1, 17), (2, 1)):
        ids[row, length:] = padding
        mask[row, length:] = 0
    return ids, mask


def run(name, model, ids, mask):
    if name == "bert_embedding":
        types = (torch.arange(ids.shape[1])[None] >= 9).long() * mask
        states = model(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state
        kept = mask[..., None].to(states.dtype)
        mean = (states * kept).sum(1) / kept.sum(1)
        return {"embeddings": torch.nn.functional.normalize(mean, dim=1)}, {"token_type_ids": types}
    if name.startswith("t5"):
        decoder = torch.cat([torch.zeros_like(ids[:, :1]), (ids[:, :8] * 7 + 5) % 36 + 4], 1)
        logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder).logits
        return {"logits": logits}, {"decoder_input_ids": decoder}
    logits = model(input_ids=ids, attention_mask=mask).logits
    if logits.dim() == 3:
        logits = logits.masked_fill(mask[..., None] == 0, 0)                 # padded positions are written as 0
    return {"logits": logits}, {}


def main(root, only):
    for seed, (name, (kind, config, zero_centred)) in enumerate(CASES.items()):
        if only and name not in only:
            continue
        folder = Path(root) / name
        shutil.rmtree(folder, ignore_errors=True)
        gen = torch.Generator().manual_seed(100 + seed)
        torch.manual_seed(seed)
        config._attn_implementation = "eager"
        model = randomise(kind(config), gen, zero_centred).float().eval()
        if name == "t5_gated":                                               # as in every published T5 1.1
            model.encoder.embed_tokens.weight = model.decoder.embed_tokens.weight = model.shared.weight
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        ids, mask = batch(gen, config.vocab_size, config.pad_token_id)
        with torch.no_grad():
            out, extra = run(name, model, ids, mask)
            # In float64, and row by row without padding: how far another correct way lands.
            lengths = mask.sum(1).tolist()
            rows = [run(name, model.double(), ids[i:i + 1, :n], mask[i:i + 1, :n])[0] for i, n in enumerate(lengths)]
        save_file({k: v.contiguous() for k, v in {**out, "input_ids": ids, "attention_mask": mask, **extra}.items()},
                  folder / "expected.safetensors")
        (key, found), = out.items()
        gap = max(float((found[i, :row[key].shape[1]] - row[key][0]).abs().max()) if found.dim() == 3 else float((found[i] - row[key][0]).abs().max())
                  for i, (n, row) in enumerate(zip(lengths, rows)))
        print(f"{name:16s} largest |{key}| {float(found.abs().max()):.2f}, float64 differs by {gap:.1e}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent, sys.argv[2:])
