"""Models without their numbers: what a piece of PyTorch holds at its peak, found by running it on nothing.

Floating-point tensors are fake here: they have shapes and no data, so a model of any size takes no memory and no time
to multiply. Integers and booleans are real and small, so that code whose shapes depend on them (which positions are
answers, which tokens are hard) runs as it stands.

Knows PyTorch, and how bitsandbytes holds a linear layer in NF4. Leaves to others which code is run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

BLOCK, NESTED_BLOCK = 64, 256  # of NF4: weights that share a scale, and scales that share one
SMALL = 32 * 2**20  # bytes: larger blocks a C library gives back to the system at once
PICKING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}


class _RealIntegers(TorchDispatchMode):
    """Runs for real what has integers and booleans alone, so that a mask which picks from fake tensors has a count."""

    def __init__(self, told: Callable[[Tensor], None]):
        """`told` hears of every fake tensor that is made."""
        super().__init__()
        self.told = told

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation; its result is told."""
        result = self._run(func, args, kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, FakeTensor):
                self.told(leaf)
        return result

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(isinstance(tensor, FakeTensor) for tensor in given):
            if func in PICKING:
                args = (args[0], [place for index in args[1] for place in _places(index)], *args[2:])
            if func is torch.ops.aten._local_scalar_dense.default:
                return 1.0  # a number that is checked or logged
            return func(*args, **kwargs)
        with _disable_current_modes():
            result = func(*args, **kwargs)
        floats = any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in tree_leaves(result))
        return func(*args, **kwargs) if floats else result


def _places(index: Any) -> list[Any]:
    """An index, or for a real mask the places it picks, as many as it has axes."""
    if not isinstance(index, Tensor) or isinstance(index, FakeTensor) or index.dtype != torch.bool:
        return [index]
    with _disable_current_modes():
        return list(index.nonzero(as_tuple=True))


class _Packed(torch.autograd.Function):
    """A product with weights that are unpacked for it, in forward and again in backward, as bitsandbytes does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        return x @ layer.unpacked(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.unpacked(grad.dtype), None


class PackedLinear(bitsandbytes.nn.Linear4bit):
    """Stands for bitsandbytes' layer in NF4, whose weights cannot be made of fake tensors."""

    def __init__(self, base: nn.Linear, compute_dtype: torch.dtype):
        """Take the place of `base`."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = base.in_features, base.out_features, base.bias
        size = base.weight.numel()
        packed: Any = nn.Parameter(torch.empty(size // 2, 1, dtype=torch.uint8), requires_grad=False)
        packed.compress_statistics, packed.quant_type = True, "nf4"  # peft asks
        self.weight = packed
        self.scales = nn.Buffer(torch.empty(size // BLOCK, dtype=torch.uint8))
        self.scales_of_scales = nn.Buffer(torch.empty(-(-size // BLOCK // NESTED_BLOCK)))
        self.compute_dtype = compute_dtype

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weights [out, in], beside the scales they are made with."""
        scales = self.scales.float()
        weight = scales.new_empty(self.out_features, self.in_features, dtype=self.compute_dtype)
        return weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] to [..., out]."""
        out: Tensor = _Packed.apply(x.to(self.compute_dtype), self)
        return (out if self.bias is None else out + self.bias.to(out.dtype)).to(x.dtype)


def config_of(values: Mapping[str, Any], layers: int) -> Any:
    """A checkpoint's config, of so many layers."""
    values = {**values, "num_hidden_layers": layers}
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][:layers]
    return AutoConfig.for_model(values.pop("model_type"), **values)


def model_of(values: Mapping[str, Any], layers: int, dtype: torch.dtype, nf4: bool) -> PreTrainedModel:
    """A checkpoint with `layers` layers; call it where tensors are fake. Its head stays whole in NF4, too."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config_of(values, layers), dtype=dtype)
    if nf4:
        head = model.get_output_embeddings()
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and module is not head:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, PackedLinear(module, dtype))
        model.is_loaded_in_4bit = True  # type: ignore[assignment]
    return model


class Peak:
    """Runs code on fake tensors and says how much is alive.

    Attributes:
        alive: bytes now.
        most: bytes at most, so far.
        most_small: of blocks smaller than `SMALL` made since, bytes at most.
    """

    def __init__(self) -> None:
        """Nothing is alive yet."""
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._seen = WeakIdKeyDictionary()
        self.alive = self.most = self._small = self.most_small = 0

    def made(self, make: Callable[[], nn.Module]) -> Any:
        """A module that `make` makes, its parameters and buffers fake."""
        with torch.device("meta"):  # a module of fake tensors cannot be moved or cast, which makers do
            module = make()
        fake: dict[int, Tensor] = {}
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.device.type == "meta":
                        if id(tensor) not in fake:  # tied ones stay so
                            fake[id(tensor)] = self._like(tensor)
                        tensors[name] = fake[id(tensor)]  # type: ignore[assignment]
        return module

    def _like(self, tensor: Tensor) -> Tensor:
        with self._fake:
            made = torch.empty(tensor.shape, dtype=tensor.dtype)
            return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made

    def tensor(self, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A fake tensor."""
        with self._fake:
            return torch.empty(shape, dtype=dtype, device=device)

    def of(self, run: Callable[[], Any], *given: nn.Module | Tensor) -> int:
        """The most bytes alive while `run` runs, what is `given` (and the gradients of modules) among them."""
        for one in given:
            if isinstance(one, nn.Module):
                one.zero_grad(set_to_none=True)
            for tensor in (one,) if isinstance(one, Tensor) else (*one.parameters(), *one.buffers()):
                self._count(tensor)
        self.most, self._small, self.most_small = self.alive, 0, 0
        with self._fake, _RealIntegers(self._count):
            run()
        return self.most

    def _count(self, tensor: Tensor) -> None:
        """Count what a tensor lies in, once, until it is let go."""
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            size = storage.nbytes()
            self._seen[storage] = size
            weakref.finalize(storage, self._changed, -size)
            self._changed(size)

    def _changed(self, size: int) -> None:
        self.alive += size
        self.most = max(self.most, self.alive)
        if abs(size) < SMALL:
            self._small += size
            self.most_small = max(self.most_small, self._small)


def held(*modules: nn.Module) -> tuple[int, int]:
    """Bytes of all parameters and buffers, and how many numbers are trained."""
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}.values()
    return sum(t.numel() * t.element_size() for t in tensors), sum(t.numel() for t in tensors if t.requires_grad)
