"""Published data sets and layouts -> JSONL with `question`, `answer` and `task`, which train.py reads.

    python -m recipes.data gsm8k --out data/gsm8k.jsonl                a name of HUB, downloaded
    python -m recipes.data somewhere/math.parquet --out data/math.jsonl

Reads JSONL, JSON arrays and parquet, a file or a directory of them, in the layouts of GSM8K, MATH,
OlympiadBench, CommonsenseQA, DAPO-Math-17k and prompt/completion. It leaves out and counts problems that come
again and those whose answers no response can match, such as proofs. Other fields of a record are not kept.
"""
import argparse
import difflib
import json
import re
from fnmatch import fnmatch
from pathlib import Path

from reward import as_problem, matchable, save_problems

HUB = {  # name: data set on the Hugging Face hub, and which of its files
    "gsm8k": ("openai/gsm8k", "main/train*"), "gsm8k-test": ("openai/gsm8k", "main/test*"),
    "math": ("DigitalLearningGmbH/MATH-lighteval", "data/train*"),
    "math500": ("HuggingFaceH4/MATH-500", "test.jsonl"),
    "dapo-math-17k": ("BytedTsinghua-SIA/DAPO-Math-17k", "data/*.parquet"),
    "aime24": ("HuggingFaceH4/aime_2024", "data/train*"), "aime25": ("math-ai/aime25", "test.jsonl"),
    "olympiadbench": ("Hothan/OlympiadBench", "*OE_TO_maths_en_COMP*.parquet"),
    "commonsenseqa": ("tau/commonsense_qa", "data/validation*")}
READ = (".jsonl", ".json", ".parquet")


def download(name):
    """The files of a name of HUB, kept in the hub's cache."""
    from huggingface_hub import snapshot_download  # comes with transformers
    repository, pattern = HUB[name]
    try:
        folder = Path(snapshot_download(repository, repo_type="dataset", allow_patterns=pattern))
    except Exception as error:  # whatever a lost connection raises
        raise ValueError(f"{name} cannot be downloaded ({type(error).__name__}): give the path of {pattern} "
                         f"of https://huggingface.co/datasets/{repository}") from error
    # The same folder holds what was downloaded by other patterns: the test set, say.
    return sorted(path for path in folder.rglob("*") if fnmatch(path.relative_to(folder).as_posix(), pattern))


def files_of(source):
    """Paths of a name's, a file's or a directory's files. ValueError says what was found and what to type."""
    path = Path(source)
    if not path.exists():
        if source in HUB:
            return download(source)
        meant = difflib.get_close_matches(source, HUB, 1) or [f"a name of {', '.join(HUB)}"]
        raise ValueError(f"{source} is no file, no directory and no known data set: did you mean {meant[0]}?")
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    kinds = {file.suffix for file in files}
    if ".arrow" in kinds:
        split = "['train']" if (path / "dataset_dict.json").exists() else ""
        raise ValueError(f"{source} is of save_to_disk: python -c \"from datasets import load_from_disk; "
                         f"load_from_disk('{source}'){split}.to_json('data.jsonl')\" makes JSONL of it")
    found = [file for file in files if file.suffix in READ]
    splits = {match[1] for file in found if (match := re.search("(?<![a-z])(train|test|val|dev)", file.stem))}
    if len(splits) > 1:
        raise ValueError(f"{source} holds {' and '.join(sorted(splits))} files: give the path of one of them")
    if not found:
        csv = [f": python -c \"import pandas; pandas.read_csv('{file}').to_json('data.jsonl', "
               "orient='records', lines=True)\" makes JSONL of it" for file in files if file.suffix == ".csv"]
        raise ValueError(f"{source} holds {', '.join(sorted(kinds)) or 'nothing'}, and read are "
                         f"{', '.join(READ)}{''.join(csv[:1])}")
    return found


def records(path):
    """The records of a file: dictionaries, or lines that hold one each."""
    if path.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError:
            raise ValueError("`pip install pyarrow` reads parquet") from None
        return (record for batch in parquet.ParquetFile(path).iter_batches() for record in batch.to_pylist())
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        return json.loads(text)
    return text.split("\n")  # not splitlines: U+2028 in a text ends no line


def unified(record):
    """{question, answer, task} of a record in any known layout. ValueError says what it has instead."""
    said = lambda x: x[-1]["content"] if isinstance(x, list) else x  # the last message of a chat
    try:
        if "choices" in record:  # CommonsenseQA
            choices = zip(record["choices"]["label"], record["choices"]["text"])
            question = "\n".join([record["question"], *(f"{label}. {text}" for label, text in choices)])
            return {"question": question, "answer": record["answerKey"], "task": "choice"}
        if "completion" in record:
            question, answer, task = said(record["prompt"]), said(record["completion"]), "math"
        elif "prompt" in record:  # DAPO-Math-17k in both its layouts; the question says how to answer
            question, task = said(record["prompt"]), "instructed"
            answer = record["label"] if "label" in record else record["reward_model"]["ground_truth"]
        else:
            question, task = record["question"] if "question" in record else record["problem"], "math"
            answers = [record[name] for name in ("answer", "final_answer", "solution") if name in record]
            answer = next((answer for answer in answers if answer is not None), answers[0])
        answer = ", ".join(filter(None, answer)) if isinstance(answer, list) else answer  # OlympiadBench
        return {"question": question, "answer": answer, "task": record.get("task", task)}
    except (KeyError, TypeError, IndexError, AttributeError):
        found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"no known layout but {found}: rename fields to `question` and `answer`") from None


def convert(source, out):
    """Writes `out`, which must not be there. ValueError or OSError in one line."""
    problems, count, out = {}, 0, Path(out)
    if out.exists():
        raise ValueError(f"{out} is there already")
    for path in files_of(source):
        number = 0
        try:
            for number, record in enumerate(records(path), 1):
                if record and not str(record).isspace():
                    record = json.loads(record) if isinstance(record, str) else record
                    problems[as_problem(unified(record))] = None
                    count += 1
        except ValueError as error:  # of pyarrow too
            raise ValueError(f"{path}, record {number}: {error}") from error
        print(f"read {path}")
    kept = matchable(problems, source)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_problems(kept, out)
    print(f"{out}: {len(kept):,} problems of {count:,} records; {count - len(problems):,} came again")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Convert a published data set to JSONL.")
    parser.add_argument("source", help=f"a file, a directory, or one of {', '.join(HUB)}")
    parser.add_argument("--out", required=True, help="JSONL to write")
    args = parser.parse_args(argv)
    try:
        convert(args.source, args.out)
    except (ValueError, OSError) as error:
        parser.exit(2, f"data.py: error: {' '.join(str(error).split())}\n")


if __name__ == "__main__":
    main()
