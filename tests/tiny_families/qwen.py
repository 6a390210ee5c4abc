"""What tiny teachers with a text encoder of the Qwen family share: a tokenizer with its chat template."""

from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer

PROMPTS = ("红苹果, 3d", "熊猫" * 300)  # the second is longer than any encoder reads
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT = (
    "{% for one in messages %}<|im_start|>{{ one.role }}\n{{ one.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> Qwen2Tokenizer:
    """Return a byte-level tokenizer without merges: 256 bytes and the marks of a chat."""
    words = {word: i for i, word in enumerate([*MARKS, *sorted(ByteLevel.alphabet())])}
    reader = Qwen2Tokenizer(vocab=words, merges=[], model_max_length=4096)
    reader.add_special_tokens({"additional_special_tokens": MARKS[1:]})
    reader.chat_template = CHAT
    return reader
