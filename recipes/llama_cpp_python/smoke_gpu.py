"""A small random Llama on the GPU, written here as a GGUF file, against the same model in plain torch in double precision.

Weights of four types, whose products are computed by different kernels; prompts of 1, 8 and 100 tokens and single tokens after
them; with and without flash attention. The reference uses the weights as they are after quantization. llama.cpp also quantizes
the activations of quantized products to 8 bits, which is most of the tolerance.
"""

import ctypes
import struct
import tempfile
from pathlib import Path

import llama_cpp
import torch

VOCABULARY, WIDTH, HEADS, KEYS, INNER, LAYERS, LENGTH = 96, 256, 4, 2, 512, 2, 128
DIM, EPSILON = WIDTH // HEADS, 1e-5
TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8}
TOLERANCES = {"F32": 1e-2, "F16": 1e-2, "Q4_0": 5e-2, "Q8_0": 5e-2}
worst = {}
"By what was compared: the largest error, and the tolerance."


def close(name, found, expected, tolerance):
    """Relative to the largest value."""
    assert torch.isfinite(found).all(), f"{name}: not finite"
    error = ((found.double() - expected).abs().max() / expected.abs().max()).item()
    assert error <= tolerance, f"{name}: off by {error:.2e} of the largest value, allowed are {tolerance:.0e}"
    worst[name] = (max(error, worst.get(name, (0.0, tolerance))[0]), tolerance)


def stored(weight, kind):
    """The bytes of a matrix in a GGUF file, and the matrix that they stand for."""
    if kind in ("F32", "F16"):
        kept = weight.to({"F32": torch.float32, "F16": torch.float16}[kind])
        return kept.numpy().tobytes(), kept.double()
    blocks = weight.reshape(-1, 32)
    if kind == "Q8_0":
        scale = (blocks.abs().amax(1, keepdim=True) / 127).half()
        numbers = (blocks / scale.float()).round().clamp(-127, 127)
        packed = numbers.to(torch.int8).view(torch.uint8)
    else:
        extreme = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
        scale = (extreme / -8).half()
        numbers = (blocks / scale.float()).round().clamp(-8, 7)
        nibbles = (numbers + 8).to(torch.uint8)
        packed = nibbles[:, :16] | nibbles[:, 16:] << 4
    data = torch.cat([scale.view(torch.uint8).reshape(-1, 2), packed], 1)
    return data.numpy().tobytes(), (numbers.double() * scale.double()).reshape(weight.shape)


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def entry(key, value):
    if isinstance(value, str):
        return text(key) + struct.pack("<I", 8) + text(value)
    return text(key) + (struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value))


def write(path, weights, kind):
    """The file, and its weights by name; vectors are always F32."""
    settings = {
        "general.architecture": "llama",
        "llama.context_length": LENGTH,
        "llama.embedding_length": WIDTH,
        "llama.block_count": LAYERS,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KEYS,
        "llama.attention.layer_norm_rms_epsilon": EPSILON,
        "llama.rope.dimension_count": DIM,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": VOCABULARY,
        "tokenizer.ggml.model": "no_vocab",
    }
    head = b"GGUF" + struct.pack("<IQQ", 3, len(weights), len(settings))
    head += b"".join(entry(key, value) for key, value in settings.items())
    body, kept = b"", {}
    for name, weight in weights.items():
        own = kind if weight.dim() == 2 else "F32"
        data, kept[name] = stored(weight, own)
        shape = weight.shape[::-1]  # the first number counts neighbours in memory
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, TYPES[own], len(body))
        body += data + bytes(-len(data) % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + body)
    return kept


def random_weights():
    shapes = {"token_embd.weight": (VOCABULARY, WIDTH), "output.weight": (VOCABULARY, WIDTH), "output_norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        block = {
            "attn_q": (WIDTH, WIDTH),
            "attn_k": (KEYS * DIM, WIDTH),
            "attn_v": (KEYS * DIM, WIDTH),
            "attn_output": (WIDTH, WIDTH),
            "ffn_gate": (INNER, WIDTH),
            "ffn_up": (INNER, WIDTH),
            "ffn_down": (WIDTH, INNER),
            "attn_norm": (WIDTH,),
            "ffn_norm": (WIDTH,),
        }
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    return {
        name: torch.randn(shape) / shape[-1] ** 0.5 if len(shape) == 2 else 1 + torch.randn(shape) / 10
        for name, shape in shapes.items()
    }


