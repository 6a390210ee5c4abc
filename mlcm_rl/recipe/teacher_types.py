"""Types of a teacher's configuration files: the values that our families can use, in sizes that exist.

Keys without an effect here may have any well-formed value. Keys for an input that no family gives must have diffusers'
default.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

Width = Annotated[int, Field(gt=0, le=65_536)]
Layers = Annotated[int, Field(gt=0, le=256)]
Share = Annotated[float, Field(ge=0, lt=1)]
Small = Annotated[float, Field(gt=0, lt=1)]
Scale = Annotated[float, Field(gt=0, le=1_000)]
Flag = Annotated[int, Field(ge=0, le=1)]
Kernel = Annotated[int, Field(ge=1, le=7)]
Activation = Literal["silu", "swish", "mish", "gelu", "relu"]
Token = str | dict[str, JsonValue] | None


class Configuration(BaseModel):
    """A JSON file of a component. A validator's message begins with the key that it is about."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)
    __pydantic_extra__: dict[str, JsonValue]


class _Blocks(Configuration):
    """What denoiser and autoencoder have in common."""

    block_out_channels: list[Width] = Field(min_length=1, max_length=8)
    norm_num_groups: Width = 32
    act_fn: Activation = "silu"

    @model_validator(mode="after")
    def _widths_are_in_groups(self):
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ValueError(f"norm_num_groups {self.norm_num_groups} does not divide block_out_channels {width}")
        return self

    def fits(self, key: str, entries: object) -> None:
        """Raise ValueError if a list does not have one entry for each block."""
        if isinstance(entries, list) and len(entries) != len(self.block_out_channels):
            raise ValueError(f"{key} has {len(entries)} entries for {len(self.block_out_channels)} block_out_channels")


class Denoiser(_Blocks):
    """unet/config.json: a UNet2DConditionModel on latents, a time and the states of a prompt."""

    sample_size: Annotated[int, Field(gt=0, le=4_096)]
    in_channels: Annotated[int, Field(gt=0, le=1_024)] = 4
    out_channels: Annotated[int, Field(gt=0, le=1_024)] = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: Flag = 0
    down_block_types: list[Literal["DownBlock2D", "CrossAttnDownBlock2D"]]
    mid_block_type: Literal["UNetMidBlock2DCrossAttn", "UNetMidBlock2D"] | None = "UNetMidBlock2DCrossAttn"
    up_block_types: list[Literal["UpBlock2D", "CrossAttnUpBlock2D"]]
    only_cross_attention: bool | list[bool] = False
    layers_per_block: Layers | list[Layers] = 2
    downsample_padding: Flag = 1
    mid_block_scale_factor: Scale = 1
    dropout: Share = 0.0
    norm_eps: Small = 1e-5
    cross_attention_dim: Width
    transformer_layers_per_block: Layers | list[Layers | list[Layers]] = 1
    reverse_transformer_layers_per_block: list[Layers | list[Layers]] | None = None
    attention_head_dim: Width | list[Width] = 8
    use_linear_projection: bool = False
    upcast_attention: bool = False
    encoder_hid_dim: Width | None = None
    encoder_hid_dim_type: Literal["text_proj"] | None = None
    addition_embed_type: Literal["text_time"] | None = None
    addition_time_embed_dim: Width | None = None
    projection_class_embeddings_input_dim: Width | None = None
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    resnet_skip_time_act: bool = False
    resnet_out_scale_factor: Scale = 1.0
    time_embedding_type: Literal["positional"] = "positional"
    time_embedding_dim: Annotated[int, Field(gt=0, le=65_536, multiple_of=2)] | None = None
    time_embedding_act_fn: Activation | None = None
    timestep_post_act: Activation | None = None
    time_cond_proj_dim: Width | None = None
    conv_in_kernel: Kernel = 3
    conv_out_kernel: Kernel = 3
    mid_block_only_cross_attention: bool | None = None
    addition_embed_type_num_heads: Width = 64
    # Inputs that no family gives, and forms that diffusers does not build.
    num_attention_heads: None = None
    dual_cross_attention: Literal[False] = False
    class_embed_type: None = None
    num_class_embeds: None = None
    attention_type: Literal["default"] = "default"
    class_embeddings_concat: Literal[False] = False
    cross_attention_norm: None = None

    @model_validator(mode="after")
    def _blocks_agree(self):
        for key in (
            *("down_block_types", "up_block_types", "only_cross_attention", "layers_per_block"),
            *("attention_head_dim", "transformer_layers_per_block", "reverse_transformer_layers_per_block"),
        ):
            self.fits(key, getattr(self, key))
        for key in ("conv_in_kernel", "conv_out_kernel"):
            if getattr(self, key) % 2 == 0:
                raise ValueError(f"{key} {getattr(self, key)} is even: pictures would shrink")
        heads = self.attention_head_dim  # in the published models this key is the number of heads
        heads = heads if isinstance(heads, list) else [heads] * len(self.block_out_channels)
        attend = [kind.startswith("CrossAttn") for kind in self.down_block_types]
        attend[-1] = attend[-1] or self.mid_block_type == "UNetMidBlock2DCrossAttn"
        for number, width, attends in zip(heads, self.block_out_channels, attend, strict=True):
            if attends and width % number:
                raise ValueError(f"attention_head_dim {number} does not divide block_out_channels {width}")
        return self

    @property
    def context_width(self) -> int:
        """The width of a prompt's states, which the denoiser may project to that of its cross-attention."""
        return self.encoder_hid_dim or self.cross_attention_dim

    @model_validator(mode="after")
    def _projection_of_the_prompt_has_a_width(self):
        if self.encoder_hid_dim_type is not None and self.encoder_hid_dim is None:
            raise ValueError(
                f"encoder_hid_dim is missing, which encoder_hid_dim_type {self.encoder_hid_dim_type} needs"
            )
        return self

    @model_validator(mode="after")
    def _is_no_student(self):
        if self.time_cond_proj_dim is not None:
            raise ValueError(
                f"time_cond_proj_dim {self.time_cond_proj_dim} is an embedding of the guidance scale: the denoiser is "
                "distilled already; name the model that it was made from"
            )
        return self

    @model_validator(mode="after")
    def _sizes_are_embedded(self):
        for key in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
            if self.addition_embed_type is not None and getattr(self, key) is None:
                raise ValueError(f"{key} is missing, which addition_embed_type {self.addition_embed_type} needs")
        return self


