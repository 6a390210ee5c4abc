"""T5's place in a pipeline without T5, computed as one token instead of 256.

Without T5 the pipeline puts 256 zeros behind the tokens of the two CLIP towers. They are equal, and nothing tells a
context token its position, so they stay equal through all blocks: 256 keys of one value weigh in every softmax as one
key with log(256) added. One token and that bias give the stock network's outputs up to rounding, for a third of the
cost.
"""

import math

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor
from torch.nn import functional as F

NUM_ZEROS = 256  # the pipeline's `max_sequence_length`


class OneForAllZeros:
    """The stock joint attention, with the last context token standing for NUM_ZEROS."""

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask=None, **_):
        """Return the states of the picture and of the context after one joint attention, as the stock processor."""
        num_picture = hidden_states.shape[1]

        def heads(projected: Tensor, norm) -> Tensor:
            split = projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return split if norm is None else norm(split)

        query = [
            heads(attn.to_q(hidden_states), attn.norm_q),
            heads(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q),
        ]
        key = [
            heads(attn.to_k(hidden_states), attn.norm_k),
            heads(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k),
        ]
        value = [heads(attn.to_v(hidden_states), None), heads(attn.add_v_proj(encoder_hidden_states), None)]
        query, key, value = (torch.cat(parts, dim=2) for parts in (query, key, value))
        bias = query.new_zeros(key.shape[2])
        bias[-1] = math.log(NUM_ZEROS)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.expand(1, 1, query.shape[2], -1))
        picture, context = mixed.transpose(1, 2).flatten(2).split([num_picture, mixed.shape[2] - num_picture], dim=1)
        return attn.to_out[0](picture), context if attn.context_pre_only else attn.to_add_out(context)


def use_one_zero(denoiser: SD3Transformer2DModel) -> SD3Transformer2DModel:
    """Return the denoiser, which from now on takes contexts from `with_one_zero`."""
    denoiser.set_attn_processor(OneForAllZeros())
    return denoiser


def with_one_zero(context: Tensor) -> Tensor:
    """Return the towers' states (B, L, D) with one token of zeros behind them, (B, L + 1, D)."""
    return F.pad(context, (0, 0, 0, 1))
