"""How many kernels a training step launches, how often the host waits, what is kept for the backward.

What counts as a launch is a call of ATen that writes: one with a result in new memory, or one that
changes an argument. Views do neither, and an allocation alone writes nothing. A call may launch
several kernels, and a call of our operator (deformable::...) counts as one.

A TorchDispatchMode sees these calls on a CPU and on a GPU alike. It is part of the state that the
backward engine hands to its threads (ATen/ThreadLocalState.h): PyTorch's FlopCounterMode relies on
that too. The profiler would count kernels on a GPU alone.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.deformable_detr import DeformableDETR
from tools.benchmarks.parts import Parts
from tools.benchmarks.steps import TrainingStep, prepare
from util.config import Config

MOST_FREQUENT = 10
REST, UPDATE = "rest of the forward", "update"
# which fill nothing
ALLOCATIONS = ("aten::empty", "aten::new_empty", "aten::_pin_memory")
COPIES = ("aten::copy_", "aten::_to_copy")
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class LaunchCounter(TorchDispatchMode):
    """Counts calls on a device: launches by part and name, and by part the waits of the host."""

    def __init__(self, device: torch.device, parts: Parts) -> None:
        super().__init__()
        self._device, self._parts = device.type, parts
        self.launches: dict[str, Counter[str]] = defaultdict(Counter)
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        result = func(*args, **(kwargs or {}))
        name, part = func.name().partition(".")[0], self._parts.current
        given, made = _tensors((args, kwargs)), _tensors(result)
        if any(tensor.device.type == self._device for tensor in given + made):
            self.launches[part][name] += self._launches(func, name, given, made)
            self.waits[part] += _waits(func, name, args, kwargs or {}, given + made)
        return result

    def _launches(self, func: Any, name: str, given: list[Tensor], made: list[Tensor]) -> bool:
        if name.startswith(ALLOCATIONS) or torch.Tag.inplace_view in func.tags:
            return False
        # by memory and not by the schema alone: aten::_unsafe_view is a view that does not say so
        known = {tensor.untyped_storage()._cdata for tensor in given}
        new = (one.untyped_storage()._cdata for one in made if one.device.type == self._device)
        # what a call changes is its first argument
        changed = any(tensor.device.type == self._device for tensor in given[:1])
        return (func._schema.is_mutable and changed) or not known.issuperset(new)


def _waits(func: Any, name: str, args: Any, options: dict[str, Any], tensors: list[Tensor]) -> bool:
    """Whether the host waits for the device: for a number, for a shape, or for the end of a copy."""
    if name in COPIES:
        asynchronous = options.get("non_blocking", args[2] if len(args) > 2 else False)
        return len({tensor.device.type for tensor in tensors}) > 1 and not asynchronous
    # a mask must be counted before the shape is known; an index must not
    if name in INDEXING:
        return any(index.dtype in (torch.bool, torch.uint8) for index in _tensors(args[1]))
    return not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}.isdisjoint(func.tags)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


class KeptMemory(saved_tensors_hooks):
    """The blocks of memory that autograd keeps for the backward: address -> bytes.

    What torch.utils.checkpoint keeps does not pass here.
    """

    def __init__(self) -> None:
        self._blocks: dict[int, int] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._blocks[storage.data_ptr()] = storage.nbytes()
        return tensor

    def without(self, own: Sequence[Tensor]) -> int:
        """Bytes of the blocks, each once, but for those of `own`."""
        addresses = {tensor.untyped_storage().data_ptr() for tensor in own}
        return sum(size for address, size in self._blocks.items() if address not in addresses)


def measure_launches(args: argparse.Namespace, config: Config) -> None:
    """Count the launches of a training step, and print them by part and by name."""
    device, (images, targets), config = prepare(args, config)
    step = TrainingStep(config, device, images, targets)
    step()  # the first also makes the optimiser's state
    parts, kept = Parts(), KeptMemory()
    counter = LaunchCounter(device, parts)
    names = [*_follow(step.model, parts), REST, "losses", "backward", UPDATE]
    with counter:
        with kept:
            with parts.part(REST):
                outputs = step.forward()
            with parts.part("losses"):
                total = step.loss(outputs)
        with parts.part("backward"):
            step.backward(total)
        with parts.part(UPDATE):
            step.update()

    # launches by part and by name
    rows = {name: (counter.launches[name].total(), counter.waits[name]) for name in names}
    launches, waits = (sum(column) for column in zip(*rows.values(), strict=True))
    rows["sum without the update"] = launches - rows[UPDATE][0], waits - rows[UPDATE][1]
    rows["sum"] = launches, waits
    print(f"{'part':28}{'launches':>9}{'waits':>7}")
    for name, row in rows.items():
        print(f"{name:28}{row[0]:9}{row[1]:7}")
    print("most frequent:")
    for name, count in sum(counter.launches.values(), Counter()).most_common(MOST_FREQUENT):
        print(f"    {name:40}{count:6}")
    if device.type == "cpu":
        print("waits: those for a number or a shape; on a GPU also those for copies")

    # what is there without a step does not count
    inputs = [images.tensors, images.mask, *(value for target in targets for value in target.values())]
    nbytes = kept.without([*step.model.parameters(), *step.model.buffers(), *inputs])
    print(f"kept for the backward: {nbytes / 2**20:.1f} MiB, parameters and inputs not counted")
    if config.transformer.checkpoint_encoder:
        print("(without the tokens between encoder layers, which --checkpoint_encoder keeps by itself)")


def _follow(model: DeformableDETR, parts: Parts) -> list[str]:
    """Follow the parts of the forward, and give their names."""
    backbone, position = model.backbone
    modules: dict[str, list[nn.Module]] = {
        "backbone": [backbone],
        "projection and positions": [*model.input_proj, position],
        "encoder": [model.transformer.encoder],
        "decoder": [model.transformer.decoder],
        "heads": [*model.class_embed, *model.bbox_embed],
    }
    for name, of_part in modules.items():
        # layers may share a head, which must count once
        for module in dict.fromkeys(of_part):
            parts.follow(module, name)
    return list(modules)