class HunyuanDenoiser(Configuration):
    """transformer/config.json: a HunyuanDiT2DModel that predicts a variance beside v, as the stock pipeline expects."""

    learn_sigma: Literal[True] = True
    use_style_cond_and_image_meta_size: bool = True

    @model_validator(mode="after")
    def _takes_no_sizes(self):
        if self.use_style_cond_and_image_meta_size:
            raise ValueError(
                "use_style_cond_and_image_meta_size: true is of Hunyuan-DiT before 1.2, which is given a style and "
                "sizes; name Hunyuan-DiT 1.2 or a model made from it"
            )
        return self


class PixArtDenoiser(Configuration):
    """transformer/config.json: a PixArtTransformer2DModel, under that name or the older Transformer2DModel."""

    sample_size: Annotated[int, Field(gt=0, le=4_096)] = 128
    norm_type: Literal["ada_norm_single"] = "ada_norm_single"
    use_additional_conditions: bool | None = None

    @model_validator(mode="after")
    def _takes_no_sizes(self):
        if self.use_additional_conditions or (self.use_additional_conditions is None and self.sample_size == 128):
            raise ValueError(
                "use_additional_conditions: true, or absent at sample_size 128, is of PixArt-alpha, which is given "
                "sizes; name PixArt-Sigma or a model made from it"
            )
        return self


class Autoencoder(_Blocks):
    """vae/config.json: an AutoencoderKL of pictures in three colours."""

    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    down_block_types: list[Literal["DownEncoderBlock2D"]] = ["DownEncoderBlock2D"]
    up_block_types: list[Literal["UpDecoderBlock2D"]] = ["UpDecoderBlock2D"]
    layers_per_block: Layers = 1
    latent_channels: Annotated[int, Field(gt=0, le=1_024)] = 4
    sample_size: Annotated[int, Field(gt=0, le=65_536)] = 32
    scaling_factor: Scale = 0.18215
    shift_factor: Annotated[float, Field(ge=-1_000, le=1_000)] | None = None
    latents_mean: list[float] | None = None
    latents_std: list[Scale] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @model_validator(mode="after")
    def _blocks_agree(self):
        self.fits("down_block_types", self.down_block_types)
        self.fits("up_block_types", self.up_block_types)
        for key in ("latents_mean", "latents_std"):
            if (entries := getattr(self, key)) is not None and len(entries) != self.latent_channels:
                raise ValueError(f"{key} has {len(entries)} entries for {self.latent_channels} latent_channels")
        return self


class _OfTransformers(Configuration):
    """The keys that transformers reads of any configuration."""

    architectures: list[str] | None = None
    transformers_version: str | None = None
    id2label: dict[str, str] | None = None
    num_labels: Annotated[int, Field(ge=0, le=10_000)] | None = None  # transformers makes a name for each
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    torch_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    output_hidden_states: Literal[False] = False
    output_attentions: Literal[False] = False
    return_dict: Literal[True] = True
    use_return_dict: Literal[True] = True
    chunk_size_feed_forward: Literal[0] = 0
    is_encoder_decoder: Literal[False] = False


