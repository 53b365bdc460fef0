"""Vision: how much the images of some clients slow down the streams of others.

    python -m bench.vision --build DIRECTORY             builds a checkpoint to serve: a demo model with a vision tower
                           [--kind qwen2_5_vl]           of random weights; Gemma 3 270M, or Qwen 2.5 Coder 0.5B
    python -m bench.vision --base-url http://127.0.0.1:8000/v1

Sixteen clients stream text, first alone and then while sixteen others send an image each.
"""

import argparse
import asyncio
import base64
import io
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from bench import load
from bench.load import Level, Stream, Target

CLIENTS = 16
SIDE, PATCH, TOKENS_PER_IMAGE = 448, 14, 64  # pixels, pixels, tokens: an image has a quarter of Gemma 3's tokens


@dataclass(frozen=True)
class ImageTarget(Target):
    """A target whose requests have an image each, all different."""

    def body(self, prompt: str) -> dict[str, Any]:
        body = super().body(prompt)
        image = {"type": "image_url", "image_url": {"url": picture(prompt)}}
        body["messages"] = [{"role": "user", "content": [image, {"type": "text", "text": prompt}]}]
        return body


def picture(seed: str) -> str:
    rng = random.Random(seed)
    small = Image.frombytes("RGB", (16, 16), rng.randbytes(3 * 16 * 16))
    file = io.BytesIO()
    small.resize((640, 480)).save(file, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


async def measure(target: Target, images: int, salt: str) -> tuple[Level, Level]:
    """Returns the figures of the text streams, and of those with an image."""
    seeing = ImageTarget(**{**vars(target), "max_tokens": 16})
    async with load.open_client(target) as client:
        texts = [load.send(client, target, p) for p in load.make_prompts(target, CLIENTS, f"{salt}/text")]
        running = [asyncio.ensure_future(text) for text in texts]
        await asyncio.sleep(1.0)
        prompts = load.make_prompts(replace(seeing, prompt_tokens=30), images, f"{salt}/image")
        shown = await asyncio.gather(*(load.send(client, seeing, prompt) for prompt in prompts))
        read: Sequence[Stream] = await asyncio.gather(*running)
    return load.summarize(target, CLIENTS, list(read), 1.0), load.summarize(seeing, images, shown, 1.0)


def demo(name: str) -> tuple[Any, Any]:
    """Returns a demo's model and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from checkpoints import checkpoint
    from config import Settings

    source = checkpoint.fetch(f"demo:{name}", Settings().cache_dir, lambda phase, fraction: None).directory
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16), AutoTokenizer.from_pretrained(source)


def build_gemma3(directory: Path) -> None:
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    text, tokenizer = demo("gemma-3-270m")
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)  # the text model has no such token
    text.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    vision = SiglipVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=SIDE,
        patch_size=PATCH,
    )
    token = tokenizer.get_vocab()["<image_soft_token>"]
    config = Gemma3Config(
        text_config=text.config,
        vision_config=vision,
        mm_tokens_per_image=TOKENS_PER_IMAGE,
        image_token_index=token,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).bfloat16()
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    Gemma3ImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_pan_and_scan=False
    ).save_pretrained(directory)


def build_qwen2_5_vl(directory: Path) -> None:
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    text, tokenizer = demo("qwen2.5-coder-0.5b")
    shape = text.config.to_dict()
    sections = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    more = ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "eos_token_id")
    tower = {"depth": 12, "hidden_size": 768, "intermediate_size": 3072, "num_heads": 12, "patch_size": PATCH}
    config = Qwen2_5_VLConfig(
        text_config={**{name: shape[name] for name in (*names, *more)}, "rope_parameters": sections},
        vision_config={**tower, "out_hidden_size": shape["hidden_size"], "fullatt_block_indexes": [2, 5, 8, 11]},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        tie_word_embeddings=shape["tie_word_embeddings"],
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).bfloat16()
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.save_pretrained(directory)
    tokenizer.chat_template = None  # the demo's shows no images
    tokenizer.save_pretrained(directory)
    Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": SIDE * SIDE}).save_pretrained(directory)


BUILDERS = {"gemma3": build_gemma3, "qwen2_5_vl": build_qwen2_5_vl}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, metavar="DIRECTORY")
    parser.add_argument("--kind", choices=BUILDERS, default="gemma3")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--salt", default="0", help="another one gives other prompts and images")
    arguments = parser.parse_args()
    if arguments.build:
        BUILDERS[arguments.kind](arguments.build)
        return
    target = Target(arguments.base_url, asyncio.run(load.first_model(arguments.base_url)), is_chat=True)
    print(load.HEAD)
    for images in (0, CLIENTS):
        text, shown = asyncio.run(measure(target, images, f"{arguments.salt}/{images}"))
        for level, kind in ((text, f"text beside {images} images"), (shown, "with an image"))[: 1 + bool(images)]:
            print(load.row(level), kind, json.dumps(level.errors) if level.errors else "")


if __name__ == "__main__":
    main()
