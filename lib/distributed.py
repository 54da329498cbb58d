"""Several processes that train one model, and what ends them early."""


class Preempted(Exception):
    """The run was asked to end, wrote a checkpoint and can be resumed."""
