"""Vision-language models: the sites are those of the language model inside, which reads image features as tokens."""

from __future__ import annotations

from typing import Any

from mechattr.models.families.family import Family
from mechattr.models.families.shapes import GATED, ids

LLAVA = Family(language="language_model", auto="AutoModelForImageTextToText")
QWEN_VL = Family(language="language_model", text="qwen2", auto="AutoModelForImageTextToText")

ROWS: dict[str, Family] = {
    "llava": LLAVA,
    "llava_next": LLAVA,
    "mistral3": LLAVA,
    "internvl": LLAVA,
    "qwen2_vl": QWEN_VL,
    "qwen2_5_vl": QWEN_VL,
}

IMAGE_TOKEN = 4  # random test tokens begin at 5


def small() -> dict[str, Any]:
    """Configs of small models, by name. A picture of 8 by 8 pixels is 4 image tokens, of LLaVA-NeXT 10."""
    import transformers as tf

    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    clip = tf.CLIPVisionConfig(**shape, projection_dim=16, image_size=8, patch_size=4)
    pixtral = tf.PixtralVisionConfig(**shape, head_dim=8, image_size=8, patch_size=2)
    intern = tf.InternVLVisionConfig(**shape, image_size=[8, 8], patch_size=[2, 2])
    llama, mistral = tf.LlamaConfig(**GATED, **ids()), tf.MistralConfig(**GATED, **ids())
    # three of the three frequencies of a head turn with time, height and width
    text = {
        **GATED,
        **ids(),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1]},
    }
    marks = {
        "image_token_id": IMAGE_TOKEN,
        "video_token_id": 60,
        "vision_start_token_id": 58,
        "vision_end_token_id": 59,
    }
    tower = {"depth": 2, "num_heads": 2, "patch_size": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}
    return {
        "llava": tf.LlavaConfig(vision_config=clip, text_config=llama, image_token_id=IMAGE_TOKEN),
        "llava_next": tf.LlavaNextConfig(
            vision_config=clip,
            text_config=mistral,
            image_token_index=IMAGE_TOKEN,
            image_grid_pinpoints=[[8, 8], [8, 16]],
        ),
        "mistral3": tf.Mistral3Config(
            vision_config=pixtral, text_config=mistral, image_token_index=IMAGE_TOKEN, spatial_merge_size=2
        ),
        "internvl": tf.InternVLConfig(
            vision_config=intern,
            text_config=tf.Qwen2Config(**GATED, **ids()),
            image_token_id=IMAGE_TOKEN,
            downsample_ratio=0.5,
        ),
        "qwen2_vl": tf.Qwen2VLConfig(
            vision_config={**tower, "embed_dim": 16, "hidden_size": 24, "mlp_ratio": 2}, text_config=text, **marks
        ),
        "qwen2_5_vl": tf.Qwen2_5_VLConfig(
            vision_config={
                **tower,
                "hidden_size": 16,
                "out_hidden_size": 24,
                "intermediate_size": 24,
                "window_size": 8,
                "fullatt_block_indexes": [1],
            },
            text_config=text,
            **marks,
        ),
    }
