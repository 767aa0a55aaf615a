"""The basement: what every trainer needs and no paper is about.

    answers.py     whether two final answers are equal
    tasks.py       the laptop's two tasks
    family.py      the laptop's two models
    problems.py    problems from files, and back
    checkpoint.py  Hugging Face directories, in and out
    nucleus.py     top-p
    text.py        prompts to tokens, tokens to text
    optimizer.py   AdamW in float32, and mini-batches in parts that fit into memory
    pool.py        an explorer whose rollouts lie in a file
    steps.py       which problems, which random numbers, how long it took
    survival.py    kill a run at any moment, and it goes on
    books.py       what a run measures, evaluates, writes and prints
    pictures.py    its curve, and its rollouts as a page
    log.py         TensorBoard, Weights & Biases, Trackio
    files.py       files that are whole or not there
    terminal.py    errors in one line, exit codes, devices

Every program imports this package before torch, which reads the variables below once, when it is imported.
"""
import atexit
import gc
import os

atexit.register(gc.freeze)  # else Python searches all that torch and transformers made before it ends
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # OpenMP's threads spin while they wait, and starve others
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # of many different shapes
