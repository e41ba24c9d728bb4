"""What the user did or gave that cannot work, said in one sentence."""


class UserError(Exception):
    """The command line prints it on one line and exits with code 2; nothing is left half-written."""


def one_line(message: object) -> str:
    """A message as one line that a terminal shows and does not obey: control characters are escaped."""
    return printable(" ".join(str(message).split("\n")))


def printable(text: str) -> str:
    """Text with everything escaped that is neither seen nor a space or line end: control and direction characters."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


class InvariantError(UserError):
    """Something that must hold by construction (the first ratio is 1, the KL to itself is 0) does not."""
