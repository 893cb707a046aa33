"""Adapters that come and go while the server runs: by the admin's routes, or because a training has finished.

A new adapter is read and checked beside the running network, its columns are added between two steps of the engine, and
it must pass the proofs of a start before a request can name it. Another version of a served adapter stands beside the
old one until the last request of that has ended.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from scripts.common.artifacts import read_manifest
from scripts.common.errors import UserError, is_out_of_memory
from scripts.common.paths import resolve
from scripts.common.stages import ADAPTER_STAGES, BASE
from scripts.dataset.chat_format import ChatFormat
from serve.adapters import Models, Served, describe, prove_adapters, read_adapter
from serve.engine import Engine
from serve.errors import ServingError
from serve.metrics import Metrics
from serve.stacking import LoraWeights, members, rank_of, stack_layers, stacks_of, write_adapter

log = logging.getLogger(__name__)

WATCH_SECONDS = 2.0
DRAIN_POLL_SECONDS = 0.05

# Which version of a folder: when its manifest was written, and which file it is.
Stamp = tuple[int, int]


class LiveAdapters:
    """Add, replace and remove adapters, one after the other. Made and used in the event loop's thread."""

    def __init__(self, models: Models, engine: Engine, metrics: Metrics, root: str | None) -> None:
        self.models, self.engine, self.metrics = models, engine, metrics
        self.root = resolve(root).resolve() if root else None
        self._one_at_a_time = asyncio.Lock()
        self._versions = 0
        self._stamps = {path: _stamp(path) for path in self._served_paths()}
        self._dropping: set[asyncio.Task[None]] = set()
        for model in models.served.values():
            self._show(model)

    async def add(self, name: str, path: str) -> Served:
        """Serve the adapter in a folder below serve.adapters_root under a new name.

        Raises: ServingError with the reason when it is not served.
        """
        folder = self._below_root(path)
        async with self._one_at_a_time:
            self._check_name(name)
            self._stamps[folder] = _stamp(folder)
            return await self._serve(name, folder)

    async def remove(self, name: str) -> None:
        """Take an adapter away; requests that run with it end first.

        Raises: ServingError for the base, the default and what is not served.
        """
        async with self._one_at_a_time:
            model = self.models.served.get(name)
            if model is None:
                raise ServingError(404, "model_not_found", "no such model", "name")
            if model.path is None or name == self.models.default:
                what = "the default adapter" if model.path else "the base"
                raise ServingError(409, "not_removable", f"{name} is {what}, which is always served", "name")
            del self.models.served[name]
            self._show(model, served=False)
            self.metrics.forget(name)
        await self._drop(model)
        log.info("adapter %s is served no more", name)

    async def watch(self) -> None:
        """Serve what trainings finish, until this task is cancelled."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            for name, path in await asyncio.to_thread(self._finished):
                await self._take(name, path)

    async def _take(self, name: str, path: Path) -> None:
        """Serve a newly finished adapter; what was served before stays when it cannot be."""
        try:
            async with self._one_at_a_time:
                if name not in self.models.served or self.models.served[name].path != path:
                    self._check_name(name)
                await self._serve(name, path)
        except ServingError as error:
            log.error("adapter %s in %s is not served: %s", name, path, error)
        except Exception:
            log.exception("adapter %s in %s is not served", name, path)

    def _finished(self) -> list[tuple[str, Path]]:
        """Return folders that hold another adapter than when they were last looked at."""
        found = {model.path: model.name for model in list(self.models.served.values()) if model.path}
        if self.root:
            known = {path.resolve() for path in found}
            for manifest in sorted(self.root.glob("*/manifest.json")):
                folder = manifest.parent.resolve()
                if folder not in known and folder.is_relative_to(self.root) and _is_adapter(folder):
                    found[folder] = manifest.parent.name
        changed = []
        for path, name in found.items():
            stamp = _stamp(path)
            if stamp and stamp != self._stamps.get(path):
                self._stamps[path] = stamp  # before it is read: a change meanwhile is seen at the next look
                changed.append((name, path))
        return changed

    def _served_paths(self) -> list[Path]:
        return [model.path for model in self.models.served.values() if model.path]

    def _below_root(self, path: str) -> Path:
        if self.root is None:
            raise ServingError(403, "adapters_root_off", "adapters can be added only where serve.adapters_root is set")
        absent = ServingError(404, "adapter_not_found", "path: there is no such folder in serve.adapters_root", "path")
        try:
            folder = (self.root / path).resolve()
            there = folder.is_dir()
        except (OSError, ValueError, RuntimeError):  # a path that no system takes, or links in a circle
            raise absent from None
        if folder == self.root or not folder.is_relative_to(self.root):
            raise ServingError(403, "outside_adapters_root", "path: leads out of serve.adapters_root", "path")
        if not there:
            raise absent
        return folder

    def _check_name(self, name: str) -> None:
        if name == BASE or not name.isidentifier():
            raise ServingError(422, "invalid_name", f"name: wanted letters, digits and _, and not `{BASE}`", "name")
        if name in self.models.served:
            raise ServingError(
                409, "name_taken", "name: is served already; choose another or remove that first", "name"
            )
        if not self.models.rows.index.get(BASE) == 0:
            raise ServingError(409, "merged_model", "this server has a merged model, which takes no adapters")

    async def _serve(self, name: str, path: Path) -> Served:
        """Read, stack and prove an adapter, and let requests name it from then on."""
        try:
            manifest, weights = await asyncio.to_thread(read_adapter, self.models, path)
        except UserError as error:
            reason = str(error).replace(str(path), name)  # a client learns no path of this machine
            raise ServingError(422, "adapter_refused", reason, "path") from None
        before = self.models.served.get(name)
        self._versions += 1
        adapter = f"{name}@{self._versions}"  # no name has an @
        await self._stack(adapter, weights)
        self.models.chats[adapter] = ChatFormat.of(self.models.tokenizer, manifest)
        model = describe(name, path, manifest, adapter)
        self.models.served[name] = model
        if before:
            self._show(before, served=False)
            task = asyncio.create_task(self._drop(before))
            self._dropping.add(task)
            task.add_done_callback(self._dropping.discard)
        self._show(model)
        log.info("adapter %s is served (%s…)", name, manifest.sha256[:12])
        return model

    async def _stack(self, adapter: str, weights: dict[str, LoraWeights]) -> None:
        """Add an adapter's columns to the network in use and prove that they change its logits.

        Raises: ServingError when memory does not suffice or the proof fails; then all is as before.
        """
        network, rows = self.models.network, self.models.rows
        self._check_memory(weights)
        rows.take_block(adapter, rank_of(weights))
        try:
            await self.engine.run(rows.refresh)
            for stack in stacks_of(network):
                if stack.width < rows.width:
                    parts = await asyncio.to_thread(stack.grown, rows.width)
                    await self.engine.run(partial(stack.become, parts))
            fresh = set(weights) - members(network).keys()
            if fresh:
                await self.engine.run(partial(stack_layers, network, fresh, rows))
                await self.engine.run(self.engine.forward.renew)
            await self.engine.run(partial(write_adapter, network, rows, adapter, weights))
            await self.engine.run(partial(prove_adapters, self.models, [adapter]))
        except UserError as error:
            await self._free(adapter)
            reason = str(error).replace(adapter, adapter.partition("@")[0])
            raise ServingError(422, "adapter_refused", reason, "path") from None
        except Exception as error:
            await self._free(adapter)
            if is_out_of_memory(error):
                raise _no_memory() from None
            raise

    def _check_memory(self, weights: dict[str, LoraWeights]) -> None:
        """Refuse before anything is changed: an adapter's columns, and the largest stack twice while it grows."""
        network = self.models.network
        stacks = [stack.A.nbytes + stack.B.nbytes for stack in stacks_of(network)]
        fresh = [network.get_submodule(target) for target in set(weights) - members(network).keys()]
        copied = [sum(p.nbytes for p in module.parameters()) for module in fresh]
        needed = sum(layer.A.nbytes + layer.B.nbytes for layer in weights.values())
        needed += max([*stacks, *copied], default=0)
        on_gpu = network.device.type == "cuda"
        free = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available
        if needed > free:
            raise _no_memory()

    async def _drop(self, model: Served) -> None:
        """Give an adapter's columns back once no request uses them."""
        while self.engine.in_use(model.adapter):
            await asyncio.sleep(DRAIN_POLL_SECONDS)
        await self._free(model.adapter)
        self.models.chats.pop(model.adapter, None)

    async def _free(self, adapter: str) -> None:
        self.models.rows.blocks.pop(adapter, None)
        await self.engine.run(self.models.rows.refresh)
        await self.engine.run(partial(self.engine.prefixes.forget, adapter))

    def _show(self, model: Served, served: bool = True) -> None:
        """Show or hide an adapter in the metrics."""
        if model.path is None:
            return
        _, rank = self.models.rows.blocks.get(model.adapter, (0, 0))
        labels: Sequence[Any] = (model.name, rank, model.parent, model.sha256)
        if served:
            self.metrics.lora.labels(*labels).set(1)
        else:
            self.metrics.lora.remove(*labels)


def _stamp(path: Path) -> Stamp | None:
    try:
        facts = (path / "manifest.json").stat()
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_ino


def _is_adapter(folder: Path) -> bool:
    """Tell whether a folder claims to hold an adapter; whether it does is proven when it is read."""
    try:
        return read_manifest(folder, verify=False).stage in ADAPTER_STAGES
    except UserError:
        return False


def _no_memory() -> ServingError:
    return ServingError(409, "insufficient_memory", "there is not enough memory for another adapter")
