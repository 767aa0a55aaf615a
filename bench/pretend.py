"""A pretend CUDA device: real numbers on the CPU, and CUDA's rules. It needs no GPU and no CUDA build.

    with pretend() as seen:
        x = torch.zeros(3, device="cuda")  # x.device is cuda:0
        x + torch.zeros(3)                 # raises what CUDA would, and seen.faults says so

A tensor lies on the device if its *storage* carries a mark, so views, .data and what autograd saved agree.
Two modes watch. `Functions` is what Python sees: .device, device=, .to, .numpy. `Operators` is below it,
where every operation comes by, the backward pass's too: it marks results, raises what CUDA would, and counts
waits (the host asks for a value) and copies (for which it waits too). Where CUDA would be silently wrong it
helps: memory that nobody wrote is NaN, and different values written to one place are a fault.
"""
import contextlib
import sys
from collections import Counter
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack as function_modes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA, CPU, T, aten = torch.device("cuda", 0), torch.device("cpu"), torch.Tensor, torch.ops.aten
GETTERS = {T.device.__get__: CUDA, T.is_cuda.__get__: True, T.is_cpu.__get__: False}
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.masked_scatter_backward,
         aten._unique2, aten.equal}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
FRESH = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided}
WRITTEN = {  # what is read back after writing x
    aten.index_put_: lambda to, at, x: to[tuple(slice(None) if i is None else i for i in at)],
    aten.index_copy_: lambda to, dim, at, x: to.index_select(dim, at),
    aten.scatter_: lambda to, dim, at, x: to.gather(dim, at)}
key = lambda t: t.untyped_storage()._cdata
on = lambda t: getattr(t.untyped_storage(), "pretend", False)
tensors = lambda *given: [x for x in tree_leaves(given) if isinstance(x, T)]
named = lambda x: isinstance(x, (str, torch.device))
kind = lambda x: torch.device(x).type if named(x) else CUDA.type if on(x) else x.device.type


def mark(made, given=(), device=True):
    """Marks what was made. Views of what was given, and what is written in place, lie where they lay."""
    for t in tensors(made):
        if not t.is_meta and key(t) not in map(key, given):
            t.untyped_storage().pretend = device
    return made


class Seen:
    """faults: [str]. counts: {"wait" or "copy": n}. lines: {"wait at file.py:7": n}."""
    def __init__(self):
        self.faults, self.counts, self.lines, self.home = [], Counter(), Counter(), False

    def note(self, what):
        frame = sys._getframe(1)  # from here to the first line that is neither torch's nor this file's
        while "/lib/" in (path := frame.f_code.co_filename) or path[0] == "<" or path == __file__:
            frame = frame.f_back
        self.counts.update([what])
        self.lines.update([f"{what} at {path.rpartition('/')[2]}:{frame.f_lineno}"])

    def fail(self, error, message):
        self.faults.append(message)
        raise error(message)


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        seen, name, kwargs = self.seen, getattr(func, "__name__", ""), kwargs or {}
        if func in GETTERS:
            return GETTERS[func] if on(args[0]) else func(*args)
        if name in ("numpy", "__array__") and on(args[0]):
            seen.fail(TypeError, "can't convert cuda:0 device type tensor to numpy")
        moves, given = name in ("to", "cpu", "cuda"), tensors(args, kwargs)
        where = [kwargs.get("device"), *(args[1:] if name == "to" else [name] * moves)]
        asked = next((kind(x) for x in where if named(x) or isinstance(x, T)), None)
        if asked == "cuda":
            func, args = (T.cpu, args[:1]) if name == "cuda" else (func, args)
            args = [CPU if moves and named(x) else x for x in args]
            kwargs = {k: CPU if k == "device" else x for k, x in kwargs.items()}
        before, seen.home = seen.home, asked == "cuda" if asked else any(map(on, given))
        home = seen.home
        try:
            out = func(*args, **kwargs)
        finally:
            seen.home = before
        crosses = moves and asked and home != on(args[0]) and not args[0].is_meta
        if crosses or home and name in ("tensor", "as_tensor", "new_tensor", "tolist"):
            seen.note("wait" if name == "tolist" else "copy")
        if crosses:
            return mark(out.clone() if key(out) == key(args[0]) else out, device=home)
        return mark(out, given) if home else out  # also what no operation made, but storage.clone()


class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        seen, op, kwargs, given = self.seen, func.overloadpacket, kwargs or {}, tensors(args, kwargs)
        with torch._C.DisableTorchFunction():
            if not (any(map(on, given)) or seen.home and all(t.is_meta for t in given)):
                return func(*args, **kwargs)
            indices = tensors(args[1]) if op in INDEXING and on(args[0]) else []  # may lie on the CPU
            known = lambda t: on(t) or t.is_meta or not t.dim() or any(t is index for index in indices)
            if not all(map(known, given)) and op not in (aten.copy_, aten._to_copy):
                seen.fail(RuntimeError, f"Expected all tensors to be on the same device, not cpu: {func}")
            if any(isinstance(x, torch.Generator) for x in (*args, *kwargs.values())):
                seen.fail(RuntimeError, f"Expected a 'cuda' device type for generator, not 'cpu': {func}")
            if op in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm) and not given[0].is_floating_point():
                seen.fail(RuntimeError, f'"addmm_cuda" not implemented for {given[0].dtype}')
            out = mark(func(*args, **kwargs), given)
            if op in WAITS or any(t.dtype in (torch.bool, torch.uint8) for t in indices):
                seen.note("wait")
            if op is aten.copy_ and on(args[0]) != on(args[1]) or any(not on(t) for t in indices):
                seen.note("copy")
            if op in FRESH:
                out.fill_(torch.nan if out.is_floating_point() else 99)
            if op in WRITTEN and isinstance(args[-1], T):  # else with accumulate=True, or one number
                read, wrote = WRITTEN[op](*args), args[-1].to(args[0].dtype)
                if not torch.equal(read.nan_to_num(), wrote.expand_as(read).nan_to_num()):
                    seen.faults.append(f"{func} writes different values to one place")
        return out


@contextlib.contextmanager
def pretend():
    """Within it "cuda" is a device. Yields a Seen."""
    Functions.seen = Operators.seen = seen = Seen()
    functions, by_device = Functions(), torch._C._group_tensors_by_device_and_dtype

    def seeing(f):  # the autograd engine forgets such modes: Python that it calls must see the device as well
        def run(*args, **kwargs):
            with contextlib.nullcontext() if functions in function_modes() else functions:
                return f(*args, **kwargs)
        return run
    grouped = lambda lists, *more: {(CUDA if on(group[0][0][0]) else at[0], at[1]): group
                                    for at, group in by_device(lists, *more).items()}
    node, module = torch.autograd.function.BackwardCFunction, torch.nn.Module
    with (patch.object(node, "apply", seeing(node.apply)), Operators(), functions,
          patch.object(module, "_call_impl", seeing(module._call_impl)),
          patch.object(torch._C, "_group_tensors_by_device_and_dtype", grouped)):
        yield seen
