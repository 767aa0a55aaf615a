"""What a run shows: its curve, and one self-contained page of its groups, each token coloured.

A switch at the top of the page says what colours mean. *gap*: how much likelier the learner finds a token
than whoever drew it. The explorer's tokens show how far off-policy they are; the learner's own are white, or
there is a bug. *ratio*: pi_theta / pi_old when the token was trained on; underlined tokens were clipped.

What a model writes is data: it is escaped, and characters that do not print are spelled out.
"""
import html
import json
import sys
from pathlib import Path

import numpy as np

from plumbing.files import write_whole
from plumbing.survival import FREE
from plumbing.text import decode, pieces, printable

GROUPS, STEPS, TOKENS = 4, 6, 256  # shown: groups of a step, steps on the page, leading tokens of a rollout
LEARNER, EXPLORER, GRPO = "#0072b2", "#e69f00", "#777777"  # which colour-blind readers can tell apart
SHOWN = "logp_gap", "ratio", "clip_fraction"


# ---- the page ----------------------------------------------------------------------------------------------

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Rollouts</title><style>
body {font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222}
summary {cursor: pointer; font-weight: 600} details {margin: .5em 0} h2 {font-size: 1em; margin: 1.2em 0 .3em}
pre {white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font: 14px/1.6 ui-monospace, monospace}
table {border-collapse: collapse; width: 100%%} td {padding: .2em .8em .2em 0; vertical-align: top}
td:not(:last-child) {white-space: nowrap; width: 1%%} .explorer {color: #a06000} .learner {color: #0072b2}
i {font-style: normal; border-radius: 2px} .c {text-decoration: underline 2px}
%s</style>
<input type="radio" name="by" id="gap" checked> <label for="gap">colour by gap</label>
<input type="radio" name="by" id="ratio"> <label for="ratio">colour by ratio</label>
<span>&nbsp; blue: likelier to the learner, or pushed up; orange: less likely, or pushed down. %s</span>
<main>%s</main></html>"""


def shade(level):
    """CSS colour of a level -5..5: blue above 0, orange below, as strong as it is far."""
    return f"rgba({'0,114,178' if level > 0 else '230,159,0'},{abs(level) / 7:.2f})"


STYLE = "\n".join(f"#{name}:checked ~ main .{name[0]}{level + 5} {{background: {shade(level)}}}"
                  for name in ("gap", "ratio") for level in range(-5, 6) if level)


def note(out, step, tokenizer):
    """Writes out/rollouts/step_N.json, of the groups of a step that moved most, and the page."""
    rollouts, shades = step.rollouts, {name: step.tokens[name].nan_to_num() for name in SHOWN}
    shades["ratio"] = shades["ratio"].masked_fill(shades["ratio"] == 0, 1)  # 0: not trained on
    moved = (shades["ratio"] - 1).abs().flatten(1).amax(1)  # [P, G, T] -> [P]
    groups = []
    for p in moved.argsort(descending=True, stable=True)[:GROUPS].tolist():
        group = []
        for g, length in enumerate(rollouts.lengths[p].clamp(max=TOKENS).tolist()):
            values = {name: shades[name][p, g, :length].tolist() for name in SHOWN}
            text = pieces(rollouts.ids[p, g, :length].tolist(), tokenizer)
            group.append({"who": "explorer" if rollouts.from_explorer[p, g] else "learner", "tokens": text,
                          "reward": step.scores[p, g, 0].item(), "advantage": step.advantages[p, g].item(),
                          "length": rollouts.lengths[p, g].item(), **values})
        problem = step.problems[p]
        groups.append({"question": problem.question, "answer": problem.answer, "rollouts": group})
    record = json.dumps({"step": step.number, "groups": groups})
    write_whole(out / "rollouts" / f"step_{step.number:06d}.json", lambda file: file.write(record.encode()))
    write_page(out)


def shown(text):
    """HTML that shows any text, whatever it says."""
    return html.escape(printable(text))


def token(text, gap, ratio, clipped):
    """A coloured token. The strongest colour stands for a gap of 2, or a ratio 0.2 from 1: the usual clip."""
    gap, ratio = (max(-5, min(5, round(x))) + 5 for x in (gap / 0.4, (ratio - 1) / 0.04))
    return f'<i class="g{gap} r{ratio}{" c" if clipped else ""}">{shown(text)}</i>'


def rollout(r):
    text, hidden = "".join(map(token, r["tokens"], *(r[name] for name in SHOWN))), r["length"] - TOKENS
    more = f" ... {hidden} more tokens" if hidden > 0 else ""
    return (f'<tr><td class="{r["who"]}">{r["who"]}<td>reward {r["reward"]:g}<td>A = {r["advantage"]:+.2f}'
            f"<td><pre>{text}{more}</pre>")


def write_page(out):
    """Makes out/rollouts.html anew from the newest steps in out/rollouts/."""
    steps = []
    for path in sorted(Path(out, "rollouts").glob("step_*.json"))[-STEPS:]:
        step = json.loads(path.read_text(encoding="utf-8"))
        groups = [f"<h2><pre>{shown(group['question'])}</pre> answer: {shown(group['answer'])}</h2>"
                  f"<table>{''.join(map(rollout, group['rollouts']))}</table>" for group in step["groups"]]
        steps.append(f"<details><summary>step {step['step']}</summary>{''.join(groups)}</details>")
    if steps:
        steps[-1] = steps[-1].replace("<details>", "<details open>", 1)
    said = (f"Underlined: clipped. Shown are the newest {STEPS} evaluated steps, and of each the {GROUPS} "
            "groups whose ratios went furthest.")
    page = PAGE % (STYLE, said, "".join(steps))
    write_whole(Path(out, "rollouts.html"), lambda file: file.write(page.encode()))


def show_rollouts(step, tokenizer):
    """Prints the best and the worst rollout of the first group that has different rewards, if one has."""
    rewards, rollouts, texts = step.scores[..., 0], step.rollouts, decode(step.rollouts, tokenizer)
    p = int((rewards.amax(1) > rewards.amin(1)).int().argmax())  # [P, G] -> [P] -> its first 1
    for name, g in (("best", int(rewards[p].argmax())), ("worst", int(rewards[p].argmin()))):
        who = "explorer" if rollouts.from_explorer[p, g] else "learner"
        print(f"  {name}: the {who}'s, reward {rewards[p, g]:g}: {printable(texts[p][g])[-500:]}")
    problem = step.problems[p]
    print(f"  of the question {problem.question[:500]!r}, whose answer is {problem.answer!r}")


# ---- curves ------------------------------------------------------------------------------------------------

def new_figure(panels):
    """(figure, axes), or None with a note where matplotlib is missing: only the pictures need it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: pip install matplotlib draws it", file=sys.stderr)
        return None
    figure = Figure(figsize=(5.2 * panels, 3.8), layout="constrained")
    return figure, figure.subplots(1, panels)


def plot_curves(axis, curves, title, crossing=None, styles=None):
    """Draws pass@k curves, {name: values at k = 1, 2, 4, ..}, and where the second overtakes the first."""
    for name, values in curves.items():
        ks = [2 ** i for i in range(len(values))]
        axis.plot(ks, values, marker="o", markersize=4, label=name, **(styles or {}).get(name, {}))
    if crossing:
        axis.axvline(crossing, color="grey", linestyle=":", label=f"crossover at k = {crossing:.1f}")
    axis.set(xscale="log", xlabel="k", ylabel="pass@k", ylim=(0, 1.02), title=title)
    axis.set_xticks(ks, [str(k) for k in ks])
    axis.minorticks_off()
    axis.legend(fontsize=9)


def draw(out, history, crossing):
    """Writes out/curve.png: pass@k before and after, and the learning curve over the explorer's share, with
    the 95% interval of each evaluation. Plain GRPO's is beside it, where there is such a run."""
    evals = [line for line in history if "eval_curve" in line]
    if (figure := new_figure(2 if evals else 1)) is None:
        return
    figure, axes = figure
    left, right = np.atleast_1d(axes)[[0, -1]]
    if evals:
        last = f"learner, step {evals[-1]['step']}"
        curves = {"learner before": evals[0]["eval_curve"], "explorer": evals[0].get("explorer_curve"),
                  last: evals[-1]["eval_curve"]}
        styles = {"learner before": dict(color=LEARNER, linestyle="--"), "explorer": dict(color=EXPLORER),
                  last: dict(color=LEARNER)}
        curves = {name: curve for name, curve in curves.items() if curve}
        plot_curves(left, curves, "pass@k, held out", crossing, styles)
    steps = [line for line in history if line["step"] > 0]
    x, share, reward = ([line[name] for line in steps] for name in ("step", "share", "reward"))
    right.fill_between(x, share, step="mid", alpha=0.2, color=EXPLORER, linewidth=0, label="explorer's share")
    right.plot(x, reward, color="black", linewidth=0.8, label="reward in training")
    for run, name, color in ((plain_grpo(out), "plain GRPO", GRPO), (history, "held out", LEARNER)):
        evals = [line for line in run if "eval_interval" in line]
        x, at_1 = [line["step"] for line in evals], [line["eval_curve"][0] for line in evals]
        if evals:
            right.fill_between(x, *zip(*(line["eval_interval"] for line in evals)), alpha=0.15, color=color,
                               linewidth=0)
            right.plot(x, at_1, "o-", markersize=4, color=color, label=f"{name}, pass@1")
    right.set(xlabel="step", ylim=(0, 1.02), title="training")
    right.legend(fontsize=9)
    figure.savefig(out / "curve.png", dpi=130)


def plain_grpo(out):
    """Metrics of a run beside this one that has no explorer, no other loop, and else no difference; or []."""
    def experiment(path):
        settings = json.loads((path / "config.json").read_text())
        who = settings["hash_of_explorer"], settings["recipe"]
        explorers = {name for name in settings if "explorer" in name}
        explorers |= {"schedule", "mix_steps", "off_policy", "recipe"}
        return settings | dict.fromkeys(FREE | explorers), who
    for path in sorted(out.parent.glob("*")):  # none, if that directory may not be listed
        try:
            if path != out and experiment(path) == (experiment(out)[0], (None, None)):
                return [json.loads(line) for line in open(path / "metrics.jsonl")]
        except (OSError, ValueError, LookupError, TypeError):
            continue  # no run, or one that is broken: this is only for a picture
    return []
