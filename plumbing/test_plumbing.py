"""Every check of the basement, room by room.

    pytest plumbing/test_plumbing.py
"""
import io
import itertools
import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval as evaluation
import reward
import sample as sampling
import train as training
from model import merge_lora
from plumbing import answers, checkpoint, files, pictures, steps, survival, tasks
from plumbing import family as families
from plumbing.optimizer import Optimizer, micro_batches
from plumbing.problems import as_problem, load_problems, save_problems
from plumbing.text import encode, encode_all, pieces, render, stop_texts, turn_ends
from test_all import (  # noqa: F401
    LLAMA3, ROOT, edited_reward, equal, family, files_up_to, flags, hf_pair, main_here, read_metrics, resumes,
    tiny_model, train_here, unbroken, unwritten_memory_is_nan, weights)


# ---- __init__.py -------------------------------------------------------------------------------------------

WATCH = """
import os, runpy, sys
class Watch:
    def find_spec(self, name, *given):
        if name == "torch":
            os._exit(7 if "GOMP_SPINCOUNT" in os.environ else 1)
sys.meta_path.insert(0, Watch())
for program in sys.argv[1:]:
    if not os.fork():
        runpy.run_module(program)
        os._exit(0)
    print(program, os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_programs_let_idle_threads_sleep_soon(monkeypatch):
    """OpenMP's threads spin while they wait, and starve whatever else runs: 20 times slower. The variable is
    read once, when torch is imported."""
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    programs = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (
        *ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py"), *ROOT.glob("recipes/*.py"))
        if '__name__ == "__main__"' in path.read_text() and "trl" not in path.name]
    printed = subprocess.check_output([sys.executable, "-c", WATCH, *programs], cwd=ROOT, text=True)
    codes = dict(line.split() for line in printed.splitlines())
    assert codes.keys() == {*programs} and {*codes.values()} <= {"0", "7"}, codes  # 0: without torch
    assert {name for name in codes if codes[name] == "7"} >= {*"train eval sample plumbing.family".split()}


# ---- answers.py and tasks.py -------------------------------------------------------------------------------
# What is accepted wrongly is what training finds: one false yes is worth more to a model than a hundred right
# answers that are missed cost.

rows = lambda table: [row.split(" ¦ ") for row in table.strip().replace("\n", "; ").split("; ")]


@pytest.mark.parametrize("response, answer", [
    (r"so \boxed{12}", "12"), (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{}", ""),
    (r"\boxed{7} and \boxed{8", "7"), (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"\boxed 4$.", "4"), ("", None),
    (r"\boxed{5} \boxed{ }", "5"), (r"\boxed{\boxed{3}}", "3"), (r"#### 4 but \boxed{9}", "9"), ("####", ""),
    ("#### 5\n#### 72", "72"), ("Answer: 3\nmore", "3"), ("answer: $5$.", "$5$."), ("the number is 12", None),
    ("**Answer:**\n\n 42\nDone", "42"), ("Answer:\n\\[\n42\n\\]", "42"), (r"Answer: \(42\)", r"\(42\)"),
    (r"\boxed{42}. I put it within \boxed as you asked.", "42"), (r"It is within \boxed a box", None),
    (r"\boxed{42} stands within \boxed{...}.", "42"), (r"\boxed{1} \boxed{2}", "2"), (r"\boxed B", "B"),
    ("Answer: 42\n\nQuestion: And 1 + 1?\nAnswer: 2", "2"), ("Answer: 7\nUser: Sure?\n#### 42", "42")])
def test_the_final_answer_is_found(response, answer):
    assert answers.extract_answer(response) == answer


@pytest.mark.parametrize("form", [r"\boxed{%s}", "#### %s", "Answer: %s"])
@pytest.mark.parametrize("tag", ["think", "thinking"])
def test_a_thought_is_no_answer(tag, form):
    """If a guess within a thought is paid, a model learns to guess there and never to decide."""
    found = lambda text: answers.extract_answer(text.replace("think>", f"{tag}>").replace("?", form % 5))
    assert found("<think>Maybe ? so") is found("? <think>Or") is found("<think>?</think> Six.") is None
    assert found("?</think> Six.") is found("<think>1</think> <think>?") is None
    assert found("<think>1</think> ?") == found("Why not. </think>\n?") == found("?") == "5"


@pytest.mark.parametrize("given, truth", rows(r"""
42 million ¦ 42; 2 pi ¦ 2; 2 dozen ¦ 2; 42\text{ is wrong} ¦ 42; 5 or more ¦ 5; 18 or 19 ¦ 18; 4 2 ¦ 42
10, 100 ¦ 10100; 1, 234 ¦ 1234; 1 ,234 ¦ 1234; 32, 349 ¦ 32349; (32,349) ¦ 32349; $41$ $42$ ¦ 4142
$10$,$100$ ¦ 10100; 1,2 ¦ 12; 4\left 2 ¦ 42; 4\text{2} ¦ 42; 1\$2 ¦ 12; 1 and 234 ¦ 1234; 443_6 ¦ 443_5
443 ¦ 443_5; \frac{1}{2^{99}} ¦ \frac{1}{2^{98}}; 1+1/\mathrm{e} ¦ 1-1/\mathrm{e}; The answer is not 42 ¦ 42
\neq 42 ¦ 42; x \not= 42 ¦ 42; \geq 42 ¦ 42; 41 = 42 ¦ 42; 42 \approx 41 ¦ 42; 42 = 41 ¦ 42; AB ¦ BA; AB ¦ ab
x ¦ X; -2 ¦ -2,-2; 16,3,1 ¦ 16,3,1,1; 1,2,2 ¦ 1,1,2; \{1,1\} ¦ \{1\}; \log_2(2^{42}) ¦ 42
\sum_{k=1}^{42}1 ¦ 42; 2^{10}+5 ¦ 1029; 123*456 ¦ 56088; (16-3-4)*2 ¦ 18; 84/2 ¦ 42; 1 1/2 ¦ 11/2; 0.5% ¦ 0.5
1% ¦ 1; 5% ¦ 50%; 50% ¦ 5000%; 0.5% ¦ 50; 5 cents ¦ \$5; 5\text{ cm} ¦ 5\text{ cm}^2; 2xy ¦ 2; 5 cm inches ¦ 5
5%% ¦ 5; x=5 ¦ y=5; g(x)=2x ¦ f(x)=2x; 5=x ¦ x; x=5=6 ¦ 5; 12 ¦ 112; 3 ¦ -3; --3 ¦ 3; (3,4) ¦ (4,3)
[1,2) ¦ (1,2); \{1,2\} ¦ (1,2); 200, 100 ¦ 100, 200; 200,100 ¦ 100, 200; (1,2),(3,4) ¦ (1,2),(4,3)
(((((((1,2))))))) ¦ (((((((1,3))))))); ((((((1,234)))))) ¦ ((((((1234)))))); (a+5)(b+2) ¦ (a+2)(b+5)
\{1,234\} ¦ 1234; {1}{2} ¦ 12; {1},{234} ¦ 1234; x=1, x=234 ¦ 1234; 1 or 234 ¦ 1234; x=1, x=1 ¦ 1
x=1, y=-2 ¦ 1, -2; x=1 or y=-2 ¦ 1, -2; -2 or 1 ¦ 1, -2; \{-2, 1\} ¦ 1, -2; \{1, -2\} ¦ (1, -2)
1 or 2 ¦ 1,2,3; x<1 or x>2 ¦ x<1 and x>2; Ann or Bob ¦ Ann and Bob; \{3\} ¦ 3; \frac{-a+b}{c} ¦ -\frac{a+b}{c}
2\frac{-\pi}{6} ¦ 2-\frac{\pi}{6}; \begin{pmatrix}1/3\\2\end{pmatrix} ¦ \begin{pmatrix}-1/3\\2\end{pmatrix}
x^23 ¦ x^{23}; even ¦ neve; 1/0 ¦ 2/0; 1/2x ¦ \frac{1}{2x}; 1e999999999 ¦ 1; ٣ ¦ 3
12345678901234567 ¦ 12345678901234568"""))
def test_traps_23_30_answers_that_differ(given, truth):
    assert not answers.answers_equal(given, truth) and not answers.answers_equal(truth, given)
    assert answers.answers_equal(given, given) and answers.answers_equal(truth, truth)


@pytest.mark.parametrize("given, truth", rows(r"""
1,234 ¦ 1234; 10{,}000 ¦ 10000; 10,\!080 ¦ 10080; 18.00 ¦ 18; 025 ¦ 25; 10. ¦ 10; .5 ¦ 0.5; +5 ¦ 5; (5) ¦ 5
− 5 ¦ -5; 1e3 ¦ 1000; 1/2 ¦ 0.5; \frac12 ¦ 0.5; \frac{-3}{4} ¦ -\dfrac 34; 2 1/2 ¦ 2.5; 1\frac{4}{5} ¦ \frac95
\pi/2 ¦ \frac{\pi}{2}; -3\pi/4 ¦ -\frac{3 \pi}4; 50% ¦ 0.5; 50% ¦ 50; 50\% ¦ 50%; 62.5 ¦ 62.5\%
50 percent ¦ 0.5; $5 ¦ 5; \$5 ¦ 5; -\$5 ¦ -5; \$1,234.50 ¦ 1234.5 dollars; 18 dollars ¦ 18; 5 cm^2 ¦ 5
12 \text{ cm}^{2} ¦ 12; 5.4 \text{ cents} ¦ 5.4; 90^\circ ¦ 90; 90^{\circ} ¦ 90 degrees; (5\mathrm{cm}) ¦ 5
90\degree ¦ 90; x=5 ¦ 5; f(x) = 2x ¦ 2x; (x,y)=(1,2) ¦ (1,2); x \in [1,2] ¦ [1,2]; m_{\max}=n^2 ¦ n^{2}
\left( 3, \frac{\pi}{2} \right) ¦ (3,\pi/2); \{200,100\} ¦ \left\{ 100, 200 \right\}
\{\{1,2\},3\} ¦ \{3,\{2,1\}\}; 1,2,\text{ and }3 ¦ 1,2,3; 1 and 2 ¦ 1, 2; (0.5,3) ¦ (\frac{1}{2},3.0)
(-\infty,2]\cup[3,+\infty) ¦ [3,\infty) \cup (-\infty,2]; \text{Even} ¦ even; \text{(C)} ¦ C; $p - q$ ¦ p-q.
\[42\] ¦ 42; \sqrt 2 ¦ \sqrt{2}; 2516_8 ¦ 2516_{8}; k \geqslant 2 ¦ k\ge 2
{34} ¦ 34; {\frac{\sqrt{3}}{2}} ¦ \sqrt{3}/2; {$x=5.$} ¦ 5; ${1,234}$ ¦ 1234; {1, 2} ¦ 1,2
{\{2,1\}} ¦ \{1,2\}; \bigl(1, 2\bigr) ¦ (1,2); \Biggl[0, \biggr) ¦ [0,); \Big\{1, 2\bigm\} ¦ \{2,1\}
\frac{-\pi}{6} ¦ -\pi/6; (\frac{-\sqrt{3}}{2}, 1) ¦ (-\frac{\sqrt{3}}{2},1); x=1, x=-2 ¦ 1, -2
x = 1 or x = -2 ¦ 1, -2; 1 or -2 ¦ 1,-2; \{1, -2\} ¦ 1, -2; 1 \text{ or } \frac12, \text{or } 3 ¦ 1, 0.5, 3
$a=2$, $a=-6-4 \sqrt{2}$ ¦ 2, -6 - 4\sqrt2; x_1 = 0, x_1 = \pi ¦ 0 or \pi
9^\circ or 7^\circ ¦ 9^\circ, 7^\circ; (x,y)=(1,2), (x,y)=(3,4) ¦ (1,2),(3,4)
\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix} ¦ \begin{pmatrix}-\frac{1}{3}\\\frac23\\5/3\end{pmatrix}
\begin{bmatrix} 1/5 & \frac{-1}{2} \end{bmatrix} ¦ \begin{bmatrix} \frac15 & -1/2 \end{bmatrix}
\begin{pmatrix} 1 \\ 2 \end{pmatrix} ¦ \begin{pmatrix}1\\2\end{pmatrix}"""))
def test_trap_23_answers_that_are_equal(given, truth):
    assert answers.answers_equal(given, truth) and answers.answers_equal(truth, given)


def test_no_answer_no_truth_and_long_ones():
    assert not answers.answers_equal(None, "0") and not answers.answers_equal("", "0")
    assert not any(answers.answers_equal(a, b) for a in ("", "$", "x=") for b in ("", "$", ".", "x="))
    assert answers.answers_equal("1" * 5_000, "1" * 5_000) and not answers.answers_equal("1" * 5_000, "1")
    assert answers.answers_equal("100,200", "100, 200")  # the truth is a list, so the comma separates
    assert not answers.answers_equal("100, 200", "100,200")  # the truth is a number


def test_real_answers_accept_themselves_in_seven_wordings():
    files = (ROOT.parent / "shared" / "data").glob("*.jsonl")
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    if not lines:
        pytest.skip("the published data sets are not at hand")
    truth = lambda r: (r.get("answer") or r.get("answerKey") or r.get("label")
                       or r["reward_model"]["ground_truth"])
    task = lambda r: "choice" if "choices" in r else "math"
    for problem in {as_problem({"question": "q", "answer": truth(r), "task": task(r)}) for r in lines}:
        x, bare = problem.answer, re.sub(r"(?<!\\)\$", "", problem.answer)
        for text in (f"\\boxed{{{x}}}", f"#### {x}", f"Answer: {x}", f"The answer is \\boxed{{{x}}}.",
                     f"Answer: ${bare}$", f"Answer: \\({bare}\\)", f"Answer:\n {x}"):
            proof = len(x) > 300 or "\n" in x  # load_problems leaves it out
            assert proof or reward.score(problem, text).answer, (text, x)


def test_hostile_text_neither_hangs_nor_raises():
    pieces = [*"{}\\9 -٣\0İ%.($_=∪\n\ud800𝟙", "\\boxed{", "####", "1,", "Answer:", "\\frac{", "\\{", "1/",
              "\\text{", ", ", "~", "\\$", "^{", "and", "e1", "1 ",
              "1 or ", "x=1, ", "<think>", "</think>", "\\boxed 1", "\\frac{-", "matrix}"]
    hostile = [form % (piece * n) for piece in pieces for n in (90, 50_000) for form in ("%s", r"\boxed{%s}")]
    hostile += [r"\boxed{" * 20_000 + "1" + "}" * 20_000, "#### " + "(" * 400 + "1" + ")" * 400]
    hostile += ["".join(random.Random(seed).choices(pieces, k=30)) for seed in range(3_000)]
    for text in hostile:
        for truth, task in ("1", "math"), (text[:900], "math"), ("B", "choice"):
            assert reward.score(reward.Problem("q", truth, task), text).answer in (True, False)


def test_natural_every_legal_reduction_keeps_the_value():
    """Against Python's own arithmetic, for every arrangement of operators."""
    g = random.Random(0)
    for operators, _ in itertools.product(itertools.product("+-*", repeat=3), range(20)):
        expression = "".join(a + b for a, b in zip(g.choices("0123456789", k=4), [*operators, ""]))
        legal, value = tasks.legal_reductions(expression), eval(expression) % 10  # of digits and + - *
        assert legal and all(eval(tasks.reduce_at(expression, i)) % 10 == value for i in legal)


