"""The basement: what every trainer needs and no paper is about.

    checkpoint.py  Hugging Face directories in and out    survival.py  kill a run at any moment, and it goes on
    text.py        prompts to tokens, tokens to text      books.py     what a run measures, evaluates, reports
    answers.py     whether two final answers are equal    pictures.py  its curve, and its rollouts as a page
    family.py      the laptop's two models                pool.py      an explorer's rollouts from a file
    log.py         TensorBoard, Weights & Biases, Trackio

Every program imports this package before torch, which reads the variable below once, when it is imported.
"""
import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # OpenMP's threads spin while they wait, and starve others
