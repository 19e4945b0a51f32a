"""Writes models with random weights and a simple tokenizer in the real format, and the results of transformers with a model.

    python -m bench._serving.model make FOLDER llama-8b         weights (the GPU computes them), tokenizer and config.json
    python -m bench._serving.model shape FOLDER llama-405b 16   config.json for this number of layers, tokenizer, no weights
    python -m bench._serving.model exchange FOLDER OTHER        a copy of the model, in which two shards of one matrix or the
                                                                experts of two ranks are exchanged
    python -m bench._serving.model reference FOLDER OUT.json    log-probabilities of the prompts in 32 bit and in 16 bit, and
                                                                with the same exchange
    python -m bench._serving.model greedy FOLDER OUT.json       the likeliest tokens after each prompt, one after the other

The commands require a Python with torch and transformers.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PROMPTS, TOP, KEPT = 32, 20, 400
"The number of prompts; the number of compared log-probabilities per prompt; the number of stored ones. More are stored, so "
"that they include the first ones of an engine."
STEPS = 32
"The number of greedy tokens after each prompt."
TIMES = 3.0
"The bound for differences of log-probabilities, as a multiple of the difference of transformers between 16 and 32 bit."
VOCABULARY = 128256
SHAPES: dict[str, dict[str, float]] = {
    "llama-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-405b": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
    "small": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "initializer_range": 0.04,
    },
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 16},
    "moe": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "initializer_range": 0.04,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 512,
    },
}
"llama-*: the dimensions of Llama 3.1. small: uses the same kernels, and is written in seconds. tiny: for a rehearsal without "
"a GPU. moe: like Qwen3-MoE."
ROUTER = 0.2
"Standard deviation of a router's weights. It is large, so that the last chosen expert has a small weight. Rounding may "
"change the choice of the last expert, but this has only a small effect."
SHARDS = 8
SWAPPED = ("mlp.down_proj", 2)
"The negative control exchanges the two halves of this matrix in the middle layer. With two ranks, each rank has one half."
EXPERT_RANKS = 2
"For a model with experts, the negative control exchanges the two halves of the experts in the middle layer."


def prompts() -> list[list[int]]:
    """The prompts, each with 16 to 64 tokens. They are the same on every machine."""
    chance = random.Random(18)
    return [[chance.randrange(VOCABULARY - 256) for _ in range(chance.randint(16, 64))] for _ in range(PROMPTS)]


def config(shape: str, layers: int | None = None) -> dict[str, Any]:
    """The config.json of a model like Llama 3.1."""
    numbers = SHAPES[shape]
    if "num_experts" in numbers:
        return _with_experts(numbers)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "initializer_range": 0.02,
        **numbers,
        **({"num_hidden_layers": layers} if layers else {}),
        "num_key_value_heads": 8,
        "head_dim": int(numbers["hidden_size"] // numbers["num_attention_heads"]),
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": VOCABULARY - 256,
        "eos_token_id": VOCABULARY - 255,
    }


def _with_experts(numbers: Mapping[str, float]) -> dict[str, Any]:
    """The config.json of a model like Qwen3-MoE."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "torch_dtype": "bfloat16",
        **numbers,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
        "bos_token_id": VOCABULARY - 256,
        "eos_token_id": VOCABULARY - 255,
    }


def write_small(folder: Path, about: dict[str, Any]) -> None:
    """Write config.json, generation_config.json and a tokenizer. Its vocabulary is bytes, and pairs and triples of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = itertools.product(letters, letters)
    triples = ((first + second, third) for first, second, third in itertools.product(letters, letters, letters))
    merges = list(itertools.islice(itertools.chain(pairs, triples), VOCABULARY - 256 - len(letters)))
    words = [*letters, *(first + second for first, second in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{place}|>" for place in range(254))]
    tokenizer.add_special_tokens(special)
    assert tokenizer.get_vocab_size() == VOCABULARY, tokenizer.get_vocab_size()
    tokenizer.save(str(folder / "tokenizer.json"))
    texts: dict[str, dict[str, Any]] = {
        "config.json": about,
        "generation_config.json": {"bos_token_id": about["bos_token_id"], "eos_token_id": about["eos_token_id"]},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": special[0],
            "eos_token": special[1],
            "model_max_length": 131072,
        },
    }
    for name, text in texts.items():
        (folder / name).write_text(json.dumps(text, indent=1))


def make(folder: Path, shape: str) -> None:
    """Write random weights with a fixed seed, in shards, and the index of the shards."""
    import torch
    from safetensors.torch import save_file

    about = config(shape)
    write_small(folder, about)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(405)
    hidden, layer = about["hidden_size"], _matrices(about)
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    norms |= {f"self_attn.{name}_norm": about["head_dim"] for name in "qk" if "num_experts" in about}

    def numbers(*size: int, spread: float = about["initializer_range"]) -> Any:
        return (torch.randn(size, device=device, dtype=torch.float32) * spread).to(torch.bfloat16).cpu()

    parts: list[dict[str, Any]] = [{} for _ in range(SHARDS)]
    parts[0]["model.embed_tokens.weight"] = numbers(VOCABULARY, hidden)
    for place in range(about["num_hidden_layers"]):
        part = parts[place * SHARDS // about["num_hidden_layers"]]
        part |= {f"model.layers.{place}.{name}.weight": numbers(*size) for name, size in layer.items()}
        part |= {f"model.layers.{place}.{name}.weight": torch.ones(size, dtype=torch.bfloat16) for name, size in norms.items()}
        if "num_experts" in about:
            part[f"model.layers.{place}.mlp.gate.weight"] = numbers(about["num_experts"], hidden, spread=ROUTER)
    parts[-1] |= {"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16), "lm_head.weight": numbers(VOCABULARY, hidden)}
    names = [f"model-{place + 1:05}-of-{SHARDS:05}.safetensors" for place in range(SHARDS)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda part, name: save_file(part, folder / name, metadata={"format": "pt"}), parts, names))
    places = {tensor: name for part, name in zip(parts, names, strict=True) for tensor in part}
    total = sum(tensor.numel() * tensor.element_size() for part in parts for tensor in part.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _matrices(about: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Rows and columns of each matrix of a layer, except for the router."""
    hidden, heads = about["hidden_size"], about["num_attention_heads"]
    rows = about["num_key_value_heads"] * about["head_dim"]
    mlp = about.get("moe_intermediate_size", about["intermediate_size"])
    places = [f"mlp.experts.{place}" for place in range(about["num_experts"])] if "num_experts" in about else ["mlp"]
    return {
        **{f"self_attn.{name}_proj": (rows, hidden) for name in "kv"},
        "self_attn.q_proj": (heads * about["head_dim"], hidden),
        "self_attn.o_proj": (hidden, heads * about["head_dim"]),
        **{f"{place}.{name}_proj": (mlp, hidden) for place in places for name in ("gate", "up")},
        **{f"{place}.down_proj": (hidden, mlp) for place in places},
    }


def exchange(folder: Path, other: Path) -> None:
    """Write a copy of the model with exchanged halves of SWAPPED or of the experts. A test must refuse results of the copy."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, other)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    about = json.loads((folder / "config.json").read_text())
    layer = f"model.layers.{about['num_hidden_layers'] // 2}"
    if "num_experts" in about:
        half = about["num_experts"] // EXPERT_RANKS
        pairs = [
            [f"{layer}.mlp.experts.{place}.{name}_proj.weight" for place in (expert, expert + half)]
            for expert in range(half)
            for name in ("gate", "up", "down")
        ]
        part = load_file(folder / index[pairs[0][0]])  # one file has all tensors of a layer
        for first, second in pairs:
            part[first], part[second] = part[second], part[first]
        save_file(part, other / index[pairs[0][0]], metadata={"format": "pt"})
        return
    name, ranks = SWAPPED
    tensor = f"{layer}.{name}.weight"
    part = load_file(folder / index[tensor])
    part[tensor] = part[tensor].roll(part[tensor].shape[1] // ranks, 1)
    save_file(part, other / index[tensor], metadata={"format": "pt"})


def computed(model: Any) -> list[Any]:
    """For each prompt, the log-probabilities of every token after each token of the prompt: (tokens, vocabulary)."""
    import torch

    with torch.inference_mode():
        inputs = [torch.tensor([prompt], device=model.device) for prompt in prompts()]
        return [model(given).logits[0].float().log_softmax(-1) for given in inputs]


def inside(values: Any, prompt: list[int]) -> Any:
    """The log-probabilities of the prompt's tokens from the second one on, from a result of `computed`."""
    return values[range(len(prompt) - 1), prompt[1:]]


def reference(folder: Path, out: Path) -> None:
    """Write the results of transformers (see the module).

    `kept` has the 32-bit log-probabilities of the KEPT likeliest tokens after each prompt. `mean` and `max` are differences
    of the first TOP of them. `inside` has the 32-bit log-probabilities of the tokens of each prompt. `inside_mean` and
    `inside_max` are differences of these.
    """
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    half = computed(model)
    if "num_experts" in json.loads((folder / "config.json").read_text()):
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            exchange(folder, Path(scratch) / "exchanged")  # the names of experts' tensors depend on the version
            other = AutoModelForCausalLM.from_pretrained(Path(scratch) / "exchanged", dtype=torch.bfloat16)
        swapped = computed(other.to(device).eval())
    else:
        _roll(model)
        swapped = computed(model)
        _roll(model)
    whole = computed(model.float())

    known = [inside(values, prompt) for values, prompt in zip(whole, prompts(), strict=True)]

    def apart(others: list[Any]) -> dict[str, float]:
        tops = [values[-1].topk(TOP).indices for values in whole]
        gaps = torch.stack([(a[-1, top] - b[-1, top]).abs() for a, b, top in zip(others, whole, tops, strict=True)])
        theirs = [inside(values, prompt) for values, prompt in zip(others, prompts(), strict=True)]
        within = torch.cat([(a - b).abs() for a, b in zip(theirs, known, strict=True)])
        figures = {"mean": gaps.mean(), "max": gaps.max(), "inside_mean": within.mean(), "inside_max": within.max()}
        return {name: round(float(value), 5) for name, value in figures.items()}

    document = {
        "kept": [_best(values[-1], KEPT) for values in whole],
        "inside": [values.tolist() for values in known],
        "half": apart(half),
        "swapped": apart(swapped),
        "transformers": _version(),
    }
    out.write_text(json.dumps(document))
    sys.stdout.write(f"transformers in 16 bit: {document['half']}, with exchanged shards: {document['swapped']}\n")


def _roll(model: Any) -> None:
    """Exchange the halves of SWAPPED. A second call restores them."""
    import torch

    name, ranks = SWAPPED
    weight = model.model.layers[len(model.model.layers) // 2].get_submodule(name).weight
    with torch.no_grad():
        weight.copy_(weight.data.roll(weight.shape[1] // ranks, 1))


def _best(values: Any, count: int) -> dict[str, float]:
    best = values.topk(count)
    return dict(zip(map(str, best.indices.tolist()), best.values.tolist(), strict=True))


def greedy(folder: Path, out: Path) -> None:
    """Store the TOP likeliest tokens after each prompt in 32 bit. Append the first one to the prompt. Repeat STEPS times."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    document = []
    with torch.inference_mode():
        for prompt in prompts():
            tokens, steps = list(prompt), []
            for _ in range(STEPS):
                steps.append(_best(model(torch.tensor([tokens], device=device)).logits[0, -1].log_softmax(-1), TOP))
                tokens.append(int(next(iter(steps[-1]))))
            document.append(steps)
    out.write_text(json.dumps(document))


def differences(ours: Sequence[Mapping[str, float]], others: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The differences of the log-probabilities of common tokens, and `common`, the share of common tokens.

    With few common tokens, the differences are not reliable.
    """
    pairs = list(zip(ours, others, strict=True))
    gaps = [abs(value - other[token]) for mine, other in pairs for token, value in mine.items() if token in other]
    asked = sum(len(mine) for mine in ours)
    if not gaps:
        return {"mean": math.inf, "max": math.inf, "common": 0.0}
    return {"mean": round(sum(gaps) / len(gaps), 5), "max": round(max(gaps), 5), "common": round(len(gaps) / asked, 3)}


def _version() -> str:
    import transformers

    return str(transformers.__version__)


def main() -> None:
    """See the module."""
    verb, folder, *more = sys.argv[1:]
    if verb == "make":
        make(Path(folder), more[0])
    elif verb == "shape":
        write_small(Path(folder), config(more[0], int(more[1])))
    else:
        {"exchange": exchange, "reference": reference, "greedy": greedy}[verb](Path(folder), Path(more[0]))


if __name__ == "__main__":
    main()
