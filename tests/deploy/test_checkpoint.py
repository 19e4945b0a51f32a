"""Headers of safetensors files: what they say is planned, and files that say what is not so are refused in one sentence."""

from __future__ import annotations

import asyncio
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from deploy.fleet.calls import call
from deploy.planning import architectures, engines, models, shards
from deploy.planning.engines import Split
from deploy.planning.shapes import Model
from deploy.planning.tensors import Tensor
from deploy.remote import checkpoint
from gracefarm.errors import ConfigError, FetchError
from tests.deploy import kit
from tests.deploy.test_bad_input import prepared, told
from tests.deploy.test_init import deploy

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_hidden_layers": 3,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]},
}


def model(**changes: object) -> Model:
    return models.from_config({**CONFIG, **changes}, repo="a/b", revision="0" * 40, source="test")


def named(of: Model) -> dict[str, Tensor]:
    """Every tensor under its whole name, experts one by one."""
    found = {}
    for layer in range(of.layers):
        for tensor in architectures.layer_tensors(of, layer):
            for number in range(tensor.count):
                name = f"model.layers.{layer}.{tensor.name}".replace("*", str(number))
                found[name] = Tensor(name=name, shape=tensor.shape, dtype=tensor.dtype)
    for tensor in architectures.outer_tensors(of):
        name = tensor.name if tensor.name.startswith("lm_head") else f"model.{tensor.name}"
        found[name] = tensor
    return found


def write(path: Path, tensors: Mapping[str, Tensor], **changes: Any) -> None:
    """A file in the format, with zeros; `changes` to its header make it lie."""
    header, place = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [place, place + tensor.size]}
        place += tensor.size
    for name, change in changes.items():
        header[name] |= change
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(place))