def turned(x, base=10000.0):
    """Rotary positions of (length, heads, DIM): each pair of neighbours is turned by an angle."""
    angles = torch.arange(x.shape[0])[:, None] * base ** (-torch.arange(0, DIM, 2, dtype=torch.double) / DIM)
    cosine, sine = angles.cos()[:, None], angles.sin()[:, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], -1).flatten(-2)


def normed(x, weight):
    return x * (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * weight


def reference(weights, tokens):
    """Logits of shape (length, vocabulary)."""
    x, length = weights["token_embd.weight"][tokens], len(tokens)
    hidden = torch.ones(length, length).triu(1).bool()
    for layer in range(LAYERS):
        own = {name.split(".")[2]: weight for name, weight in weights.items() if name.startswith(f"blk.{layer}.")}
        y = normed(x, own["attn_norm"])
        q = turned((y @ own["attn_q"].T).reshape(length, HEADS, DIM))
        k = turned((y @ own["attn_k"].T).reshape(length, KEYS, DIM)).repeat_interleave(HEADS // KEYS, 1)
        v = (y @ own["attn_v"].T).reshape(length, KEYS, DIM).repeat_interleave(HEADS // KEYS, 1)
        scores = torch.einsum("thd,shd->hts", q, k) / DIM**0.5
        seen = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1)
        x = x + torch.einsum("hts,shd->thd", seen, v).flatten(1) @ own["attn_output"].T
        y = normed(x, own["ffn_norm"])
        x = x + (torch.nn.functional.silu(y @ own["ffn_gate"].T) * (y @ own["ffn_up"].T)) @ own["ffn_down"].T
    return normed(x, weights["output_norm.weight"]) @ weights["output.weight"].T


def decoded(context, tokens, start, batch):
    """Logits of the tokens, which begin at position `start`."""
    batch.n_tokens = len(tokens)
    for place, token in enumerate(tokens):
        batch.token[place], batch.pos[place], batch.logits[place] = token, start + place, 1
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
    assert llama_cpp.llama_decode(context, batch) == 0, "llama_decode fails"
    rows = [llama_cpp.llama_get_logits_ith(context, place) for place in range(len(tokens))]
    return torch.tensor([row[:VOCABULARY] for row in rows])


def run(path, tokens, prompt, flash):
    """Logits from the GPU: of the prompt at once, then of one token after the other."""
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 99
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
    assert model, "the model cannot be loaded"
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.flash_attn_type = LENGTH, LENGTH, LENGTH, flash
    context = llama_cpp.llama_init_from_model(model, settings)
    batch = llama_cpp.llama_batch_init(LENGTH, 0, 1)
    parts = [decoded(context, tokens[:prompt], 0, batch)]
    parts += [decoded(context, [token], prompt + number, batch) for number, token in enumerate(tokens[prompt:])]
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return torch.cat(parts)


@llama_cpp.llama_log_callback
def keep(_level, message, _data):
    messages.append(message.decode(errors="replace"))


torch.manual_seed(0)
messages = []
llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()
assert llama_cpp.llama_supports_gpu_offload(), "llama.cpp sees no GPU"
count = 0
with tempfile.TemporaryDirectory() as name:
    path = Path(name) / "model.gguf"
    for kind, tolerance in TOLERANCES.items():
        kept = write(path, random_weights(), kind)
        for prompt in (1, 8, 100):
            tokens = torch.randint(0, VOCABULARY, (prompt + 5,)).tolist()
            expected = reference(kept, tokens)
            for flash in (0, 1):
                close(f"logits, {kind}{', flash attention' * flash}", run(path, tokens, prompt, flash), expected, tolerance)
                count += 1
    assert any("offloaded 3/3 layers to GPU" in message for message in messages), "the layers are not on the GPU"

    # The comparison can fail: the model without its causal order is another one.
    try:
        close("", run(path, tokens, 100, 0), reference(kept, tokens[::-1]).flip(0), TOLERANCES["Q8_0"])
    except AssertionError:
        NEGATIVE_CONTROL = "the logits of the reversed text are refused"
        COMPARISONS = [{"name": name, "error": error, "tolerance": bound} for name, (error, bound) in worst.items()]
        print(f"{count} runs on {torch.cuda.get_device_name()} agree with torch")
    else:
        raise AssertionError("the comparison accepts the logits of another text")
