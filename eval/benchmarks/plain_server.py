"""The simple server that the benchmark compares with: PEFT, one `generate` at a time behind a lock.

It takes the part of /v1/generate that the benchmark needs and reads the same configuration. Not for use.

    uvicorn eval.benchmarks.plain_server:app --port 8001
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from scripts.common.config import DEFAULT_CONFIG, load_config
from scripts.common.machine import apply_machine, choose_machine, prepare_environment
from scripts.dataset.chat_format import ChatFormat, user_turn
from scripts.dataset.rendering import render_prompt
from scripts.model.adapter import load_adapter
from scripts.model.base import load_base, load_tokenizer
from scripts.model.find import find_model


class Request(BaseModel):
    prompt: str
    adapter: str
    max_new_tokens: int
    stream: bool = True


class Plain:
    """Base and adapters as PEFT holds them."""

    def __init__(self) -> None:
        config = load_config(os.environ.get("LLM_CONFIG", DEFAULT_CONFIG)).values
        prepare_environment(config)
        machine = choose_machine(config)
        apply_machine(machine)
        folder = find_model(config.base_model_id, config.base_model_revision)
        self.tokenizer = load_tokenizer(folder)
        names = {**config.serve.adapters, "dpo": config.serve.adapter_path or ""}
        first, *others = names
        self.model = load_adapter(load_base(folder, config, machine), names[first], name=first)
        for name in others:
            self.model.load_adapter(names[name], adapter_name=name)
        self.model.eval()
        self.lock = threading.Lock()

    def stream(self, request: Request) -> Iterator[str]:
        """Generate one answer while everybody else waits."""
        import torch
        from transformers import TextIteratorStreamer

        from scripts.model.generation import decoding_greedily

        ids = torch.tensor([render_prompt(ChatFormat(self.tokenizer), user_turn(request.prompt))])
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        out: list[Any] = []

        def generate() -> None:
            if request.adapter != "base":
                self.model.set_adapter(request.adapter)
            with torch.inference_mode(), decoding_greedily(self.model, self.tokenizer):
                out.append(
                    self.model.generate(
                        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.max_new_tokens,
                        streamer=streamer,
                    )
                )  # fmt: skip

        with self.lock:
            if request.adapter == "base":
                with self.model.disable_adapter():
                    yield from self._pieces(generate, streamer)
            else:
                yield from self._pieces(generate, streamer)
        usage = {"completion_tokens": len(out[0][0]) - ids.shape[1]}
        yield f"data: {json.dumps({'finish_reason': 'stop', 'usage': usage})}\n\ndata: [DONE]\n\n"

    def _pieces(self, generate: Any, streamer: Any) -> Iterator[str]:
        thread = threading.Thread(target=generate)
        thread.start()
        for piece in streamer:
            if piece:
                yield f"data: {json.dumps({'text': piece})}\n\n"
        thread.join()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Load before the first request."""
    app.state.plain = Plain()
    yield


app = FastAPI(lifespan=lifespan)


@app.post("/v1/generate")
def generate(request: Request) -> StreamingResponse:
    """Stream one answer."""
    return StreamingResponse(app.state.plain.stream(request), media_type="text/event-stream")


@app.get("/health/ready")
def ready() -> dict[str, str]:
    """Answer once the model is loaded."""
    return {"status": "ready"}
