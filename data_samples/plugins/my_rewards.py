"""Two rewards of your own: copy this file, change it, and name it with --external_plugins my_rewards.py."""


def two_sentences(completions, **columns):
    "1 for an answer of at most two sentences, 0.5 for three, else 0. TRL's form: columns hold what is known of each row."
    values = []
    for completion in completions:
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        sentences = sum(part.strip() != "" for part in text.replace("!", ".").replace("?", ".").split("."))
        values.append(1.0 if sentences <= 2 else 0.5 if sentences == 3 else 0.0)
    return values


def same_first_letter(responses, references):
    "1 when the answer's last word begins like the truth. The other form: texts, and the truths beside them."
    last = [text.split()[-1] if text.split() else "" for text in responses]
    return [float(word[:1].lower() == str(truth)[:1].lower()) for word, truth in zip(last, references)]
