"""Text to tokens and back: prompts as a model wants them, responses as a reader and the scorer want them."""


def encode(text, tokenizer, chat=True, thinking=None):
    """Token ids of a prompt. With `chat`, a tokeniser that has a chat template applies it, told to think
    ("on") or not ("off") where it can be, as Qwen3's. The template already holds the BOS token; exactly one
    is wanted, and no EOS at the end. ValueError if the template, a small program that comes with the
    checkpoint, fails."""
    if not chat or not tokenizer.chat_template:
        ids = tokenizer(text).input_ids
        return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids  # some end every text so
    options = {} if thinking is None else {"enable_thinking": thinking == "on"}
    message = [{"role": "user", "content": text.rstrip("\n")}]
    try:
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, **options)
    except Exception as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{tokenizer.name_or_path}: its chat template fails: {why:.200}") from error
    return tokenizer(text, add_special_tokens=False).input_ids


def encode_all(problems, tokenizer, thinking=None):
    """Token ids of each problem's prompt: text for a chat model, or a whole prompt as it stands."""
    return [encode(problem.prompt, tokenizer, problem.in_words, thinking) for problem in problems]


def decode(rollouts, tokenizer):
    """[P][G] texts, special tokens left out."""
    return [[tokenizer.decode(ids[:length], skip_special_tokens=True) for ids, length in zip(*group)]
            for group in zip(rollouts.ids.tolist(), rollouts.lengths.tolist())]  # they cross once


def pieces(ids, tokenizer):
    """The text of each token, as a part of the whole: decoded alone, a token of SentencePiece loses the space
    before it, and a character of several tokens is none. Such a character goes to the last of its tokens."""
    texts, start, shown = [], 0, ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end])
        whole = end == len(ids) or not text.endswith("\N{REPLACEMENT CHARACTER}")
        texts.append(text[len(shown):] if whole else "")
        if whole:  # go on from the token before this one: decoding all of it anew would take squared time
            start, shown = end - 1, tokenizer.decode(ids[end - 1:end])
    return texts


def printable(text):
    """With what does not print spelled out: a model's escape sequence is no command to the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