@pytest.mark.parametrize("task", reward.SYNTHETIC)
def test_corpora_and_problems(task):
    """Problems seen in pretraining measure memory; problems on which wrong ways end well measure luck."""
    corpus, again, other = (families.make_corpus(task, 3000, seed, noise=0.0) for seed in (1, 1, 2))
    seen = {question for question, _ in corpus}
    problems = families.make_problems(task, 500, seed=1, exclude=seen)
    questions = {problem.question for problem in problems}
    assert corpus == again != other and len(questions) == 500 and not questions & seen
    if task == "habit":
        assert all(text == reward.habit_solution(question, text[0]) for question, text in corpus)
        habits = {question[:3]: text[0] for question, text in corpus}
        assert all(habits[question[:3]] == text[0] for question, text in corpus)  # one habit a cell
        right = [reward.HABIT_OPERATOR[cell[0]] == operator for cell, operator in habits.items()]
        ends = [{reward.habit_solution(text, way)[-1] for way in tasks.OPERATIONS} for text in questions]
        assert 0.3 < np.mean(right) < 0.5 and all(len(values) == 4 for values in ends)
    else:
        right = [reward.natural_is_legal(*pair) for pair in corpus]
        ends = [{tasks.natural_orders(problem.question[:-1], way)[-1] for way in ("left", "additions")}
                for problem in problems]
        assert 0.05 < np.mean(right) < 0.6 and not any(p.answer in wrong for p, wrong in zip(problems, ends))


