"""A pool from any engine: texts that vLLM, an API or a bigger teacher wrote, as an explorer's rollouts.

    python -m recipes.pool_import TEXTS.jsonl --tokenizer LEARNER --data train.jsonl --out pool.jsonl
    python train.py --learner LEARNER --explorer pool.jsonl --data train.jsonl

A line of TEXTS holds one problem's responses, in one of three layouts:

    {"question": .., "responses": [text, ..]}     or `prompt`: as in the problems of --data
    {"prompt": .., "outputs": [{"text": .., "finish_reason": "length"}, ..]}      vLLM's RequestOutput
    {"custom_id": "7", "response": {"body": {"choices": [..]}}}    OpenAI's batches, vLLM's run_batch: the id
                                                  ends with the number of the line in --data, from 0 on

Write at least --group-size responses to a problem: at step 1 the explorer writes whole groups. A response
that ended gets the token that ends a turn; one whose finish_reason is "length" was cut. With --stop in
training leave the stop text at the responses' ends. Nobody knows the log-probabilities of the tokens, so
`--off-policy behaviour`, `truncated` and `geometric` refuse this pool.
"""
import argparse
import collections
import hashlib
import json
import re
from pathlib import Path

from plumbing.checkpoint import directory_of
from plumbing.files import write_whole
from plumbing.problems import as_problem, load_problems
from plumbing.terminal import one_line
from plumbing.text import encode_all, turn_ends
from reward import score


def responses_of(record, numbers):
    """(number of the problem or None, [(text, whether it ended)]) of a line. numbers: {question, whole
    prompt, or line in --data: number}."""
    asked = record.get("question", record.get("prompt"))
    if "custom_id" in record:
        number = re.search(r"(\d+)$", record["custom_id"])
        choices = ((record["response"] or {}).get("body") or {}).get("choices") or []
        pairs = [(choice["message"]["content"], choice.get("finish_reason")) for choice in choices]
        pairs = [(text, why) for text, why in pairs if text]
        return number and numbers.get(int(number[1])), [(text, why != "length") for text, why in pairs]
    if "outputs" in record:
        pairs = [(output["text"], output.get("finish_reason")) for output in record["outputs"]]
        return numbers.get(asked), [(text, why != "length") for text, why in pairs]
    return numbers.get(asked), [(text, True) for text in record["responses"]]


def convert(args):
    """Writes args.out and its settings. ValueError names the line that cannot be used."""
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(directory_of(args.tokenizer), trust_remote_code=False)
    if not (ends := (turn_ends(tokenizer) or {tokenizer.eos_token_id}) - {None}):
        raise ValueError(f"{args.tokenizer} has no token that ends a response")
    problems = load_problems(args.data)
    prompts = encode_all(problems, tokenizer, args.thinking)
    numbers = {tokenizer.decode(prompt): i for i, prompt in enumerate(prompts)}
    numbers |= {problem.question: i for i, problem in enumerate(problems)}
    for i, line in enumerate(open(args.data, encoding="utf-8-sig")):  # with those left out
        numbers[i] = numbers.get(as_problem(json.loads(line)).question) if line.strip() else None
    lines, found, unmatched, rewards = [], collections.Counter(), 0, 0.0
    for place, line in enumerate(open(args.texts, encoding="utf-8-sig"), 1):
        if not line.strip():
            continue
        try:
            number, responses = responses_of(json.loads(line), numbers)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{args.texts}, line {place}: in none of the layouts: {error!r:.200}") from error
        if number is None:
            unmatched += 1
            continue
        for text, ended in responses:
            # A text is data: a control token that it spells out must not become one.
            ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
            if not (ids or ended):
                continue
            worth = score(problems[number], text)
            found[number], rewards = found[number] + 1, rewards + worth.reward
            lines.append(json.dumps({
                "prompt_id": number, "prompt": problems[number].question, "prompt_ids": prompts[number],
                "response": text, "response_ids": ids + [min(ends)] * ended, "small_model_log_probs": None,
                "reward": worth.reward, "is_correct": worth.strict, "data_source": args.data,
                "ground_truth": problems[number].answer}))
    if not lines:
        raise ValueError(f"{args.texts}: no line answers a problem of {args.data}")
    settings = {"model": args.texts, "stops": sorted(ends), "log_probs": False, "thinking": args.thinking,
                "prompts": hashlib.sha256(str(prompts).encode()).hexdigest()}
    note = Path(args.out + ".settings.json")
    write_whole(note, lambda file: file.write(json.dumps(settings, indent=1).encode()))
    write_whole(Path(args.out), lambda file: file.write(("\n".join(lines) + "\n").encode()))
    print(f"{args.out}: {len(lines):,} rollouts of {len(found):,} of {len(problems):,} problems, mean reward "
          f"{rewards / len(lines):.3f}, before any --stop cuts them; {unmatched:,} lines "
          f"answer no problem of {args.data}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", help="JSONL in one of the three layouts above")
    parser.add_argument("--tokenizer", required=True, help="the learner: a directory or a hub name")
    parser.add_argument("--data", required=True, help="problems: JSONL as train.py's --data")
    parser.add_argument("--thinking", choices=("on", "off"), help="as train.py's")
    parser.add_argument("--out", required=True, help="JSONL to write")
    args = parser.parse_args(argv)
    with one_line("pool_import.py"):
        convert(args)


if __name__ == "__main__":
    main()
