"""train.py --log: a run's metrics in TensorBoard, Weights & Biases or Trackio, besides metrics.jsonl."""
import importlib
from pathlib import Path


def open_log(args, step):
    """log(line): writes a step's metrics to --log. A resumed run goes on in the same place, with `step`."""
    numbers = lambda line: {name: x for name, x in line.items() if isinstance(x, (int, float))}
    if args.log == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(args.out, purge_step=step)

        def log(line):
            for name, x in numbers(line).items():
                writer.add_scalar(name, x, line["step"])
            writer.flush()
        return log
    tracker = importlib.import_module(args.log)  # both have the functions below
    same = {"id": args.id} if args.log == "wandb" else {}
    tracker.init(project="s2l-po", name=Path(args.out).name, resume="allow", config=vars(args), **same)
    return lambda line: tracker.log(numbers(line), step=line["step"])
