"""Checks of trl_s2lpo.py: TRL's trainer runs our Algorithm 1.

    pip install trl==1.16.0 && pytest recipes/test_trl.py
"""
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("trl", reason="it needs TRL: pip install trl==1.16.0")
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback

from anneal import explorer_share, split_group
from grpo import Objective, update
from plumbing.checkpoint import hf_weights, load
from plumbing.text import decode
from recipes import trl_s2lpo as recipe
from plumbing.problems import load_problems, save_problems
from reward import Problem, Score
from sample import Rollouts
from test_all import ROOT, hf_pair, seeded

P, G, M, T_MIX = 4, 5, 2, 3  # prompts a step, rollouts a prompt, updates a step, mixing steps


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """flags(out, *more): four short steps with random models, who write all sorts of texts."""
    home = tmp_path_factory.mktemp("models")
    hf_pair("qwen3", home / "learner", vocab_size=32)
    hf_pair("qwen3", home / "explorer", vocab_size=32, num_hidden_layers=1)
    save_problems([Problem(f"Bfa4839{i:02}=", "2", "habit") for i in range(40)], home / "data.jsonl")
    return lambda out, *more: [str(flag) for flag in (
        "--learner", home / "learner", "--explorer", home / "explorer", "--data", home / "data.jsonl",
        "--out", out, "--steps", 4, "--mix-steps", T_MIX, "--prompts-per-step", P, "--group-size", G,
        "--minibatches", M, "--max-new-tokens", 6, "--lr", 1e-3, "--per_device_train_batch_size", 5,
        "--disable_tqdm", True, *more)]


def varied(problem, text):
    """A reward that random models get, and now and then."""
    return Score(sum(c.isdigit() for c in text) % 3 / 2, False, False)


def train(flags, prepare=lambda trainer: None):
    """(trainer after training, its rounds of sampling: who wrote what, in which step). `prepare` may change
    the trainer first."""
    rounds, generate = [], recipe.GRPOTrainer._generate_single_turn

    def by_learner(self, prompts, *more):
        rows, logps = generate(self, prompts, *more)
        rounds[-1]["learner"] += zip(prompts, rows)
        return rows, logps

    def by_explorer(prompts, n, generator):
        rollouts = explore(prompts, n, generator)
        rounds[-1]["explorer"] += [(prompt, ids[:n].tolist()) for prompt, *group in
                                   zip(prompts, rollouts.ids, rollouts.lengths) for ids, n in zip(*group)]
        return rollouts

    def by_both(prompts, *more):
        rounds.append({"step": trainer.state.global_step // M + 1, "training": trainer.model.training,
                       "explorer": [], "learner": []})
        rows, logps = both(prompts, *more)
        rounds[-1]["group"] = list(zip(prompts, rows))
        return rows, logps

    with (patch.object(recipe.GRPOTrainer, "_generate_single_turn", by_learner),
          patch.object(recipe, "score", varied)):
        args, config = recipe.parse_flags(flags)
        trainer = recipe.open_trainer(args, config)
        explore, trainer.explore = trainer.explore, by_explorer
        both, trainer._generate_single_turn = trainer._generate_single_turn, by_both
        prepare(trainer)
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
        trainer.save_model()
    return trainer, json.loads(json.dumps(rounds))  # tuples become lists, as they come from other processes


def launch(flags, *launcher):
    """The rounds of two processes, each trained as in `train`."""
    out = Path(flags[flags.index("--out") + 1])
    command = [sys.executable, "-m", *launcher, "-m", "recipes.test_trl", *flags]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
                          text=True, timeout=90)
    assert not done.returncode, done.stderr[-3000:]
    return [json.loads((out / f"rounds-{rank}.json").read_text()) for rank in range(2)]


def check_groups(processes):
    """The rounds of each process: every group holds the split's rollouts, the explorer's first."""
    for step in range(1, 5):
        rounds = [line for part in processes for line in part if line["training"] and line["step"] == step]
        n_explorer, n_learner = split_group(explorer_share(step, T_MIX), G)
        prompts = []
        for line in rounds:
            assert len(line["group"]) == P * G // len(processes)
            for start in range(0, len(line["group"]), G):
                group, place = line["group"][start:start + G], start // G
                assert group == (line["explorer"][n_explorer * place:][:n_explorer]
                                 + line["learner"][n_learner * place:][:n_learner])
                prompts += {tuple(prompt) for prompt, _ in group}
        assert len(rounds) == len(processes) and len(prompts) == len(set(prompts)) == P


def test_groups_are_split_by_the_schedule_and_an_evaluation_is_the_learners(flags, tmp_path):
    """A share counted by updates anneals M times too fast; an explorer in evaluations is measured with it."""
    trainer, rounds = train(flags(tmp_path, "--eval-data", flags(tmp_path)[5]))
    check_groups([rounds])
    evaluations = [line for line in rounds if not line["training"]]
    assert evaluations and all(line["learner"] and not line["explorer"] for line in evaluations)
    log = [line for line in trainer.state.log_history if "explorer_share" in line]
    assert [line["explorer_share"] for line in log] == pytest.approx([1, 0.6, 0, 0])
    assert ["reward_explorer" in line for line in log] == [True, True, False, False]
    assert ["reward_learner" in line for line in log] == [False, True, True, True]


def test_several_updates_by_the_same_rollouts_are_one_step_of_the_schedule(flags, tmp_path):
    """--num_iterations 2 moved it two steps a batch: the explorer was gone in half the time."""
    trainer, rounds = train(flags(tmp_path, "--num_iterations", 2, "--minibatches", 1, "--steps", 3))
    log = [line for line in trainer.state.log_history if "explorer_share" in line]
    assert [line["explorer_share"] for line in log] == pytest.approx([1, 0.6, 0]) and len(rounds) == 3
    assert trainer.state.global_step == 3 * 2


@pytest.fixture(scope="module")
def two_processes(flags, tmp_path_factory):
    """(the rounds of two processes, where they saved the learner)."""
    out = tmp_path_factory.mktemp("two")
    return launch(flags(out), "torch.distributed.run", "--nproc_per_node", "2"), out


def test_two_processes_hold_whole_groups_of_different_prompts(two_processes):
    check_groups(two_processes[0])


def test_fsdp2_trains_as_two_whole_copies_do(flags, two_processes, tmp_path):
    """With sharded weights a process that samples alone would wait for ever, and the test's time runs out."""
    rounds = launch(flags(tmp_path), "accelerate.commands.launch", "--config_file",
                    Path(__file__).with_name("fsdp2.yaml"), "--num_processes", "2", "--mixed_precision", "no")
    assert rounds == two_processes[0] and (tmp_path / "sharded-0").exists()
    ours, theirs = (load_file(out / "model.safetensors") for out in (tmp_path, two_processes[1]))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])
def test_an_update_has_the_loss_and_gradient_of_train_py(loss, flags, tmp_path):
    """Step 2, of mixed groups; with --lr 0, so that both begin at the same weights."""
    losses, gradients, watch = [], {}, TrainerCallback()
    watch.on_pre_optimizer_step = lambda *_, model, **more: gradients.update(
        {name: p.grad.clone() for name, p in model.named_parameters()})
    source = flags(tmp_path)[1]
    (learner, tokenizer, _), (reference, *_) = load(source), load(source)
    for p in reference.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=seeded())

    def prepare(trainer):
        compute = trainer.compute_loss
        trainer.compute_loss = lambda *given, **more: losses.append(compute(*given, **more)) or losses[-1]
        trainer.ref_model.load_state_dict(hf_weights(reference))
        trainer.add_callback(watch)
    _, rounds = train(flags(tmp_path, "--lr", 0, "--steps", 2, "--minibatches", 1, "--temperature", 0.7,
                            "--kl-coef", 0.1, "--loss", loss, "--max_grad_norm", 0), prepare)

    prompts, rows = zip(*rounds[-1]["group"])
    lengths = torch.tensor([len(row) for row in rows]).view(P, G)
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).view(P, G, -1)
    from_explorer = (torch.arange(G) < 3).expand(P, G)
    rollouts = Rollouts(ids, lengths, torch.zeros(ids.shape), lengths < 6, from_explorer)
    texts = decode(rollouts, tokenizer)
    rewards = torch.tensor([[varied(None, text).reward for text in group] for group in texts])
    A = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    still = SimpleNamespace(accumulate=lambda: None, step=lambda max_norm, loss: 0.0)
    objective = Objective(loss=loss, kl_coef=0.1, temperature=0.7, max_new_tokens=6)
    metrics, _ = update(learner, reference, still, prompts[::G], rollouts, A, objective, seeded())
    for p in learner.parameters():
        p.data = p.grad
    assert len(rounds[-1]["explorer"]) == 3 * P and metrics["kl"] > 0.01
    assert abs(sum(losses[-P:]).item() - metrics["loss"]) < 1e-5
    torch.testing.assert_close(gradients, dict(hf_weights(learner)), rtol=1e-5, atol=1e-5)


def test_a_killed_run_goes_on_where_it_was(flags, tmp_path):
    """Steps counted anew would hand the groups to the explorer once more. A checkpoint inside a step would
    sample in the middle of the next one."""
    def kill(trainer):
        compute = trainer.compute_loss

        def deadly(*given, **more):
            if trainer.state.global_step == M + 1:  # in step 2, with one of its two updates made
                raise KeyboardInterrupt
            return compute(*given, **more)
        trainer.compute_loss = deadly
    _, unbroken = train(flags(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        train(flags(tmp_path / "run", "--save-every", 1), kill)
    trainer, rounds = train(["--out", str(tmp_path / "run"), "--resume"])
    assert [line["step"] for line in rounds] == [2, 3, 4] and rounds == unbroken[1:]
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_resumed_run_is_the_experiment_it_began_as(flags, tmp_path, capsys):
    """With more steps T_mix was computed anew and the explorer came back; another explorer temperature was
    taken without a word. A checkpoint cut short has no trainer_state.json, a copied one an older step."""
    home, resumed = tmp_path / "run", ["--out", str(tmp_path / "run"), "--resume"]
    recipe.open_trainer(*recipe.parse_flags(flags(home, "--mix-steps", 0, "--hub_token", "secret")))
    assert "secret" not in (home / "settings.json").read_text()
    assert recipe.parse_flags(resumed)[1].resume_from_checkpoint is None  # killed before its first checkpoint
    for name, step in (("4", 4), ("10", 10), ("4-best", 4), ("12", None)):
        (home / f"checkpoint-{name}").mkdir()
        if step:
            (home / f"checkpoint-{name}/trainer_state.json").write_text(json.dumps({"global_step": step}))
    args, config = recipe.parse_flags([*resumed, "--steps", "9", "--rollout-rows", "8", "--save-every", "2"])
    assert (args.mix_steps, config.max_steps, config.num_generations, args.rollout_rows) == (2, 9 * M, G, 8)
    assert config.resume_from_checkpoint == str(home / "checkpoint-10")
    for wrong, complaint in (([*resumed, "--explorer-temperature", "0.7"], "temperature 1.0 -> 0.7"),
                             ([*resumed, "--lr", "1"], "learning_rate 0.001 -> 1.0"),
                             ([*resumed, "--weight_decay", "0.1"], "weight_decay 0.0 -> 0.1"),
                             ([*resumed, "--mix-steps", "4"], "mix_steps 2 -> 4"),
                             (["--out", str(tmp_path / "none"), "--resume"], "none holds no run to resume"),
                             (flags(home), "holds a run: --resume")):
        with pytest.raises(SystemExit):
            recipe.parse_flags(wrong)
        assert complaint in capsys.readouterr().err


def test_problems_too_long_for_either_model_are_left_out(flags, tmp_path, capsys):
    """One such prompt ended the run in the step that it came in."""
    hf_pair("qwen3", tmp_path / "explorer", vocab_size=32, num_hidden_layers=1, max_position_embeddings=32)
    path, long = tmp_path / "data.jsonl", [Problem("1" * n, "2", "instructed") for n in (27, 60)]
    save_problems([*load_problems(flags(tmp_path)[5]), *long], path)
    for explorer, room, left_out in (("none", 64, 1), (tmp_path / "explorer", 32, 2)):
        given = flags(tmp_path / str(room), "--data", path, "--eval-data", path, "--explorer", explorer)
        trainer = recipe.open_trainer(*recipe.parse_flags(given))
        assert len(trainer.train_dataset) == len(trainer.eval_dataset) == 42 - left_out
        said = f"{left_out} of 42 problems left out: too long for a context of {room}"
        assert said in capsys.readouterr().out


def test_log_probs_of_vllm_weigh_the_learners_tokens_alone(flags, tmp_path):
    """By the explorer's own log-probs TRL would weigh its rollouts towards 0."""
    generate, seen = recipe.GRPOTrainer._generate_single_turn, []

    def vllm(self, *given):
        self.use_vllm = False
        rows, _ = generate(self, *given)
        self.use_vllm = True
        return rows, [[-1.0] * len(row) for row in rows]

    def prepare(trainer):
        trainer.use_vllm, compute = True, trainer.compute_loss
        trainer.compute_loss = lambda model, x, **more: seen.append(x) or compute(model, x, **more)
    with patch.object(recipe.GRPOTrainer, "_generate_single_turn", vllm):
        train(flags(tmp_path, "--steps", 2, "--vllm_importance_sampling_mode", "token_truncate"), prepare)
    for step, n_explorer in ((1, G), (2, 3)):
        rows = [row for inputs in seen[(step - 1) * P:step * P]
                for row in zip(inputs["sampling_per_token_logps"], inputs["importance_sampling_ratio"])]
        explored = [weights for logps, weights in rows if logps[0].isnan()]
        assert len(explored) == n_explorer * P and all((weights == 1).all() for weights in explored)
        assert all((weights != 1).any() for logps, weights in rows if not logps[0].isnan())


def test_flags_have_train_pys_names_and_counts_are_checked(flags, tmp_path, monkeypatch, capsys):
    args, config = recipe.parse_flags(flags(tmp_path, "--kl-coef", 0.25, "--clip-high", 0.3, "--mix-steps", 0,
                                            "--loss", "dr_grpo"))
    assert (config.num_generations, config.max_completion_length, config.learning_rate) == (G, 6, 1e-3)
    assert (config.beta, config.epsilon_high, args.mix_steps, config.max_steps) == (0.25, 0.3, 2, 4 * M)
    assert config.loss_type == "dr_grpo" and config.lr_scheduler_type == "constant"
    for processes, group, complaint in (("3", 6, "4 prompts do not go into 3 processes"),
                                        ("1", 5, "20 rows into 2 x 4")):
        monkeypatch.setenv("WORLD_SIZE", processes)
        with pytest.raises(SystemExit):
            recipe.parse_flags(flags(tmp_path, "--group-size", group, "--per_device_train_batch_size", 4))
        assert complaint in capsys.readouterr().err


def test_paper_8gpus_flags_are_known(monkeypatch):
    """TRL renames flags, and nobody here can run that script."""
    script = Path(__file__).with_name("paper-8gpu.sh").read_text().replace("\\\n", " ")
    words = shlex.split(re.search(r"-m recipes.trl_s2lpo (.*) \"\$@\"", script)[1])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    args, config = recipe.parse_flags(words)
    assert (args.mix_steps, args.minibatches, config.max_steps, config.loss_type) == (8, 32, 16 * 32, "dapo")
    assert config.use_vllm and not config.vllm_importance_sampling_correction and config.delta == 3


def test_flags_that_the_recipe_computes_are_refused(flags, tmp_path, capsys):
    """They were overwritten without a word. --eval-data evaluated nothing without --eval_strategy."""
    for flag, instead in (
            ("--max_steps", "--steps"), ("--num-train-epochs", "--steps"), ("--save_steps", "--save-every"),
            ("--save_strategy", "--save-every"), ("--eval_steps", "--eval-every"),
            ("--gradient_accumulation_steps", "--minibatches"), ("--logging_steps", "--minibatches"),
            ("--steps_per_generation", "--prompts-per-step"), ("--resume_from_checkpoint", "--resume"),
            ("--generation_batch_size", "--prompts-per-step")):
        with pytest.raises(SystemExit):
            recipe.parse_flags(flags(tmp_path, flag, "steps" if "strategy" in flag else 1))
        assert capsys.readouterr().err.endswith(f"{flag[2:].replace('-', '_')} follows from {instead}\n")
    _, config = recipe.parse_flags(flags(tmp_path, "--eval-data", "x.jsonl"))
    assert (config.eval_strategy, config.eval_steps) == ("steps", 4 * M)
    _, config = recipe.parse_flags(flags(tmp_path, "--eval-data", "x.jsonl", "--eval-every", 2))
    assert config.eval_steps == 2 * M


def test_both_models_stop_at_the_stop_tokens_of_either(flags, tmp_path):
    """Else a base learner learns to write an instruct explorer's stop token, and does not stop there."""
    hf_pair("qwen3", stops := tmp_path / "stops", vocab_size=32)
    (stops / "generation_config.json").write_text('{"eos_token_id": [0, 5]}')
    trainer = recipe.open_trainer(*recipe.parse_flags(flags(tmp_path / "run", "--explorer", stops)))
    assert {0, 5} <= {*trainer.eos_token_ids} == {*trainer.generation_config.eos_token_id}
    assert trainer.explore.keywords["stops"] == tuple(trainer.eos_token_ids)


def test_a_pool_explores_and_a_stop_text_ends_whoever_wrote_it(flags, tmp_path, capsys):
    """TRL has no place for generations made elsewhere within a group, and trains on what follows a text."""
    problems, tokenizer = load_problems(flags(tmp_path)[5]), load(flags(tmp_path)[1])[1]
    record = lambda problem, i: json.dumps({"prompt_ids": tokenizer(problem.question).input_ids,
                                            "response_ids": tokenizer(f"{i}9{i}").input_ids + [0],
                                            "small_model_log_probs": None}) + "\n"
    pool = tmp_path / "pool.jsonl"
    pool.write_text("".join(record(problem, i) for problem in problems[3:] for i in range(G)))
    _, rounds = train(flags(tmp_path / "run", "--explorer", pool, "--stop", "9"))
    assert "3 of 40 problems left out" in capsys.readouterr().out  # the pool has none of theirs
    first, second, *_ = rounds
    said = [tokenizer.decode(row) for _, row in first["group"]]
    assert said == [f"{i}9" for _ in range(P) for i in range(G)]  # all by the pool, all cut behind the 9
    written = [tokenizer.decode(row) for _, row in second["learner"]]
    kept = [tokenizer.decode(row) for i, (_, row) in enumerate(second["group"]) if i % G >= 3]
    assert kept == [re.match("[^9]*9?", text)[0] for text in written] != written


def test_the_bare_answer_to_an_exact_prompt_is_rewarded(flags, tmp_path):
    """`Answer:` stands in the prompt. Forgotten, no rollout of a few-shot prompt ever earned anything."""
    few = tmp_path / "few.jsonl"
    save_problems([Problem(f"{i}+1? Answer:", str(i + 1), exact=True) for i in range(8)], few)
    trainer = recipe.open_trainer(*recipe.parse_flags(flags(tmp_path / "run", "--data", few)))
    columns, answer = trainer.train_dataset[:2], trainer.processing_class("1").input_ids
    assert columns["prompt"] == ["0+1? Answer:", "1+1? Answer:"]
    assert trainer.reward_funcs[0](completion_ids=[answer] * 2, log_metric=print, **columns) == [1.0, 0.0]


def test_what_the_user_can_mend_is_said_in_one_line(flags, tmp_path, monkeypatch, capsys):
    bad, other = tmp_path / "bad", tmp_path / "other"
    hf_pair("qwen3", other, vocab_size=32)
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text().replace('"~"', '"!"'))
    hf_pair("qwen3", bad, vocab_size=32)
    next(bad.glob("*.safetensors")).write_bytes(b"torn")
    (tmp_path / "data.jsonl").write_text('{"question": "1"}')
    (tmp_path / "few.jsonl").write_text('{"question": "1", "answer": "1", "task": "instructed"}')
    for *wrong, complaint in (
            ("--explorer", other, "differ in tokens"), ("--explorer", "", "missing"),
            ("--explorer", "no where", "no where cannot be loaded"),
            ("--learner", "no where", "no where cannot be loaded"), ("--learner", bad, "deserializing"),
            ("--data", tmp_path / "none", "no such file"), ("--data", tmp_path / "data.jsonl", "line 1"),
            ("--data", tmp_path / "few.jsonl", "1 problems are left"), ("--max-new-tokens", 60, "0 problems"),
            ("--group-size", 1, "--per_device_train_batch_size", 1, "at least 2 generations"),
            ("--minibatches", 0, "out of range"), ("--explorer-top-p", 2, "out of range"),
            ("--explorer-temperature", "nan", "out of range"), ("--steps", "x", "invalid int"),
            ("--nonsense", 1, "unrecognized")):
        monkeypatch.setattr(sys, "argv", ["trl_s2lpo.py", *flags(tmp_path / "run", *wrong)])
        with pytest.raises(SystemExit) as stop:
            recipe.main()
        *_, line = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and line.startswith("trl_s2lpo.py: error: ") and complaint in line, line
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit):
        runpy.run_path(recipe.__file__)
    assert "pip install trl==1.16.0" in capsys.readouterr().err


