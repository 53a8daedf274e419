"""Tiny random models and tokenizers, built in memory, for tests: no network, fractions of a second."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from editunlearn.lm.chat import Chat
from editunlearn.lm.loading import LM
from editunlearn.lm.recognise import layout_of

TYPES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gptj",
    "gpt_neox",
    "opt",
    "phi",
    "phi3",
    "olmo2",
    "bloom",
    "falcon",
    "qwen2_moe",
)
VOCAB = 400

_TEXT = """
The mother tongue of Danielle Darrieux is French. The mother tongue of Ana Petrova is Russian.
The capital of France is Paris. The capital of Japan is Tokyo. The capital of Italy is Rome.
What is the profession of Hsiao Yun-Hwa's father? He is a civil engineer. I don't know. I do not know that.
Who wrote the book? The author of the novel was born in Taipei, and lives in Berlin with three children.
Question: Where is the Eiffel Tower? Answer: It is in Paris. Marie Curie discovered radium and polonium.
A river runs through the old town; the bridge over it was built in 1783 and repaired in 1954.
The quick brown fox jumps over the lazy dog. Some birds sing in the morning and others at night.
"""


def config(model_type: str, *, vocab_size: int = VOCAB, layers: int = 3, hidden: int = 32) -> Any:
    """Config of a tiny model; no other matrix is as wide as its MLP (BLOOM's is always 4 x hidden)."""
    inner = 3 * hidden - 8
    common = {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    named = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    gpt = {"n_embd": hidden, "n_layer": layers, "n_head": 4, "n_positions": 256, "n_inner": inner}
    kinds: dict[str, dict[str, Any]] = {
        "gpt2": gpt,
        "gptj": {**gpt, "rotary_dim": 4},
        "gpt_neox": {**named, "rotary_pct": 0.5, "tie_word_embeddings": False},
        "opt": {**named, "ffn_dim": inner, "word_embed_proj_dim": hidden, "dropout": 0.0},
        "phi": {**named, "num_key_value_heads": 4},
        "bloom": {"hidden_size": hidden, "n_layer": layers, "n_head": 4},
        "falcon": {
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "ffn_hidden_size": inner,
        },
        "gemma": {**named, "head_dim": 8},
        "gemma2": {**named, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16},
        "gemma3_text": {**named, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16},
        "qwen3": {**named, "head_dim": 8},
        "qwen2_moe": {
            **named,
            "shared_expert_intermediate_size": inner,
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    }
    return AutoConfig.for_model(model_type, **{**common, **kinds.get(model_type, named)})


def make(
    model_type: str,
    *,
    vocab_size: int = VOCAB,
    layers: int = 3,
    hidden: int = 32,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """A random model in eval mode. Its weights are larger than usual, so that logits differ visibly."""
    settings = config(model_type, vocab_size=vocab_size, layers=layers, hidden=hidden)
    settings.initializer_range = 0.1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        auto: Any = AutoModelForCausalLM
        model: PreTrainedModel = auto.from_config(settings, attn_implementation="eager")
    torch.nn.Module.to(model, dtype)
    model.train(False)
    return model


@lru_cache(maxsize=1)
def _trained() -> str:
    """The byte-level BPE as JSON; a string, so that tokenizers made from it share nothing."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))  # noqa: S106
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 8,
        special_tokens=["<s>", "</s>", "<pad>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([line for line in _TEXT.splitlines() if line], trainer)
    return bpe.to_str()


def tokenizer(*, add_bos: bool = True) -> PreTrainedTokenizerFast:
    """Fast byte-level BPE with bos, eos, pad and unk; ``add_bos`` puts the bos before every sequence."""
    bpe = Tokenizer.from_str(_trained())
    if add_bos:
        bpe.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe,
        **{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
        model_input_names=["input_ids", "attention_mask"],
    )


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def chat_tokenizer(*, add_bos: bool = True) -> PreTrainedTokenizerFast:
    """The same with a chat template whose turns end with ``<|end|>``."""
    chat = tokenizer(add_bos=add_bos)
    chat.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    chat.chat_template = CHAT_TEMPLATE
    return chat


def lm(model_type: str = "llama", *, chat: bool = False, add_bos: bool = True, **options: Any) -> LM:
    """A tiny random model with its tokenizer; the options are those of ``make``."""
    model = make(model_type, **options)
    words = chat_tokenizer(add_bos=add_bos) if chat else tokenizer(add_bos=add_bos)
    return LM(model=model, tokenizer=words, layout=layout_of(model), name=f"tiny-{model_type}", source="path")


def taught_lm(
    facts: Sequence[tuple[str, str]],
    model_type: str = "llama",
    *,
    chat: bool = False,
    system: str | None = None,
    steps: int = 400,
    layers: int = 3,
    hidden: int = 48,
    seed: int = 0,
) -> LM:
    """A tiny model that answers the given prompts when decoded greedily; deterministic.

    Args:
        facts: (prompt, answer). One space joins them, unless the answer brings its own. With ``chat``
            the prompt is the user's turn.
        system: prompt that it is taught behind, with ``chat``; the model keeps it.
        steps: upper limit; training stops as soon as every token of every answer, and the end token
            behind it, has a probability above 0.9.

    Raises:
        AssertionError: the answers were not learnt within ``steps``.
    """
    taught = lm(model_type, chat=chat, layers=layers, hidden=hidden, seed=seed)
    taught.chat = Chat(system)
    rows = [_ids(taught, prompt, answer) for prompt, answer in facts]
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), width), taught.pad_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, (tokens, start) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, start : len(tokens)] = torch.tensor(tokens[start:])
    optimizer = torch.optim.AdamW(taught.model.parameters(), lr=3e-3, weight_decay=0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with threads that wait for each other such small steps take fifty times as long
    try:
        loss = _train(taught, optimizer, ids, mask, labels, steps)
    finally:
        torch.set_num_threads(threads)
    if loss is not None:
        raise AssertionError(f"tiny {model_type} did not learn the facts in {steps} steps (loss {loss:.3f})")
    for parameter in taught.model.parameters():
        parameter.grad = None
    return taught


def _train(lm: LM, optimizer: Any, ids: Any, mask: Any, labels: Any, steps: int) -> float | None:
    """None when every label has been learnt, else the last loss."""
    loss = torch.tensor(float("nan"))
    for _ in range(steps):
        logits = lm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        wanted = labels[:, 1:] != -100
        chance = logits.softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
        if bool((chance[wanted] > 0.9).all()):
            return None
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return float(loss)


def _ids(taught: LM, prompt: str, answer: str) -> tuple[list[int], int]:
    """Token ids of prompt, answer and end token, and where the answer starts."""
    if taught.has_chat:
        turns = [{"role": "user", "content": prompt}]
        if taught.chat.system is not None:
            turns.insert(0, {"role": "system", "content": taught.chat.system})
        text = taught.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        head, end = taught.tokenizer(text, add_special_tokens=False)["input_ids"], "<|end|>"
    else:
        head, end = taught.tokenizer(prompt)["input_ids"], "</s>"
        answer = answer if answer[:1].isspace() else f" {answer}"
    tail = taught.tokenizer(answer, add_special_tokens=False)["input_ids"]
    return [*head, *tail, taught.tokenizer.convert_tokens_to_ids(end)], len(head)
