"""What a program and its user say to each other: errors in one line, exit codes, the name of a device."""
import contextlib
import sys

import torch


# Decisions about CUDA's arithmetic, in this one place. None was measured, as no GPU was at hand.
torch.backends.cuda.enable_cudnn_sdp(False)  # plans anew for every shape, and ours hardly ever come twice
torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32, as on a CPU: for speed there is bf16
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # long sums are float32's


def pick_device(name):
    """`auto` takes CUDA, then Apple's MPS, then the CPU. ValueError for a device that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # which `meta` cannot give
        return str(probe.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None


def out_of_memory(error):
    """Whether an exception says that memory ran out. Every allocator has its own words for it."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate", "ALLOC_FAILED"))


@contextlib.contextmanager
def one_line(program, users=(ValueError, OSError), memory="sample fewer rollouts at once, or shorter ones"):
    """Within it an error that the user can mend ends the program with one line. Exit codes: 2 bad input or a
    full disk, 3 out of memory, 4 NaN, 130 Ctrl-C. All other errors are bugs, and keep their traceback. What a
    terminal cannot show is spelled out, where it would be an error of its own."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if isinstance(error.__context__, OSError) and isinstance(error, RuntimeError):
            error = error.__context__  # a full disk, over which torch.save raises its own
        if isinstance(error, FloatingPointError):
            code, why = 4, error
        elif out_of_memory(error):
            code, why = 3, f"out of memory: {memory}"
        elif isinstance(error, users):
            code, why = 2, error
        else:
            raise
        fail(program, code, why)


def fail(program, code, error):
    print(f"{program}: error: {str(error).partition(chr(10))[0]}", file=sys.stderr)
    sys.exit(code)
