"""Small random models of transformers, saved as published ones are: one that reads, one that sees too, a classifier."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers_models import QWEN_VOCABULARY, small_language_model, small_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

IMAGE = "<image>"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{% for p in m['content'] %}"
    "{% if p['type'] == 'text' %}{{ p['text'] }}{% else %}<image>{% endif %}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}answer:{% endif %}"
)


def save_reader(folder: Path) -> Path:
    """Qwen3's architecture and prompt format."""
    small_language_model("qwen3", 6, vocab_size=QWEN_VOCABULARY).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


def save_seer(folder: Path, seed: int = 0) -> Path:
    """LLaVA: of the models that see, one whose processor needs no torchvision."""
    tokens = ["<pad>", "<s>", "</s>", IMAGE, "yes", "no", "\n", *map(chr, range(32, 127))]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"yes|no|[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token) for token in tokens[:4]])
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token=" "
    )
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        pictures,
        words,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = MistralConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=vocabulary[IMAGE])
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # so that what is seen and read decides
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_classifier(folder: Path, labels: tuple[str, ...] = ("normal", "nsfw")) -> Path:
    """Calls a picture unsafe by how bright it is: black 0.12, white 0.88, the published threshold being at 0.85."""
    config = ViTConfig(
        hidden_size=4,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )
    model = ViTForImageClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        # A patch's brightness, which the norm makes -1.73 or 1.73, reaches the class token by an attention that is even
        # over all five tokens, and from there, after the last norm, the logit: +-1.73 * 1.15 = +-2.
        named = dict(model.named_parameters())
        named["vit.embeddings.patch_embeddings.projection.weight"][0] = 1 / 192
        for name, parameter in named.items():
            if "layernorm" in name and name.endswith("weight"):
                parameter.fill_(1)
            if name.endswith(("v_proj.weight", "o_proj.weight")):
                parameter[0, 0] = 1
        named["classifier.weight"][1, 0] = 1.15
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder
