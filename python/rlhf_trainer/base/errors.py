"""What the user did or gave that cannot work, said in one sentence."""


class UserError(Exception):
    """The command line prints it on one line and exits with code 2; nothing is left half-written."""


class InvariantError(UserError):
    """Something that must hold by construction (the first ratio is 1, the KL to itself is 0) does not."""
