"""The tokenizers of models built here: one token a byte, one a tag; or one a letter of a task.

Byte-level BPE without merges: ASCII text has one token per character, any Unicode text comes back
(in normal form C once loaded from a Qwen2 folder), and no text is unknown. `<think>`, `</think>`,
`<answer>` and `</answer>` are one token each, and ordinary text (kept by `skip_special_tokens`),
because rewards read them. There is no beginning-of-sequence token. The chat template is the bare
text of the turns, so a question asked as a string and as one user turn are the same tokens.
"""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, EOS, MASK = "<pad>", "<eos>", "<mask>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'system' %}{{ '\\n' }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def build_tokenizer(max_length: int = 512) -> PreTrainedTokenizerFast:
    """A fast tokenizer of 262 tokens: pad, eos, 4 tags, 256 bytes.

    It is byte-level BPE, and names an unknown token it never emits, because transformers loads the
    tokenizer of any Qwen2 folder as `Qwen2Tokenizer`, which imposes the one and adds the other.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate((PAD, EOS, *TAGS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (PAD, EOS)]
    )
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=PAD,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
    )


def build_letter_tokenizer(alphabet: str, max_length: int = 512) -> PreTrainedTokenizerFast:
    """A fast tokenizer of pad, eos, mask and a token for each letter of `alphabet`; other letters
    are read as pad.

    Tokens that no text has are not harmless in a small model: Adam moves their rows of the head as
    far as any other, and completions that are pushed down push them up.
    """
    vocab = {token: i for i, token in enumerate((PAD, EOS, MASK, *alphabet))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (PAD, EOS, MASK)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        mask_token=MASK,
        unk_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )
