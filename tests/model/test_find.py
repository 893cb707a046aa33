"""Models are found, or refused with a fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.common.errors import UserError
from scripts.model.find import DEMO_MODEL, find_model


def test_local_folder_is_found(tiny_llama: Path) -> None:
    assert find_model(str(tiny_llama)) == tiny_llama


def test_hub_id_without_a_hub_names_the_demo_model_and_the_switch() -> None:
    with pytest.raises(UserError) as caught:
        find_model("nobody-at-all/no-such-model")

    message = str(caught.value)
    assert message.startswith("base_model_id: nobody-at-all/no-such-model is not in the local cache")
    assert DEMO_MODEL in message
    assert "python -m scripts.get_demo_model" in message
    assert "HF_HUB_OFFLINE=1" in message


@pytest.mark.parametrize("name", ["./no-such-folder", "/no/such/folder", "models/no-such-model"])
def test_missing_folder_is_not_looked_up_on_the_hub(name: str) -> None:
    with pytest.raises(UserError, match=r"no such model folder. Correct base_model_id"):
        find_model(name)


def test_folder_without_safetensors_is_refused(copy_of, tiny_llama: Path) -> None:
    folder = copy_of(tiny_llama)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    with pytest.raises(UserError, match=r"holds no \*\.safetensors"):
        find_model(str(folder))


def test_folder_without_config_is_refused(copy_of, tiny_llama: Path) -> None:
    folder = copy_of(tiny_llama)
    (folder / "config.json").unlink()

    with pytest.raises(UserError, match=r"holds no config\.json"):
        find_model(str(folder))


def test_adapter_given_as_base_is_refused(trained_adapter: Path) -> None:
    """transformers would load it as a base with something on top, and training would go wrong in silence."""
    with pytest.raises(UserError, match="is an adapter, wanted a base or merged model"):
        find_model(str(trained_adapter))
