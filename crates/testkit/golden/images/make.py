"""Makes this pack: tiny random models that read images, with what transformers computes.

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
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTForImageClassification, ViTModel

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VIT = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, patch_size=4)
LABELS = dict(id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2})
# The two towers differ in everything: width, heads, depth.
TEXT = dict(vocab_size=40, hidden_size=16, intermediate_size=28, num_hidden_layers=3, num_attention_heads=2,
            max_position_embeddings=12, bos_token_id=38, eos_token_id=39, pad_token_id=0)
VISION = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, image_size=12, patch_size=4)


def clip(**text):
    return CLIPConfig(text_config={**TEXT, **text}, vision_config=VISION, projection_dim=20)


# name: class, configuration, arguments
CASES = {
    "vit_classes": (ViTForImageClassification, ViTConfig(**VIT, image_size=12, **LABELS), {}),
    "vit_pooler": (ViTModel, ViTConfig(**VIT, image_size=[8, 12], num_channels=1, qkv_bias=False), {}),
    "vit_bare": (ViTModel, ViTConfig(**VIT, image_size=12), dict(add_pooling_layer=False)),
    "clip": (CLIPModel, clip(), {}),
    # OpenAI's own checkpoints say 2 and mean the largest number.
    "clip_legacy": (CLIPModel, clip(eos_token_id=2), {}),
}


def randomise(model, gen):
    """Weights of a size that makes every part matter: no norm is exactly 1, no bias exactly 0."""
    for name, p in model.named_parameters():
        n = torch.randn(p.shape, generator=gen)
        if name == "logit_scale":
            p.data = torch.tensor(1.5)
        elif p.dim() == 1 and name.endswith("weight"):                       # norms
            p.data = 1 + 0.1 * n
        elif p.dim() == 1 and name.endswith("bias"):
            p.data = 0.1 * n
        elif "embedding" in name and "patch" not in name or "cls_token" in name:
            p.data = 0.3 * n
        else:                                                                # linear maps and the patches' kernel
            p.data = n * p[0].numel() ** -0.5
    return model


def texts(gen):
    """Four texts of 12, 5, 9 and 2 tokens that end with the end token; behind it comes more of it."""
    ids = torch.randint(3, 38, (4, 12), generator=gen)
    for row, length in enumerate((12, 5, 9, 2)):
        ids[row, 0] = 38
        ids[row, length - 1:] = 39
    return ids


def run(name, model, pixels, ids):
    if name.startswith("clip"):
        out = model(pixel_values=pixels, input_ids=ids)
        return {"image_embeds": out.image_embeds, "text_embeds": out.text_embeds, "logits": out.logits_per_image}
    out = model(pixel_values=pixels)
    if name == "vit_classes":
        return {"logits": out.logits}
    state = out.pooler_output if name == "vit_pooler" else out.last_hidden_state[:, 0]
    return {"embeddings": torch.nn.functional.normalize(state, dim=1)}


def main(root, only):
    for seed, (name, (kind, config, arguments)) in enumerate(CASES.items()):
        if only and name not in only:
            continue
        folder = Path(root) / name
        shutil.rmtree(folder, ignore_errors=True)
        gen = torch.Generator().manual_seed(200 + seed)
        torch.manual_seed(seed)
        config._attn_implementation = "eager"
        model = randomise(kind(config, **arguments), gen).float().eval()
        model.save_pretrained(folder)
        vision = getattr(config, "vision_config", config)
        size = vision.image_size if isinstance(vision.image_size, (list, tuple)) else [vision.image_size] * 2
        pixels = torch.randn((3, vision.num_channels, *size), generator=gen)
        ids = texts(gen) if name.startswith("clip") else None
        with torch.no_grad():
            out = run(name, model, pixels, ids)
            double = run(name, model.double(), pixels.double(), ids)
        inputs = {"pixel_values": pixels, **({} if ids is None else {"input_ids": ids})}
        save_file({k: v.contiguous() for k, v in {**out, **inputs}.items()}, folder / "expected.safetensors")
        for key, found in out.items():
            print(f"{name:12s} largest |{key}| {float(found.abs().max()):.2f}, float64 differs by {float((found - double[key]).abs().max()):.1e}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent, sys.argv[2:])
