"""Published data sets and layouts -> JSONL with `question`, `answer` and `task`, which train.py reads.

    python -m recipes.data gsm8k --out data/gsm8k.jsonl                a name of HUB, downloaded
    python -m recipes.data somewhere/math.parquet --out data/math.jsonl
    python -m recipes.data gsm8k math:2000 --out data/both.jsonl       a mixture: 2,000 problems of the second

Reads JSONL, JSON arrays, CSV and parquet, a file or a directory of them, in the layouts that docs/data.md
shows. It leaves out and counts problems that come again and those whose answers no response can match, such
as proofs. Other fields of a record are not kept.
"""
import argparse
import csv
import difflib
import io
import json
import random
import re
from fnmatch import fnmatch
from pathlib import Path

from plumbing.problems import as_problem, matchable, save_problems

HUB = {  # name: data set on the Hugging Face hub, and which of its files
    "gsm8k": ("openai/gsm8k", "main/train*"), "gsm8k-test": ("openai/gsm8k", "main/test*"),
    "math": ("DigitalLearningGmbH/MATH-lighteval", "data/train*"),
    "math500": ("HuggingFaceH4/MATH-500", "test.jsonl"),
    "dapo-math-17k": ("BytedTsinghua-SIA/DAPO-Math-17k", "data/*.parquet"),
    "aime24": ("HuggingFaceH4/aime_2024", "data/train*"), "aime25": ("math-ai/aime25", "test.jsonl"),
    "olympiadbench": ("Hothan/OlympiadBench", "*OE_TO_maths_en_COMP*.parquet"),
    "commonsenseqa": ("tau/commonsense_qa", "data/validation*")}
READ = (".jsonl", ".json", ".csv", ".parquet")


def download(name):
    """The files of a name of HUB, kept in the hub's cache."""
    from huggingface_hub import snapshot_download  # comes with transformers
    repository, pattern = HUB[name]
    try:
        folder = Path(snapshot_download(repository, repo_type="dataset", allow_patterns=pattern))
    except Exception as error:  # a lost connection, a gated repository: the hub says which
        why = " ".join(str(error).split())
        raise ValueError(f"{name} cannot be downloaded: {why:.200}. Or give the path of {pattern} of "
                         f"https://huggingface.co/datasets/{repository}") from error
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
        raise ValueError(f"{source} holds {', '.join(sorted(kinds)) or 'nothing'}, and read are "
                         f"{', '.join(READ)}")
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
    if path.suffix == ".csv":
        return csv.DictReader(io.StringIO(text, newline=""))
    if text.lstrip().startswith("["):
        return json.loads(text)
    return text.split("\n")  # not splitlines: U+2028 in a text ends no line


def unified(record):
    """{question, answer, task} of a record in any known layout. ValueError says what it has instead."""
    try:
        if "choices" in record:  # CommonsenseQA
            choices = zip(record["choices"]["label"], record["choices"]["text"])
            question = "\n".join([record["question"], *(f"{label}. {text}" for label, text in choices)])
            return {"question": question, "answer": record["answerKey"], "task": "choice"}
        question = said(next(record[name] for name in ("question", "problem", "prompt") if name in record))
        names = ("completion", "answer", "final_answer", "label", "solution")
        answers = [record[name] for name in names if name in record]
        if "ground_truth" in (record.get("reward_model") or ()):  # verl's
            answers.insert(0, record["reward_model"]["ground_truth"])
        answer = said(next((answer for answer in answers if answer is not None), answers[0]))
        answer = ", ".join(filter(None, answer)) if isinstance(answer, list) else answer  # OlympiadBench
        asks = record.get("prompt") and re.search(r"answer:|\\boxed|####", question, re.IGNORECASE)
        return {"question": question, "answer": answer,
                "task": record.get("task", "instructed" if asks else "math")}
    except (KeyError, TypeError, IndexError, AttributeError, StopIteration):
        found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"no known layout but {found}: rename fields to `question` and `answer`") from None


def said(x):
    """The text of a chat's last message, behind its system's. Other things as they are. ValueError for a chat
    of several turns."""
    if not (isinstance(x, list) and x and isinstance(x[0], dict)):
        return x
    *before, last = x
    if any(message["role"] != "system" for message in before):
        raise ValueError("a chat of several turns: only one question with one answer can be trained on")
    return "\n\n".join(message["content"] for message in x)


def read_all(source, exact):
    """({Problem: None} of a name, a file or a directory, how many records that were). SOURCE:COUNT takes so
    many problems of it, by chance. ValueError or OSError in one line."""
    name, _, least = source.rpartition(":")
    name, size = (name, int(least)) if name and least.isdigit() else (source, None)
    problems, count = {}, 0
    for path in files_of(name):
        number = 0
        try:
            for number, record in enumerate(records(path), 1):
                if record and not str(record).isspace():
                    record = json.loads(record) if isinstance(record, str) else record
                    problems[as_problem(record if exact else unified(record))] = None
                    count += 1
        except ValueError as error:  # of pyarrow too
            raise ValueError(f"{path}, record {number}: {error}") from error
        print(f"read {path}")
    kept = matchable(problems, name)
    if size is not None and size > len(kept):
        raise ValueError(f"{source}: there are only {len(kept)} problems")
    return dict.fromkeys(random.Random(0).sample(kept, size) if size else kept), count


def convert(sources, out, exact=False):
    """Writes `out`, which must not be there. `exact`: records are as train.py reads them. ValueError or
    OSError in one line."""
    problems, count, out = {}, 0, Path(out)
    if out.exists():
        raise ValueError(f"{out} is there already")
    for source in sources:
        more, records = read_all(source, exact)
        problems, count = problems | more, count + records
    out.parent.mkdir(parents=True, exist_ok=True)
    save_problems(problems, out)
    print(f"{out}: {len(problems):,} problems of {count:,} records")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Convert published data sets to JSONL.")
    parser.add_argument("source", nargs="+",
                        help=f"a file, a directory, or one of {', '.join(HUB)}; SOURCE:COUNT: so many of it")
    parser.add_argument("--exact", action="store_true",
                        help="fields are as train.py reads them: a `prompt` is given exactly, not asked")
    parser.add_argument("--out", required=True, help="JSONL to write")
    args = parser.parse_args(argv)
    try:
        convert(args.source, args.out, args.exact)
    except (ValueError, OSError) as error:
        parser.exit(2, f"data.py: error: {' '.join(str(error).split())}\n")


if __name__ == "__main__":
    main()
