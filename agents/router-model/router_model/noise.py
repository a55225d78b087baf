"""What people do to sentences: capitals, punctuation, typing errors, lost words."""

ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")  # neighbours on the keyboard


def capital(text):
    """The sentence with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def tidy(text, rng):
    """The sentence as a careful person writes it."""
    out = capital(text) if rng.random() < 0.6 else text
    if not out.endswith((".", "?", "!", ")")) and rng.random() < 0.4:
        out += "."
    return out


def disturb(text, rng):
    """The sentence as a careless person types it."""
    words = text.split(" ")
    if len(words) > 5 and rng.random() < 0.15:
        del words[rng.randrange(len(words))]
    for _ in range(1 + rng.randrange(2)):
        at = rng.randrange(len(words))
        if len(words[at]) >= 4:
            words[at] = _mistype(words[at], rng)
    out = " ".join(words)
    case = rng.randrange(10)
    if case == 0:
        out = out.upper()
    elif case < 4:
        out = capital(out)
    end = rng.randrange(8)
    if end == 0:
        out += "!!"
    elif end == 1:
        out += " ..."
    elif end == 2:
        out = out.rstrip(".?")
    elif end == 3:
        out += " "
    elif end == 4:
        out = out.replace(",", "")
    return out or text


def _mistype(word, rng):
    """One word of at least four letters with one typing error."""
    letters = list(word)
    at = 1 + rng.randrange(len(letters) - 2)
    how = rng.randrange(4)
    if how == 0:
        letters[at], letters[at + 1] = letters[at + 1], letters[at]
    elif how == 1:
        del letters[at]
    elif how == 2:
        letters.insert(at, letters[at])
    else:
        row = next((r for r in ROWS if letters[at] in r), letters[at])
        near = row.index(letters[at]) + rng.choice((-1, 1))
        if 0 <= near < len(row):
            letters[at] = row[near]
    return "".join(letters)


def gibberish(rng):
    """Letters that mean nothing."""
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    return " ".join("".join(rng.choices(alphabet, k=rng.randint(2, 10))) for _ in range(rng.randint(1, 5)))
