"""Small random pipelines in the format of diffusers, for tests."""
import json

import torch

WORDS = "a red blue circle square bus at the left right".split()
SCHEDULE = dict(_class_name="DDIMScheduler", beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                num_train_timesteps=1000, prediction_type="epsilon", clip_sample=False, set_alpha_to_one=False,
                steps_offset=1)


def tokenizer(folder):
    """A CLIP tokenizer that knows WORDS, joined from the left, as vocab.json and merges.txt in `folder`."""
    letters = sorted({c for w in WORDS for c in w})
    vocab, merges = [*letters, *(c + "</w>" for c in letters)], []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            if f"{parts[0]} {parts[1]}" not in merges:
                merges.append(f"{parts[0]} {parts[1]}")
            parts[:2] = [parts[0] + parts[1]]
            vocab += [parts[0]] * (parts[0] not in vocab)
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="CLIPTokenizer", model_max_length=12)))
    return len(vocab)


def text_to_image(folder, **schedule):
    """A Stable Diffusion of 0.2 M random parameters for pictures of 32 x 32, latents of 4 x 16 x 16."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    torch.manual_seed(0)
    count = tokenizer(folder / "tokenizer")
    text = CLIPTextConfig(vocab_size=count, hidden_size=32, intermediate_size=64, num_hidden_layers=1, pad_token_id=1,
                          num_attention_heads=2, max_position_embeddings=12, bos_token_id=count - 2, eos_token_id=count - 1)
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    UNet2DConditionModel(sample_size=16, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
                         down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=32,
                         up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=8, norm_num_groups=8,
                         ).save_pretrained(folder / "unet")
    AutoencoderKL(block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
                  up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4).save_pretrained(folder / "vae")
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(SCHEDULE | schedule))
    parts = dict(unet=["diffusers", "UNet2DConditionModel"], vae=["diffusers", "AutoencoderKL"],
                 text_encoder=["transformers", "CLIPTextModel"], tokenizer=["transformers", "CLIPTokenizer"],
                 scheduler=["diffusers", "DDIMScheduler"], safety_checker=[None, None], feature_extractor=[None, None])
    about = dict(_class_name="StableDiffusionPipeline", _diffusers_version="0.30.0", requires_safety_checker=False)
    (folder / "model_index.json").write_text(json.dumps(about | parts))
    return folder


def pixels(folder, **schedule):
    """A DDPM of random weights for pictures of 3 x 16 x 16."""
    from diffusers import UNet2DModel
    torch.manual_seed(0)
    UNet2DModel(sample_size=16, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                ).save_pretrained(folder / "unet")
    (folder / "scheduler").mkdir()
    config = dict(_class_name="DDPMScheduler", beta_start=1e-4, beta_end=0.02, beta_schedule="linear",
                  num_train_timesteps=1000)
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config | schedule))
    about = dict(_class_name="DDPMPipeline", unet=["diffusers", "UNet2DModel"], scheduler=["diffusers", "DDPMScheduler"])
    (folder / "model_index.json").write_text(json.dumps(about))
    return folder