@pytest.mark.parametrize("error, code, said", [
    (KeyboardInterrupt(), 130, ""), (OSError("No space left on device"), 2, "error: No space"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), 3, "lower --rollout-rows")])
def test_what_ends_a_run_is_said_in_one_line_too(error, code, said, flags, tmp_path, monkeypatch, capsys):
    """A scheduler that reads exit codes starts again what a retry helps, and nothing else."""
    def train(self, **more):
        raise error
    monkeypatch.setattr(recipe.S2LPOTrainer, "train", train)
    monkeypatch.setattr(sys, "argv", ["trl_s2lpo.py", *flags(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        recipe.main()
    assert stop.value.code == code and said in capsys.readouterr().err


def shard_on_cpus():
    """accelerate 1.15 hands FSDP's settings on for devices of every kind but CPUs (AcceleratorState leaves
    MULTI_CPU out), though torch shards on CPUs too, over gloo."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState
    make = AcceleratorState.__init__

    def with_fsdp(self, *given, fsdp_plugin=None, **more):
        make(self, *given, fsdp_plugin=fsdp_plugin, **more)
        if fsdp_plugin:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState.__init__ = with_fsdp


if __name__ == "__main__":  # one of `launch`'s processes
    if os.environ.get("ACCELERATE_USE_FSDP"):
        shard_on_cpus()
    trainer, rounds = train(sys.argv[1:])
    rank, out = os.environ["RANK"], Path(trainer.args.output_dir)
    (out / f"rounds-{rank}.json").write_text(json.dumps(rounds))
    if type(next(trainer.model.parameters())).__name__ == "DTensor":
        (out / f"sharded-{rank}").touch()
