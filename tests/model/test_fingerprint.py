"""A base is known by what it computes."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from scripts.model.fingerprint import base_fingerprint
from tests.support.models import load


def test_fingerprint_ignores_folder_and_float_type(copy_of, tiny_llama: Path, tmp_path: Path) -> None:
    model = load(tiny_llama)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")

    assert base_fingerprint(copy_of(tiny_llama)) == base_fingerprint(tiny_llama)
    assert base_fingerprint(tmp_path / "bf16") == base_fingerprint(tiny_llama)


def test_fingerprint_ignores_how_weights_are_cut_into_files(tiny_llama: Path, tmp_path: Path) -> None:
    load(tiny_llama).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")

    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert base_fingerprint(tmp_path / "sharded") == base_fingerprint(tiny_llama)


def test_fingerprint_tells_other_weights_of_the_same_shape(tiny_llama: Path, tmp_path: Path) -> None:
    """An instruct variant has the configuration of its base and other weights."""
    model = load(tiny_llama)
    with torch.no_grad():
        for parameter in model.model.layers[1].parameters():
            parameter.mul_(1.05)
    model.save_pretrained(tmp_path / "tuned")

    assert base_fingerprint(tmp_path / "tuned") != base_fingerprint(tiny_llama)


def test_fingerprint_tells_another_configuration(copy_of, tiny_llama: Path) -> None:
    folder = copy_of(tiny_llama)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 0.5}))

    assert base_fingerprint(folder) != base_fingerprint(tiny_llama)