class TextEncoder(_OfTransformers):
    """text_encoder/config.json: a CLIP text tower."""

    vocab_size: Annotated[int, Field(gt=0, le=10_000_000)]
    hidden_size: Width
    intermediate_size: Width
    projection_dim: Width = 512
    num_hidden_layers: Layers
    num_attention_heads: Width
    max_position_embeddings: Width = 77
    hidden_act: Literal["quick_gelu", "gelu", "gelu_new", "relu", "silu"] = "quick_gelu"
    layer_norm_eps: Small = 1e-5
    attention_dropout: Share = 0.0
    dropout: Share = 0.0
    initializer_range: Scale = 0.02
    initializer_factor: Scale = 1.0
    pad_token_id: Annotated[int, Field(ge=0)] | None = None
    bos_token_id: Annotated[int, Field(ge=0)] | None = None
    eos_token_id: Annotated[int, Field(ge=0)] = 49407
    model_type: Literal["clip_text_model"] = "clip_text_model"

    @property
    def pooled_width(self) -> int:
        """The width of the vector that a UNet takes with six picture sizes."""
        return self.projection_dim

    @model_validator(mode="after")
    def _sizes_agree(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"num_attention_heads {self.num_attention_heads} does not divide hidden_size")
        for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if (token := getattr(self, key)) is not None and token >= self.vocab_size:
                raise ValueError(f"{key} {token} is none of {self.vocab_size} in vocab_size")
        return self


class ChatGLM(_OfTransformers):
    """text_encoder/config.json: ChatGLM3, whose last state at the last token is the pooled vector."""

    num_layers: Layers = 28
    padded_vocab_size: Annotated[int, Field(gt=0, le=10_000_000)] = 65024
    hidden_size: Width = 4096
    ffn_hidden_size: Width = 13696
    kv_channels: Annotated[int, Field(gt=0, le=65_536, multiple_of=4)] = 128
    num_attention_heads: Width = 32
    seq_length: Annotated[int, Field(ge=256, le=65_536)] = 2048  # the pipeline pads prompts to 256
    hidden_dropout: Share = 0.0
    attention_dropout: Share = 0.0
    layernorm_epsilon: Small = 1e-5
    rmsnorm: bool = True
    apply_residual_connection_post_layernorm: bool = False
    post_layer_norm: bool = True
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    multi_query_attention: bool = False
    multi_query_group_num: Width = 1
    apply_query_key_layer_scaling: bool = True
    attention_softmax_in_fp32: bool = True
    fp32_residual_connection: bool = False
    original_rope: bool
    quantization_bit: Literal[0] = 0
    pre_seq_len: None = None

    @property
    def pooled_width(self) -> int:
        """The width of the vector that a UNet takes with six picture sizes."""
        return self.hidden_size

    @model_validator(mode="after")
    def _heads_share_keys(self):
        if self.multi_query_attention and self.num_attention_heads % self.multi_query_group_num:
            raise ValueError(f"multi_query_group_num {self.multi_query_group_num} does not divide num_attention_heads")
        return self


class TokenizerOfPipeline(Configuration):
    """tokenizer/tokenizer_config.json of a pipeline that says how many tokens it reads."""

    model_max_length: Annotated[int, Field(ge=3)] | None = None
    tokenizer_class: str | None = None
    backend: str | None = None
    bos_token: Token = None
    eos_token: Token = None
    unk_token: Token = None
    pad_token: Token = None


class Tokenizer(TokenizerOfPipeline):
    """tokenizer/tokenizer_config.json."""

    model_max_length: Annotated[int, Field(ge=3)]  # of some a number beyond any prompt


class Index(Configuration):
    """model_index.json: the pipeline's class, and library and class of every component."""

    class_name: str = Field(alias="_class_name")
    force_zeros_for_empty_prompt: bool = True
    requires_aesthetics_score: bool = False

    @model_validator(mode="after")
    def _is_no_refiner(self):
        if self.requires_aesthetics_score:
            raise ValueError(
                "requires_aesthetics_score true is of a refiner, which only finishes the pictures of another model; "
                "name that one, the base model"
            )
        return self

    def component(self, name: str) -> list[Any] | None:
        """Return [library, class] of a component that the pipeline has."""
        entry = (self.__pydantic_extra__ or {}).get(name)
        return entry if isinstance(entry, list) and entry[:1] not in ([], [None]) else None


CONFIGURATIONS: dict[str, type[Configuration]] = {  # by class; the file of another class may be any JSON object
    "UNet2DConditionModel": Denoiser,
    "HunyuanDiT2DModel": HunyuanDenoiser,
    "PixArtTransformer2DModel": PixArtDenoiser,
    "AutoencoderKL": Autoencoder,
    "CLIPTextModel": TextEncoder,
    "CLIPTextModelWithProjection": TextEncoder,
    "ChatGLMModel": ChatGLM,
}