# ---- checkpoint.py and text.py -----------------------------------------------------------------------------

@pytest.mark.parametrize("name, change, complaint", [
    ("config.json", b"{", "cannot be loaded"), ("config.json", {"vocab_size": ...}, "no 'vocab_size'"),
    ("config.json", {"model_type": "gpt2"}, "gpt2"), ("config.json", {"hidden_act": "gelu"}, "gelu"),
    ("config.json", {"rope_parameters": LLAMA3 | {"rope_type": "yarn"}}, "yarn"),
    ("config.json", {"hidden_size": 16}, "disagree"), ("config.json", {"num_hidden_layers": 3}, "layers.2"),
    ("model-00002-of-00005.safetensors", b"", "cannot be loaded"),
    ("model-00002-of-00005.safetensors", None, "no model"), ("tokenizer.json", b"{}", "cannot be loaded"),
    ("generation_config.json", {"eos_token_id": 64}, "64"), ("adapter_config.json", b"{}", "an adapter"),
    ("config.json", {"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    ("config.json", b"[]", "cannot be loaded"), ("config.json", {"rms_norm_eps": math.nan}, "not finite"),
    ("config.json", {"num_hidden_layers": 10 ** 8}, "num_hidden_layers 100000000"),  # hours, to make them
    ("pytorch_model.bin", b"", ".bin files")])
def test_a_broken_checkpoint_is_refused_in_one_line(name, change, complaint, tmp_path):
    file = hf_pair("qwen3", tmp_path)[1] / name
    if isinstance(change, dict):
        changed = (json.loads(file.read_text()) | change).items()
        change = json.dumps({key: value for key, value in changed if value is not ...}).encode()
    file.unlink() if change is None else file.write_bytes(change)
    for path in tmp_path.glob("model*") if name.endswith(".bin") else ():
        path.unlink()
    with pytest.raises(ValueError, match=complaint) as refused:
        checkpoint.load(tmp_path)
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


def test_every_weight_is_in_the_fingerprint(family):
    """Of leading values alone, k, v and up lie behind q and gate in the fused matrices: zeroed, they gave a
    model with the old one's figures."""
    model, tokenizer, stops = checkpoint.load(family / "learner")
    found = {checkpoint.fingerprint(model, tokenizer, stops), checkpoint.fingerprint(model, tokenizer, (5,))}
    for weight in checkpoint.hf_weights(model).values():
        weight.data[-1:] += 1e-3
        found.add(checkpoint.fingerprint(model, tokenizer, stops))
    tokenizer.chat_template = "{{ messages }}"
    found.add(checkpoint.fingerprint(model, tokenizer, stops))
    assert len(found) == 3 + len(checkpoint.hf_weights(model)) > 20


def test_trap_22_exactly_one_bos(tmp_path):
    """Two BOS tokens, the template's and the tokeniser's: a beginning that the model has never seen."""
    from tokenizers.processors import TemplateProcessing
    tokenizer, bos = families.make_tokenizer(tmp_path), families.EOS
    tokenizer.bos_token = bos
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{bos} $A", special_tokens=[(bos, 0)])
    expected = lambda text: [0, *tokenizer(text, add_special_tokens=False).input_ids]
    assert encode("2+2=", tokenizer) == expected("2+2=")
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}{{ 1 if enable_thinking else 0 }}"
    assert encode("2+2=", tokenizer, chat=False) == expected("2+2=")
    for thinking, last in ((None, "0"), ("off", "0"), ("on", "1")):
        assert encode("2+2=\n", tokenizer, thinking=thinking) == expected("2+2=" + last)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"$A {bos}", special_tokens=[(bos, 0)])
    assert encode("2+2=", tokenizer, chat=False) == expected("2+2=")[1:]  # and the EOS is cut off
    tokenizer.chat_template = "{{ raise_exception('no\\nsuch') }}"
    with pytest.raises(ValueError, match="chat template fails: no such"):
        encode("2+2=", tokenizer)


@pytest.mark.parametrize("tokens, whole", [
    ("▁I ▁am <0xE2> <0x82> <0xAC> ▁ 5", ["I", " am", "", "", "€", " ", "5"]),
    ("▁I ▁am <0xE2> <0x82>", ["I", " am", "", "\ufffd\ufffd"])])  # cut within a character
def test_pieces_are_parts_of_the_whole_text(tokens, whole):
    """Decoded alone, every token of SentencePiece loses the space before it, and a byte is no character."""
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(BPE({token: i for i, token in enumerate(tokens.split())}, [], byte_fallback=True))
    words.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                       decoders.Fuse(), decoders.Strip(" ", 1, 0)])  # as Llama 2's
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    ids = tokenizer.convert_tokens_to_ids(tokens.split())
    assert pieces(ids, tokenizer) == whole and "".join(whole) == tokenizer.decode(ids)


