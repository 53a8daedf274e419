"""The Gemma tokenizer of a GGUF file, for versions of transformers that read it wrongly.

transformers 5.17 makes a unigram model of it, though the scores in the file are all alike: words then fall
apart into letters, without any error. It is a BPE whose merges follow the order of the vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's numbers for the kinds of token


def is_gemma(config: Any) -> bool:
    """True for a model that uses the Gemma tokenizer."""
    return str(config.model_type).startswith("gemma")


def merges_by_rank(backend: Any) -> bool:
    """True when a ``tokenizers.Tokenizer`` is a BPE that has merges, as Gemma's has to be."""
    model = json.loads(backend.to_str())["model"]
    return model["type"] == "BPE" and bool(model["merges"])


def gemma_merges(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a third, in the order of what they make; the longer left part first."""
    merges: list[tuple[str, str]] = []
    for token in sorted(vocab, key=vocab.__getitem__):
        cuts = [(token[:cut], token[cut:]) for cut in range(len(token) - 1, 0, -1)]
        merges += [(left, right) for left, right in cuts if left in vocab and right in vocab]
    return merges


def read_gemma_tokenizer(file: Path) -> Any:
    """Build the tokenizer from the vocabulary and the kinds of token that the file states.

    Returns:
        A ``transformers.GemmaTokenizer``, fast, without BOS put on yet.

    Raises:
        KeyError: the file has no vocabulary.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken
    from transformers import GemmaTokenizer

    fields = GGUFReader(file).fields
    words: list[str] = fields["tokenizer.ggml.tokens"].contents()
    kinds: list[int] = fields["tokenizer.ggml.token_type"].contents()
    # The file has runs of spaces as they are; the tokenizer looks for them after its normaliser, as "▁▁".
    spelled = ["▁" * len(word) if word and not word.strip(" ") else word for word in words]
    vocab = {word: index for index, word in enumerate(spelled)}

    def named(key: str, default: str) -> str:
        field = fields.get(f"tokenizer.ggml.{key}_token_id")
        return words[int(field.contents())] if field is not None else default

    make: Any = GemmaTokenizer
    tokenizer = make(
        vocab=vocab,
        merges=gemma_merges(vocab),
        bos_token=named("bos", "<bos>"),
        eos_token=named("eos", "<eos>"),
        unk_token=named("unknown", "<unk>"),
        pad_token=named("padding", "<pad>"),
    )
    both = list(zip(words, kinds, strict=True))
    control = [AddedToken(word, special=True, normalized=False) for word, kind in both if kind == _CONTROL]
    own = [word for word, kind in both if kind == _USER_DEFINED and word in vocab]
    tokenizer.backend_tokenizer.add_special_tokens(control)
    tokenizer.backend_tokenizer.add_tokens([AddedToken(word, normalized=False) for word in own])
    return tokenizer
