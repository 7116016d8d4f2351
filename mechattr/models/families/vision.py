"""Vision-language models: the sites are those of the language model inside, which reads image features as tokens."""

from __future__ import annotations

from typing import Any

from mechattr.models.families.family import Family
from mechattr.models.families.shapes import GATED, ids

LLAVA = Family(language="language_model", auto="AutoModelForImageTextToText")
QWEN_VL = Family(language="language_model", text="qwen2", auto="AutoModelForImageTextToText")

ROWS: dict[str, Family] = {"llava": LLAVA, "qwen2_vl": QWEN_VL, "qwen2_5_vl": QWEN_VL}

IMAGE_TOKEN = 4  # random test tokens begin at 5


def small() -> dict[str, Any]:
    """Configs of small models, by name. A picture of 8 by 8 pixels is 4 image tokens."""
    import transformers as tf

    clip = tf.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
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
        "llava": tf.LlavaConfig(
            vision_config=clip, text_config=tf.LlamaConfig(**GATED, **ids()), image_token_id=IMAGE_TOKEN
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