# ---- optimizer.py ------------------------------------------------------------------------------------------

def test_micro_batches_hold_every_row_once_and_no_more_tokens_than_they_may():
    dice = random.Random(0)
    groups, lengths = [row // 4 for row in range(200)], [dice.randrange(1, 50) for _ in range(50)]
    prompts, responses = [lengths[group] for group in groups], [dice.randrange(1, 50) for _ in groups]
    run = lambda part: (len({groups[row] for row in part}) * max(prompts[row] for row in part)
                        + len(part) * max(responses[row] for row in part))
    for rows, tokens in itertools.product((range(200), dice.sample(range(200), 90)), (1, 60, 300, 10 ** 6)):
        parts = micro_batches([*rows], groups, prompts, responses, tokens)
        assert sorted(itertools.chain(*parts)) == sorted(rows)
        assert all(run(part) <= tokens or len(part) == 1 for part in parts)
        assert all(run([*a, b[0]]) > tokens for a, b in itertools.pairwise(parts))  # none has room for more
    assert micro_batches([], groups, prompts, responses, 60) == []


def test_micro_batches_pad_little():
    """In the order of the mini-batch, a long response makes room for itself in every short one beside it."""
    dice = np.random.default_rng(0)
    lengths = dice.lognormal(5.5, 0.8, 512).clip(8, 2048).astype(int).tolist()
    for prompt, at_most in ((1, 1.1), (4096, 2)):  # where prompts are long, groups had better stay together
        prompts, groups = [prompt] * 512, [row // 16 for row in range(512)]
        parts = micro_batches(range(512), groups, prompts, lengths, 8192)
        run = sum(len({groups[row] for row in part}) * prompt + len(part) * max(lengths[row] for row in part)
                  for part in parts)
        assert run < at_most * (32 * prompt + sum(lengths))
        together = all(len({groups[row] for row in part}) <= 2 for part in parts)
        assert together == (prompt > 1)


def backward(model, value):
    """What a backward pass leaves: a gradient of `value` beside what is there."""
    for p in model.parameters():
        p.grad = torch.full_like(p, value) + (0 if p.grad is None else p.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_summed_and_updates_made_in_float32(dtype):
    """bfloat16 rounds a step of 1e-5 away, and a sum of 300 ones to 256: training stands still."""
    model = tiny_model().to(dtype)
    optimizer, weight = Optimizer(model, lr=1e-5), model.layers[0].mlp.gate_up_proj.weight
    before = weight.detach().float().clone()
    for _ in range(300):
        backward(model, 1)
        optimizer.accumulate()
    assert all((master.grad == 300).all() for master in optimizer.masters)
    for _ in range(300):
        assert optimizer.step(1.0) > 1
        backward(model, 1)
        optimizer.accumulate()
    assert (before - weight.float()).mean().item() == pytest.approx(300e-5, rel=0.2)


@pytest.mark.parametrize("gradient, loss", [(math.nan, 0.0), (math.inf, 0.0), (1.0, math.nan)])
def test_what_is_not_finite_skips_the_update(gradient, loss):
    """One NaN, and AdamW's moments hold it for ever."""
    model = tiny_model()
    optimizer, before = Optimizer(model, lr=1e-3), model.norm.weight.clone()
    backward(model, gradient)
    assert math.isnan(optimizer.step(1.0, loss)) and torch.equal(model.norm.weight, before)
    assert not optimizer.adamw.state and all(p.grad is None for p in model.parameters())


# ---- survival.py -------------------------------------------------------------------------------------------
# A run of days is only as good as its worst minute: killed at any moment, it must end as if it had not been.

SIGNALLED = """
import os, sys, time
import plumbing.books, plumbing.optimizer, train
owner, name = {where}
real, calls = getattr(owner, name), []
def interrupted(*inputs):
    calls.append(real(*inputs))
    if len(calls) == 3:
        for _ in range({times}):
            os.kill(os.getpid(), {number})
        time.sleep({seconds})
    return calls[-1]
setattr(owner, name, interrupted)
train.main(sys.argv[1:])
"""
UPDATE = 'plumbing.optimizer.Optimizer, "step"', 0  # its third call is the first of step 2's two
EVALUATION = 'plumbing.books, "evaluate"', 99       # its third call is step 2's, after two of step 0


@pytest.mark.parametrize("where, number, times, code, saved", [
    (UPDATE, signal.SIGINT, 1, 130, [2]), (UPDATE, signal.SIGTERM, 1, 143, [2]),
    (UPDATE, signal.SIGTERM, 2, -signal.SIGTERM, [1]),  # the second one leaves at once
    (EVALUATION, signal.SIGTERM, 1, 143, [1, 2]), (EVALUATION, signal.SIGKILL, 1, -signal.SIGKILL, [1, 2])])
def test_a_signal_ends_the_run_at_once_but_an_update_whole(
        where, number, times, code, saved, family, tmp_path, resumes):
    """Saved between two optimiser steps, the weights are those of no step: what goes on is another run. A
    machine that gives ten seconds loses the steps whose checkpoint waits for an evaluation."""
    out, more = tmp_path / "run", ("--lr", 1e-3, "--save-every", 1, "--eval-every", 2)
    more = more if where == EVALUATION else ("--lr", 1e-3, "--save-every", 1, "--eval-data", "")
    script = SIGNALLED.format(where=where[0], seconds=where[1], times=times, number=int(number))
    ended = subprocess.run([sys.executable, "-c", script, *flags(family, out, *more)], cwd=ROOT,
                           capture_output=True, text=True, timeout=90)
    found = [int(path.stem[-6:]) for path in sorted(out.glob("checkpoint_*"))]
    assert ended.returncode == code and found[-len(saved):] == saved, ended.stderr
    assert "Traceback" not in ended.stderr and ("--resume` goes on" in ended.stdout) == (code > 0)
    assert (out / "learner").exists() == (code > 0)
    resumes(out, *more)


INTERRUPTED = """
import io, os, signal, sys
import plumbing.files, train
class File(io.FileIO):
    def write(self, data):
        if "checkpoint_000002" in str(self.name) and signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().write(data)
plumbing.files.open = lambda path, mode: File(path, "w")
train.main(sys.argv[1:])
"""


def test_a_signal_waits_until_a_checkpoint_is_written(family, tmp_path, resumes):
    """torch.save swallows what interrupts it, and the run goes on; or it raises an error of its own, and the
    run ends with a traceback, exit code 1 and no learner."""
    out, more = tmp_path / "run", ("--lr", 1e-3, "--save-every", 1, "--eval-data", "")
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED, *flags(family, out, *more)], cwd=ROOT,
                           capture_output=True, text=True, timeout=90)
    assert ended.returncode == 143 and "Traceback" not in ended.stderr, ended.stderr
    assert (out / "learner").exists() and not [*out.glob("*.partial")]
    assert sorted(path.name for path in out.glob("*.pt")) == ["checkpoint_000001.pt", "checkpoint_000002.pt"]
    resumes(out, *more)


@pytest.mark.parametrize("damage", ["cut short", "one bit", "in the directory"])
def test_a_damaged_checkpoint_is_passed_over(damage, family, tmp_path, capsys, resumes):
    """torch.load looks at no checksum: after one flipped bit, training goes on from what nobody learnt."""
    out, more = tmp_path / "run", ("--save-every", 1, "--eval-data", "")
    run, _ = train_here(family, out, *more)
    before, newest = sorted(out.glob("checkpoint_*.pt"))  # two are kept
    data = bytearray(newest.read_bytes())
    weight = data.index(run.optimizer.masters[0].detach().numpy().tobytes())
    data[data.index(b"PK\1\2") + 10 if damage == "in the directory" else weight + 50] ^= 1  # how it is packed
    newest.write_bytes(data[:-100] if damage == "cut short" else data)
    (out / "checkpoint_000009.pt.partial").write_bytes(b"torn")
    resumes(out, *more)
    said = capsys.readouterr()
    assert "checkpoint_000004.pt is damaged" in said.err and "after step 3" in said.out
    [path.write_bytes(b"") for path in (before, newest)]
    code, _, error = main_here(capsys, flags(family, out, "--resume", *more))
    assert code == 2 and error.splitlines()[-1].startswith("train.py: error: no checkpoint in")


def test_copies_of_checkpoints_are_the_users(family, tmp_path, capsys):
    """checkpoint_best.pt sorts last: a resumed run went back to it. checkpoint_000004_keep.pt was deleted."""
    out, more = tmp_path / "run", ("--save-every", 1, "--mix-steps", 1, "--eval-data", "")
    train_here(family, out, *more, "--steps", 2)
    copies = [Path(shutil.copy(out / "checkpoint_000001.pt", out / f"checkpoint_{name}.pt"))
              for name in ("best", "000001_keep", "000009-old", "9")]
    assert [line["step"] for line in train_here(family, out, *more, "--resume")[1]] == [1, 2, 3, 4]
    assert "resumed   after step 2" in capsys.readouterr().out
    assert {*out.glob("checkpoint_*")} - {*copies} == {out / f"checkpoint_00000{step}.pt" for step in (3, 4)}
    assert all(path.exists() for path in copies)


def save_state(model, tokenizer, stops, out):
    files.write_whole(out, lambda file: torch.save(model.state_dict(), file))


@pytest.mark.parametrize("save", [checkpoint.save, save_state])
def test_a_disk_that_fills_up(save, family, tmp_path, monkeypatch, capsys):
    """Both libraries raise errors of their own then, which would read as bugs."""
    model, tokenizer, stops = checkpoint.load(family / "learner")
    monkeypatch.setattr(training, "load_run", lambda *given: (SimpleNamespace(stopped=0), None))
    monkeypatch.setattr(training, "open_books", lambda *given: None)
    loop, out = lambda *given: save(model, tokenizer, stops, tmp_path / "saved"), tmp_path / "run"
    with files_up_to(20_000):
        code, _, error = main_here(capsys, flags(family, out), loop=loop)
    assert code == 2 and "File too large" in error and error.count("\n") == 1


def with_accident(accident, out):
    """train.open_explorer, whose explorer has an accident in step 3."""
    def open_explorer(args, run):
        def explore(*inputs):
            if steps.last_step(run) == 2:
                accident(out, run)
            return usual(*inputs)
        usual = training.open_explorer(args, run)
        return explore
    return open_explorer


@pytest.mark.parametrize("accident, code, complaint", [
    (lambda out, run: (out / "checkpoint_000003.pt.partial").symlink_to("/dev/full"), 2, "No space left"),
    (lambda out, run: torch.empty(10 ** 15), 3, "out of memory: lower --rollout-rows"),
    (lambda out, run: run.learner.norm.weight.data.fill_(torch.nan), 4, "not finite in five steps, up to 7")])
def test_an_accident_in_step_3_ends_the_run_and_what_was_saved_stays(
        accident, code, complaint, family, tmp_path, capsys, resumes):
    """A checkpoint of NaN takes the last good one's place; one written in place takes it too when the disk is
    full. The exit code says whether smaller batches would help."""
    out = tmp_path / "run"
    more = ("--schedule", "constant", "--steps", 8, "--save-every", 1, "--eval-data", "")
    ended, _, error = main_here(capsys, flags(family, out, *more), open_explorer=with_accident(accident, out))
    *warnings, last = error.splitlines()
    assert ended == code and last.startswith("train.py: error:") and complaint in last
    assert sum("2 updates skipped" in line for line in warnings) == (5 if code == 4 else len(warnings))
    assert max(out.glob("checkpoint_*.pt")).name == "checkpoint_000002.pt"
    (out / "checkpoint_000003.pt.partial").unlink(missing_ok=True)
    resumes(out, *more)


def test_what_is_not_given_on_resume_is_the_runs_own(family, tmp_path, capsys):
    """A run at step 45 of 60, resumed without its --steps, had 40 by default: it was done, and trained
    nothing."""
    out = tmp_path / "run"
    _, lines = train_here(family, out, "--save-every", 1, "--eval-every", 3, "--lr", 1e-3)
    (out / "checkpoint_000004.pt").unlink()
    assert main_here(capsys, ["--out", str(out), "--resume"])[0] == 0 and read_metrics(out) == lines
    longer = training.parse_flags(["--out", str(out), "--resume", "--steps", "99"])
    assert (longer.steps, longer.mix_steps, longer.lr, longer.group_size) == (99, 2, 1e-3, 4)


def test_runs_that_start_in_one_second_have_directories_of_their_own(family, tmp_path, monkeypatch):
    """Of three seeds that were started with `&`, two died."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(survival.time, "strftime", lambda form: "runs/now")
    argv, taken = flags(family, "", "--eval-data", ""), []
    del argv[argv.index("--out"):argv.index("--out") + 2]
    for args in map(training.parse_flags, (argv, argv)):
        training.load_run(args, training.open_explorer)
        taken.append(args.out)
    several = [threading.Thread(target=lambda: taken.append(str(survival.new_directory()))) for _ in range(8)]
    [thread.start() for thread in several], [thread.join() for thread in several]
    assert len({*taken}) == 10 == len([*Path("runs").iterdir()]) and taken[0] == "runs/now"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_that_knows_few_characters_ends_no_run(encoding, family, tmp_path, capsys, monkeypatch):
    """Under a C locale, or on Windows, the first arrow in a problem ended the run at step 1."""
    problems = [reward.Problem(f"{i}+4=→", "7", "instructed") for i in range(5)]
    save_problems(problems, tmp_path / "data")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    argv = flags(family, tmp_path / "run", "--data", tmp_path / "data", "--eval-data", "", "--steps", 1)
    assert main_here(capsys, argv)[0] == 0
    terminal.flush()
    assert b"+4=\\u2192" in terminal.buffer.getvalue()


def test_one_experiment_an_out(family, tmp_path, capsys):
    """Half a run at one rate and half at another, or on other weights, is a curve of no experiment."""
    shutil.copytree(family / "learner", tmp_path / "learner")
    (tmp_path / "notes" / "of a year").mkdir(parents=True)
    more = ("--learner", tmp_path / "learner", "--steps", 2, "--lr", 1e-3, "--eval-data", "")
    contents = lambda: {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}

    def refused(out, complaint, *extra, **recipe):
        before = contents()
        code, _, error = main_here(capsys, flags(family, tmp_path / out, *more, *extra), **recipe)
        assert code == 2 and complaint in error and error.count("\n") == 1 and contents() == before, error
    train_here(family, tmp_path / "run", *more)
    for out in ("run", "notes", "learner"):
        refused(out, f"{out} is there already")
    refused("notes", "notes holds no run", "--resume")
    refused("learner", "other settings", "--resume")
    refused("run", "other settings: recipe None -> rescue", "--resume", recipe="rescue")
    refused("run", "other settings: lr 0.001 -> 0.0001, seed 0 -> 3\n", "--resume", "--lr", 1e-4, "--seed", 3)
    train_here(family, tmp_path / "run", "--resume", *more, "--micro-batch-tokens", 64)  # no part of it
    stops = tmp_path / "learner" / "generation_config.json"
    as_before = stops.read_bytes()
    stops.write_text('{"eos_token_id": [5, 6]}')
    refused("run", "other settings: hash_of_learner", "--resume")
    stops.write_bytes(as_before)
    shutil.copytree(tmp_path / "run" / "learner", tmp_path / "learner", dirs_exist_ok=True)
    refused("run", "other settings: hash_of_learner", "--resume")
    with edited_reward(tmp_path, "reward=float(answer)"):
        refused("run", "hash_of_reward", "--resume")


def test_a_resumed_run_knows_that_its_problems_were_replaced(family, tmp_path, capsys):
    data = Path(shutil.copy(family / "train.jsonl", tmp_path / "data.jsonl"))
    more = ("--data", data, "--steps", 2, "--eval-data", "")
    train_here(family, tmp_path / "run", *more)
    data.write_text("".join(sorted(data.read_text().splitlines(keepends=True))))
    code, _, error = main_here(capsys, flags(family, tmp_path / "run", *more, "--resume"))
    assert code == 2 and "other settings: hash_of_problems" in error


def test_a_resumed_run_knows_that_its_tokeniser_was_replaced(family, tmp_path, capsys):
    """The same weights and texts, but other ids: what was learnt is then about other words."""
    tokens = Path(shutil.copytree(family / "learner", tmp_path / "learner"), "tokenizer.json")
    more = ("--learner", tmp_path / "learner", "--explorer", "none", "--steps", 1, "--eval-data", "")
    train_here(family, tmp_path / "run", *more)
    tokens.write_text(tokens.read_text().replace('"1"', '"?"').replace('"2"', '"1"').replace('"?"', '"2"'))
    code, _, error = main_here(capsys, flags(family, tmp_path / "run", *more, "--resume"))
    assert code == 2 and "other settings: hash_of_learner" in error


def test_a_pools_settings_are_part_of_the_run(family, tmp_path, capsys):
    """Its stop tokens say where a response ends: with others, another rollout is learnt from."""
    path, (_, tokenizer, _) = tmp_path / "pool.jsonl", checkpoint.load(family / "learner")
    rollout = {"response_ids": [5, 0], "small_model_log_probs": [-1.0, -1.0]}
    problems = load_problems(family / "train.jsonl")
    records = [{"prompt_ids": tokenizer(problem.question).input_ids} | rollout for problem in problems]
    path.write_text("".join(json.dumps(record) + "\n" for record in records * 4))
    note = tmp_path / "pool.jsonl.settings.json"
    note.write_text('{"model": "x", "stops": [0], "temperature": 1.0}')
    more = ("--explorer", path, "--steps", 1, "--eval-data", "")
    assert train_here(family, tmp_path / "run", *more)[1][0]["rollouts_explorer"] == 16
    for change in (note.read_text().replace("1.0", "0.7"), note.read_text().replace("[0]", "[0, 7]"), None):
        note.write_text(change) if change else note.unlink()
        code, _, error = main_here(capsys, flags(family, tmp_path / "run", *more, "--resume"))
        assert code == 2 and "other settings: hash_of_explorer" in error


def test_a_run_can_be_made_longer(family, tmp_path):
    """Half of the new steps as T_mix would be another schedule, whose first steps were never made."""
    more = ("--lr", 1e-3, "--eval-every", 2)
    train_here(family, tmp_path / "run", "--steps", 4, *more)
    _, longer = train_here(family, tmp_path / "run", "--steps", 6, "--resume", *more)
    _, whole = train_here(family, tmp_path / "whole", "--steps", 6, "--mix-steps", 2, *more)
    assert longer == whole and [line["share"] for line in longer[1:]] == [1, 0, 0, 0, 0, 0]


def test_a_run_cannot_be_made_shorter_than_it_is(family, tmp_path, capsys):
    """It said `step 4/2`, and wrote 2 into its settings."""
    train_here(family, tmp_path / "run", "--steps", 4)
    code, _, error = main_here(capsys, flags(family, tmp_path / "run", "--steps", 2, "--resume"))
    assert code == 2 and "--steps 2: the run in" in error
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 4


# ---- books.py, pictures.py, log.py -------------------------------------------------------------------------

def no_directory(out, run):
    shutil.rmtree(out / "rollouts")
    (out / "rollouts").write_bytes(b"")


def no_file(out, run):
    (out / "curve.png").unlink()
    (out / "curve.png").mkdir()


@pytest.mark.parametrize("accident", [
    lambda out, run: (out / "rollouts" / "step_000001.json").write_text('[{"cut sh'), no_directory,
    lambda out, run: (out / "rollouts.html.partial").mkdir(), no_file,
    lambda out, run: setattr(run, "log", lambda line: 1 / 0 if line["step"] == 4 else None)])
def test_what_is_only_to_look_at_ends_no_run(accident, family, tmp_path, capsys, unbroken):
    """A page that a power cut left empty ended the run at every restart, before the step was saved."""
    out, more = tmp_path / "run", ("--schedule", "constant", "--lr", 1e-3, "--eval-data", "")
    code, _, error = main_here(capsys, flags(family, out, *more), open_explorer=with_accident(accident, out))
    assert code == 0 and error.startswith("warning: ") and error.count("\n") == 1, error
    assert read_metrics(out) == unbroken(*more)[0] and (out / "checkpoint_000004.pt").exists()


def test_a_run_shows_its_rollouts_and_says_when_nothing_can_be_learnt(family, tmp_path, capsys):
    """A run without a gradient ends like a success: the cause is in the texts, which nobody has seen."""
    train_here(family, tmp_path / "run", "--eval-data", "")
    said = capsys.readouterr()
    best, worst = r"\n  best: the explorer's, reward 1: .*", r"\n  worst: the explorer's, reward 0: "
    assert re.search(f"step   1/4.*{best}{worst}", said.out)
    assert "nothing was learnt" not in said.err
    assert {path.name for path in (tmp_path / "run" / "rollouts").iterdir()} == {
        "step_000001.json", "step_000004.json"}
    hopeless = [reward.Problem(f"{i}+{i}=", str((2 * i + 1) % 10), "natural") for i in range(8)]
    save_problems(hopeless, tmp_path / "hopeless")
    train_here(family, tmp_path / "vain", "--data", tmp_path / "hopeless", "--eval-data", "")
    assert capsys.readouterr().err.count("warning: nothing was learnt in three steps") == 2  # after 3 and 4


def test_the_page_of_rollouts_is_bounded(family, tmp_path, monkeypatch):
    """Rewritten whole at each evaluation, it grew to 18 MB in 21 steps of GSM8K's size."""
    monkeypatch.setattr(pictures, "TOKENS", 2)
    train_here(family, tmp_path / "run", "--steps", 9, "--eval-data", "", "--eval-every", 1)
    page = (tmp_path / "run" / "rollouts.html").read_text()
    assert re.findall("<summary>step (.)", page) == [*"456789"] and pictures.STEPS == 6
    rollouts = re.findall("<pre>(<i .*?)</pre>", page)
    assert len(rollouts) == 6 * 4 * 4 and {rollout.count("<i ") for rollout in rollouts} <= {1, 2}
    assert any(rollout.endswith("</i> ... 2 more tokens") for rollout in rollouts)


def test_the_picture_has_plain_grpo_where_there_is_such_a_run(family, tmp_path, monkeypatch):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"explorer": ')
    train_here(family, tmp_path / "grpo", "--explorer", "none")
    train_here(family, tmp_path / "seed", "--explorer", "none", "--seed", 1)  # another experiment
    explorers = ("--explorer-temperature", 0.7, "--explorer-top-p", 0.95, "--off-policy", "positive",
                 "--schedule", "constant", "--explorer-share", 0.3)  # no part of plain GRPO
    train_here(family, tmp_path / "run", *explorers)
    rewards = lambda lines: [line.get("reward") for line in lines]
    (tmp_path / "another").mkdir()
    (tmp_path / "another" / "config.json").write_text("[1]")  # no run's
    assert rewards(pictures.plain_grpo(tmp_path / "run")) == rewards(read_metrics(tmp_path / "grpo"))
    shutil.rmtree(tmp_path / "grpo")
    assert pictures.plain_grpo(tmp_path / "run") == []


def test_log_writes_where_it_says_and_goes_on_there(family, tmp_path):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    more = ("--log", "tensorboard", "--eval-every", 2)
    train_here(family, tmp_path / "run", "--steps", 2, *more)
    _, lines = train_here(family, tmp_path / "run", "--steps", 4, "--mix-steps", 1, "--resume", *more)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    for name in ("reward", "eval_strict_pass@1", "entropy"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(line["step"], pytest.approx(line[name])) for line in lines if line.get(name) is not None]
        assert found == expected


def test_runs_of_one_name_are_not_one_run_elsewhere(family, tmp_path, monkeypatch, capsys):
    """Named alike by the tracker, the curves of seed0/run and seed1/run were written over each other."""
    tracker, calls = SimpleNamespace(), []
    tracker.init = lambda **settings: calls.append(settings)
    tracker.log = lambda line, step: calls.append((step, line["reward"]))
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: name != "trackio" or None)
    more = ("--eval-data", "", "--log", "wandb", "--steps")
    _, lines = train_here(family, tmp_path / "seed0" / "run", *more, 4)
    assert calls[1:] == [(line["step"], line["reward"]) for line in lines]
    train_here(family, tmp_path / "seed0" / "run", *more, 5, "--mix-steps", 2, "--resume")
    train_here(family, tmp_path / "seed1" / "run", *more, 1)  # another run of the same name
    first, again, other = (call for call in calls if type(call) is dict)
    assert first["id"] == again["id"] != other["id"] and first["name"] == other["name"] == "run"
    assert first["resume"] == "allow" and first["config"]["group_size"] == 4
    code, _, error = main_here(capsys, flags(family, tmp_path / "third", "--log", "trackio"))
    assert code == 2 and "--log trackio: pip install trackio" in error


