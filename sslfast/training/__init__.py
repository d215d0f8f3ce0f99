"""The small kit that the training methods share: data, optimizers, checkpoints and logs."""


class UserError(Exception):
    """A mistake that the person at the keyboard can mend: the command line prints the message without a traceback."""
