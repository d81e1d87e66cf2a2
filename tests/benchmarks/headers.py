"""Sharded LoRA-Null checkpoints of any number of layers that take no room: headers, and holes where the weights are."""

import json
from pathlib import Path

PROJECTIONS = tuple(f"self_attn.{x}_proj" for x in "qkvo") + tuple(f"mlp.{x}_proj" for x in ("gate", "up", "down"))
WIDTH, RANK = 4096, 16


def sharded(folder: Path, layers: int, shards: int = 20) -> Path:
    """Write such a checkpoint, whose weights are zeros that no disk holds."""
    folder.mkdir(parents=True)
    names = [f"model.layers.{i // 7}.{PROJECTIONS[i % 7]}" for i in range(layers)]
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file, header, at = f"model-{number + 1:05}-of-{shards:05}.safetensors", {}, 0
        for name in names[number::shards]:
            shapes = {
                "ALinear.weight": (WIDTH, RANK),
                "BLinear.weight": (RANK, WIDTH),
                "weight_residual": (WIDTH, WIDTH),
            }
            for part, shape in shapes.items():
                end = at + 2 * shape[0] * shape[1]
                header[f"{name}.{part}"] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
                at = end
        encoded = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(encoded).to_bytes(8, "little") + encoded)
            stream.truncate(8 + len(encoded) + at)
        weight_map |= dict.fromkeys(header, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "lora_r": RANK}))
    return folder