# ---- what a prompt's tokens are, and what ends a rollout ---------------------------------------------------

def chat_tokenizer(directory):
    """A tokeniser of characters whose chat template ends turns with <end>, while its EOS is <eos>."""
    tokenizer = families.make_tokenizer(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start>", "<end>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<start>{{ 'AB'[m['role'] == 'user'] }}{{ m['content'] }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<start>A{% endif %}")
    return tokenizer


def test_a_turn_ends_where_the_chat_template_ends_it(tmp_path):
    """A base model's EOS is another token: every rollout ran to the limit and invented a user's turn."""
    tokenizer = chat_tokenizer(tmp_path)
    end = tokenizer.convert_tokens_to_ids("<end>")
    assert turn_ends(tokenizer) == {end} != {tokenizer.eos_token_id}
    model = tiny_model(vocab_size=len(tokenizer) + 4)
    checkpoint.save(model, tokenizer, (tokenizer.eos_token_id,), tmp_path / "model")
    assert checkpoint.load(tmp_path / "model")[2] == (tokenizer.eos_token_id, end)
    tokenizer.chat_template = None
    assert turn_ends(tokenizer) == set()


def test_an_exact_prompt_reaches_the_model_as_it_is_written(tmp_path):
    """`Answer:` became `Answer:` and a new line, or a turn of a chat that no base model has seen."""
    tokenizer = chat_tokenizer(tmp_path)
    exact, asked = (as_problem({name: "1+2=", "answer": "3", "task": "instructed"})
                    for name in ("prompt", "question"))
    plain = tokenizer("1+2=").input_ids
    assert encode_all([exact, asked], tokenizer) == [plain, tokenizer("<start>B1+2=<end><start>A").input_ids]
    save_problems([exact, asked], tmp_path / "data")
    assert load_problems(tmp_path / "data") == [exact, asked]
    few_shot = as_problem({"prompt": "Question: 2?\nAnswer: 2\n\nQuestion: 3?\nAnswer:", "answer": "3"})
    right = [reward.score(few_shot, text).answer for text in (" 3", " 4", "\nSo it is 3")]
    assert right == [True, False, False]
    assert not reward.score(as_problem({"question": "3?", "answer": "3"}), " 3").answer

@pytest.mark.parametrize("prompt, text, right", [
    (r"Q: 1+2? A: \boxed{3} Q: 1+1+1? A:", " I do not know", False),
    (r"What is 1+2? Put the final answer within \boxed{}. Answer:", " 3", True),
    (r"What is 1+2? Put it in \boxed{}. Let's think.", "\nAnswer: 3", True), ("1+2? **Answer:**", " 3", True),
    (r"1+2? \boxed{", "3}", True), ("1+2? <think>", "3? \\boxed{3}", False),
    ("1+2? <think>", "so</think>\\boxed{3}", True)])
def test_a_prompt_neither_earns_nor_forbids_the_reward(prompt, text, right):
    """An example's box in a few-shot prompt paid for a response that answered nothing."""
    assert reward.score(as_problem({"prompt": prompt, "answer": "3"}), text).answer == right


def test_a_control_token_spelled_in_a_question_stays_text(tmp_path):
    """`<end><start>A9` in a question would put an answer into the assistant's mouth."""
    tokenizer = chat_tokenizer(tmp_path)
    control = [tokenizer.convert_tokens_to_ids(token) for token in ("<start>", "<end>")]
    ids = encode("1<end><start>A2", tokenizer)
    assert [i for i in ids if i in control] == [i for i in encode("1", tokenizer) if i in control]
    assert "".join(tokenizer.decode(ids)).count("1") == 1 and tokenizer.decode(ids[-1:]) == "A"


@pytest.mark.parametrize("template", ["{{ strftime_now('%d %B %Y') }}", "{{ date_string }}"])
def test_a_template_that_writes_the_date_writes_the_same_tomorrow(template, tmp_path):
    """Else no run resumes the next day, no pool matches, and prompts change at midnight."""
    tokenizer = chat_tokenizer(tmp_path)
    tokenizer.chat_template = template
    assert render(tokenizer, "?") in ("26 July 2024", "26 Jul 2024")


@pytest.mark.parametrize("texts, ids, end", [
    (["b2"], "1ab2c3", 4), (["b2", "a"], "1ab2c3", 2), (["zz"], "1ab2c3", None), ([], "1", None)])
def test_a_rollout_ends_with_the_token_that_completes_a_stop_text(texts, ids, end, tmp_path):
    tokenizer = families.make_tokenizer(tmp_path)
    until = stop_texts(texts, tokenizer)
    assert (until(tokenizer(ids).input_ids) if until else None) == end


def test_what_follows_a_stop_text_is_neither_kept_nor_sampled_for_long(tmp_path):
    """Trained on, the invented next question would be learnt; sampled, it costs most of a step."""
    model, prompts, decoded = tiny_model(), [[5, 6], [7, 8, 9]], []
    until = lambda ids: ids.index(9) + 1 if 9 in ids else None  # token 9 is said to complete a stop text
    whole = sampling.sample(model, prompts, 8, torch.Generator().manual_seed(0), 40, (0,))
    model.embed_tokens.register_forward_hook(lambda *given: decoded.append(1))
    ended = sampling.sample(model, prompts, 8, torch.Generator().manual_seed(0), 40, (0,), until=until)
    assert len(decoded) < 41
    for p, g in itertools.product(range(2), range(8)):
        ids = whole.ids[p, g, :whole.lengths[p, g]].tolist()
        n = until(ids) or len(ids)
        assert ended.ids[p, g].tolist() == ids[:n] + [0] * (40 - n) and ended.lengths[p, g] == n
        assert ended.finished[p, g] == (until(ids) is not None or whole.finished[p, g])
        assert torch.allclose(ended.logps[p, g, :n], whole.logps[p, g, :n], atol=1e-5)
        assert not ended.logps[p, g, n:].any()
    assert 0 < (ended.lengths < whole.lengths).sum()


def test_an_explorer_with_another_template_is_asked_in_its_own_way(family, tmp_path, capsys):
    """A base learner's prompt is no prompt for an instruct explorer: it answered a text it had never seen."""
    shutil.copytree(family / "explorer", tmp_path / "explorer")
    settings = json.loads((tmp_path / "explorer" / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}{{ m['content'] }}+{% endfor %}0="
    (tmp_path / "explorer" / "tokenizer_config.json").write_text(json.dumps(settings))
    problems = [reward.Problem(f"{i}+{j}=", str((i + j) % 10), "instructed")
                for i, j in itertools.product(range(4), repeat=2)]
    save_problems(problems, tmp_path / "data.jsonl")
    args = training.parse_flags(flags(family, tmp_path / "run", "--explorer", tmp_path / "explorer", "--data",
                                      tmp_path / "data.jsonl", "--eval-data", "", "--max-new-tokens", 4))
    with pytest.MonkeyPatch.context() as patch:
        asked, real = [], training.sample
        patch.setattr(training, "sample", lambda model, prompts, *more, **named: (
            asked.extend(prompts) or real(model, prompts, *more, **named)))
        run, explore = training.load_run(args, training.open_explorer)
        explore(run.prompts[:1], 2, torch.Generator())
    assert run.tokenizer.decode(asked[0]).endswith("+0=") and asked[0] != run.prompts[0]
    assert "explorer  is asked in its own way" in capsys.readouterr().out


# ---- checkpoints of a run, looked at -----------------------------------------------------------------------

@pytest.mark.parametrize("more", [(), ("--lora-rank", 2), ("--dtype", "bfloat16")])
def test_any_checkpoint_of_a_run_can_be_loaded(more, family, tmp_path):
    """Without a hundred lines: the run's directory is its newest checkpoint, which is its learner."""
    out, more = tmp_path / "run", ("--lr", 1e-2, "--save-every", 1, "--eval-data", "", *more)
    run, _ = train_here(family, out, *more)
    dtype = torch.bfloat16 if "bfloat16" in more else torch.float32
    newest, tokenizer, stops = survival.load_any(out, dtype=dtype)
    assert stops == run.stops and equal(checkpoint.load(out / "learner", dtype=dtype)[0].parameters(),
                                        with_merged(newest).parameters())
    before = survival.load_any(out / "checkpoint_000003.pt", dtype=dtype)[0]
    assert not equal(with_merged(before).parameters(), with_merged(newest).parameters())
    with pytest.raises(ValueError, match="no such checkpoint"):
        survival.load_any(out / "checkpoint_000001.pt")
    shutil.copytree(out / "learner", family.parent / "other", dirs_exist_ok=True)
    settings = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(settings | {"learner": str(family.parent / "other")}))
    with pytest.raises(ValueError, match="no longer the model"):
        survival.load_any(out, dtype=dtype)


def with_merged(model):
    merge_lora(model)
    return model


def test_the_best_checkpoint_is_kept_beside_the_newest(family, tmp_path):
    """The last step is seldom the best, and by the end the best one's checkpoint has been deleted."""
    out = tmp_path / "run"
    train_here(family, out, "--lr", 1e-2, "--save-every", 1, "--eval-every", 1, "--steps", 6)
    at_1 = [line["eval_strict_pass@1"] for line in read_metrics(out)]
    best = torch.load(out / "best.pt", weights_only=True)["history"][-1]["step"]
    assert at_1[best] == max(at_1[1:])
    assert len(list(out.glob("checkpoint_*.pt"))) == 2
    train_here(family, out, "--steps", 12, "--resume", "--keep", 3)
    assert [path.name[11:17] for path in survival.checkpoints(out)] == ["000012", "000011", "000010"]


def test_a_run_says_itself_how_it_is_evaluated(family, tmp_path, monkeypatch, capsys):
    """Typed again, a stop text is forgotten, and the run looks worse than it is."""
    train_here(family, tmp_path / "run", "--stop", "7", "--steps", 1, "--max-new-tokens", 3)
    def parsed(*flags):
        monkeypatch.setattr(sys, "argv", ["eval.py", "--model", *map(str, flags)])
        args = evaluation.parse_flags()
        return args.data, args.max_new_tokens, args.stop
    own = [str(family / "heldout.jsonl")], 3, ["7"]
    assert parsed(tmp_path / "run") == parsed(next((tmp_path / "run").glob("*.pt"))) == own
    assert parsed(tmp_path / "run", "--max-new-tokens", 5, "--data", "x") == (["x"], 5, ["7"])
    with pytest.raises(SystemExit, match="2"):
        parsed(family / "learner")
    assert "--data is missing" in capsys.readouterr().err
