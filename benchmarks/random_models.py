"""Random models in the form of Llama, and a tokenizer trained on the shipped text: all that costs depend on."""

from __future__ import annotations

from typing import Any

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "bos_token_id": 0, "eos_token_id": 1}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def tokenizer(size: int) -> Any:
    """Byte-level, of at most ``size`` words: the text may not have as many."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from editunlearn.facts.text import documents

    bpe = Tokenizer(models.BPE(unk_token=SPECIAL["unk_token"]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(SPECIAL.values()), show_progress=False)
    bpe.train_from_iterator(documents("general"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **SPECIAL)


def llama(shape: dict[str, Any], dtype: str, device: str = "cpu") -> Any:
    """A random model, made where it is to be."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    auto: Any = AutoModelForCausalLM
    torch.manual_seed(0)
    with torch.device(device):
        return auto.from_config(LlamaConfig(**{**HEADS, **shape}), dtype=getattr(torch, dtype)).eval()
