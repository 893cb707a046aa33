"""What a model leaves to chance in training, found wherever a family keeps it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from scripts.training.dropout import dropout_of, switch_off_dropout

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, dict] = {
    "falcon": {"hidden_dropout": 0.3},  # read from the configuration at each pass
    "xglm": {
        "d_model": 32,
        "num_layers": 2,
        "attention_heads": 4,
        "ffn_dim": 64,
        "layerdrop": 0.3,
        "activation_dropout": 0.3,
    },
    "gpt_bigcode": {"attn_pdrop": 0.3, "resid_pdrop": 0.3},
    "phi": {"resid_pdrop": 0.3, "intermediate_size": 64},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_model_in_training_mode_computes_what_it_computes_in_evaluation_mode(family: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SMALL | FAMILIES[family])))
    ids = torch.arange(20)[None]
    one, other = (model.train()(ids).logits for _ in range(2))
    assert not torch.equal(one, other), "chance must have been at work"
    assert 0.3 in dropout_of(model).values()

    switch_off_dropout(model)

    assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)
    assert not dropout_of(model)
