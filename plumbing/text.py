"""Text to tokens and back: prompts as a model wants them, responses as a reader and the scorer want them."""
from bisect import bisect_left
from datetime import datetime

# Some chat templates print today's date. It is fixed here, so that prompts stay the same within a run, and
# between a pool and its learner. transformers hands no function to a template: a macro hides the clock.
DATE, CODES = datetime(2024, 7, 26), "%d %-d %b %B %m %Y %y %a %A".split()
CLOCK = "".join(f" | replace('{code}', '{DATE.strftime(code)}')" for code in CODES)
CLOCK = "{%- macro strftime_now(format) -%}{{ format" + CLOCK + " }}{%- endmacro -%}"
USER = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands for the user's text while a template is rendered


def encode(text, tokenizer, chat=True, thinking=None):
    """Token ids of a prompt. With `chat`, a tokeniser that has a chat template applies it, told to think
    ("on") or not ("off") where it can be, as Qwen3's. The template already holds the BOS token; exactly one
    is wanted, and no EOS at the end. A control token that is spelled out in the user's text stays text.
    ValueError if the template, a small program that comes with the checkpoint, fails."""
    if not chat or not tokenizer.chat_template:
        ids = tokenizer(text).input_ids
        return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids  # some end every text so
    tokens = lambda text, **more: tokenizer(text, add_special_tokens=False, **more).input_ids
    text = text.rstrip("\n")
    if not any(token in text for token in tokenizer.get_added_vocab()):
        return tokens(render(tokenizer, text, thinking))
    before, _, after = render(tokenizer, USER, thinking).partition(USER)
    return tokens(before) + tokens(text, split_special_tokens=True) + tokens(after)


def render(tokenizer, text, thinking=None, answer=None):
    """The chat template's text of a user's turn, up to where the assistant begins, or with its answer."""
    messages = [{"role": "user", "content": text}]
    messages += [{"role": "assistant", "content": answer}] if answer else []
    options = {} if thinking is None else {"enable_thinking": thinking == "on"}
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=CLOCK + tokenizer.get_chat_template(), tokenize=False,
            add_generation_prompt=not answer, date_string=DATE.strftime("%d %b %Y"), **options)
    except Exception as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{tokenizer.name_or_path}: its chat template fails: {why:.200}") from error


def turn_ends(tokenizer):
    """Ids of the control token, if there is one, with which a chat template ends the assistant's turn. A base
    model's EOS is often another: without this one it would write on and invent the user's next turn."""
    if not tokenizer.chat_template:
        return set()
    tail = render(tokenizer, "?", answer=USER).rpartition(USER)[2]
    first = tokenizer(tail, add_special_tokens=False).input_ids[:1]
    return {*first} & {*tokenizer.get_added_vocab().values()}


def encode_all(problems, tokenizer, thinking=None):
    """Token ids of each problem's prompt: asked through the chat template, or exactly as it is written."""
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


def stop_texts(texts, tokenizer):
    """until(ids): how many of a response's tokens it takes to say one of these texts, or None if it does not
    say any. A text may begin or end within a token. None without texts."""
    texts = [text.replace("\\n", "\n") for text in texts]  # as one types it
    says = lambda ids: any(text in tokenizer.decode(ids, skip_special_tokens=True) for text in texts)

    def until(ids):
        return 1 + bisect_left(range(1, len(ids)), True, key=lambda n: says(ids[:n])) if says(ids) else None
    return until if texts else None


def cut(rollouts, until):
    """Ends each rollout where it first says a stop text: until(ids) is the number of tokens that takes, or
    None. What came after it is gone, and is not trained on."""
    lengths, finished = rollouts.lengths.tolist(), rollouts.finished.tolist()  # [P][G]: they cross once
    for ids, ends, done in zip(rollouts.ids.tolist(), lengths, finished):
        for g, length in enumerate(ends):
            if end := until(ids[g][:length]):
                ends[g], done[g] = end, True
    rollouts.lengths, rollouts.finished = (old.new_tensor(new) for old, new in (
        (rollouts.lengths, lengths), (rollouts.finished, finished)))
    rollouts.ids = rollouts.ids.masked_fill(~rollouts.mask, 0)
    rollouts.logps = rollouts.logps.masked_fill(~rollouts.mask, 0.0)
    return rollouts


def printable(text):
    """With what does not print spelled out: a model's escape sequence is no command to the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