def repository(folder: Path, of: Model, shards_: int = 3, config: Mapping[str, object] = CONFIG) -> dict[str, Tensor]:
    """config.json, index and shards."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = named(of)
    names = [f"model-{number + 1:05}-of-{shards_:05}.safetensors" for number in range(shards_)]
    where = {name: names[index % shards_] for index, name in enumerate(tensors)}
    for shard in names:
        write(folder / shard, {name: tensor for name, tensor in tensors.items() if where[name] == shard})
    (folder / checkpoint.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return tensors


def test_a_plan_from_headers_is_the_plan_from_config_json(tmp_path: Path) -> None:
    of = model()
    tensors = repository(tmp_path / "m", of)
    found = models.from_file(tmp_path / "m", repo="a/b", revision="0" * 40)
    assert found.stored
    vllm = engines.engine("vllm")
    for split in (Split(tp=1), Split(tp=2), Split(tp=2, expert_parallel=True)):
        assert shards.shares(vllm, found, split, (2, 1)) == shards.shares(vllm, of, split, (2, 1))
    (whole,) = shards.shares(vllm, found, Split(tp=1), (3,))[0]
    padding = (1024 - 1000) * 256 * 2 * 2
    assert whole.weights == sum(tensor.size for tensor in tensors.values()) + padding


def test_what_only_the_files_say_is_counted(tmp_path: Path) -> None:
    """A part for images, which every rank is taken to hold; layers that predict several tokens are not loaded."""
    of = model()
    tensors = repository(tmp_path / "m", of, 1)
    more = {
        "vision_tower.blocks.0.weight": Tensor(name="v", shape=(100, 10)),
        "model.layers.3.eh_proj.weight": Tensor(name="e", shape=(256, 512)),
    }
    (tmp_path / "m" / checkpoint.INDEX).unlink()
    (tmp_path / "m" / "model-00001-of-00001.safetensors").unlink()
    write(tmp_path / "m" / checkpoint.SINGLE, {**tensors, **more})
    found = models.from_file(tmp_path / "m", repo="a/b", revision="0" * 40)
    vllm = engines.engine("vllm")
    without, seen = (shards.shares(vllm, each, Split(tp=2), (2, 1)) for each in (of, found))
    assert [share.weights - 2000 for stage in seen for share in stage] == [
        share.weights for stage in without for share in stage
    ]


def test_scales_of_another_type_are_held_as_the_engine_holds_them(tmp_path: Path) -> None:
    of = model()
    folder = tmp_path / "m"
    repository(folder, of)
    for path in folder.glob("*.safetensors"):
        tensors = {
            name: Tensor(name=name, shape=shape, dtype="BF16" if name.endswith("weight_scale_inv") else dtype)
            for name, dtype, shape in checkpoint.header(path)
        }
        write(path, tensors)
    found = models.from_file(folder, repo="a/b", revision="0" * 40)
    vllm = engines.engine("vllm")
    assert shards.shares(vllm, found, Split(tp=2), (3,)) == shards.shares(vllm, of, Split(tp=2), (3,))


def test_an_index_without_its_files_is_checked_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    repository(folder, model())
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert models.from_file(folder, repo="a/b", revision="0" * 40) == model().model_copy(update={"source": str(folder)})
    index = json.loads((folder / checkpoint.INDEX).read_text())
    del index["weight_map"]["model.layers.1.mlp.experts.0.up_proj.weight"]
    (folder / checkpoint.INDEX).write_text(json.dumps(index))
    models.from_file(folder, repo="a/b", revision="0" * 40)  # seven of eight are there: the files will say it
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if ".mlp.gate." not in name}
    (folder / checkpoint.INDEX).write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"requires mlp.gate.weight of layer 1, but the index of the weights"):
        models.from_file(folder, repo="a/b", revision="0" * 40)


def lie(folder: Path, name: str, **change: object) -> None:
    """The header of the file that has a tensor says something else of it."""
    for path in folder.glob("*.safetensors"):
        tensors = {each: Tensor(name=each, shape=shape, dtype=dtype) for each, dtype, shape in checkpoint.header(path)}
        if name in tensors:
            write(path, tensors, **{name: change})


GATE = "model.layers.1.mlp.gate.weight"
DEEP = b'{"a":' * 100_000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data_offsets": [0, 10**12]}, f"the header places {GATE} at 0 to 1000000000000; this does not match the shape"),
        ({"data_offsets": [10**12, 10**12 + 4096]}, "this does not match the shape"),
        ({"data_offsets": [-4096, 0]}, "this does not match the shape"),
        ({"shape": [8, 255]}, "this does not match the shape"),
        ({"shape": [8, -256]}, "the impossible shape"),
        ({"dtype": "Q4"}, "the unknown type Q4"),
        ({"shape": "8"}, "the impossible shape"),
        ({"shape": [8, True]}, "the impossible shape"),
        ({"shape": None}, "the impossible shape null"),
        ({"dtype": ["BF16"]}, r'the unknown type \["BF16"\]'),
        *(
            ({"data_offsets": offsets}, f"{GATE} has the data_offsets .* instead of two numbers")
            for offsets in (7, None, [0], [0, 4096, 4096], ["0", "4096"], [0, 4096.0])
        ),
    ],
)
def test_a_header_that_lies(tmp_path: Path, change: dict[str, object], words: str) -> None:
    repository(tmp_path / "m", model())
    lie(tmp_path / "m", GATE, **change)
    with pytest.raises(ConfigError, match=words) as caught:
        models.from_file(tmp_path / "m", repo="a/b", revision="0" * 40)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is shorter than its header"),
        (b"\xff" * 64, "it is shorter than its header"),
        (struct.pack("<Q", 4) + b"[1]\n", "it is not a safetensors file"),
        (struct.pack("<Q", 8) + b'{"a": 1}', "a is 1 in the header instead of a JSON object"),
        (struct.pack("<Q", len(DEEP)) + DEEP, "it is not a safetensors file"),
        (struct.pack("<Q", 2) + b"{}" + b"more", "its tensors end at byte 10, but the file has 14"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, content: bytes, words: str) -> None:
    repository(tmp_path / "m", model())
    (tmp_path / "m" / "model-00002-of-00003.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        models.from_file(tmp_path / "m", repo="a/b", revision="0" * 40)


def test_an_index_that_names_files_that_are_missing(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    repository(folder, model())
    (folder / "model-00002-of-00003.safetensors").unlink()
    prepared(tmp_path)
    told(tmp_path, 3, "1 of 3 files are missing, such as model-00002-of-00003.safetensors", *plan_of(folder))
    index = json.loads((folder / checkpoint.INDEX).read_text())
    index["weight_map"] |= {GATE: "../../etc/passwd"}
    (folder / checkpoint.INDEX).write_text(json.dumps(index))
    told(tmp_path, 3, "outside of the folder", *plan_of(folder))
    for text in ("[]", '{"weight_map": 7}', "no", '{"weight_map": {"a": 7}}', DEEP.decode()):
        (folder / checkpoint.INDEX).write_text(text)
        told(tmp_path, 3, "is not an index of safetensors files", *plan_of(folder))


def test_an_index_and_files_that_do_not_match(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    repository(folder, model())
    prepared(tmp_path)
    index = json.loads((folder / checkpoint.INDEX).read_text())
    more = {**index["weight_map"], "vision.weight": "model-00002-of-00003.safetensors"}
    (folder / checkpoint.INDEX).write_text(json.dumps({"weight_map": more}))
    told(
        tmp_path,
        3,
        "lists the tensor vision.weight for this file, but the file does not contain this tensor",
        *plan_of(folder),
    )
    other = {name: f"other-{shard}" for name, shard in index["weight_map"].items()}
    (folder / checkpoint.INDEX).write_text(json.dumps({"weight_map": other}))
    told(tmp_path, 3, "3 of 3 files are missing, such as other-model-00001-of-00003.safetensors", *plan_of(folder))


def test_a_folder_as_the_model(tmp_path: Path) -> None:
    repository(tmp_path / "m", model())
    prepared(tmp_path)
    done = deploy(tmp_path, "plan", "--nodes", "1", "--engine", "vllm", "--model", "./m")
    assert done.returncode == 0, done.stderr
    assert "m at local, vllm" in done.stdout
    assert "not pinned" not in done.stdout
    for absent in ("./absent", "absent/", "~/absent", "a/b/absent", str(tmp_path / "absent")):
        told(tmp_path, 2, f"--model {absent}: no such file or folder", "plan", "--nodes", "1", "--model", absent)


def plan_of(folder: Path) -> tuple[str, ...]:
    return ("plan", "--nodes", "1", "--engine", "vllm", "--model", str(folder))


def test_files_of_another_model(tmp_path: Path) -> None:
    repository(tmp_path / "m", model(moe_intermediate_size=128))
    with pytest.raises(
        ConfigError,
        match=r"layer 1 should have 8 x mlp.experts.\*.gate_proj.weight \[256, 256\] according to config.json, "
        r"but the files have 8 x \[128, 256\]",
    ):
        models.from_file(tmp_path / "m", repo="a/b", revision="0" * 40)
    repository(tmp_path / "n", model(num_hidden_layers=2))
    with pytest.raises(ConfigError, match=r"the files have 2 layers, but config\.json has 3"):
        models.from_file(tmp_path / "n", repo="a/b", revision="0" * 40)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts_per_tok": 9}, "config.json has wrong numbers: 9 experts per token, but only 8 experts"),
        ({"num_key_value_heads": 3}, "8 attention heads are not divisible by 3 KV heads"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 layers, but num_hidden_layers is 3"),
        ({"text_config": {"layer_types": [], "num_hidden_layers": 3}}, "wrong numbers: layer_types has 0 layers"),
        ({"hidden_size": -4}, "the wrong value -4 for hidden_size: it must be greater than 0$"),
        ({"hidden_size": 10**12}, "the wrong value 1000000000000 for hidden_size: it must be less than or equal to"),
        ({"num_hidden_layers": 10**9}, "the wrong value 1000000000 for num_hidden_layers: it must be .* 1000$"),
        ({"num_attention_heads": 0, "head_dim": None}, "the wrong value 0 for num_attention_heads"),
        ({"num_attention_heads": "x"}, 'the wrong value "x" for num_attention_heads: it must be a valid integer$'),
        ({"vocab_size": "many"}, 'the wrong value "many" for vocab_size'),
        ({"vocab_size": ["many"] * 999}, '"many", .*… for vocab_size'),
        ({"decoder_sparse_step": 0}, "the wrong value 0 for decoder_sparse_step"),
        ({"head_dim": 0}, "the wrong value 0 for head_dim"),
        ({"head_dim": None, "hidden_size": 4}, "the wrong value 0 for head_dim"),
        ({"torch_dtype": "int7"}, 'the wrong value "int7" for torch_dtype'),
        ({"dtype": 16}, "the wrong value 16 for dtype"),
        ({"tie_word_embeddings": "no"}, 'the wrong value "no" for tie_word_embeddings: it must be a valid boolean$'),
        ({"quantization_config": []}, r"the wrong value \[\] for quantization_config"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 128]}}, "config.weight_block_size.0: it"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": 128}}, "config.weight_block_size: it must"),
        ({"quantization_config": {"quant_method": "fp8", "ignore": "lm_head"}}, 'the wrong value "lm_head" for quant'),
        ({"quantization_config": {"quant_method": "fp8", "ignore": ["re:("]}}, r"re:\( is not a regular expression"),
        ({"quantization_config": {"quant_method": "awq", "group_size": 0}}, "a group of 0 weights is not possible"),
    ],
)
def test_numbers_that_cannot_be(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        model(**changes)
    assert caught.value.remedy


def test_a_missing_number_is_named() -> None:
    for name in ("num_experts", "moe_intermediate_size", "hidden_size", "vocab_size", "max_position_embeddings"):
        with pytest.raises(ConfigError, match=f"config.json has no {name}"):
            model(**{name: None})
        with pytest.raises(ConfigError, match=f"config.json has no {name}"):
            models.from_config(
                {key: value for key, value in CONFIG.items() if key != name}, repo="a/b", revision="m", source="t"
            )


def test_this_file_writes_what_the_format_says(tmp_path: Path) -> None:
    """Against the header that is read: names, types, shapes, and nothing between them."""
    tensors = {"a": Tensor(name="a", shape=(3, 5)), "b": Tensor(name="b", shape=(), dtype="F32")}
    write(tmp_path / "x.safetensors", tensors)
    assert list(checkpoint.header(tmp_path / "x.safetensors")) == [("a", "BF16", (3, 5)), ("b", "F32", ())]
    assert (tmp_path / "x.safetensors").stat().st_size % 1 == 0
    assert sum(math.prod(tensor.shape) for tensor in tensors.values()) == 16


def test_a_node_reads_the_headers_of_what_was_brought(tmp_path: Path) -> None:
    """Over a real SSH connection, by the worker that is sent along."""
    repository(tmp_path / "m", model())

    async def ask(folder: Path) -> Model:
        async with kit.nodes(tmp_path, 1) as nodes:
            return models.with_tensors(model(), await call(nodes[0], "checkpoint.read", {"folder": str(folder)}))

    here = models.from_file(tmp_path / "m", repo="a/b", revision="0" * 40)
    assert asyncio.run(ask(tmp_path / "m")).stored == here.stored
    (tmp_path / "empty").mkdir()
    assert asyncio.run(ask(tmp_path / "empty")).stored is None  # not safetensors: only config.json
    lie(tmp_path / "m", GATE, shape=[8, 255])
    with pytest.raises(FetchError, match=f"the header places {GATE} at"):
        asyncio.run(ask(tmp_path / "m"))
